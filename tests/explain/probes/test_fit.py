"""Probes against an independent computation of the published formulas, and against truth that was planted."""

from __future__ import annotations

import numpy as np
import pytest

from tests.explain.probes.planted_truth import cosine, planted
from tracer.errors import InputError, UnknownNameError
from tracer.explain.probes import ccs
from tracer.explain.probes.directions import principal_components, truth_directions
from tracer.explain.probes.examples import Examples, Flags, Floats, normalise
from tracer.explain.probes.fit import KINDS, fit, score
from tracer.explain.probes.held_out import Material, equal_rows
from tracer.explain.probes.metrics import accuracy

# Classes overlap, so that logistic regression without penalty has an optimum.
NOISY = planted(strength=0.5, polarity=0.8, entities=60, seed=3)
CLEAR = planted(strength=2.0, entities=40, seed=4)
LEARNT, JUDGED = (0, 1, 2), (3, 4)


def parts(material: Material, layer: int = 1) -> tuple[Examples, Examples]:
    """Examples of some topics to learn from, and of others to be judged by."""
    examples = material.at(layer)
    return (
        examples.take(np.flatnonzero(np.isin(examples.topics, LEARNT))),
        examples.take(np.flatnonzero(np.isin(examples.topics, JUDGED))),
    )


def newton(features: Floats, labels: Flags, penalty: float = 0.0) -> tuple[Floats, float]:
    """Logistic regression by Newton's method on the log-likelihood less penalty |w|^2 / 2."""
    design = np.column_stack([features, np.ones(len(features))])
    ridge = np.diag([penalty] * features.shape[1] + [0.0])
    weights = np.zeros(design.shape[1])
    for _ in range(50):
        chance = 1.0 / (1.0 + np.exp(-design @ weights))
        gradient = design.T @ (labels - chance) - ridge @ weights
        curvature = (design * (chance * (1.0 - chance))[:, None]).T @ design + ridge
        weights = weights + np.linalg.solve(curvature, gradient)
    return weights[:-1], float(weights[-1])


def by_sets(examples: Examples) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    return [
        np.flatnonzero((examples.topics == topic) & (examples.negated == negated))
        for topic in np.unique(examples.topics)
        for negated in (False, True)
    ]


def ttpd(examples: Examples) -> tuple[Floats, Floats, Floats, float]:
    """t_G and t_P by the normal equations written out, then weights and bias of the whole probe."""
    values = examples.values.astype(np.float64)
    t = np.where(examples.labels, 1.0, -1.0)
    p = np.where(examples.negated, -1.0, 1.0)
    shifted = values.copy()
    for rows in by_sets(examples):
        shifted[rows] -= shifted[rows].mean(0)
    n, cross = len(t), float((t * t * p).sum())
    first, second = t @ shifted, (t * p) @ shifted
    determinant = n * n - cross * cross
    general = (n * first - cross * second) / determinant
    sensitive = (n * second - cross * first) / determinant
    polarity, _ = newton(values, ~examples.negated)
    two = np.column_stack([values @ general, values @ polarity])
    weights, bias = newton(two, examples.labels)
    return general, sensitive, weights[0] * general + weights[1] * polarity, bias


def test_ttpd_agrees_with_its_formulas() -> None:
    learnt, judged = parts(NOISY.material)
    general, sensitive, weights, bias = ttpd(learnt)
    found = truth_directions(learnt)
    probe = fit("ttpd", learnt)
    assert cosine(found.general, general) > 0.999999
    assert cosine(found.polarity_sensitive, sensitive) > 0.999999
    assert cosine(probe.directions["truth"], general) > 0.999999
    assert cosine(probe.weights, weights) > 0.999
    own = accuracy(judged.values.astype(np.float64) @ weights + bias, judged.labels)
    assert accuracy(probe.score(judged.values), judged.labels) == pytest.approx(own, abs=0.005)
    assert own > 0.6


def test_mass_mean_agrees_with_its_formulas() -> None:
    learnt, judged = parts(NOISY.material)
    values = learnt.values.astype(np.float64)
    difference = np.mean(values[learnt.labels], 0) - np.mean(values[~learnt.labels], 0)
    slope, bias = newton((values @ difference)[:, None], learnt.labels)
    probe = fit("mass_mean", learnt)
    assert cosine(probe.weights, difference) > 0.999999
    own = accuracy(slope[0] * (judged.values.astype(np.float64) @ difference) + bias, judged.labels)
    assert accuracy(probe.score(judged.values), judged.labels) == pytest.approx(own, abs=0.005)

    within = np.cov(values[learnt.labels].T, bias=True) * learnt.labels.mean()
    within += np.cov(values[~learnt.labels].T, bias=True) * (~learnt.labels).mean()
    tilted = np.linalg.solve(within, difference)
    assert cosine(fit("mass_mean_iid", learnt).weights, tilted) > 0.999


