"""Removal, leave-one-out, ContextCite and Shapley values against brute force and other solvers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Lasso
from sklearn.preprocessing import StandardScaler

from tests.explain.needle import needle_model, needle_trace
from tests.explain.planted import random_ids, small_trace
from tests.tiny_models import FAMILIES, tiny_model
from tracer.errors import InputError
from tracer.explain.attribution import ablation
from tracer.explain.attribution.ablation import random_masks, run
from tracer.explain.attribution.lasso import fit_lasso
from tracer.explain.base import Context, Finding
from tracer.explain.methods import request
from tracer.explain.removal import Removal, logit
from tracer.replay.model import Replica
from tracer.replay.recorded import Recorded, Target

TRACE = small_trace([random_ids(14, seed=1)], [[random_ids(12, seed=3)]], steps=4)
WINDOWED = {"mistral_window", "gemma2", "gemma3"}


def find(context: Context, target: Target, name: str, **parameters: Any) -> Finding:
    [found] = run(context, [request(name, parameters)], [target])
    return found


def by_hand(family: str, recorded: Recorded, target: Target, removal: Removal, mask: list[bool]) -> float:
    """The target's log-probability from one plain pass of its own over the shortened or the masked sequence."""
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    sequence = recorded.sequences[target.sequence].token_ids[: target.end]
    gone = {unit for unit, kept in zip(removal.units, mask, strict=True) if not kept}
    keep = np.array([int(source) not in gone for source in recorded.source_of[target.sequence][: target.end]])
    keep[target.start :] = True
    ids = torch.as_tensor(sequence)[None]
    with torch.no_grad():
        if removal.kind == "delete":
            logits = model(ids[:, torch.as_tensor(keep)]).logits[0]
        else:
            length = len(sequence)
            seen = torch.ones(length, length, dtype=torch.bool).tril() & torch.as_tensor(keep)[None]
            seen |= torch.eye(length, dtype=torch.bool)  # a hidden token may read itself: nobody reads it
            bias = torch.zeros(length, length).masked_fill(~seen, torch.finfo(torch.float32).min)
            where = torch.arange(length)[None]
            logits = model(ids, attention_mask=bias[None, None], position_ids=where).logits[0][torch.as_tensor(keep)]
    written = target.end - target.start
    logs = logits[-written - 1 : -1].log_softmax(-1)
    return float(logs[torch.arange(written), ids[0, target.start :]].sum())


@pytest.mark.parametrize("kind", ["delete", "mask"])
@pytest.mark.parametrize("family", FAMILIES)
def test_removal_equals_a_pass_of_its_own_for_every_mask(family: str, kind: Any) -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model(family)), recorded)
    target = recorded.targets[2]
    if kind == "mask" and family in WINDOWED:
        with pytest.raises(InputError, match="sliding window"):
            Removal(context, target, kind=kind)
        return
    removal = Removal(context, target, kind=kind)
    assert [recorded.sources[unit].kind for unit in removal.units] == ["instruction", "document", "thought", "thought"]
    masks = [list(mask) for mask in itertools.product([False, True], repeat=4)]
    expected = [by_hand(family, recorded, target, removal, mask) for mask in masks]
    assert removal.values(np.array(masks)) == pytest.approx(expected, abs=1e-4)
    assert removal.evaluated == 16
    # Far fewer tokens than a pass for each mask, and none for what is known.
    before = context.cost.forward_tokens
    lengths = [len(removal.shortened(np.array(mask))[0]) - 1 for mask in masks]
    assert before < sum(lengths)
    removal.values(np.array(masks))
    assert context.cost.forward_tokens == before


def test_leave_one_out_is_the_loss_of_each_source() -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model("llama")), recorded)
    target = recorded.targets[2]
    removal = Removal(context, target)
    found = find(context, target, "leave_one_out")
    by_source = recorded.aggregate(target, found.scores)
    for number, unit in enumerate(removal.units):
        mask = np.ones((2, 4), dtype=bool)
        mask[1, number] = False
        whole, without = removal.values(mask)
        assert by_source[unit] == pytest.approx(whole - without, abs=1e-4)
    assert found.details["masks"] == 5
    assert np.count_nonzero(by_source) == 4


def test_leave_one_out_is_the_difference_of_two_plain_passes() -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model("qwen3")), recorded)
    target = recorded.targets[2]
    removal = Removal(context, target)
    found = removal.of_units(recorded.aggregate(target, find(context, target, "leave_one_out").scores))
    whole = by_hand("qwen3", recorded, target, removal, [True] * 4)
    for number, own in enumerate(found):
        without = by_hand("qwen3", recorded, target, removal, [unit != number for unit in range(4)])
        assert own == pytest.approx(whole - without, abs=1e-4)


