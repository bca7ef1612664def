"""Means with their intervals, where values of one run have much in common and values of several runs do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with the 95 % interval of a bootstrap over traces, or over targets where there is one trace only.

    Args:
        mean: Mean over all targets.
        low: Lower end; ``None`` where a single value leaves nothing to draw from.
        high: Upper end.
        count: How many targets it is the mean of.
    """

    mean: float
    low: float | None
    high: float | None
    count: int


def estimate(groups: Sequence[Sequence[float]], seed: int = 0) -> Estimate | None:
    """The mean of all values, with the interval of a bootstrap over groups.

    Args:
        groups: Values by trace.
        seed: Of the bootstrap.

    Returns:
        The estimate; ``None`` without any value.
    """
    groups = [list(group) for group in groups if group]
    if not groups:
        return None
    if len(groups) == 1:
        groups = [[value] for value in groups[0]]
    sums = np.array([sum(group) for group in groups])
    sizes = np.array([len(group) for group in groups])
    drawn = np.random.default_rng(seed).integers(len(groups), size=(_DRAWS, len(groups)))
    mean, count = float(sums.sum() / sizes.sum()), int(sizes.sum())
    if len(groups) == 1:
        return Estimate(mean, None, None, count)
    low, high = np.quantile(sums[drawn].sum(1) / sizes[drawn].sum(1), [0.025, 0.975])
    return Estimate(mean, float(low), float(high), count)
