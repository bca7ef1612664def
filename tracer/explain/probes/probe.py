"""What all truth probes are once fitted: a direction in the hidden states behind one layer, and a threshold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike
from pydantic import JsonValue

from tracer.errors import InputError
from tracer.explain.probes.examples import Floats


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """A fitted probe. `tracer.explain.probes.fit.fit` makes one, `tracer.explain.probes.saved.SavedProbe` keeps one.

    Args:
        kind: How it was fitted, a name of `tracer.explain.probes.fit.KINDS`.
        weights: ``(width,)``.
        bias: Added to the projection.
        directions: What it was made of, each ``(width,)``, for pictures and for comparison with other probes.
        notes: What else is to be known, such as where the sign of a probe without labels came from.
    """

    kind: str
    weights: Floats
    bias: float
    directions: Mapping[str, Floats] = field(default_factory=dict)
    notes: Mapping[str, JsonValue] = field(default_factory=dict)

    def score(self, values: ArrayLike) -> Floats:
        """How much hidden states speak for true: above zero means true. No probability until it is calibrated.

        Args:
            values: Hidden states ``(..., width)``, normalised as those that the probe was fitted on.

        Returns:
            ``(...)``.

        Raises:
            InputError: They are not as wide as the probe.
        """
        rows = np.asarray(values, dtype=np.float64)
        if rows.shape[-1:] != self.weights.shape:
            raise InputError(f"the probe reads {len(self.weights)} numbers for each token, found {rows.shape[-1:]}")
        found: Floats = rows @ self.weights + self.bias
        return found

    def rescaled(self, values: ArrayLike) -> Probe:
        """The same probe in units of the spread of its scores on some hidden states ``(rows, width)``.

        Where classes can be told apart without error, the length of the weights says only when the fit stopped.
        """
        spread = float(np.std(self.score(values)))
        if not spread > 0.0:
            return self
        return replace(self, weights=self.weights / spread, bias=self.bias / spread)
