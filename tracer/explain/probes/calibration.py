"""From scores to probabilities, and how far these can be believed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy.stats import beta

from tracer.errors import InputError
from tracer.explain.probes.examples import Flags, Floats, one_thread
from tracer.explain.probes.logistic import fit_logistic
from tracer.explain.probes.statements import Indices
from tracer.trace.probe_report import Bin, Reliability
from tracer.trace.trace import Finite

_BINS = 10
_DRAWS = 200
_FOLDS = 10
_LEVEL = 0.95


class Band(NamedTuple):
    """Probabilities with a 95% band, each ``(rows,)``."""

    probability: Floats
    low: Floats
    high: Floats


class Calibration(BaseModel):
    """A logistic curve from scores to the probability of being true (Platt 1999)."""

    model_config = ConfigDict(frozen=True)

    slope: Finite
    """Never below zero: where higher scores do not mean true more often, every score gets the base rate."""
    intercept: Finite
    draws: tuple[tuple[Finite, Finite], ...]
    """Slope and intercept of bootstrap fits over the clusters."""
    reliability: Reliability

    def probability(self, scores: Floats) -> Floats:
        """Probability of being true, in the shape of the scores."""
        return _curve(scores, self.slope, self.intercept)

    def band(self, scores: Floats) -> Band:
        """Probabilities of scores ``(rows,)`` and where they would lie had other topics been used to calibrate."""
        drawn = np.stack([_curve(scores, slope, intercept) for slope, intercept in self.draws])
        low, high = np.quantile(drawn, [(1.0 - _LEVEL) / 2.0, (1.0 + _LEVEL) / 2.0], axis=0)
        own = self.probability(scores)
        return Band(own, np.minimum(low, own), np.maximum(high, own))


def fit_calibration(scores: Floats, labels: Flags, clusters: Iterable[object], *, seed: int = 0) -> Calibration:
    """Fit the curve to scores of statements that the probe was not fitted on.

    Its reliability is measured on clusters that the curve was not fitted on either.

    Args:
        scores: ``(rows,)``.
        labels: ``(rows,)``.
        clusters: What each row belongs to, topics if there are several, else entities, ``(rows,)``.
        seed: Decides the bootstrap draws.

    Raises:
        InputError: There are not two clusters, or all labels are the same.
    """
    numbers: dict[object, int] = {}
    own: Indices = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], dtype=np.int64)
    if len(numbers) < 2:
        raise InputError("a calibration needs statements about two topics or entities; these are all about one")
    with one_thread():
        slope, intercept = _platt(scores, labels)
        held = np.full(len(scores), np.nan)
        for test in _folds(own, seed):
            if _both(labels[~test]):
                held[test] = _curve(scores[test], *_platt(scores[~test], labels[~test]))
        draws = tuple(_bootstrap(scores, labels, own, seed))
    known = np.isfinite(held)
    return Calibration(
        slope=slope,
        intercept=intercept,
        draws=draws or ((slope, intercept),),
        reliability=reliability(held[known], labels[known]),
    )


def reliability(probabilities: Floats, labels: Flags) -> Reliability:
    """The reliability curve of probabilities ``(rows,)`` in bins of equal width, and its ECE."""
    places = np.minimum((probabilities * _BINS).astype(np.int64), _BINS - 1)
    bins: list[Bin] = []
    for number in range(_BINS):
        own = places == number
        count, true = int(own.sum()), int(labels[own].sum())
        if count:
            bins.append(
                Bin(
                    count=count,
                    predicted=float(probabilities[own].mean()),
                    share=true / count,
                    low=float(beta.ppf((1.0 - _LEVEL) / 2.0, true, count - true + 1)) if true else 0.0,
                    high=float(beta.ppf((1.0 + _LEVEL) / 2.0, true + 1, count - true)) if true < count else 1.0,
                )
            )
    total = sum(item.count for item in bins)
    ece = sum(item.count * abs(item.share - item.predicted) for item in bins) / total if total else 0.0
    return Reliability(bins=tuple(bins), ece=ece)


def _platt(scores: Floats, labels: Flags) -> tuple[float, float]:
    """Slope and intercept; targets a little inside of 0 and 1 keep them finite (Platt 1999, section 2.2)."""
    true, false = int(labels.sum()), int((~labels).sum())
    target = np.where(labels, (true + 1.0) / (true + 2.0), 1.0 / (false + 2.0))
    # A soft target is the same as both labels, weighted.
    doubled = np.concatenate([scores, scores])[:, None]
    both = np.repeat([True, False], len(scores))
    found = fit_logistic(doubled, both, sample_weight=np.concatenate([target, 1.0 - target]))
    if found.weights[0] > 0.0:
        return float(found.weights[0]), found.bias
    return 0.0, float(np.log((true + 1.0) / (false + 1.0)))


def _folds(clusters: Indices, seed: int) -> Iterator[Flags]:
    """Rows to leave out in turn: each cluster, or ten groups of clusters where there are many."""
    order = np.random.default_rng(seed).permutation(int(clusters.max()) + 1)
    folds = len(order) if len(order) <= 2 * _FOLDS else _FOLDS
    for number in range(folds):
        yield np.isin(clusters, order[number::folds])


def _bootstrap(scores: Floats, labels: Flags, clusters: Indices, seed: int) -> Iterator[tuple[float, float]]:
    rng = np.random.default_rng(seed)
    count = int(clusters.max()) + 1
    members = [np.flatnonzero(clusters == number) for number in range(count)]
    for _ in range(_DRAWS):
        rows = np.concatenate([members[number] for number in rng.integers(0, count, count)])
        if _both(labels[rows]):
            yield _platt(scores[rows], labels[rows])


def _both(labels: Flags) -> bool:
    return bool(labels.any() and not labels.all())


def _curve(scores: Floats, slope: float, intercept: float) -> Floats:
    found: Floats = 0.5 * (1.0 + np.tanh((slope * scores + intercept) / 2.0))
    return found