def test_exact_shapley_values_add_up_to_what_plain_passes_say() -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model("gpt_neox")), recorded)
    target = recorded.targets[2]
    removal = Removal(context, target)
    shares = removal.of_units(recorded.aggregate(target, find(context, target, "shapley").scores))
    ends = [by_hand("gpt_neox", recorded, target, removal, [kept] * 4) for kept in (True, False)]
    assert shares.sum() == pytest.approx(ends[0] - ends[1], abs=1e-4)


def test_exact_shapley_values_are_efficient_and_equal_their_definition() -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model("qwen2_tied")), recorded)
    target = recorded.targets[2]
    removal = Removal(context, target)
    found = find(context, target, "shapley")
    shares = removal.of_units(recorded.aggregate(target, found.scores))
    ends = removal.values(np.array([[True] * 4, [False] * 4]))
    assert shares.sum() == pytest.approx(ends[0] - ends[1], abs=1e-4)
    # The definition by orders: the mean gain of each source over all of them.
    gains = np.zeros(4)
    for order in itertools.permutations(range(4)):
        mask = np.zeros(4, dtype=bool)
        for unit in order:
            before = removal.values(mask[None])[0]
            mask[unit] = True
            gains[unit] += removal.values(mask[None])[0] - before
    assert shares == pytest.approx(gains / math.factorial(4), abs=1e-4)


def test_sampled_shapley_values_agree_with_exact_ones_within_their_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model("llama")), recorded)
    target = recorded.targets[2]
    removal = Removal(context, target)
    exact = removal.of_units(recorded.aggregate(target, find(context, target, "shapley").scores))
    monkeypatch.setattr("tracer.explain.attribution.ablation.EXACT_SHAPLEY", 0)
    found = find(context, target, "shapley", orders=400)
    sampled = removal.of_units(recorded.aggregate(target, found.scores))
    widths = found.details["half_width_95"]
    assert isinstance(widths, dict)
    for unit, own, theirs in zip(removal.units, sampled, exact, strict=True):
        assert abs(own - theirs) <= 2 * float(str(widths[recorded.sources[unit].id])) + 1e-5
    assert sampled.sum() == pytest.approx(exact.sum(), abs=1e-4)


@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(12, 80), st.sampled_from([0.001, 0.01, 0.1]))
def test_the_solver_equals_scikit_learn(seed: int, columns: int, rows: int, penalty: float) -> None:
    generator = np.random.default_rng(seed)
    masks = random_masks(rows, columns, seed=seed).astype(float)
    outcomes = masks @ generator.normal(size=columns) + 0.3 * generator.normal(size=rows)
    own, intercept = fit_lasso(masks, outcomes, penalty=penalty)
    scaler = StandardScaler().fit(masks)
    theirs = Lasso(alpha=penalty, tol=1e-12, max_iter=100_000).fit(scaler.transform(masks), outcomes)
    expected = theirs.coef_ / scaler.scale_
    assert own == pytest.approx(expected, abs=1e-6)
    assert intercept == pytest.approx(theirs.intercept_ - scaler.mean_ @ expected, abs=1e-6)


def test_logit_is_exact_near_one() -> None:
    assert logit(np.array([-1e-5])) == pytest.approx([math.log(1e5 - 0.5)], rel=1e-9)
    assert logit(np.log(np.array([0.25, 0.5]))) == pytest.approx([math.log(1 / 3), 0.0], abs=1e-12)
    assert np.isfinite(logit(np.array([0.0, -800.0]))).all()


def test_a_target_that_rounds_to_certain_does_not_outweigh_all_others() -> None:
    assert logit(np.array([0.0, 1e-6, -1e-300])).tolist() == pytest.approx([math.log(2**19)] * 3, abs=1e-5)
    generator = np.random.default_rng(0)
    masks = generator.random((64, 6)) < 0.5
    exact = masks @ np.array([6.0, 4.0, 0, 0, 0, 0]) + 2.0
    # Float32 logits of about 20 can only tell log p apart in steps of 2^-19.
    logprobs = np.round(-np.log1p(np.exp(-exact)) * 2**19) / 2**19
    found, _ = fit_lasso(masks.astype(float), logit(logprobs), penalty=0.0)
    assert found[:2] == pytest.approx([6, 4], abs=0.5)
    assert np.abs(found[2:]).max() < 0.5


