"""How far a method's scores can be trusted, as an explanation carries it: the typed view of its ``faithfulness``.

Kept as plain data there, so that what other programs and newer versions measure survives.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from pydantic import Field, ValidationError

from tracer.trace.explanation import Explanation
from tracer.trace.trace import Finite, Record

RANDOM_ORDERS = 6
"""Random orders of the sources that a target's baseline is the mean of."""
_NORMAL = 1.644854
"""What the normal distribution exceeds in one case of twenty."""


class RemovalCurves(Record):
    """Log-probability of a target as its sources are taken away or added; all lists are equally long."""

    shares: list[Finite]
    """Share of the sources that are gone (deletion) or there (insertion), from 0 to 1."""
    deletion: list[Finite]
    """Nats; the sources of highest score go first."""
    insertion: list[Finite]
    """Nats; the sources of highest score come first."""
    random_deletion: list[Finite]
    """Mean over random orders."""
    random_insertion: list[Finite]


class TargetFaithfulness(Record):
    """What was measured for one target."""

    sources: int
    """Sources that could be removed."""
    lds: Finite | None = None
    """Linear datamodelling score; ``None`` where it is not defined."""
    top_k_drop: Finite
    """Nats that the target loses without the ``k`` sources of highest score."""
    k: int
    deletion: Finite
    """Against random orders, nats; positive is better than random."""
    insertion: Finite
    """Against random orders, nats; positive is better than random."""
    gap: Finite | None = None
    """Insertion minus deletion, nats."""
    random_gap: Finite | None = None
    """The same for random orders, on average."""
    random_spread: Finite | None = None
    """Its standard deviation from one random order to the next."""
    curves: RemovalCurves | None = None
    """``None`` where they were not kept."""


class MethodFaithfulness(Record):
    """What was measured for one method on one trace."""

    targets: dict[str, TargetFaithfulness] = Field(default_factory=dict)
    """By the target's id."""
    agreement: dict[str, dict[str, Finite | None]] = Field(default_factory=dict)
    """Spearman correlation with other methods' scores, by target and method."""
    z: Finite | None = None
    """How far its curves are above those of random orders, in standard deviations, all targets together."""
    better_than_random: bool | None = None
    """Whether chance alone would reach that in less than one case in twenty."""


class Measure(Protocol):
    """What is compared with random orders; all in nats."""

    @property
    def gap(self) -> float:
        """Insertion minus deletion area of the method's own order."""
        ...

    @property
    def random_gap(self) -> float:
        """The same for random orders, on average."""
        ...

    @property
    def random_spread(self) -> float:
        """Its standard deviation from one random order to the next."""
        ...


@dataclass(frozen=True, slots=True)
class AgainstRandom:
    """Whether a method ranks sources better than chance, over one or many targets.

    Args:
        z: Sum of its gaps over those of random orders, in standard deviations of that sum.
        better: Whether chance alone would reach that in less than one case in twenty.
    """

    z: float
    better: bool


def against_random(measures: Iterable[Measure]) -> AgainstRandom:
    """Pool targets: a single one with few sources can never tell a good order from a lucky one.

    The spread is known from few random orders, so that sums are held against Student's distribution, with the degrees
    of freedom of Welch (1947) and Satterthwaite (1946). Targets must have been measured against orders of their own.
    """
    items = list(measures)
    above = sum(item.gap - item.random_gap for item in items)
    # The mean of the random orders is itself uncertain. Of two or three sources all orders are known; they are so few
    # that the best of them is no rare one, and what is too careful elsewhere is right there.
    variances = [item.random_spread**2 * (1 + 1 / RANDOM_ORDERS) for item in items]
    # Very small spreads have squares of zero.
    squares = sum(variance**2 for variance in variances)
    if not squares:
        return AgainstRandom(0.0, better=False)
    z = above / math.sqrt(sum(variances))
    return AgainstRandom(z, z > _one_in_twenty((RANDOM_ORDERS - 1) * sum(variances) ** 2 / squares))


def _one_in_twenty(freedom: float) -> float:
    """What Student's distribution exceeds in one case of twenty (Abramowitz & Stegun 1964, 26.7.5), to 0.001."""
    one, three, five, seven = (_NORMAL**power for power in (1, 3, 5, 7))
    terms = (
        (three + one) / 4,
        (5 * five + 16 * three + 3 * one) / 96,
        (3 * seven + 19 * five + 17 * three - 15 * one) / 384,
    )
    return one + sum(term / freedom**order for order, term in enumerate(terms, 1))


def faithfulness_of(explanation: Explanation) -> MethodFaithfulness | None:
    """What is known of an explanation's faithfulness; ``None`` where nothing was measured or it cannot be read."""
    if explanation.faithfulness is None:
        return None
    try:
        found = MethodFaithfulness.model_validate(explanation.faithfulness)
    except ValidationError:
        return None
    if not found.targets:
        return None
    measured = [_Known.of(target) for target in found.targets.values()]
    known = [item for item in measured if item is not None]
    if len(known) < len(measured):
        # Somebody else's, who did not say what it rests on.
        return found
    pooled = against_random(known)
    return found.model_copy(update={"z": pooled.z, "better_than_random": pooled.better})


@dataclass(frozen=True, slots=True)
class _Known:
    gap: float
    random_gap: float
    random_spread: float

    @classmethod
    def of(cls, target: TargetFaithfulness) -> _Known | None:
        if target.gap is None or target.random_gap is None or target.random_spread is None:
            return None
        return cls(target.gap, target.random_gap, target.random_spread)