@pytest.mark.parametrize(("kind", "c"), [("logistic", None), ("logistic_l2", 0.01)])
def test_logistic_regression_agrees_with_newtons_method(kind: str, c: float | None) -> None:
    learnt, judged = parts(NOISY.material)
    values = learnt.values.astype(np.float64)
    mean, spread = values.mean(0), values.std(0)
    weights, bias = newton((values - mean) / spread, learnt.labels, 0.0 if c is None else 1.0 / c)
    probe = fit(kind, learnt)
    assert cosine(probe.weights, weights / spread) > 0.9999
    own = accuracy((judged.values - mean) / spread @ weights + bias, judged.labels)
    assert accuracy(probe.score(judged.values), judged.labels) == pytest.approx(own, abs=0.005)


def adam(plus: Floats, minus: Floats, start: Floats) -> tuple[Floats, float]:
    """Contrast-consistent search by AdamW with the gradient written out; weights and bias, and the loss."""
    ones = np.ones((len(plus), 1))
    plus, minus = np.hstack([plus, ones]), np.hstack([minus, ones])
    w, first, second = start.copy(), np.zeros_like(start), np.zeros_like(start)

    def sides() -> tuple[Floats, Floats]:
        return 1.0 / (1.0 + np.exp(-plus @ w)), 1.0 / (1.0 + np.exp(-minus @ w))

    for step in range(1, 1001):
        a, b = sides()
        consistent = 2.0 * (a + b - 1.0)
        sure = 2.0 * np.minimum(a, b)
        gradient = plus.T @ ((consistent + sure * (a < b)) * a * (1.0 - a))
        gradient += minus.T @ ((consistent + sure * (b < a)) * b * (1.0 - b))
        gradient /= len(plus)
        w = w * (1.0 - 1e-3 * 1e-2)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        w = w - 1e-3 * (first / (1.0 - 0.9**step)) / (np.sqrt(second / (1.0 - 0.999**step)) + 1e-8)
    a, b = sides()
    return w, float(np.mean((a + b - 1.0) ** 2 + np.minimum(a, b) ** 2))


def test_ccs_agrees_with_its_formulas() -> None:
    learnt, judged = parts(CLEAR.material)
    values = learnt.values.astype(np.float64)
    for rows in by_sets(learnt):
        values[rows] -= values[rows].mean(0)
    affirmative = np.flatnonzero(~learnt.negated)
    starts = ccs.starts(np.random.default_rng(5), values.shape[1])
    tries = [adam(values[affirmative], values[learnt.partners[affirmative]], start) for start in starts]
    weights, loss = min(tries, key=lambda item: item[1])
    probe = fit("ccs", learnt, seed=5)
    assert abs(cosine(probe.directions["truth"], weights[:-1])) > 0.999
    assert probe.notes["loss"] == pytest.approx(loss, rel=1e-3)

    # p = (p+ + 1 - p-) / 2, each hidden state less the training mean of its polarity.
    sign = np.sign(probe.directions["truth"] @ weights[:-1])
    raw = learnt.values.astype(np.float64)
    rows = np.flatnonzero(~judged.negated)
    chances = [
        1.0 / (1.0 + np.exp(-sign * ((judged.values[side] - mean) @ weights[:-1] + weights[-1])))
        for side, mean in (
            (rows, raw[~learnt.negated].mean(0)),
            (judged.partners[rows], raw[learnt.negated].mean(0)),
        )
    ]
    own = np.mean(((chances[0] + 1.0 - chances[1]) / 2.0 > 0.5) == judged.labels[rows])
    assert accuracy(score(probe, judged)[rows], judged.labels[rows]) == pytest.approx(own, abs=0.005)


def test_ccs_says_that_its_sign_came_from_labels() -> None:
    learnt, judged = parts(CLEAR.material)
    probe = fit("ccs", learnt)
    turned = fit("ccs", learnt.with_labels(~learnt.labels))
    assert cosine(probe.weights, turned.weights) == pytest.approx(-1.0)
    assert probe.notes["sign_labels"] == ccs.SIGN_LABELS
    assert "labels" in str(probe.notes["sign"])
    assert accuracy(score(probe, judged), judged.labels) > 0.9


@pytest.mark.parametrize("kind", ["ttpd", "mass_mean", "mass_mean_iid", "logistic_l2"])
def test_planted_truth_is_found(kind: str) -> None:
    learnt, judged = parts(CLEAR.material)
    probe = fit(kind, learnt)
    assert cosine(probe.weights, CLEAR.truth) > 0.9
    assert accuracy(probe.score(judged.values), judged.labels) > 0.92


