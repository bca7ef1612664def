"""What is known of a trace beyond what was recorded: readings, how far they can be trusted, truth. Draws nothing.

Everything comes from the trace's own documents, which may have been imported: what cannot be read is left out and
counted, and every text in them is untrusted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from tracer.trace.explanation import Explanation, ExplanationSource, choose_explanations
from tracer.trace.faithfulness import TargetFaithfulness, faithfulness_of
from tracer.trace.probes import SENTENCES, ProbeScore, probe_scores
from tracer.trace.trace import Call, Step, Trace

Numbers = NDArray[np.float64]
Thing = tuple[str, str | int | None]
"""A kind, and the id of a step, the number of a part of the prompt, or nothing."""
GLUE = ("template", "sink")
"""Kinds of sources that say nothing that a person could read: all of one kind are shown as one."""
CONFIDENT = math.log(0.5)
"""Mean log-probability of a token above which a step counts as written without hesitation, nats."""


class Part(NamedTuple):
    """A piece of a prompt that shows no step, such as the exemplar; what several calls show alike is one part."""

    number: int
    """From 1, in the order of the calls."""
    kind: str
    call_id: str
    """The first call that shows it."""
    start: int
    """Its first token in that call's prompt."""
    end: int


class Reading(NamedTuple):
    """What a step read of one thing."""

    kind: str
    step_id: str | None
    """The step that was read."""
    part: int | None
    """Number of the part of the prompt that was read."""
    value: float
    """In the explanation's unit, added up over the thing's tokens."""
    share: float
    """Its absolute value over the sum of all absolute values, the step's own tokens left out."""
    through: float | None
    """The share over all ways through earlier steps; known for the answer only."""


@dataclass(frozen=True, slots=True)
class Trust:
    """How far the scores of a method can be trusted.

    Args:
        worth: What was measured for the step, if it was.
        better: Whether the method is shown to rank better than random on this trace; ``None`` if never measured.
        z: By how many standard deviations, over all measured steps.
        measured: Steps that were measured.
    """

    worth: TargetFaithfulness | None
    better: bool | None
    z: float
    measured: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Table:
    """An explanation by what its sources show, ``(targets, things)``; a target's own tokens count nothing."""

    things: tuple[Thing, ...]
    columns: NDArray[np.int64]
    """The thing of every source."""
    rows: dict[str, int]
    own: list[str]
    """The step that each target is, or is a token of."""
    values: Numbers
    sizes: Numbers
    """Sums of absolute values."""


