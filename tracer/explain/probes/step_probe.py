"""A probe of reasoning steps: fitted on right and wrong steps, since probes of statements transfer poorly to these."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import numpy as np
from numpy.typing import NDArray

from tracer.errors import InputError
from tracer.explain.probes.calibration import fit_calibration
from tracer.explain.probes.examples import Examples, Flags, Floats, Normalisation, normalise
from tracer.explain.probes.fit import fit
from tracer.explain.probes.metrics import auroc, measure
from tracer.explain.probes.places import POSITIONS, Position
from tracer.explain.probes.probe import Probe
from tracer.explain.probes.saved import STEPS, ProbeRecord, SavedProbe, Training, mark
from tracer.explain.probes.statements import Indices
from tracer.explain.probes.step_chains import OPERATIONS, Chain, StepExample, chains, fingerprint, perturbed
from tracer.explain.probes.step_features import LOGPROBS, StepFeatures, on_policy, step_features
from tracer.explain.probes.transfer import Reader, measure_baselines, read_steps, step_worth
from tracer.replay.forward import check_cancel
from tracer.replay.model import Replica, identity_of
from tracer.trace.probe_report import HeldOut, StepWorth

KIND = "logistic_l2"
PROBLEMS = 80
"""Problems to learn from, three to five steps each; about a minute of work for the demo model."""
TEST_PROBLEMS = 60
"""Problems to judge by."""
NORMALISATION: Normalisation = "rms"
_FOLDS = 3
_FEWEST = 10
"""Problems with a right step, and with a wrong one, below which nothing is judged."""
_TEST_SEED = 1_000_003
"""Added to the seed for problems to judge by."""
ON_POLICY = "the model's own results behind right steps of unseen problems"

Progress = Callable[[str, int, int], None]
"""Called with the stage, units done and their total."""


@dataclass(frozen=True, slots=True)
class _Choice:
    """Where a probe reads best, and what it says there about problems that it did not learn from."""

    position: Position
    layer: int
    scores: Floats


def train_step_probe(
    replica: Replica,
    *,
    problems: int = PROBLEMS,
    test_problems: int = TEST_PROBLEMS,
    seed: int = 0,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> SavedProbe:
    """Fit a probe on right and wrong steps, and judge it on other problems.

    Every step comes as it should be and with a wrong result: the model's own where it errs, else a made-up one. Layer
    and token are chosen, and the calibration is fitted, by leaving out groups of the problems that it learns from.

    Args:
        replica: The model, with its tokenizer.
        problems: Problems to learn from.
        test_problems: Problems to judge by.
        seed: For everything drawn at random.
        progress: Told how far the work is.
        cancel: Ends the work between two passes or fits.

    Raises:
        InputError: The replica has no tokenizer, there are too few problems, or the model makes no mistake in them.
        CancelledError: ``cancel`` was set.
        EngineUnavailableError: Memory ran out.
    """
    learnt = chains(problems, seed=seed)
    features = _features(
        replica, _hard(replica, learnt, seed, cancel), "reading right and wrong steps", progress, cancel
    )
    choice = _choose(features, seed, progress, cancel)
    examples = _examples(features, choice.position, choice.layer)
    probe = fit(KIND, examples, seed=seed).rescaled(examples.values)
    shuffled = examples.with_labels(np.random.default_rng(seed).permutation(examples.labels))
    test = held_out_chains(test_problems, seed=seed, apart_from=learnt)
    layers = [choice.layer]
    made_up = _features(replica, perturbed(test, seed=seed), "reading held-out steps", progress, cancel, layers)
    own = own_steps(replica, test, layers, progress=progress, cancel=cancel)
    worth = None
    if own is not None:
        scores = probe.score(_examples(own, choice.position, choice.layer).values)
        worth = step_worth(own, scores, name=STEPS, steps=ON_POLICY, seed=seed)
    record = ProbeRecord(
        name=STEPS,
        kind=KIND,
        model=identity_of(replica),
        layer=choice.layer,
        position=choice.position,
        normalisation=NORMALISATION,
        training=Training(
            sha256=fingerprint(features.examples),
            rows=len(features.labels),
            topics=OPERATIONS,
            source="tracer's own chains of arithmetic and logic",
            texts=tuple(sorted({mark(example.step.text) for example in features.examples})),
        ),
        seed=seed,
        held_out=_held_out(probe, fit(KIND, shuffled, seed=seed), made_up, choice, seed),
        on_steps=worth,
        median_norm=median_norm(features.hidden[choice.position][:, features.layers.index(choice.layer)]),
        calibration=fit_calibration(choice.scores, features.labels, features.problems, seed=seed),
        notes={**dict(probe.notes), "likelier_than_right": _likelier(features)},
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return SavedProbe(record, probe)


def measure_on_steps(
    replica: Replica,
    probes: Sequence[SavedProbe],
    *,
    test: Sequence[Chain] | None = None,
    test_problems: int = TEST_PROBLEMS,
    seed: int = 0,
    ask: bool = False,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> dict[str, StepWorth | None]:
    """What probes are worth on steps that the model wrote itself, by name of the probe.

    Args:
        replica: The model.
        probes: Its probes.
        test: Problems that had no part in them; new ones if not given.
        test_problems: How many new ones.
        seed: For everything drawn at random.
        ask: Whether to ask the model too whether each step is true, as one more baseline.
        progress: Told how far the work is.
        cancel: Ends the work between two passes.

    Returns:
        ``None`` for all where the model was nearly always right or nearly always wrong.

    Raises:
        InputError: The replica has no tokenizer.
        CancelledError: ``cancel`` was set.
        EngineUnavailableError: Memory ran out.
    """
    chosen = held_out_chains(test_problems, seed=seed) if test is None else test
    layers = sorted({probe.record.layer for probe in probes})
    features = own_steps(replica, chosen, layers, ask=ask, progress=progress, cancel=cancel)
    if features is None:
        return dict.fromkeys(probe.record.name for probe in probes)
    baselines = measure_baselines(features, seed=seed)
    return {
        probe.record.name: step_worth(
            features,
            read_steps(features, Reader.of(probe)),
            name=probe.record.name,
            steps=ON_POLICY,
            baselines=baselines,
            seed=seed,
        )
        for probe in probes
    }


def held_out_chains(count: int, *, seed: int = 0, apart_from: Sequence[Chain] = ()) -> list[Chain]:
    """Problems to judge by, none of which was learnt from.

    Args:
        count: At most so many.
        seed: Decides them.
        apart_from: Problems that were learnt from.
    """
    known = {chain.problem for chain in apart_from}
    return [chain for chain in chains(count, seed=seed + _TEST_SEED) if chain.problem not in known]


def median_norm(values: NDArray[np.float32]) -> float:
    """Usual length of hidden states ``(rows, width)``."""
    return float(np.median(np.linalg.norm(values, axis=-1)))


def _hard(replica: Replica, learnt: Sequence[Chain], seed: int, cancel: threading.Event | None) -> list[StepExample]:
    """Right and wrong versions of every step; a wrong one is the model's own where it errs."""
    own = {(item.problem, item.position): item for item in on_policy(replica, learnt, cancel=cancel) if not item.label}
    made_up = perturbed(learnt, seed=seed)
    return [item if item.label else own.get((item.problem, item.position), item) for item in made_up]