def test_planted_directions_are_found_apart() -> None:
    learnt, _ = parts(CLEAR.material)
    found = truth_directions(learnt)
    assert cosine(found.general, CLEAR.truth) > 0.98
    assert cosine(found.polarity_sensitive, CLEAR.sensitive) > 0.97
    assert np.linalg.norm(found.general) == pytest.approx(np.linalg.norm(CLEAR.truth), rel=0.1)
    assert cosine(fit("ttpd", learnt).directions["polarity"], CLEAR.polarity) > 0.7


@pytest.mark.parametrize("kind", ["ttpd", "mass_mean"])
def test_attention_sinks_do_no_harm_after_normalisation(kind: str) -> None:
    found: dict[str, list[float]] = {"none": [], "rms": []}
    # How much harm a few enormous states do is chance: three draws.
    for seed in (6, 7, 8):
        wrecked, saved = (
            planted(strength=2.0, sinks=0.08, normalisation=how, seed=seed).material for how in ("none", "rms")
        )
        ordinary = np.flatnonzero(np.linalg.norm(parts(wrecked)[1].values, axis=1) < 50)
        for name, material in (("none", wrecked), ("rms", saved)):
            learnt, judged = parts(material)
            probe = fit(kind, learnt)
            found[name].append(accuracy(probe.score(judged.values[ordinary]), judged.labels[ordinary]))
    assert min(found["rms"]) > 0.93
    assert np.mean(found["rms"]) > np.mean(found["none"]) + 0.1


def test_normalised_states_are_equally_long() -> None:
    values = np.random.default_rng(0).standard_normal((5, 2, 16)).astype(np.float32) * 30
    values[0, 0] = 0.0
    found = normalise(values, "rms")
    assert np.sqrt((found**2).mean(-1)).ravel()[1:] == pytest.approx(1.0, abs=1e-5)
    assert not found[0, 0].any()
    assert normalise(values, "none") is values


def test_principal_components_are_those_of_the_covariance() -> None:
    rows = np.random.default_rng(1).standard_normal((80, 6)) * np.array([5, 3, 2, 1, 1, 1])
    values, vectors = np.linalg.eigh(np.cov(rows.T))
    found = principal_components(rows, 3)
    for number in range(3):
        assert abs(cosine(found[number], vectors[:, -1 - number])) == pytest.approx(1.0)
    assert values[-1] > values[-2]
    learnt, _ = parts(CLEAR.material)
    assert (
        cosine(fit("first_component", learnt).weights, principal_components(learnt.values.astype(np.float64), 1)[0])
        ** 2
        > 0.999
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_settles_everything(kind: str) -> None:
    learnt, judged = parts(CLEAR.material)
    one, other = (fit(kind, learnt, seed=2).score(judged.values) for _ in range(2))
    assert one.tolist() == other.tolist()


def test_equal_rows_are_equal_and_paired() -> None:
    material = CLEAR.material
    examples = material.at(1)
    # One topic is smaller than the others.
    kept = np.flatnonzero((examples.topics != 0) | (np.arange(len(examples.labels)) % 160 < 41))
    examples = examples.take(kept)
    rows = equal_rows(examples, LEARNT, np.random.default_rng(0))
    chosen = examples.take(rows)
    counts = {int(number): int((chosen.sets == number).sum()) for number in np.unique(chosen.sets)}
    assert len(set(counts.values())) <= 2
    assert max(counts.values()) <= int((examples.topics == 0).sum())
    assert len(np.unique(rows)) == len(rows)
    whole = chosen.take(np.flatnonzero(chosen.topics != 0))
    assert (whole.partners >= 0).mean() > 0.95
    assert (chosen.labels[chosen.partners[chosen.partners >= 0]] != chosen.labels[chosen.partners >= 0]).all()


def test_what_cannot_be_fitted_is_refused() -> None:
    learnt, _ = parts(CLEAR.material)
    affirmative = learnt.take(np.flatnonzero(~learnt.negated))
    true = learnt.take(np.flatnonzero(learnt.labels))
    with pytest.raises(InputError, match="negated"):
        fit("ttpd", affirmative)
    with pytest.raises(InputError, match="negations"):
        fit("ccs", affirmative)
    for kind in ("mass_mean", "logistic", "ttpd"):
        with pytest.raises(InputError, match="same label"):
            fit(kind, true)
    with pytest.raises(UnknownNameError, match="ttpd"):
        fit("ttdp", learnt)
    with pytest.raises(InputError, match="24 numbers"):
        fit("mass_mean", learnt).score(np.zeros((2, 5)))
