"""How faithful methods are over many traces, beside each other, beside chance, and beside what they cost.

Measures of single targets say little: a target has few sources. Means over targets come with an interval that is
bootstrapped over traces, for targets of one trace have much in common.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, cast

import numpy as np
from pydantic import JsonValue

from tracer.errors import InputError
from tracer.explain.document import SHARED_WITH
from tracer.explain.estimate import Estimate, estimate
from tracer.explain.faithfulness import Faithfulness, measures_of
from tracer.trace.explanation import Explanation
from tracer.trace.faithfulness import against_random

if TYPE_CHECKING:
    from tracer.explain.report import Progress, Report
    from tracer.explain.service import Trusted
    from tracer.replay.model import Replica
    from tracer.store import Arrays, Store
    from tracer.trace.trace import Trace

CHANCE = "random"
"""The method that knows nothing; it is always on the board."""
DEFAULT_FIELD = (
    "attention",
    "attention_resolvent",
    "attention_rollout_sinkless",
    "two_hop",
    "at2",
    "span",
    "alti",
    "alti_logit",
    "grad_x_input",
    "grad_l2",
    "mirage",
    "leave_one_out",
    "contextcite",
)
"""Methods of every kind that cost no more than some dozens of passes for a target."""


@dataclass(frozen=True, slots=True)
class Standing:
    """One method on the board.

    Args:
        method: Its name.
        parameters: What it ran with.
        targets: Targets that were measured.
        lds: Linear datamodelling score; ``None`` where it is defined for no target.
        top_k_drop: What a target loses without the sources that rank highest, nats.
        deletion: Deletion area against random orders, nats; positive is better than random.
        insertion: Insertion area against random orders, nats; positive is better than random.
        agreement: Rank correlation with the other methods, chance left out.
        z: How far its curves are above those of random orders, in standard deviations, all targets together.
        better_than_random: Whether chance alone would reach that in less than one case in twenty.
        seconds: Time for each target.
        passes: That time in plain forward passes over the target's tokens.
        forward_tokens: Tokens that went through all layers, for each target.
        backward_passes: Backward passes for each target.
        problems: Why it could not run on a trace, by the trace's id.
    """

    method: str
    parameters: Mapping[str, JsonValue]
    targets: int
    lds: Estimate | None
    top_k_drop: Estimate | None
    deletion: Estimate | None
    insertion: Estimate | None
    agreement: Estimate | None
    z: float
    better_than_random: bool
    seconds: float
    passes: float
    forward_tokens: float
    backward_passes: float
    problems: Mapping[str, str] = field(default_factory=dict)

    @property
    def lds_per_pass(self) -> float | None:
        """Mean LDS over what a target costs in forward passes: faithfulness per unit of cost."""
        return None if self.lds is None or self.passes <= 0 else self.lds.mean / self.passes

    def to_document(self) -> dict[str, JsonValue]:
        """Plain data."""
        return {**asdict(self), "lds_per_pass": self.lds_per_pass}


@dataclass(frozen=True, slots=True)
class _Entry:
    """What a method did on one trace."""

    explanation: Explanation
    cost: Mapping[str, JsonValue]
    """Of its own passes; those of the explanation may have been made for other methods too."""
    targets: tuple[str, ...]
    plain_seconds: float
    """Time of a plain forward pass for each target, all targets together."""


@dataclass(slots=True)
class Board:
    """Traces with their explanations, and the methods in the order of the LDS that they reach for their cost."""

    traces: list[Trace]
    standings: list[Standing]


def leaderboard(
    traces: Sequence[Trace],
    *,
    methods: Sequence[str] = DEFAULT_FIELD,
    parameters: Mapping[str, Mapping[str, JsonValue]] | None = None,
    targets: str = "answer",
    replica: Replica | str | None = None,
    dtype: str = "float32",
    seed: int = 0,
    force: bool = False,
    low_memory: bool = False,
    store: Store | None = None,
    arrays: Mapping[str, Arrays] | None = None,
    progress: Progress | None = None,
    interim: Callable[[Board], None] | None = None,
    cancel: threading.Event | None = None,
) -> Board:
    """Run methods on traces, each by itself so that its cost is its own, and measure them all alike.

    What was computed or measured before is taken from the traces or the store.

    Args:
        traces: What to explain.
        methods: Names as in ``tracer methods``; `CHANCE` is added.
        parameters: By method, those that differ from its defaults.
        targets: ``answer`` or ``all``.
        replica: A loaded replica, a model's name, or ``None`` for the one that each trace names.
        dtype: Precision of a replica that is loaded here.
        seed: For everything drawn at random.
        force: Go on where a run has no ids or a replica does not reproduce it; the result is marked.
        low_memory: Recompute instead of keeping.
        store: Keeps the explanations of traces that are in it.
        arrays: By trace id, where token scores go, for traces that are in no store.
        progress: Told how far the work is.
        interim: Given the board of the runs so far after each but the last, for who stops early or cannot wait.
        cancel: Ends the work between two targets.

    Raises:
        InputError: A name or parameter cannot be used, or no method could explain any of the traces.
        ModelError: A replica does not behave like the model that wrote a trace.
        EngineUnavailableError: Memory ran out.
        CancelledError: ``cancel`` was set; what was finished is kept in the store.
        StoreError: The results cannot be kept.
    """
    from tracer.explain.arguments import check_seed, parse_requests

    check_seed(seed)
    names = list(dict.fromkeys([*methods, CHANCE]))
    given = dict(parameters or {})
    parse_requests(names, given)
    if not methods:
        raise InputError("no methods to compare; `tracer methods` lists them")
    if not traces:
        raise InputError("no runs to compare methods on; name some, `tracer list` shows them")
    entries: dict[str, list[_Entry]] = {name: [] for name in names}
    problems: dict[str, dict[str, str]] = {name: {} for name in names}
    explained: list[Trace] = []
    replicas = _Replicas(replica, dtype, progress)
    began = time.monotonic()
    for number, trace in enumerate(traces):
        own = None if progress is None else _of_run(progress, number, len(traces), time.monotonic() - began)
        into = (arrays or {}).get(trace.id)
        report, found, refused = _Contest(
            replicas.of(trace), given, targets, seed, force, low_memory, store, into, own, cancel
        ).run(trace, names)
        explained.append(report)
        for name, entry in found.items():
            entries[name].append(entry)
        for name, reason in refused.items():
            problems[name][trace.id] = reason
        if interim is not None and found and number + 1 < len(traces):
            interim(Board(list(explained), _rank(entries, problems, seed)))
    if not any(entries[name] for name in methods):
        raise InputError(next(iter(problems[names[0]].values())))
    return Board(explained, _rank(entries, problems, seed))


def _of_run(progress: Progress, done: int, total: int, seconds: float) -> Progress:
    """Say with every stage which run it is of, and how long the rest takes if it goes on as it did."""
    from tracer.explain.report import Stage

    left = f", about {_duration(seconds / done * (total - done))} left" if done else ""

    def told(at: object) -> None:
        stage = f"run {done + 1} of {total}{left}: {getattr(at, 'stage', at)}"
        progress(Stage(stage, getattr(at, "done", 0), getattr(at, "total", 0), getattr(at, "unit", "")))

    return told


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


@dataclass(slots=True)
class _Replicas:
    """The replica of each trace; weights are large, so that one is held at a time."""

    given: Replica | str | None
    dtype: str
    progress: Progress | None
    held: tuple[str, Replica] | None = None

    def of(self, trace: Trace) -> Replica:
        from tracer.explain.service import load_replica

        if self.given is not None and not isinstance(self.given, str):
            return self.given
        name = self.given or trace.model.name
        if self.held is None or self.held[0] != name:
            self.held = None
            self.held = (name, load_replica(self.given, trace, self.dtype, self.progress))
        return self.held[1]


@dataclass(frozen=True, slots=True)
class _Contest:
    """All methods on one trace."""

    replica: Replica
    parameters: Mapping[str, Mapping[str, JsonValue]]
    targets: str
    seed: int
    force: bool
    low_memory: bool
    store: Store | None
    arrays: Arrays | None
    progress: Progress | None
    cancel: threading.Event | None

    def run(self, trace: Trace, names: Sequence[str]) -> tuple[Trace, dict[str, _Entry], dict[str, str]]:
        """The explained trace, what each method did on it, and why others could not run."""
        able: list[str] = []
        refused: dict[str, str] = {}
        for name in names:
            try:
                trace = self._explain(trace, [name], "none").trace
                able.append(name)
            except InputError as error:
                refused[name] = str(error)
        if not able:
            return trace, {}, refused
        report = self._explain(trace, able, "all")
        floor = self._plain_seconds(report)
        entries = {
            item.method: _Entry(item, self._own_cost(report.trace, item), report.targets, floor)
            for item in report.explanations
        }
        return report.trace, entries, refused

    def _explain(self, trace: Trace, names: Sequence[str], faithfulness: Trusted) -> Report:
        from tracer.explain.service import explain

        return explain(
            trace,
            methods=names,
            targets=self.targets,
            replica=self.replica,
            parameters={name: self.parameters[name] for name in names if name in self.parameters},
            seed=self.seed,
            probes=(),
            store=self.store,
            arrays=self.arrays,
            faithfulness=faithfulness,
            force=self.force,
            low_memory=self.low_memory,
            progress=self.progress,
            cancel=self.cancel,
        )

    def _own_cost(self, trace: Trace, item: Explanation) -> Mapping[str, JsonValue]:
        """What a method costs by itself: passes that it shared with others are made again for it alone."""
        if SHARED_WITH not in item.cost:
            return item.cost
        alone = replace(self, store=None, arrays=None)
        report = alone._explain(trace.model_copy(update={"explanations": []}), [item.method], "none")
        return report.explanation(item.method).cost

    def _plain_seconds(self, report: Report) -> float:
        """What a plain forward pass over each target's tokens takes, all of them together."""
        from tracer.replay.forward import CHUNK, Wanted, replay
        from tracer.replay.retokenise import recorded_of
        from tracer.replay.tree import build_tree

        recorded = recorded_of(report.trace, self.replica)
        seconds = 0.0
        for name in report.targets:
            target = recorded.target(name)
            ids = recorded.sequences[target.sequence].token_ids[: target.end - 1]
            began = time.perf_counter()
            replay(self.replica, build_tree([ids], longest=CHUNK), Wanted(), cancel=self.cancel)
            seconds += time.perf_counter() - began
        return seconds


