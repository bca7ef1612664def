"""How far a method's scores can be trusted, as an explanation carries it: the typed view of its ``faithfulness``.

Kept as plain data there, so that what other programs and newer versions measure survives.
"""

from __future__ import annotations

from pydantic import Field, ValidationError

from tracer.trace.explanation import Explanation
from tracer.trace.trace import Finite, Record


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


def faithfulness_of(explanation: Explanation) -> MethodFaithfulness | None:
    """What is known of an explanation's faithfulness; ``None`` where nothing was measured or it cannot be read."""
    if explanation.faithfulness is None:
        return None
    try:
        found = MethodFaithfulness.model_validate(explanation.faithfulness)
    except ValidationError:
        return None
    return found if found.targets else None
