"""What steps read of each other according to one method, kept so that one step's share is found without the others'.

A method gives a row for each explained step and a column for each source; several sources can show the same step.
Summed over them this is what ``trace.graph(influence=METHOD)`` calls ``influences``; here it stays a matrix, for the
edges of a trace of a thousand steps are too many to be walked at every click. Parts of a prompt that show no step, such
as an exemplar, are sources too: without them the strongest source of a step may be one that is not in the graph.

Things are named by their place: the steps of a trace from 0, behind them the parts of its prompts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tracer.trace.explanation import Explanation
from ui.evidence import Evidence

Floats = NDArray[np.float64]


class Influence(NamedTuple):
    """The influence of one thing on a step."""

    source: int
    """Place of what was read."""
    target: int
    """Place of the step that read it."""
    weight: float
    """In the method's unit; below zero where the source speaks against what the target says."""
    strength: float
    """Its absolute value as a share of the strongest one on the same target, above 0 and at most 1."""


@dataclass(frozen=True, slots=True, eq=False)
class Influences:
    """Influences on the steps of one trace, by one method.

    Args:
        method: Its name.
        unit: What weights are in.
        signed: Whether weights below zero can occur.
        sources: Places of what was read, rising, ``(sources,)``.
        targets: Places of the steps that are explained, ``(targets,)``.
        weights: ``(targets, sources)``.
        strengths: Absolute weights over the largest of the same row, ``(targets, sources)``.
    """

    method: str
    unit: str
    signed: bool
    sources: NDArray[np.int64]
    targets: NDArray[np.int64]
    weights: Floats
    strengths: Floats

    @classmethod
    def of(cls, evidence: Evidence, explanation: Explanation) -> Influences:
        """Sum an explanation's values over the sources that show the same thing.

        Args:
            evidence: What is known of the trace; targets that are no step of it are left out, as single tokens are,
                and so are sources that say nothing, such as the chat template.
            explanation: What a method found.
        """
        places = {step.id: place for place, step in enumerate(evidence.trace.steps)}
        rows = [row for row, target in enumerate(explanation.targets) if target in places]
        things = [_place(evidence.thing(source)[1], places) for source in explanation.sources]
        columns = [column for column, place in enumerate(things) if place is not None]
        shown = np.array([place for place in things if place is not None], dtype=np.int64)
        targets = np.array([places[explanation.targets[row]] for row in rows], dtype=np.int64)
        order = np.argsort(shown, kind="stable")
        sources, starts = np.unique(shown[order], return_index=True)
        values = np.array(explanation.values, dtype=np.float64).reshape(len(explanation.targets), -1)
        values = values[rows][:, np.array(columns, dtype=np.int64)[order]]
        weights = np.add.reduceat(values, starts, axis=1) if len(starts) else np.zeros((len(rows), 0))
        # A step's own earlier tokens are no other step.
        weights[targets[:, None] == sources[None, :]] = 0.0
        largest = np.abs(weights).max(axis=1, initial=0.0, keepdims=True)
        strengths = np.abs(weights) / np.where(largest > 0.0, largest, 1.0)
        return cls(explanation.method, explanation.unit, explanation.signed, sources, targets, weights, strengths)

    def into(self, place: int, minimum: float) -> Iterator[Influence]:
        """What a step read, from the minimum strength up."""
        for row in np.flatnonzero(self.targets == place):
            for column in np.flatnonzero(_shown(self.strengths[row], minimum)):
                yield Influence(
                    int(self.sources[column]),
                    place,
                    float(self.weights[row, column]),
                    float(self.strengths[row, column]),
                )

    def read_by(self, places: Collection[int], minimum: float) -> dict[int, float]:
        """What any of some steps read, with the largest strength of each: one look at their rows, for all at once."""
        rows = np.isin(self.targets, list(places))
        return self._largest(self.sources, self.strengths[rows].max(axis=0, initial=0.0), minimum)

    def readers_of(self, places: Collection[int], minimum: float) -> dict[int, float]:
        """Which steps read any of some steps, with the largest strength of each."""
        columns = np.isin(self.sources, list(places))
        return self._largest(self.targets, self.strengths[:, columns].max(axis=1, initial=0.0), minimum)

    @staticmethod
    def _largest(steps: NDArray[np.int64], strengths: Floats, minimum: float) -> dict[int, float]:
        shown = _shown(strengths, minimum)
        return dict(zip(steps[shown].tolist(), strengths[shown].tolist(), strict=True))


def _place(name: str | int | None, places: Mapping[str, int]) -> int | None:
    """Where a step, or a part of the prompt by its number from 1, stands among all things."""
    return len(places) + name - 1 if isinstance(name, int) else places.get(name or "")


def _shown(strengths: Floats, minimum: float) -> NDArray[np.bool_]:
    return (strengths >= minimum) & (strengths > 0.0)