class Evidence:
    """What explanations and probes say about a trace.

    Args:
        trace: The trace; it must not change.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.steps = {step.id: step for step in trace.steps}
        self.numbers = {step.id: number for number, step in enumerate(trace.steps, 1)}
        self._calls = {call.id: call for call in trace.calls}
        self.parts: tuple[Part, ...]
        self._part_of: dict[tuple[str, int], int]
        self.parts, self._part_of = _find_parts(trace)
        self._explanations, self.unreadable = choose_explanations(trace.explanations)
        self._tables: dict[str, _Table] = {}

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods that the trace was explained with; the one whose scores fit best first."""

        def fit(name: str) -> float:
            measured = faithfulness_of(self._explanations[name])
            known = [item.lds for item in measured.targets.values() if item.lds is not None] if measured else []
            return sum(known) / len(known) if known else -2.0

        return tuple(sorted(self._explanations, key=lambda name: -fit(name)))

    def explanation(self, method: str) -> Explanation:
        """The explanation that stands for a method, one of `methods`."""
        return self._explanations[method]

    @cached_property
    def answers(self) -> tuple[str, ...]:
        """Steps that stand for the final answer: the last answer that the model wrote, or those that it was made of."""
        answers = [step for step in self.trace.steps if step.kind == "answer"]
        if not answers:
            return ()
        last = answers[-1]
        if last.call_id is not None:
            return (last.id,)
        before = {edge.source for edge in self.trace.edges if edge.target == last.id}
        before |= {edge.target for edge in self.trace.edges if edge.source == last.id} | set(last.parents)
        return tuple(step.id for step in self.trace.steps if step.id in before and step.call_id is not None)

    def targets(self, method: str) -> tuple[str, ...]:
        """Steps that a method explains."""
        return tuple(target for target in self.explanation(method).targets if target in self.steps)

    def token_targets(self, method: str, step_id: str) -> dict[int, str]:
        """Single tokens of a step that a method explains: their number in the step, and the target's name."""
        found: dict[int, str] = {}
        for target in self.explanation(method).targets:
            step, mark, number = target.rpartition("#")
            if mark and step == step_id and number.isdecimal():
                found[int(number)] = target
        return found

    def default_target(self, method: str) -> str | None:
        """The answer if it is explained, else the last step that is."""
        targets = self.targets(method)
        answers = [step for step in self.answers if step in targets]
        return answers[0] if answers else targets[-1] if targets else None

    def thing(self, source: ExplanationSource) -> Thing:
        """What a source shows: its kind, and the id of a step, the number of a part, or nothing."""
        if source.step_id in self.steps:
            return source.kind, source.step_id
        if source.call_id is not None and source.start is not None:
            return source.kind, self._part_of.get((source.call_id, source.start))
        return source.kind, None

    def name_of(self, call_id: str, start: int, step_id: str | None) -> str | int | None:
        """The step or the part of the prompt that tokens of a call show, given where they start."""
        return step_id if step_id in self.steps else self._part_of.get((call_id, start))

    def readings(self, method: str, target: str) -> list[Reading]:
        """What a step, or a token named ``ID#N``, read by a method: most first, zeros left out, `GLUE` at the end."""
        table = self._table(method)
        row = table.rows.get(target)
        if row is None:
            return []
        values, sizes = table.values[row], table.sizes[row]
        total = float(sizes.sum())
        ways = self._ways(method, target)
        found = [
            Reading(
                kind,
                name if isinstance(name, str) else None,
                name if isinstance(name, int) else None,
                float(values[at]),
                float(sizes[at]) / total if total else 0.0,
                None if ways is None else float(ways[at]),
            )
            for at, (kind, name) in enumerate(table.things)
            if sizes[at] or (ways is not None and ways[at] and name != table.own[row])
        ]
        return sorted(found, key=lambda item: (item.kind in GLUE, -max(item.share, item.through or 0.0)))

    def _ways(self, method: str, target: str) -> Numbers | None:
        """The share of each thing over all ways through earlier steps, where it is known."""
        explanation = self.explanation(method)
        through = explanation.through.get(target)
        if through is None:
            return None
        weights = [through.get(source.id, 0.0) for source in explanation.sources]
        table = self._table(method)
        return np.bincount(table.columns, weights=weights, minlength=len(table.things)).astype(np.float64)

    def readers(self, method: str, name: str | int) -> list[Reading]:
        """Which steps read a step, or a part of the prompt by its number: most first, with their shares of it."""
        table = self._table(method)
        at = next((number for number, thing in enumerate(table.things) if thing[1] == name), None)
        if at is None:
            return []
        totals = table.sizes.sum(axis=1)
        found = [
            Reading(
                self.steps[target].kind,
                target,
                None,
                float(table.values[row, at]),
                float(table.sizes[row, at] / totals[row]),
                None,
            )
            for target, row in table.rows.items()
            if target in self.steps and table.sizes[row, at]
        ]
        return sorted(found, key=lambda item: -item.share)

    def influences(self, method: str, *, rows: Mapping[str | int, int], top: int) -> dict[int, list[tuple[int, float]]]:
        """What every explained step read of the rows of a list: the largest values, divided by the largest of all.

        Args:
            method: One of `methods`.
            rows: The row of each step id and of each part's number.
            top: Values kept for each step.
        """
        table = self._table(method)
        known = [(at, rows[name]) for at, (_, name) in enumerate(table.things) if name is not None and name in rows]
        if not known:
            return {}
        things, places = np.array(known).T
        found: dict[int, list[tuple[int, float]]] = {}
        for target, row in table.rows.items():
            if target not in rows or target not in self.steps:
                continue
            values = table.values[row, things]
            sizes = np.abs(values)
            largest = float(sizes.max())
            best = np.argsort(-sizes, kind="stable")[:top]
            found[rows[target]] = [(int(places[at]), float(values[at]) / largest) for at in best if values[at]]
        return found

    def _table(self, method: str) -> _Table:
        if method not in self._tables:
            self._tables[method] = self._make_table(self.explanation(method))
        return self._tables[method]

    def _make_table(self, explanation: Explanation) -> _Table:
        numbers: dict[Thing, int] = {}
        columns = np.array(
            [numbers.setdefault(self.thing(source), len(numbers)) for source in explanation.sources], dtype=np.int64
        )
        sources_of: dict[str, list[int]] = {}
        for number, source in enumerate(explanation.sources):
            sources_of.setdefault(source.step_id or "", []).append(number)
        shape = (len(explanation.targets), len(numbers))
        table = _Table(tuple(numbers), columns, {}, [], np.zeros(shape), np.zeros(shape))
        for row, (target, values) in enumerate(zip(explanation.targets, explanation.values, strict=True)):
            own = target if target in self.steps else target.rpartition("#")[0]
            table.rows[target] = row
            table.own.append(own)
            weights = np.array(values, dtype=np.float64)
            weights[sources_of.get(own, [])] = 0.0
            table.values[row] = np.bincount(columns, weights=weights, minlength=len(numbers))
            table.sizes[row] = np.bincount(columns, weights=np.abs(weights), minlength=len(numbers))
        return table

    def trust(self, method: str, step_id: str) -> Trust:
        """How far a method's scores for a step can be trusted."""
        known = faithfulness_of(self.explanation(method))
        if known is None:
            return Trust(None, None, 0.0, ())
        return Trust(known.targets.get(step_id), known.better_than_random, known.z or 0.0, tuple(known.targets))

    @cached_property
    def _scores(self) -> dict[str, list[ProbeScore]]:
        found: dict[str, list[ProbeScore]] = {}
        for score in probe_scores(self.trace):
            found.setdefault(score.step_id, []).append(score)
        return found

    @property
    def has_truth(self) -> bool:
        """Whether any step was scored by a probe."""
        return bool(self._scores)

    def truth(self, step_id: str) -> list[ProbeScore]:
        """What probes say of a step as a whole."""
        return [score for score in self._scores.get(step_id, ()) if score.sentence is None]

    def sentences(self, step_id: str, probe: str) -> list[ProbeScore]:
        """What a probe says of a step's sentences."""
        return [item for item in self._scores.get(step_id, ()) if item.sentence is not None and item.name == probe]

    def logprobs(self, step: Step) -> list[float]:
        """Log-probabilities of the tokens of a step, nats; empty where none were recorded."""
        call = self._calls.get(step.call_id or "")
        if call is None or step.completion is None or step.start is None or step.end is None:
            return []
        return call.completions[step.completion].logprobs[step.start : step.end]

    def call_of(self, step: Step) -> Call | None:
        """The call that a step was written in."""
        return self._calls.get(step.call_id or "")

    def part_ids(self, part: Part) -> list[int]:
        """Token ids of a part's prompt up to the part's end: texts are decoded from the beginning."""
        return self._calls[part.call_id].prompt_token_ids[: part.end]