@pytest.mark.parametrize("kind", ["delete", "mask"])
@pytest.mark.parametrize("name", ["leave_one_out", "contextcite", "shapley"])
def test_a_planted_document_is_found(name: str, kind: str) -> None:
    recorded = Recorded(needle_trace(hidden_in=4))
    context = Context(Replica(needle_model()), recorded)
    [target] = recorded.targets
    found = find(context, target, name, removal=kind, kinds="document")
    by_source = recorded.aggregate(target, found.scores)
    values = {str(source.step_id): value for source, value in zip(recorded.sources, by_source, strict=True)}
    others = max(abs(value) for key, value in values.items() if key != "d4")
    assert values["d4"] > 1
    assert values["d4"] > 10 * others


def test_contextcite_is_reproducible_and_says_how_well_it_fits() -> None:
    recorded = Recorded(TRACE)
    target = recorded.targets[2]
    replica = Replica(tiny_model("llama"))
    first, second = (
        find(Context(replica, recorded, seed=seed), target, "contextcite", ablations=24) for seed in (1, 1)
    )
    assert first.scores.tolist() == second.scores.tolist()
    other = find(Context(replica, recorded, seed=2), target, "contextcite", ablations=24)
    assert first.scores.tolist() != other.scores.tolist()
    assert 0 < float(str(first.details["fit_r2"])) <= 1


@pytest.mark.parametrize(
    ("name", "parameters"), [("leave_one_out", {}), ("contextcite", {}), ("shapley", {"orders": 3})]
)
def test_progress_moves_inside_a_target_and_only_grows(
    name: str, parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "EXACT_SHAPLEY", 2)
    monkeypatch.setattr("tracer.explain.removal._AT_ONCE", 60)
    told: list[tuple[float, int]] = []
    recorded = Recorded(TRACE)
    targets = recorded.targets[:3]
    context = Context(Replica(tiny_model("llama")), recorded, progress=lambda done, total: told.append((done, total)))
    list(run(context, [request(name, parameters)], targets))
    done = [amount for amount, _ in told]
    assert {total for _, total in told} == {len(targets)}
    assert done == sorted(done) and done[-1] == len(targets)
    for number in range(len(targets)):
        assert sum(number < amount < number + 1 for amount in done) >= 2


def test_all_orders_of_sampled_shapley_values_are_one_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "EXACT_SHAPLEY", 2)
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model("llama")), recorded)
    found = find(context, recorded.targets[2], "shapley", orders=50)
    # Fifty orders of four sources come by each of the sixteen masks.
    every = Context(context.replica, recorded)
    masks = np.array(list(itertools.product([False, True], repeat=4)))
    Removal(every, recorded.targets[2]).values(masks)
    assert context.cost.forward_tokens == every.cost.forward_tokens
    assert found.details["masks"] == 16


@pytest.mark.parametrize("name", ["leave_one_out", "contextcite", "shapley"])
def test_what_is_not_measured_is_not_claimed(name: str) -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model("llama")), recorded, target_function="contrast", foil=5)
    with pytest.raises(InputError, match="takes no other target function"):
        find(context, recorded.targets[2], name)


def test_masks_that_begin_alike_share_a_tree_in_whichever_order_they_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(TRACE)
    masks = np.array(list(itertools.product([False, True], repeat=4)))
    monkeypatch.setattr("tracer.explain.removal._AT_ONCE", 150)
    tokens, values = [], []
    for order in (np.arange(16), np.random.default_rng(1).permutation(16)):
        context = Context(Replica(tiny_model("llama")), recorded)
        found = Removal(context, recorded.targets[2]).values(masks[order])
        tokens.append(context.cost.forward_tokens)
        values.append(found[np.argsort(order)])
    assert tokens[0] == tokens[1]
    np.testing.assert_allclose(values[0], values[1], atol=1e-5)


def test_a_target_that_read_nothing_of_the_kinds_asked_for() -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model("llama")), recorded)
    found = find(context, recorded.targets[2], "shapley", kinds="vote")
    assert not found.scores.any()
    assert found.details["masks"] == 0
    with pytest.raises(InputError, match="read no source of the kinds vote"):
        Removal(context, recorded.targets[2], kinds=frozenset({"vote"}))


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("leave_one_out", {"removal": "hide"}, "removal is 'hide'"),
        ("contextcite", {"ablations": 1}, "ablations of contextcite is 1"),
        ("contextcite", {"penalty": -1.0}, "penalty of contextcite is -1.0"),
        ("leave_one_out", {"kinds": 3}, "kinds is 3"),
        ("shapley", {"backend": "gpu"}, "backend is 'gpu'"),
    ],
)
def test_parameters_that_cannot_be_used(name: str, parameters: dict[str, Any], message: str) -> None:
    recorded = Recorded(TRACE)
    with pytest.raises(InputError, match=message):
        find(Context(Replica(tiny_model("llama")), recorded), recorded.targets[2], name, **parameters)
