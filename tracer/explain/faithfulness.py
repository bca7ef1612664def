"""How far scores can be trusted: measured by taking away what they point at.

Scores of a method rank the sources of a target. They are faithful to the model if taking away what they rank first
costs the target more than taking away anything else. All measures are computed on the same trace, by the replica, and
beside the same measure for random orders of the sources.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import FiniteFloat, JsonValue, TypeAdapter, ValidationError

from tracer.errors import TraceFormatError
from tracer.trace.explanation import Explanation
from tracer.trace.faithfulness import RANDOM_ORDERS

if TYPE_CHECKING:
    from tracer.explain.removal import Masks, Removal

POINTS = 3
"""Points of a deletion or insertion curve beside its two ends."""
HELD_OUT = 24
"""Random masks on which predicted and measured effects are compared."""
_DECIMALS = 4
_SEED_OF_MASKS = 7919
"""Keeps held-out masks apart from other draws with the same seed."""
_SEED_OF_TIES = 104729


@dataclass(frozen=True, slots=True)
class Curves:
    """Log-probability of a target as sources are taken away or added; all lists are ``(points,)``, nats but the first.

    Args:
        shares: Share of the sources that are gone, or there, from 0 to 1.
        deletion: Without the sources that rank highest.
        insertion: With them alone.
        random_deletion: Mean over random orders.
        random_insertion: Mean over random orders.
    """

    shares: tuple[float, ...]
    deletion: tuple[float, ...]
    insertion: tuple[float, ...]
    random_deletion: tuple[float, ...]
    random_insertion: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Faithfulness:
    """Measures of one method's scores for one target.

    Args:
        sources: Sources that could be removed.
        lds: Linear datamodelling score: Spearman correlation of the summed scores of kept sources with the target's
            measured log-probability, over held-out random masks (Park et al. 2023; Cohen-Wang et al. 2024). ``None``
            where the scores or the measurements do not vary.
        top_k_drop: log p(all) - log p(without the ``k`` sources of highest score), nats.
        k: How many sources that were.
        deletion: Mean log p as sources are removed from the highest score down, relative to random orders: positive
            where the target suffers more than at random, nats.
        insertion: Mean log p as sources are added from the highest score down, relative to random orders, nats.
        deletion_rank: Share of the random orders whose deletion is worse than the method's.
        gap: Insertion minus deletion of the method's own curves, nats.
        random_gap: Mean of the same over the random orders.
        random_spread: Its standard deviation from one random order to the next.
        passes: Different masks that were evaluated for the target, for all methods together.
        curves: What the areas are measured on; ``None`` where they were not kept.
    """

    sources: int
    lds: FiniteFloat | None
    top_k_drop: FiniteFloat
    k: int
    deletion: FiniteFloat
    insertion: FiniteFloat
    deletion_rank: FiniteFloat
    gap: FiniteFloat
    random_gap: FiniteFloat
    random_spread: FiniteFloat
    passes: int = 0
    curves: Curves | None = None

    def to_document(self) -> dict[str, JsonValue]:
        """Plain data for the trace."""
        curves = None if self.curves is None else {name: list(line) for name, line in asdict(self.curves).items()}
        return {**asdict(self), "curves": curves}

    @classmethod
    def from_document(cls, document: JsonValue) -> Faithfulness:
        """What `to_document` wrote.

        Raises:
            TraceFormatError: It is something else.
        """
        try:
            return _DOCUMENT.validate_python(document)
        except ValidationError:
            raise TraceFormatError("a stored faithfulness cannot be read; explain the trace again") from None


@dataclass(frozen=True, slots=True)
class _Measured:
    """Both curves of one order, ``(points,)`` each, and the areas below them."""

    deletion_curve: NDArray[np.float64]
    insertion_curve: NDArray[np.float64]
    deletion: float
    insertion: float

    @property
    def gap(self) -> float:
        """How much more is lost by taking away first what ranks high than by taking it away last."""
        return self.insertion - self.deletion


_DOCUMENT = TypeAdapter(Faithfulness)


def readable(document: JsonValue) -> bool:
    """Whether a document is what `Faithfulness.to_document` wrote."""
    try:
        Faithfulness.from_document(document)
    except TraceFormatError:
        return False
    return True


def measures_of(explanation: Explanation) -> dict[str, Faithfulness]:
    """What was measured of an explanation, by target; what cannot be read counts as not measured."""
    targets = (explanation.faithfulness or {}).get("targets")
    found: dict[str, Faithfulness] = {}
    for target, document in targets.items() if isinstance(targets, dict) else ():
        with suppress(TraceFormatError):
            found[target] = Faithfulness.from_document(document)
    return found


def measure(
    removal: Removal,
    scores: Mapping[str, NDArray[np.floating]],
    *,
    seed: int = 0,
    held_out: int = HELD_OUT,
    points: int = POINTS,
    orders: int = RANDOM_ORDERS,
    k: int | None = None,
    fitted: Masks | None = None,
) -> dict[str, Faithfulness]:
    """Measure several methods on one target; what they ask alike is computed once, and all of it in one tree.

    Args:
        removal: The target and its removable sources.
        scores: For each method the values of all sources of the trace, ``(sources,)``; signed ones rank by their
            signed value, since a source that speaks against the target should go last.
        seed: For held-out masks and random orders; of a target's own, or what chance does to one it does to all.
        held_out: Masks for the linear datamodelling score.
        points: Points of a curve.
        orders: Random orders for the baseline.
        k: Sources to drop at once; a fifth of them, at least one, if not given.
        fitted: Masks that a method may have been fitted on, ``(masks, units)``.

    Returns:
        The measures by method.
    """
    units = len(removal.units)
    masks = heldout_masks(held_out, units, seed=seed, fitted=fitted)
    chance = _chance(units, orders, seed)
    own = {name: removal.of_units(values) for name, values in scores.items()}
    # Equal scores say nothing about an order: chance puts it, not the order of the prompt.
    tied = np.random.default_rng([seed, _SEED_OF_TIES]).permutation(units)
    ranked = {name: np.lexsort((tied, -values)) for name, values in own.items()}
    most = k or max(1, round(units / 5))
    # One question for everything: the prefix tree of all masks is computed once.
    paths = [path for order in [*ranked.values(), *chance] for path in _paths(order, points)]
    tops = [_without(order[:most], units) for order in ranked.values()]
    removal.values(np.concatenate([masks, *paths, *(top[None] for top in tops)]))
    # Differences that are rounding of float32 are no ranking.
    measured = removal.values(masks).round(_DECIMALS)
    whole = float(removal.values(np.ones((1, units), dtype=bool))[0])
    random = [_curves(removal, order, points) for order in chance]
    found: dict[str, Faithfulness] = {}
    for (name, values), top in zip(own.items(), tops, strict=True):
        curves = _curves(removal, ranked[name], points)
        found[name] = Faithfulness(
            sources=units,
            lds=spearman(masks @ values, measured) if np.ptp(values) > 0 else None,
            top_k_drop=whole - float(removal.values(top[None])[0]),
            k=most,
            deletion=float(np.mean([other.deletion for other in random])) - curves.deletion,
            insertion=curves.insertion - float(np.mean([other.insertion for other in random])),
            deletion_rank=float(np.mean([other.deletion > curves.deletion for other in random])),
            gap=curves.gap,
            random_gap=float(np.mean([other.gap for other in random])),
            random_spread=float(np.std([other.gap for other in random], ddof=1 if len(random) > 1 else 0)),
            passes=removal.evaluated,
            curves=_kept(curves, random, units, points),
        )
    return found


def _kept(own: _Measured, random: Sequence[_Measured], units: int, points: int) -> Curves:
    def line(values: NDArray[np.float64]) -> tuple[float, ...]:
        return tuple(values.round(_DECIMALS).tolist())

    return Curves(
        tuple(count / units for count in _counts(units, points)),
        line(own.deletion_curve),
        line(own.insertion_curve),
        line(np.mean([other.deletion_curve for other in random], axis=0)),
        line(np.mean([other.insertion_curve for other in random], axis=0)),
    )


def _chance(units: int, orders: int, seed: int) -> list[NDArray[np.integer]]:
    """Random orders of the sources; all orders where there are no more of them."""
    if math.factorial(units) <= orders:
        return [np.array(order) for order in itertools.permutations(range(units))]
    generator = np.random.default_rng(seed)
    return [generator.permutation(units) for _ in range(orders)]


def heldout_masks(count: int, units: int, *, seed: int, fitted: Masks | None = None) -> Masks:
    """Random masks that no method was fitted on, ``(count, units)``.

    Few sources have few masks: where nearly all were fitted on, as those of five sources are, they are drawn from all.

    Args:
        count: How many.
        units: Sources.
        seed: Makes them reproducible.
        fitted: Masks to leave out, ``(masks, units)``.
    """
    generator = np.random.default_rng([seed, _SEED_OF_MASKS])
    known = set() if fitted is None else {mask.tobytes() for mask in np.asarray(fitted, dtype=np.bool_)}
    if 2**units - len(known) < count:
        known = set()
    found: list[NDArray[np.bool_]] = []
    while len(found) < count:
        mask = generator.random(units) < 0.5
        if mask.tobytes() not in known:
            found.append(mask)
    return np.stack(found)


def agreement(scores: Mapping[str, NDArray[np.floating]]) -> dict[str, dict[str, float | None]]:
    """Spearman correlation between the values of methods over the same sources."""
    return {
        name: {other: spearman(values, theirs) for other, theirs in scores.items() if other != name}
        for name, values in scores.items()
    }


def spearman(left: NDArray[np.floating], right: NDArray[np.floating]) -> float | None:
    """Spearman's rank correlation with mean ranks for ties; ``None`` where one side does not vary."""
    ranks = [_ranks(np.asarray(side, dtype=np.float64)) for side in (left, right)]
    spread = [float(side.std()) for side in ranks]
    if min(spread, default=0.0) == 0.0 or math.isnan(sum(spread)):
        return None
    return float(np.mean((ranks[0] - ranks[0].mean()) * (ranks[1] - ranks[1].mean())) / (spread[0] * spread[1]))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[inverse])


