"""Influence on a step through the steps before it: the resolvent of the step graph.

Every explained step divides what it read among its sources: the share of a source is its absolute value over the sum
of the absolute values, the step's own tokens left out. Where a source is an explained step itself, its share is passed
on to what that step read, and so on. The share of a source ``x`` in a step ``a`` over all ways is

    through[x] = sum over steps s of ((I - W)^-1)[a, s] * share[s, x],

with ``W[s, s']`` the share of step ``s`` that came from step ``s'``. Steps only read earlier ones, so the inverse is
never formed: one sweep from the step back to the beginning gives the same. Sources that are no explained step are
roots, where ways end: documents, instructions, observations, the template. The shares of all roots add up to one.

Signs are dropped, in signed methods too: a source that spoke against a step was still read by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from tracer.errors import TraceFormatError
from tracer.trace.explanation import Explanation, ExplanationSource, find_explanation
from tracer.trace.trace import Trace


@dataclass(frozen=True, slots=True)
class Influence:
    """What one source contributed to one step.

    Args:
        source: The source.
        direct: Its share in what the step itself read, 0 to 1.
        through: Its share over all ways, the direct one included; of an explained step, what passed through it.
        root: Whether ways end in it; the ``through`` shares of roots add up to one.
    """

    source: ExplanationSource
    direct: float
    through: float
    root: bool


def influence_on(trace: Trace, method: str, step_id: str) -> list[Influence]:
    """How much of a step goes back to each source, directly and through earlier steps, most first.

    Args:
        trace: A trace with an explanation by the method, of that step and of those that lie between.
        method: Name of the method; of several explanations the newest counts.
        step_id: The step.

    Raises:
        UnknownNameError: The trace has no explanation by that method, or it does not cover the step.
        TraceFormatError: The explanation contradicts itself.
    """
    return influences(find_explanation(trace, method), step_id)


def influences(explanation: Explanation, step_id: str) -> list[Influence]:
    """As `influence_on`, of one explanation.

    Raises:
        UnknownNameError: The step is not explained.
        TraceFormatError: Steps read each other in a circle.
    """
    direct = shares(explanation, step_id)
    through = through_steps(explanation, step_id)
    passing = _passing(_rows(explanation))
    found = [
        Influence(source, share, through[source.id], source.step_id not in passing)
        for source, share in zip(explanation.sources, direct, strict=True)
        if through[source.id] > 0.0
    ]
    return sorted(found, key=lambda item: -item.through)


def shares(explanation: Explanation, step_id: str) -> list[float]:
    """What a step read, as one share for each source; the shares add up to one, or are all zero.

    Raises:
        UnknownNameError: The step is not explained.
    """
    row = explanation.row(step_id)
    values = [
        0.0 if source.step_id == step_id else abs(value) for source, value in zip(explanation.sources, row, strict=True)
    ]
    total = sum(values)
    return [value / total for value in values] if total > 0.0 else values


def through_steps(explanation: Explanation, step_id: str) -> dict[str, float]:
    """The share of every source in a step over all ways through explained steps, by the source's id.

    Raises:
        UnknownNameError: The step is not explained.
        TraceFormatError: Steps read each other in a circle.
    """
    explanation.row(step_id)
    rows = _rows(explanation)
    passing = _passing(rows)
    flow = dict.fromkeys(rows, 0.0)
    flow[step_id] = 1.0
    through = [0.0] * len(explanation.sources)
    for target in _latest_first(explanation, rows):
        if flow[target] == 0.0:
            continue
        for number, share in enumerate(rows[target]):
            part = flow[target] * share
            through[number] += part
            step = explanation.sources[number].step_id
            if step in passing:
                flow[step] += part
    return {source.id: share for source, share in zip(explanation.sources, through, strict=True)}


def is_complete(explanation: Explanation, step_id: str) -> bool:
    """Whether all steps of the model that a step goes back to are explained, so that no way ends in one of them."""
    written = {source.step_id for source in explanation.sources if source.completion is not None}
    waiting, seen = [step_id], {step_id}
    while waiting:
        for source, share in zip(explanation.sources, shares(explanation, waiting.pop()), strict=True):
            if share == 0.0 or source.step_id is None or source.step_id not in written or source.step_id in seen:
                continue
            if source.step_id not in explanation.targets:
                return False
            seen.add(source.step_id)
            waiting.append(source.step_id)
    return True


def _rows(explanation: Explanation) -> dict[str, list[float]]:
    return {target: shares(explanation, target) for target in explanation.targets}


def _passing(rows: dict[str, list[float]]) -> set[str]:
    """Explained steps that read anything; in all other sources ways end."""
    return {target for target, row in rows.items() if any(row)}


def _latest_first(explanation: Explanation, rows: dict[str, list[float]]) -> list[str]:
    readers: TopologicalSorter[str] = TopologicalSorter()
    for target, row in rows.items():
        readers.add(target)
        for source, share in zip(explanation.sources, row, strict=True):
            if share > 0.0 and source.step_id is not None and source.step_id in rows:
                readers.add(source.step_id, target)
    try:
        return list(readers.static_order())
    except CycleError as error:
        steps = " reads ".join(str(step) for step in error.args[1])
        raise TraceFormatError(f"the explanation by {explanation.method} contradicts itself: {steps}") from None
