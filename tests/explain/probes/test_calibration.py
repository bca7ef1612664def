"""Measures and calibration against brute force, an oracle library, and probabilities that are known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from tracer.errors import InputError
from tracer.explain.probes.calibration import Calibration, fit_calibration, reliability
from tracer.explain.probes.metrics import accuracy, auroc, estimate, mean_draws, measure, roc


def drawn(rows: int, *, seed: int, slope: float = 1.3, intercept: float = -0.4) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and labels that are true with the probability of a logistic curve."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(0.0, 1.5, rows)
    return scores, rng.random(rows) < 1.0 / (1.0 + np.exp(-(slope * scores + intercept)))


def test_a_curve_that_is_there_is_found() -> None:
    scores, labels = drawn(6000, seed=0)
    found = fit_calibration(scores, labels, np.arange(6000) // 10)
    assert found.slope == pytest.approx(1.3, abs=0.1)
    assert found.intercept == pytest.approx(-0.4, abs=0.1)
    assert found.reliability.ece < 0.03
    assert sum(item.count for item in found.reliability.bins) == 6000
    inside = [item.low <= item.predicted <= item.high for item in found.reliability.bins]
    assert sum(inside) >= len(inside) - 2


def test_the_band_holds_the_truth_as_often_as_it_says() -> None:
    where = np.linspace(-2, 2, 5)
    true = 1.0 / (1.0 + np.exp(-(1.3 * where - 0.4)))
    hits = []
    for seed in range(8):
        scores, labels = drawn(200, seed=seed)
        band = fit_calibration(scores, labels, np.arange(200)).band(where)
        assert (band.low <= band.probability).all()
        assert (band.probability <= band.high).all()
        hits.append((band.low <= true) & (true <= band.high))
    assert 0.85 <= np.mean(hits) <= 1.0


def test_topics_that_differ_widen_the_band() -> None:
    scores, labels = drawn(1200, seed=1)
    topics = np.arange(1200) % 6
    shifted = scores + 2.0 * np.array([-1, 1, -1, 1, -1, 1])[topics]
    alike, apart = (fit_calibration(given, labels, topics).band(np.array([0.5])) for given in (scores, shifted))
    assert apart.high[0] - apart.low[0] > 1.5 * (alike.high[0] - alike.low[0])


def test_scores_that_point_the_wrong_way_tell_nothing() -> None:
    scores, labels = drawn(600, seed=2)
    found = fit_calibration(-scores, labels, np.arange(600) // 6)
    assert found.slope == 0.0
    assert found.probability(np.array([-5.0, 5.0])) == pytest.approx(labels.mean(), abs=0.01)


def test_scores_that_tell_everything_stay_finite() -> None:
    labels = np.arange(40) % 2 == 0
    found = fit_calibration(np.where(labels, 1.0, -1.0), labels, np.arange(40) // 2)
    assert np.isfinite([found.slope, found.intercept]).all()
    assert 0.9 < found.probability(np.array([1.0]))[0] < 1.0


def test_a_calibration_survives_json() -> None:
    scores, labels = drawn(200, seed=3)
    found = fit_calibration(scores, labels, np.arange(200) // 4)
    again = Calibration.model_validate_json(found.model_dump_json())
    assert again == found


def test_one_cluster_is_too_few() -> None:
    scores, labels = drawn(50, seed=4)
    with pytest.raises(InputError, match="two topics"):
        fit_calibration(scores, labels, ["same"] * 50)


def test_expected_calibration_error_by_hand() -> None:
    probabilities = np.array([0.05, 0.05, 0.05, 0.95, 0.95, 1.0])
    labels = np.array([False, False, True, True, True, True])
    found = reliability(probabilities, labels)
    assert [item.count for item in found.bins] == [3, 3]
    assert found.ece == pytest.approx((3 * abs(1 / 3 - 0.05) + 3 * abs(1.0 - 2.9 / 3)) / 6)
    assert found.bins[0].low < 1 / 3 < found.bins[0].high
    assert found.bins[1].high == 1.0


SCORES = st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=40).filter(
    lambda rows: len({label for _, label in rows}) == 2
)


@given(rows=SCORES)
def test_auroc_is_that_of_scikit_learn(rows: list[tuple[int, bool]]) -> None:
    scores = np.array([score for score, _ in rows], dtype=np.float64)
    labels = np.array([label for _, label in rows])
    assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))
    false, true, _ = roc_curve(labels, scores, drop_intermediate=False)
    curve = roc(scores, labels)
    assert curve.false_positives == pytest.approx(false)
    assert curve.true_positives == pytest.approx(true)


def test_measures_without_both_labels() -> None:
    labels = np.ones(4, dtype=bool)
    scores = np.array([1.0, -1.0, 0.0, 2.0])
    assert auroc(scores, labels) is None
    assert roc(scores, labels).true_positives == ()
    assert accuracy(scores, labels) == pytest.approx(2.5 / 4)
    assert measure("x", scores, labels, range(4)).auroc is None


def test_intervals_are_those_of_drawing_clusters_by_hand() -> None:
    """Clusters of equal rows count as one row each: the interval is as wide as theirs, not as that of all rows."""
    scores, labels = drawn(60, seed=5)
    wide = measure("x", np.repeat(scores, 9), np.repeat(labels, 9), np.repeat(np.arange(60), 9), draws=1500)
    narrow = measure("x", np.repeat(scores, 9), np.repeat(labels, 9), range(540), draws=1500)
    rng = np.random.default_rng(1)
    by_hand, areas = [], []
    for _ in range(1500):
        rows = rng.integers(0, 60, 60)
        by_hand.append(np.mean((scores[rows] > 0) == labels[rows]))
        areas.append(roc_auc_score(labels[rows], scores[rows]))
    assert wide.accuracy.low == pytest.approx(np.quantile(by_hand, 0.025), abs=0.02)
    assert wide.accuracy.high == pytest.approx(np.quantile(by_hand, 0.975), abs=0.02)
    assert wide.auroc is not None
    assert wide.auroc.low == pytest.approx(np.quantile(areas, 0.025), abs=0.02)
    assert wide.auroc.high == pytest.approx(np.quantile(areas, 0.975), abs=0.02)
    assert narrow.accuracy.high - narrow.accuracy.low < 0.5 * (wide.accuracy.high - wide.accuracy.low)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000))
def test_means_over_topics_are_drawn_around_the_mean(seed: int) -> None:
    parts = [drawn(rows, seed=seed + rows) for rows in (40, 200)]
    scores = np.concatenate([part[0] for part in parts])[None].repeat(3, 0)
    labels = np.concatenate([part[1] for part in parts])
    topics = np.repeat([0, 1], [40, 200])
    drawn_accuracy, drawn_area = mean_draws(scores, labels, topics, list(range(240)), draws=300)
    middle = np.mean([accuracy(own, given) for own, given in parts])
    assert np.mean(drawn_accuracy) == pytest.approx(middle, abs=0.02)
    area = np.mean([roc_auc_score(given, own) for own, given in parts])
    assert np.mean(drawn_area) == pytest.approx(area, abs=0.02)
    found = estimate(float(middle), drawn_accuracy)
    assert found.low < found.value < found.high