def _curves(removal: Removal, order: NDArray[np.integer], points: int) -> _Measured:
    deletion, insertion = (removal.values(path) for path in _paths(order, points))
    return _Measured(deletion, insertion, _area(deletion, order, points), _area(insertion, order, points))


def _area(values: NDArray[np.float64], order: NDArray[np.integer], points: int) -> float:
    """Mean height of the curve over the share of sources, by trapezes."""
    shares = np.array(_counts(len(order), points)) / len(order)
    return float(np.sum(np.diff(shares) * (values[1:] + values[:-1]) / 2))


def _paths(order: Sequence[int] | NDArray[np.integer], points: int) -> tuple[Masks, Masks]:
    """Masks of the deletion and of the insertion curve, both ``(points, units)``."""
    counts = _counts(len(order), points)
    kept = np.ones((len(counts), len(order)), dtype=bool)
    for row, count in enumerate(counts):
        kept[row, np.asarray(order)[:count]] = False
    return kept, ~kept


def _counts(units: int, points: int) -> list[int]:
    """How many sources are gone at each point of a curve: none, all, and up to ``points`` in between."""
    return sorted({round(share * units) for share in np.linspace(0, 1, min(units, points + 1) + 1).tolist()})


def _without(gone: NDArray[np.integer], units: int) -> NDArray[np.bool_]:
    mask = np.ones(units, dtype=bool)
    mask[gone] = False
    return mask
