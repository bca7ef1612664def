"""How well scores tell true from false, with bootstrap intervals that keep what belongs together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from tracer.explain.probes.examples import Flags, Floats
from tracer.explain.probes.statements import Indices
from tracer.trace.probe_report import Curve, Density, Estimate, Measured

DRAWS = 1000
"""Bootstrap samples."""
_LEVEL = 0.95
_POINTS = 200
"""Most points of a curve that is kept for a picture."""
_DENSITY_BINS = 30
_OUTSIDE = 0.005
"""Share of the scores at each end that lies in the outermost bins of a histogram."""


def accuracy(scores: Floats, labels: Flags) -> float:
    """Share of scores on the right side of zero; zero itself is half right."""
    return float(_right(scores, labels).mean())


def auroc(scores: Floats, labels: Flags) -> float | None:
    """Probability that a true statement scores above a false one, ties counting half; ``None`` without both."""
    if labels.all() or not labels.any():
        return None
    return float(_weighted_auroc(scores, labels, np.ones((1, len(scores))))[0])


def measure(
    name: str, scores: Floats, labels: Flags, clusters: Iterable[object], *, seed: int = 0, draws: int = DRAWS
) -> Measured:
    """Accuracy and AUROC of scores, with intervals over clusters drawn with replacement.

    Args:
        name: What is measured.
        scores: Above zero means true, ``(rows,)``.
        labels: ``(rows,)``.
        clusters: What each row belongs to, such as its entity: rows of one are drawn together, ``(rows,)``.
        seed: Decides the draws.
        draws: How many.
    """
    weights = _draw(clusters, seed, draws)
    right = _right(scores, labels)
    totals = weights.sum(1)
    drawn = weights @ right / np.where(totals > 0, totals, 1.0)
    area = auroc(scores, labels)
    found = None
    if area is not None:
        areas = _weighted_auroc(scores, labels, weights)
        found = estimate(area, areas[np.isfinite(areas)])
    return Measured(name=name, rows=len(scores), accuracy=estimate(float(right.mean()), drawn[totals > 0]), auroc=found)


def auroc_difference(
    first: Floats, second: Floats, labels: Flags, clusters: Iterable[object], *, seed: int = 0, draws: int = DRAWS
) -> Estimate | None:
    """AUROC of one score less that of another on the same rows; each draw takes both on the same clusters.

    Args:
        first: ``(rows,)``.
        second: ``(rows,)``.
        labels: ``(rows,)``.
        clusters: As for `measure`.
        seed: Decides the draws.
        draws: How many.

    Returns:
        ``None`` where there are only true or only false rows.
    """
    own, other = auroc(first, labels), auroc(second, labels)
    if own is None or other is None:
        return None
    weights = _draw(clusters, seed, draws)
    drawn = _weighted_auroc(first, labels, weights) - _weighted_auroc(second, labels, weights)
    return estimate(own - other, drawn[np.isfinite(drawn)])


def estimate(value: float, drawn: Floats) -> Estimate:
    """A number with the interval that its bootstrap draws ``(draws,)`` give."""
    if not len(drawn):
        return Estimate(value=value, low=value, high=value)
    low, high = np.quantile(drawn, [(1.0 - _LEVEL) / 2.0, (1.0 + _LEVEL) / 2.0])
    return Estimate(value=value, low=float(low), high=float(high))


def mean_draws(
    scores: Floats,
    labels: Flags,
    topics: Indices,
    clusters: Sequence[object],
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> tuple[Floats, Floats]:
    """Bootstrap draws of accuracy and AUROC, each a mean over topics; repeats take turns.

    Args:
        scores: ``(repeats, rows)``.
        labels: ``(rows,)``.
        topics: Number of each row's topic, ``(rows,)``.
        clusters: What is drawn together, ``(rows,)``.
        seed: Decides the draws.
        draws: How many, shared among the repeats.

    Returns:
        Accuracy and AUROC, each ``(draws,)`` or a few more.
    """
    each = -(-draws // len(scores))
    accuracies: list[Floats] = []
    areas: list[Floats] = []
    for topic in np.unique(topics):
        rows = np.flatnonzero(topics == topic)
        weights = _draw([clusters[row] for row in rows], seed + int(topic), each * len(scores))
        lines = weights.reshape(len(scores), each, len(rows))
        right, area = [], []
        for own, drawn in zip(scores[:, rows], lines, strict=True):
            right.append(drawn @ _right(own, labels[rows]) / drawn.sum(1))
            area.append(_weighted_auroc(own, labels[rows], drawn))
        accuracies.append(np.concatenate(right))
        areas.append(np.concatenate(area))
    # A draw of few entities may have one label only; its topic then counts with its other draws.
    areas = [np.where(np.isfinite(area), area, np.nanmean(area)) for area in areas]
    return np.mean(accuracies, axis=0), np.mean(areas, axis=0)


def roc(scores: Floats, labels: Flags) -> Curve:
    """The receiver operating characteristic, thinned for drawing; empty without both labels."""
    if labels.all() or not labels.any():
        return Curve(false_positives=(), true_positives=())
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    true = np.concatenate([[0.0], np.cumsum(labels[order])[last] / labels.sum()])
    false = np.concatenate([[0.0], np.cumsum(~labels[order])[last] / (~labels).sum()])
    kept = np.unique(np.linspace(0, len(true) - 1, min(len(true), _POINTS)).round().astype(int))
    return Curve(false_positives=tuple(false[kept].tolist()), true_positives=tuple(true[kept].tolist()))


def density(scores: Floats, labels: Flags) -> Density:
    """Histograms of scores ``(rows,)`` of true and of false statements; a few outliers do not stretch the bins."""
    low, high = (float(np.quantile(scores, level)) for level in (_OUTSIDE, 1.0 - _OUTSIDE))
    edges = np.linspace(low, high if high > low else low + 1.0, _DENSITY_BINS + 1)
    held = np.clip(scores, edges[0], edges[-1])
    true, false = (np.histogram(held[own], edges)[0] for own in (labels, ~labels))
    return Density(edges=tuple(edges.tolist()), true=tuple(true.tolist()), false=tuple(false.tolist()))


def _right(scores: Floats, labels: Flags) -> Floats:
    return np.where(scores == 0.0, 0.5, ((scores > 0.0) == labels).astype(np.float64))


def _draw(clusters: Iterable[object], seed: int, draws: int) -> Floats:
    """How often each row is in each draw, ``(draws, rows)``."""
    numbers: dict[object, int] = {}
    own: Indices = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], dtype=np.int64)
    count = len(numbers)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1.0 / count), size=draws)
    weights: Floats = drawn[:, own].astype(np.float64)
    return weights


def _weighted_auroc(scores: Floats, labels: Flags, weights: Floats) -> Floats:
    """AUROC of weighted rows, one for each row of weights ``(draws, rows)``; not a number where a label is missing."""
    order = np.argsort(scores, kind="stable")
    starts = np.concatenate([[0], 1 + np.flatnonzero(np.diff(scores[order]))])
    sorted_weights, true = weights[:, order], labels[order]
    positive = np.add.reduceat(np.where(true, sorted_weights, 0.0), starts, axis=1)
    negative = np.add.reduceat(np.where(true, 0.0, sorted_weights), starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative / 2.0
    pairs = positive.sum(1) * negative.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Floats = (positive * below).sum(1) / pairs
    return found
