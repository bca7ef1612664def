"""What steps read of each other according to one method, kept so that one step's share is found without the others'.

A method gives a row for each explained step and a column for each source; several sources can show the same step.
Summed over them this is what ``trace.graph(influence=METHOD)`` calls ``influences``; here it stays a matrix, for the
edges of a trace of a thousand steps are too many to be walked at every click.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tracer.trace.explanation import Explanation
from tracer.trace.trace import Trace

Floats = NDArray[np.float64]


class Influence(NamedTuple):
    """One step's influence on another."""

    source: int
    """Place of the step that was read, from 0."""
    target: int
    """Place of the step that read it."""
    weight: float
    """In the method's unit; below zero where the source speaks against what the target says."""
    strength: float
    """Its absolute value as a share of the strongest one on the same target, above 0 and at most 1."""


@dataclass(frozen=True, slots=True, eq=False)
class Influences:
    """Influences among the steps of one trace, by one method.

    Args:
        method: Its name.
        unit: What weights are in.
        signed: Whether weights below zero can occur.
        sources: Places of the steps that were read, rising, ``(sources,)``.
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
    def of(cls, trace: Trace, explanation: Explanation) -> Influences:
        """Sum an explanation's values over the sources that show the same step.

        Args:
            trace: The trace; targets and sources that are no step of it are left out, as single tokens are.
            explanation: What a method found.
        """
        places = {step.id: place for place, step in enumerate(trace.steps)}
        rows = [row for row, target in enumerate(explanation.targets) if target in places]
        columns = [column for column, source in enumerate(explanation.sources) if source.step_id in places]
        shown = np.array([places[str(explanation.sources[column].step_id)] for column in columns], dtype=np.int64)
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


def _shown(strengths: Floats, minimum: float) -> NDArray[np.bool_]:
    return (strengths >= minimum) & (strengths > 0.0)