def _rank(
    entries: Mapping[str, Sequence[_Entry]], problems: Mapping[str, Mapping[str, str]], seed: int
) -> list[Standing]:
    names = set(entries) - {CHANCE}
    standings = [_standing(name, found, problems[name], names, seed) for name, found in entries.items()]
    return sorted(standings, key=lambda item: -(item.lds_per_pass or float("-inf")))


def _standing(
    method: str, entries: Sequence[_Entry], problems: Mapping[str, str], others: Collection[str], seed: int
) -> Standing:
    measured = [list(_known(entry).values()) for entry in entries]
    flat = [item for group in measured for item in group]
    against = against_random(flat)
    targets = sum(len(entry.explanation.targets) for entry in entries)
    cost = {
        name: sum(float(cast("float", entry.cost.get(name, 0.0))) for entry in entries)
        for name in ("seconds", "forward_tokens", "backward_passes")
    }
    floor = sum(entry.plain_seconds * len(entry.explanation.targets) / len(entry.targets) for entry in entries)

    def mean_of(pick: Callable[[Faithfulness], float | None]) -> Estimate | None:
        return estimate([[value for item in group if (value := pick(item)) is not None] for group in measured], seed)

    return Standing(
        method=method,
        parameters=entries[0].explanation.parameters if entries else {},
        targets=len(flat),
        lds=mean_of(lambda item: item.lds),
        top_k_drop=mean_of(lambda item: item.top_k_drop),
        deletion=mean_of(lambda item: item.deletion),
        insertion=mean_of(lambda item: item.insertion),
        agreement=estimate([_agreements(entry, others) for entry in entries], seed),
        z=against.z,
        better_than_random=against.better,
        seconds=cost["seconds"] / max(targets, 1),
        passes=cost["seconds"] / floor if floor else 0.0,
        forward_tokens=cost["forward_tokens"] / max(targets, 1),
        backward_passes=cost["backward_passes"] / max(targets, 1),
        problems=dict(problems),
    )


def _known(entry: _Entry) -> dict[str, Faithfulness]:
    """Targets that were asked for and could be measured: one with a single source cannot."""
    known = measures_of(entry.explanation)
    return {name: known[name] for name in entry.targets if name in known}


def _agreements(entry: _Entry, others: Collection[str]) -> list[float]:
    """Mean rank correlation with the other methods of the board, for each target."""
    by_target = (entry.explanation.faithfulness or {}).get("agreement")
    if not isinstance(by_target, dict):
        return []
    means: list[float] = []
    for name in _known(entry):
        known = cast("dict[str, float | None]", by_target.get(name, {}))
        values = [value for other, value in known.items() if other in others and value is not None]
        if values:
            means.append(float(np.mean(values)))
    return means
