"""Faithfulness measures against hand computations, and on a model whose attribution is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tests.explain.needle import needle_model, needle_trace
from tracer.errors import TraceFormatError
from tracer.explain.base import Context
from tracer.explain.faithfulness import (
    HELD_OUT,
    Faithfulness,
    against_random,
    agreement,
    heldout_masks,
    measure,
    spearman,
)
from tracer.explain.removal import Removal
from tracer.replay.model import Replica
from tracer.replay.recorded import Recorded


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
