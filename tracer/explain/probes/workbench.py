"""Making the probes of a model and judging them: what `tracer probe train` and `tracer probe evaluate` do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from pydantic import JsonValue

from tracer.engines.loading import fast_dtype
from tracer.engines.weights.cache import cache_dir
from tracer.errors import StoreError
from tracer.explain.probes.activations import extract
from tracer.explain.probes.evaluate import METHODS
from tracer.explain.probes.evaluate import evaluate as evaluate_statements
from tracer.explain.probes.examples import Normalisation
from tracer.explain.probes.first_error import LIMIT, MISTAKES, first_errors, read_mistakes
from tracer.explain.probes.held_out import Material, Watch, by_what, choice_fits, choose_layers, topic_folds
from tracer.explain.probes.saved import STATEMENTS, STEPS, SavedProbe, probe_path
from tracer.explain.probes.statement_files import read
from tracer.explain.probes.statements import Statement, generate
from tracer.explain.probes.step_evaluation import evaluate_steps, statement_readers
from tracer.explain.probes.step_probe import PROBLEMS, TEST_PROBLEMS, train_step_probe
from tracer.explain.probes.train import FACTS_PER_TOPIC, KIND, PREFIX, train
from tracer.explain.probes.transfer import Reader
from tracer.explain.probes.unseen_steps import PROBLEMS as UNSEEN_PROBLEMS
from tracer.explain.probes.unseen_steps import UnseenSteps, own_steps, read_unseen, unseen_chains, with_worth
from tracer.explain.report import Progress, Stage
from tracer.replay.model import Replica, identity_of
from tracer.store.probe_reports import read_report, report_path, write_report
from tracer.trace.probe_report import Evaluation, FirstErrors, ProbeReport, ProbeSummary, StepEvaluation

ProbeName = Literal["statements", "steps"]
PROBES: tuple[ProbeName, ...] = get_args(ProbeName)
"""Probes that can be made."""
SectionName = Literal["statements", "steps", "mistakes"]
SECTIONS: tuple[SectionName, ...] = get_args(SectionName)
"""Parts of an evaluation."""
OWN = "tracer's own statements"
EVALUATED_PER_TOPIC = 40
"""Facts of each topic in an evaluation, where no data are given."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is looked at in an evaluation.

    Args:
        per_topic: Facts of each topic, four statements each, where no data are given.
        repeats: Draws of training rows.
        problems: Problems whose steps are judged.
        chains: Chains with known mistakes of each task.
    """

    per_topic: int = EVALUATED_PER_TOPIC
    repeats: int = 20
    problems: int = UNSEEN_PROBLEMS
    chains: int = LIMIT


@dataclass(slots=True)
class Workbench:
    """What making and judging the probes of one model share; the model is loaded once, when it is first needed.

    Args:
        model: Name of the model.
        data: A person's own statements, a file or a folder; the generated ones if not given.
        dtype: Precision; ``None`` takes what is fast here.
        prefix: Stands before every statement.
        normalisation: What is done to hidden states first.
        seed: For everything drawn at random.
        progress: Told how far the work is.
        cancel: Ends it.
    """

    model: str
    data: Path | None = None
    dtype: str | None = None
    prefix: str = PREFIX
    normalisation: Normalisation = "rms"
    seed: int = 0
    progress: Progress | None = None
    cancel: threading.Event | None = None
    _replica: Replica | None = field(default=None, init=False)
    _materials: dict[int, Material] = field(default_factory=dict, init=False)
    _step_probe: tuple[SavedProbe, UnseenSteps | None] | None = field(default=None, init=False)

    @property
    def replica(self) -> Replica:
        """The model.

        Raises:
            ModelError: Its weights cannot be had.
            EngineUnavailableError: They do not fit in memory.
        """
        if self._replica is None:
            self._replica = Replica.load(self.model, dtype=self.dtype or fast_dtype(), progress=self.progress)
        return self._replica

    @property
    def identity(self) -> Mapping[str, JsonValue]:
        """The model's identity."""
        return identity_of(self.replica)

    def statements(self, per_topic: int) -> tuple[Statement, ...]:
        """The person's own statements, or generated ones.

        Raises:
            InputError: They cannot be read.
        """
        return generate(seed=self.seed, per_topic=per_topic) if self.data is None else read(self.data)

    def material(self, per_topic: int) -> Material:
        """Statements with their hidden states; what was extracted before is read from the cache.

        Raises:
            InputError: The statements cannot be read.
            CancelledError: ``cancel`` was set.
            EngineUnavailableError: Memory ran out.
            StoreError: The cache cannot be written.
        """
        if per_topic not in self._materials:
            statements = self.statements(per_topic)
            activations = extract(
                self.replica,
                [self.prefix + item.text for item in statements],
                folder=cache_dir() / "activations",
                progress=self._counted("hidden states of statements"),
                cancel=self.cancel,
            )
            self._materials[per_topic] = Material(statements, activations, self.normalisation)
        return self._materials[per_topic]

    def train(
        self,
        names: Sequence[ProbeName] = PROBES,
        *,
        kind: str = KIND,
        per_topic: int = FACTS_PER_TOPIC,
        problems: int = PROBLEMS,
        test_problems: int = TEST_PROBLEMS,
    ) -> list[SavedProbe]:
        """Make probes; each knows what it is worth on steps that the model wrote itself.

        Args:
            names: Which ones.
            kind: Kind of the probe of statements.
            per_topic: Facts of each topic, where no data are given.
            problems: Problems that the probe of steps learns from.
            test_problems: Problems by which probes are judged.

        Raises:
            InputError: The statements or problems do not suffice, or the replica has no tokenizer.
            UnknownNameError: There is no such kind.
            CancelledError: ``cancel`` was set.
            EngineUnavailableError: Memory ran out.
            StoreError: The cache cannot be written.
        """
        found: list[SavedProbe] = []
        if STATEMENTS in names:
            found.append(
                train(
                    self.material(per_topic),
                    identity=self.identity,
                    kind=kind,
                    prefix=self.prefix,
                    source=self._source,
                    seed=self.seed,
                    progress=self._counted("fitting probes"),
                    cancel=self.cancel,
                )
            )
        if STEPS in names:
            step_probe, unseen = train_step_probe(
                self.replica,
                problems=problems,
                test_problems=test_problems,
                seed=self.seed,
                progress=self._stage,
                cancel=self.cancel,
            )
            return [*with_worth(found, unseen.own, seed=self.seed), step_probe]
        layers = [probe.record.layer for probe in found]
        test = unseen_chains(test_problems, seed=self.seed)
        own = own_steps(self.replica, test, layers, progress=self._stage, cancel=self.cancel)
        return with_worth(found, own, seed=self.seed)

    def evaluate(
        self,
        sections: Sequence[SectionName] = SECTIONS,
        *,
        methods: Sequence[str] | None = None,
        layer: int | None = None,
        sizes: Sizes | None = None,
        mistakes: Path = MISTAKES,
        ask: bool = True,
    ) -> ProbeReport:
        """Judge probes of this model on what they have not seen.

        Args:
            sections: Which parts.
            methods: Kinds of probes of statements; those that have a paper if not given.
            layer: The layer that these read; chosen on training topics if not given.
            sizes: How much is looked at.
            mistakes: Folder of chains with known mistakes.
            ask: Whether to ask the model too whether each step is true.

        Raises:
            InputError: The statements, problems or chains cannot be used.
            UnknownNameError: There is no such method or layer.
            CancelledError: ``cancel`` was set.
            EngineUnavailableError: Memory ran out.
            StoreError: The cache cannot be written, or the saved probe is damaged.
        """
        sizes = sizes or Sizes()
        own = METHODS if methods is None else tuple(methods)
        # Before weights are loaded: what cannot be read shall fail at once.
        chains = read_mistakes(mistakes, limit=sizes.chains, seed=self.seed) if "mistakes" in sections else []
        statements: Evaluation | None = None
        if "statements" in sections:
            statements = evaluate_statements(
                self.material(sizes.per_topic),
                model=self.model,
                source=self._source,
                methods=own,
                layer=layer,
                repeats=sizes.repeats,
                seed=self.seed,
                progress=self._counted("fitting probes"),
                cancel=self.cancel,
            )
        steps: StepEvaluation | None = None
        located: FirstErrors | None = None
        if {"steps", "mistakes"} & set(sections):
            material = self.material(sizes.per_topic)
            at = statements.chosen_layer if statements else self._layer(material) if layer is None else layer
            readers = statement_readers(material, own, at, seed=self.seed)
            if "steps" in sections:
                unseen, step_probe = self._unseen([reader.layer for reader in readers], sizes.problems, ask)
                readers = [*readers, Reader.of(step_probe)]
                steps = evaluate_steps(unseen, readers, seed=self.seed)
            if chains:
                readers = readers if steps else [*readers, Reader.of(self._probe_of_steps(sizes.problems, ask)[0])]
                located = first_errors(
                    self.replica,
                    chains,
                    readers,
                    seed=self.seed,
                    progress=self._counted("looking for first wrong steps"),
                    cancel=self.cancel,
                )
        return ProbeReport(
            model=dict(self.identity), created_at=_now(), statements=statements, steps=steps, mistakes=located
        )

    @property
    def _source(self) -> str:
        return OWN if self.data is None else self.data.name

    def _layer(self, material: Material) -> int:
        """The layer that a probe of all topics would read."""
        material, _ = by_what(material, seed=self.seed)
        folds = topic_folds(len(material.topics), seed=self.seed)
        watch = Watch(self._counted("choosing a layer"), self.cancel, choice_fits(material, folds))
        return choose_layers(material, folds, seed=self.seed, watch=watch)[0]

    def _unseen(self, layers: Sequence[int], problems: int, ask: bool) -> tuple[UnseenSteps, SavedProbe]:
        """Steps to judge by, and the probe of steps, which learnt from none of them."""
        probe, unseen = self._probe_of_steps(problems, ask)
        if unseen is None:
            unseen = read_unseen(
                self.replica,
                layers=sorted({*layers, probe.record.layer}),
                problems=problems,
                seed=self.seed,
                learnt=frozenset(probe.record.training.texts),
                ask=ask,
                progress=self._stage,
                cancel=self.cancel,
            )
        return unseen, probe

    def _probe_of_steps(self, problems: int, ask: bool) -> tuple[SavedProbe, UnseenSteps | None]:
        """The saved one, or one that is made for this evaluation, with the steps that judged it."""
        if self._step_probe is None:
            path = probe_path(self.identity, STEPS)
            if path.is_file():
                self._step_probe = SavedProbe.load(path, identity=self.identity), None
            else:
                self._step_probe = train_step_probe(
                    self.replica,
                    test_problems=problems,
                    seed=self.seed,
                    ask=ask,
                    progress=self._stage,
                    cancel=self.cancel,
                )
        return self._step_probe

    def _stage(self, stage: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(Stage(stage, done, total))

    def _counted(self, stage: str) -> Callable[[int, int], None]:
        return lambda done, total: self._stage(stage, done, total)


def keep_probes(probes: Sequence[SavedProbe], identity: Mapping[str, JsonValue]) -> list[Path]:
    """Save a model's probes where `tracer explain` finds them, with a report on them for the app.

    Raises:
        StoreError: They cannot be written.
    """
    paths = [probe_path(identity, probe.record.name) for probe in probes]
    for probe, path in zip(probes, paths, strict=True):
        probe.save(path)
    keep_report(report_path(identity), report_on(probes, identity))
    return paths


def keep_report(path: Path, found: ProbeReport) -> ProbeReport:
    """Put what was found into the report that is kept, in place of the same sections and probes.

    Args:
        path: The report's file; one that is missing or cannot be read is written anew.
        found: What was found; its empty sections leave the kept ones as they are.

    Returns:
        The report as it is kept.

    Raises:
        StoreError: It cannot be written.
    """
    try:
        kept = read_report(path)
    except StoreError:
        kept = ProbeReport()
    names = {probe.name for probe in found.probes}
    merged = ProbeReport(
        model=found.model,
        created_at=found.created_at,
        probes=(*(probe for probe in kept.probes if probe.name not in names), *found.probes),
        statements=found.statements or kept.statements,
        steps=found.steps or kept.steps,
        mistakes=found.mistakes or kept.mistakes,
    )
    write_report(path, merged)
    return merged


def report_on(probes: Sequence[SavedProbe], identity: Mapping[str, JsonValue]) -> ProbeReport:
    """What new probes of a model are worth."""
    return ProbeReport(model=dict(identity), created_at=_now(), probes=tuple(map(_summary, probes)))


def _summary(probe: SavedProbe) -> ProbeSummary:
    record = probe.record
    return ProbeSummary(
        name=record.name,
        kind=record.kind,
        layer=record.layer,
        position=record.position,
        rows=record.training.rows,
        topics=record.training.topics,
        source=record.training.source,
        seed=record.seed,
        held_out=record.held_out,
        on_steps=record.on_steps,
        reliability=record.calibration.reliability,
        created_at=record.created_at,
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