def own_steps(
    replica: Replica,
    test: Sequence[Chain],
    layers: Sequence[int],
    *,
    ask: bool = False,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> StepFeatures | None:
    """Steps with the model's own results.

    Args:
        replica: The model.
        test: Verified chains.
        layers: Layers to read.
        ask: Whether to ask the model too whether each step is true.
        progress: Told how far the work is.
        cancel: Ends the work between two passes.

    Returns:
        ``None`` where too few problems have a right step, or too few a wrong one.

    Raises:
        InputError: The replica has no tokenizer.
        CancelledError: ``cancel`` was set.
        EngineUnavailableError: Memory ran out.
    """
    own = on_policy(replica, test, cancel=cancel)
    wrong = [example.problem for example in own if not example.label]
    right = [example.problem for example in own if example.label]
    if min(len(set(wrong)), len(set(right))) < _FEWEST:
        return None
    return _features(replica, own, "reading the model's own steps", progress, cancel, layers, ask=ask)


def _features(
    replica: Replica,
    examples: Sequence[StepExample],
    stage: str,
    progress: Progress | None,
    cancel: threading.Event | None,
    layers: Sequence[int] | None = None,
    *,
    ask: bool = False,
) -> StepFeatures:
    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(stage, done, total)

    return step_features(replica, examples, layers=layers, ask=ask, progress=report, cancel=cancel)


def _choose(features: StepFeatures, seed: int, progress: Progress | None, cancel: threading.Event | None) -> _Choice:
    """Layer and token with the best mean AUROC on groups of problems that were left out."""
    folds = np.random.default_rng(seed).permutation(max(features.problems) + 1) % _FOLDS
    own = folds[np.array(features.problems)]
    best: tuple[float, _Choice] | None = None
    places = [(position, layer) for position in POSITIONS for layer in features.layers]
    for number, (position, layer) in enumerate(places):
        check_cancel(cancel)
        scores = _left_out(_examples(features, position, layer), own, seed)
        area = np.mean([auroc(scores[own == fold], features.labels[own == fold]) or 0.0 for fold in range(_FOLDS)])
        if best is None or area > best[0]:
            best = float(area), _Choice(position, layer, scores)
        if progress is not None:
            progress("choosing a layer", number + 1, len(places))
    if best is None:
        raise InputError("there is no layer to read; name at least one")
    return best[1]


def _left_out(examples: Examples, folds: Indices, seed: int) -> Floats:
    """Scores by probes that learnt from other problems, ``(steps,)``."""
    scores = np.full(len(examples.labels), np.nan)
    for fold in range(_FOLDS):
        test, rest = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        if not len(test):
            continue
        learnt = examples.take(rest)
        scores[test] = fit(KIND, learnt, seed=seed).rescaled(learnt.values).score(examples.values[test])
    return scores


def _examples(features: StepFeatures, position: Position, layer: int) -> Examples:
    values = normalise(features.hidden[position][:, features.layers.index(layer)], NORMALISATION)
    operations = [OPERATIONS.index(example.step.operation) for example in features.examples]
    rows = len(features.labels)
    no: Flags = np.zeros(rows, dtype=np.bool_)
    return Examples(values, features.labels, no, np.array(operations, dtype=np.int64), np.full(rows, -1))


def _held_out(probe: Probe, shuffled: Probe, features: StepFeatures, choice: _Choice, seed: int) -> HeldOut:
    values = _examples(features, choice.position, choice.layer).values
    labels, problems = features.labels, features.problems
    judged = partial(measure, labels=labels, clusters=problems, seed=seed)
    scores = probe.score(values)
    random = values.astype(np.float64) @ np.random.default_rng(seed).standard_normal(values.shape[-1])
    kinds = np.array([example.step.operation for example in features.examples])
    return HeldOut(
        protocol=(
            f"{len(set(problems))} problems that had no part in it: every step as it should be and with a made-up "
            "wrong result; interval over problems"
        ),
        overall=judged(STEPS, scores),
        parts=tuple(
            measure(name, scores[own], labels[own], [problems[row] for row in np.flatnonzero(own)], seed=seed)
            for name in OPERATIONS
            if (own := kinds == name).any()
        ),
        baselines=measure_baselines(features, seed=seed),
        controls=(
            judged("shuffled labels", shuffled.score(values)),
            judged("random direction", random - np.median(random)),
        ),
    )


def _likelier(features: StepFeatures) -> float:
    """Share of wrong results to learn from that the model finds likelier than the right ones."""
    logprobs = features.baselines[LOGPROBS[0]]
    right = dict(zip(_places(features, True), logprobs[features.labels], strict=True))
    wrong = dict(zip(_places(features, False), logprobs[~features.labels], strict=True))
    return float(np.mean([wrong[place] > right[place] for place in wrong])) if wrong else 0.0


def _places(features: StepFeatures, label: bool) -> list[tuple[int, int]]:
    return [(item.problem, item.position) for item in features.examples if item.label == label]