def mean_logprob(logprobs: Sequence[float]) -> float | None:
    """Mean over tokens, nats; ``None`` for none."""
    return sum(logprobs) / len(logprobs) if logprobs else None


def disagreement(score: ProbeScore) -> str | None:
    """``false`` where a step was written without hesitation and its probe takes it for false, ``true`` for the reverse.

    The probe has an opinion only where its band leaves out one half.
    """
    logprob = score.baselines.mean_logprob
    if logprob is None or score.low is None or score.high is None:
        return None
    if logprob >= CONFIDENT and score.high < 0.5:
        return "false"
    return "true" if logprob < CONFIDENT and score.low > 0.5 else None


def flag_sentences(score: ProbeScore) -> list[str]:
    """Why a score is to be doubted; names of flags that this version does not know stay as they are."""
    return [SENTENCES.get(flag, flag) for flag in score.flags]


def interval(value: JsonValue) -> tuple[float, float, float] | None:
    """A value with both ends of its band, as a probe's held-out results have it."""
    if not isinstance(value, list) or len(value) != 3:
        return None
    numbers = [float(item) for item in value if isinstance(item, int | float)]
    return (numbers[0], numbers[1], numbers[2]) if len(numbers) == 3 else None


def _find_parts(trace: Trace) -> tuple[tuple[Part, ...], dict[tuple[str, int], int]]:
    parts: list[Part] = []
    numbers: dict[tuple[str, tuple[int, ...]], int] = {}
    places: dict[tuple[str, int], int] = {}
    steps = {step.id for step in trace.steps}
    for call in trace.calls:
        for segment in call.segments:
            if segment.kind in GLUE or segment.step_id in steps:
                continue
            ids = tuple(call.prompt_token_ids[segment.start : segment.end])
            number = numbers.setdefault((segment.kind, ids), len(parts) + 1)
            if number > len(parts):
                parts.append(Part(number, segment.kind, call.id, segment.start, segment.end))
            places[call.id, segment.start] = number
    return tuple(parts), places
