"""Faithfulness measures against hand computations, and on a model whose attribution is known."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tests.explain.needle import needle_model, needle_trace
from tracer.errors import TraceFormatError
from tracer.explain.attribution.ablation import random_masks
from tracer.explain.base import Context
from tracer.explain.faithfulness import (
    HELD_OUT,
    Faithfulness,
    _chance,
    agreement,
    heldout_masks,
    measure,
    spearman,
)
from tracer.explain.removal import Removal
from tracer.replay.model import Replica
from tracer.replay.recorded import Recorded
from tracer.trace.faithfulness import RANDOM_ORDERS, AgainstRandom, _one_in_twenty, against_random


def removal(hidden_in: int = 3, documents: int = 6) -> Removal:
    recorded = Recorded(needle_trace(hidden_in=hidden_in, documents=documents))
    context = Context(Replica(needle_model()), recorded)
    return Removal(context, recorded.targets[0], kinds=frozenset({"document"}))


def oracle(item: Removal, hidden_in: int) -> np.ndarray:
    """The true attribution: one for the document with the needle."""
    sources = item.context.recorded.sources
    return np.array([float(source.step_id == f"d{hidden_in}") for source in sources])


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=3, max_size=20))
def test_spearman_equals_scipy(pairs: list[tuple[int, int]]) -> None:
    left, right = (np.array(side, dtype=float) for side in zip(*pairs, strict=True))
    own = spearman(left, right)
    if len(set(left)) == 1 or len(set(right)) == 1:
        assert own is None
    else:
        assert own == pytest.approx(stats.spearmanr(left, right).statistic, abs=1e-12)


def test_curves_equal_brute_force() -> None:
    item = removal()
    scores = np.random.default_rng(4).normal(size=len(item.context.recorded.sources))
    found = measure(item, {"any": scores}, orders=2, points=8)["any"]
    order = np.argsort(-item.of_units(scores), kind="stable")
    deletion: list[float] = []
    insertion: list[float] = []
    for count in range(7):
        mask = np.ones(6, dtype=bool)
        mask[order[:count]] = False
        deletion.append(removal().values(mask[None])[0])
        insertion.append(removal().values(~mask[None])[0])
    areas = [np.trapezoid(curve, dx=1 / 6) for curve in (deletion, insertion)]
    assert found.gap == pytest.approx(areas[1] - areas[0], abs=1e-4)
    assert found.top_k_drop == pytest.approx(deletion[0] - deletion[1], abs=1e-4)
    assert (found.k, found.sources) == (1, 6)
    assert found.curves is not None
    assert found.curves.shares == pytest.approx(np.linspace(0, 1, 7))
    assert found.curves.deletion == pytest.approx(deletion, abs=1e-4)
    assert found.curves.insertion == pytest.approx(insertion, abs=1e-4)


def test_curves_show_the_areas_that_are_reported() -> None:
    item = removal()
    scores = np.random.default_rng(4).normal(size=len(item.context.recorded.sources))
    found = measure(item, {"any": scores})["any"]
    curves = found.curves
    assert curves is not None
    below = {name: np.trapezoid(getattr(curves, name), curves.shares) for name in ("deletion", "insertion")}
    chance = {name: np.trapezoid(getattr(curves, f"random_{name}"), curves.shares) for name in below}
    assert chance["deletion"] - below["deletion"] == pytest.approx(found.deletion, abs=1e-3)
    assert below["insertion"] - chance["insertion"] == pytest.approx(found.insertion, abs=1e-3)


def test_a_stored_faithfulness_without_curves_is_read() -> None:
    item = removal()
    scores = np.random.default_rng(4).normal(size=len(item.context.recorded.sources))
    found = measure(item, {"any": scores})["any"]
    document = found.to_document()
    assert Faithfulness.from_document(document) == found
    del document["curves"]
    assert Faithfulness.from_document(document) == replace(found, curves=None)
    with pytest.raises(TraceFormatError, match="explain the trace again"):
        Faithfulness.from_document({**document, "curves": {"deletion": []}})


def test_lds_compares_predicted_and_measured_effects_on_held_out_masks() -> None:
    item = removal()
    scores = np.random.default_rng(4).normal(size=len(item.context.recorded.sources))
    found = measure(item, {"any": scores}, seed=3)["any"]
    masks = heldout_masks(HELD_OUT, 6, seed=3)
    expected = stats.spearmanr(masks @ item.of_units(scores), removal().values(masks).round(4)).statistic
    assert found.lds == pytest.approx(expected, abs=1e-9)


def test_the_true_attribution_is_better_than_random_and_a_random_one_is_not() -> None:
    truth: list[Faithfulness] = []
    reverse: list[Faithfulness] = []
    chance: list[list[Faithfulness]] = [[] for _ in range(20)]
    generator = np.random.default_rng(0)
    for hidden_in in range(4):
        item = removal(hidden_in)
        known = oracle(item, hidden_in)
        drawn = {f"random {number}": generator.normal(size=len(known)) for number in range(len(chance))}
        found = measure(item, {"truth": known, "reverse": -known, **drawn}, seed=hidden_in, points=8, orders=12)
        truth.append(found["truth"])
        reverse.append(found["reverse"])
        for number, own in enumerate(chance):
            own.append(found[f"random {number}"])
        assert found["truth"].lds is not None
        assert found["truth"].lds > 0.8
        assert found["truth"].top_k_drop > 1
    assert against_random(truth).better
    assert against_random(reverse).z < -1.6
    # One in twenty would be chance; three of twenty still is (p = .08 for more).
    assert sum(against_random(own).better for own in chance) <= 3
    assert abs(float(np.mean([against_random(own).z for own in chance]))) < 0.7


@pytest.mark.parametrize("freedom", [5, 8, 20, 100, 1e9])
def test_the_threshold_is_that_of_students_distribution(freedom: float) -> None:
    assert _one_in_twenty(freedom) == pytest.approx(stats.t.ppf(0.95, freedom), abs=1e-3)


def measured(gap: float, *, spread: float = 1.0) -> Faithfulness:
    return Faithfulness(8, None, 0.0, 1, 0.0, 0.0, 0.0, gap, 0.0, spread)


def test_targets_are_pooled_by_the_variance_of_their_sums() -> None:
    # Two targets, six drawn orders each: z = (2 + 1) / sqrt(2 * 7/6), ten degrees of freedom.
    found = against_random([measured(2.0), measured(1.0)])
    assert found.z == pytest.approx(3 / np.sqrt(7 / 3))
    assert found.better is bool(found.z > stats.t.ppf(0.95, 10))
    # One target against six orders: five degrees of freedom.
    limit = stats.t.ppf(0.95, 5) * np.sqrt(7 / 6)
    assert [against_random([measured(limit + by)]).better for by in (-0.01, 0.01)] == [False, True]
    assert against_random([measured(1.0, spread=0.0)]) == AgainstRandom(0.0, better=False)


@pytest.mark.parametrize("spot", [0, 2, 5])
def test_a_random_method_is_better_than_random_in_one_case_of_twenty_where_targets_are_alike(spot: int) -> None:
    """One source matters and stands in the same place in every target: what orders have in common must not add up."""
    units, targets, games = 8, 25, 200
    generator = np.random.default_rng(spot)
    better = 0
    for _ in range(games):
        # Areas of a target that only asks whether one source is there, by the place of that source in an order.
        def gap(order: np.ndarray) -> float:
            return float(2 * np.flatnonzero(order == spot)[0] / units - 1)

        items: list[Faithfulness] = []
        for target in range(targets):
            orders = _chance(units, RANDOM_ORDERS, seed=int(generator.integers(1 << 62)) + target)
            random = [gap(order) for order in orders]
            items.append(
                Faithfulness(
                    units, None, 0.0, 1, 0.0, 0.0, 0.0, gap(generator.permutation(units)), float(np.mean(random)),
                    float(np.std(random, ddof=1)),
                )
            )  # fmt: skip
        better += against_random(items).better
    # Binomial(200, .05) is above 22 in less than one case of a thousand.
    assert better <= 22


@given(st.lists(st.floats(-5, 5), min_size=6, max_size=6, unique=True))
def test_the_best_of_six_orders_proves_nothing(gaps: list[float]) -> None:
    own, spread = max(gaps), float(np.std(gaps, ddof=1))
    item = Faithfulness(3, None, 0.0, 1, 0.0, 0.0, 0.0, own, float(np.mean(gaps)), spread)
    assert not against_random([item]).better


def test_held_out_masks_are_none_that_were_fitted_on_while_there_are_others() -> None:
    for units in (8, 14):
        fitted = random_masks(64, units, seed=3)
        masks = heldout_masks(HELD_OUT, units, seed=3, fitted=fitted)
        assert masks.shape == (HELD_OUT, units)
        assert not {mask.tobytes() for mask in masks} & {mask.tobytes() for mask in fitted}
    every = np.array(list(itertools.product([False, True], repeat=3)))
    assert len(np.unique(heldout_masks(HELD_OUT, 3, seed=0, fitted=every), axis=0)) > 4


def test_scores_that_are_all_alike_rank_nothing() -> None:
    item = removal()
    alike = np.ones(len(item.context.recorded.sources))
    found = [measure(item, {"alike": alike}, seed=seed)["alike"] for seed in range(24)]
    assert all(own.lds is None for own in found)
    # Whether the needle goes first is up to chance, one case of six, not to its place in the prompt.
    first = sum(own.top_k_drop > 1 for own in found)
    assert 1 <= first <= 10


def test_one_target_with_few_sources_proves_nothing() -> None:
    item = removal(documents=3, hidden_in=1)
    found = measure(item, {"truth": oracle(item, 1)})["truth"]
    assert found.gap > found.random_gap
    assert not against_random([found]).better


def test_what_several_methods_ask_alike_is_computed_once() -> None:
    item = removal()
    known = oracle(item, 3)
    one = measure(item, {"a": known}, seed=1)["a"]
    again = measure(item, {"a": known, "b": 2 * known}, seed=1)
    assert again["a"] == again["b"]
    assert again["a"].passes == one.passes == item.evaluated


def test_agreement() -> None:
    scores = {"a": np.array([1.0, 2, 3]), "b": np.array([2.0, 4, 9]), "c": np.array([3.0, 2, 1]), "d": np.zeros(3)}
    found = agreement(scores)
    assert found["a"]["b"] == pytest.approx(1)
    assert found["a"]["c"] == pytest.approx(-1)
    assert found["a"]["d"] is None
    assert "a" not in found["a"]
