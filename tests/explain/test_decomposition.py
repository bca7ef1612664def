"""Decomposition methods against whole matrices in float64, written out from what transformers itself computes."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.explain.planted import random_ids, small_trace
from tests.tiny_models import HEADS, LAYERS, WIDTH, tiny_model
from tracer.errors import CancelledError, InputError
from tracer.explain.attribution import residual as residual_module
from tracer.explain.attribution.decomposition import run
from tracer.explain.attribution.residual import TreeResidual
from tracer.explain.base import Context, Finding
from tracer.explain.methods import METHODS, request
from tracer.replay.model import Replica
from tracer.replay.recorded import Recorded, Target
from tracer.replay.tree import Ids, build_tree
from tracer.trace.trace import Trace

Array = NDArray[np.float64]

MODELS = ("llama", "qwen2_tied", "qwen3", "mistral_window")
NAMES = tuple(name for name, method in METHODS.items() if method.family == "decomposition")
PROMPT = random_ids(20, seed=1)
# Two samples of one prompt; a second prompt that begins like the first one; a third that goes on where a sample ended.
SAMPLES = [random_ids(9, seed=2), random_ids(7, seed=3)]
TRACE = small_trace(
    [PROMPT, [*PROMPT[:12], *random_ids(9, seed=4)], [*PROMPT, *SAMPLES[0], *random_ids(4, seed=5)]],
    [SAMPLES, [random_ids(6, seed=6)], [random_ids(6, seed=7)]],
)


@dataclass(frozen=True, slots=True, eq=False)
class Inside:
    """What a model computed on one sequence, in float64.

    Args:
        entering: ``(layers + 1, tokens, width)``; the last one left the last layer.
        middle: The residual stream behind attention, ``(layers, tokens, width)``.
        attention: ``(layers, heads, tokens, tokens)``.
        written: W_O^h v_j, ``(layers, heads, tokens, width)``.
        logits: ``(tokens, vocabulary)``.
    """

    entering: Array
    middle: Array
    attention: Array
    written: Array
    logits: Array

    @property
    def carried(self) -> Array:
        """What attention carries from j to i, ``(layers, i, j, width)``."""
        carried: Array = np.einsum("lhij,lhjd->lijd", self.attention, self.written)
        return carried

    @property
    def contributions(self) -> Array:
        """T, ``(layers, i, j, width)``."""
        passing = np.eye(self.entering.shape[1])[None, :, :, None] * self.entering[:-1, :, None]
        return self.carried + passing


@cache
def inside(family: str, ids: tuple[int, ...]) -> Inside:
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    model.double().requires_grad_(False)
    found: dict[str, list[Array]] = {"middle": [], "values": []}

    def keep(name: str, tensor: torch.Tensor) -> None:
        found[name].append(tensor[0].numpy())

    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, inputs: keep("middle", inputs[0]))
        layer.self_attn.v_proj.register_forward_hook(lambda _, __, output: keep("values", output))
    entering: list[Array] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0][0].numpy()))
    model.model.norm.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0][0].numpy()))
    with torch.no_grad():
        output = model(torch.tensor([ids]), output_attentions=True, use_cache=False)
    written = []
    for layer, values in zip(model.model.layers, found["values"], strict=True):
        out = layer.self_attn.o_proj.weight.numpy()
        size = out.shape[1] // HEADS
        groups = values.shape[1] // size
        for head in range(HEADS):
            group = head // (HEADS // groups)
            own = values[:, group * size : (group + 1) * size]
            written.append(own @ out[:, head * size : (head + 1) * size].T)
    return Inside(
        np.stack(entering),
        np.stack(found["middle"]),
        np.stack([weights[0].double().numpy() for weights in output.attentions]),
        np.stack(written).reshape(LAYERS, HEADS, len(ids), WIDTH),
        output.logits[0].numpy(),
    )


def inside_of(family: str, recorded: Recorded, target: Target) -> Inside:
    return inside(family, tuple(recorded.sequences[target.sequence].token_ids.tolist()))


def near(total: Array, parts: Array) -> Array:
    """Proximity shares of parts ``(..., j, width)`` in ``(..., width)``; each ``(..., j)`` sums to one."""
    shares = np.abs(total).sum(-1)[..., None] - np.abs(total[..., None, :] - parts).sum(-1)
    shares = np.maximum(shares, 0)
    normed: Array = shares / shares.sum(-1, keepdims=True)
    return normed


def matrices(model: Inside) -> Array:
    """C of each layer, ``(layers, i, j)``."""
    parts = model.contributions
    return near(parts.sum(2), parts)


def expected_alti(model: Inside, target: Target) -> Array:
    total = np.eye(model.entering.shape[1])
    for matrix in matrices(model):
        total = matrix @ total
    rows: Array = total[target.start - 1 : target.end - 1, : target.end].mean(0)
    return rows


def expected_logit(family: str, model: Inside, ids: Ids, target: Target, foils: Ids | None = None) -> Array:
    own = tiny_model(family).double().requires_grad_(False)
    unembedding, gamma = own.lm_head.weight.numpy(), own.model.norm.weight.numpy()
    total = np.zeros(len(ids))
    down = np.eye(len(ids))
    for layer in range(LAYERS):
        for position in range(target.start - 1, target.end - 1):
            last = model.entering[-1, position]
            direction = unembedding[ids[position + 1]]
            if foils is not None:
                direction = direction - unembedding[foils[position]]
            direction = gamma * direction / np.sqrt((last**2).mean() + own.config.rms_norm_eps)
            total += (model.carried[layer, position] @ direction) @ down
        down = matrices(model)[layer] @ down
    scores: Array = total[: target.end]
    return scores


def expected_span(model: Inside, target: Target) -> Array:
    parts = model.contributions[:, target.start - 1 : target.end - 1].sum(1)
    scores: Array = near(parts.sum(1), parts).mean(0)[: target.end]
    return scores


def findings(context: Context, *names: str, **parameters: Any) -> list[Finding]:
    return list(run(context, [request(name, parameters) for name in names], context.recorded.targets))


@pytest.mark.parametrize("family", MODELS)
def test_contributions_add_up_to_the_models_own_residual_stream(family: str) -> None:
    recorded = Recorded(TRACE)
    tree = build_tree([sequence.token_ids for sequence in recorded.sequences], longest=8)
    residual = TreeResidual(Context(Replica(tiny_model(family)), recorded), tree)
    for layer in reversed(range(LAYERS)):
        entering = residual.entering(layer)
        for reading in residual.readings(layer, torch.ones(len(tree), dtype=torch.bool)):
            rows = range(reading.heads.rows.start, reading.heads.rows.stop)
            columns = reading.heads.columns.tolist()
            parts = torch.zeros(len(rows), len(columns), WIDTH)
            for node in reading.heads.node.path:
                written = residual.written(layer, node)
                for index in range(node.start, node.end):
                    if index in columns:
                        column = columns.index(index)
                        parts[:, column] = reading.heads.weights[:, :, column].T @ written[index - node.start]
            for number, row in enumerate(rows):
                parts[number, columns.index(row)] += entering[row]
            sums = reading.attended @ residual.out_weight(layer).T + entering[reading.heads.rows]
            torch.testing.assert_close(parts.sum(1), sums, rtol=0, atol=1e-5 * float(sums.abs().max()))
            for sequence, places in zip(recorded.sequences, tree.sequences, strict=True):
                model = inside(family, tuple(sequence.token_ids.tolist()))
                for number, row in enumerate(rows):
                    for position in np.flatnonzero(places == row):
                        own = model.middle[layer, position]
                        assert np.abs(parts[number].sum(0).numpy() - own).max() <= 1e-5 * np.abs(own).max()


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_every_method_equals_its_definition_on_whole_matrices(family: str, low_memory: bool) -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model(family)), recorded, low_memory=low_memory)
    found = findings(context, "alti", "alti_logit")
    found += findings(context, "span", hops=0)
    assert len(found) == 3 * len(recorded.targets)
    for item in found:
        model, target = inside_of(family, recorded, item.target), item.target
        reference = {
            "alti": lambda model=model, target=target: expected_alti(model, target),
            "alti_logit": lambda model=model, target=target: expected_logit(
                family, model, recorded.sequences[target.sequence].token_ids, target
            ),
            "span": lambda model=model, target=target: expected_span(model, target),
        }[item.request.method.name]()
        assert item.scores.shape == (target.end,) and item.scores.dtype == np.float32
        np.testing.assert_allclose(
            item.scores, reference, atol=2e-5 * np.abs(reference).max(), err_msg=f"{item.request.method.name} {target}"
        )


def test_blocks_of_any_size_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model("qwen2_tied")), recorded)
    whole = findings(context, *NAMES)
    monkeypatch.setattr(residual_module, "_BLOCK", {"cpu": 300})
    monkeypatch.setattr(residual_module, "_WRITTEN", 1)
    monkeypatch.setattr("tracer.explain.attribution.tree_attention._SCORES", {"cpu": 400})
    for small, large in zip(findings(context, *NAMES), whole, strict=True):
        np.testing.assert_allclose(small.scores, large.scores, atol=1e-5 * np.abs(large.scores).max())


@pytest.mark.parametrize("family", MODELS)
def test_branches_of_a_tree_equal_each_sequence_alone(family: str) -> None:
    replica, recorded = Replica(tiny_model(family)), Recorded(TRACE)
    together = findings(Context(replica, recorded), *NAMES)
    assert together
    for item in together:
        context = Context(replica, recorded)
        [alone] = run(context, [item.request], [item.target])
        assert context.cost.forward_tokens == len(recorded.sequences[item.target.sequence].token_ids)
        np.testing.assert_allclose(item.scores, alone.scores, atol=1e-5 * np.abs(alone.scores).max())


def test_shares_add_up_to_one_and_are_none_behind_the_last_predicting_token() -> None:
    for item in findings(Context(Replica(tiny_model("qwen3")), Recorded(TRACE)), "alti", "span"):
        assert item.scores.sum() == pytest.approx(1, abs=1e-5)
        assert item.scores.min() >= 0 and item.scores[item.target.end - 1] == 0


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_embedding_attention_and_mlp_are_the_logit(family: str, low_memory: bool) -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model(family)), recorded, low_memory=low_memory)
    for item in findings(context, "alti_logit"):
        parts: Any = item.details
        ids = recorded.sequences[item.target.sequence].token_ids
        rows = np.arange(item.target.start - 1, item.target.end - 1)
        model = inside_of(family, recorded, item.target)
        logit = model.logits[rows, ids[rows + 1]].sum()
        assert parts["logit"] == pytest.approx(logit, abs=1e-4)
        assert parts["embedding"] + parts["attention"] + parts["mlp"] == pytest.approx(logit, abs=1e-4)
        assert len(parts["attention_by_layer"]) == len(parts["mlp_by_layer"]) == LAYERS
        assert sum(parts["attention_by_layer"]) == pytest.approx(parts["attention"])
        assert sum(parts["mlp_by_layer"]) == pytest.approx(parts["mlp"])
        assert item.scores.sum() == pytest.approx(parts["attention"], abs=1e-4)
        own = tiny_model(family).double().requires_grad_(False)
        divisor = np.sqrt((model.entering[-1, rows] ** 2).mean(-1, keepdims=True) + own.config.rms_norm_eps)
        directions = own.model.norm.weight.numpy() * own.lm_head.weight.numpy()[ids[rows + 1]] / divisor
        for layer in range(LAYERS):
            attention = (directions * (model.middle - model.entering[:-1])[layer, rows]).sum()
            mlp = (directions * (model.entering[1:] - model.middle)[layer, rows]).sum()
            assert parts["attention_by_layer"][layer] == pytest.approx(attention, abs=1e-4)
            assert parts["mlp_by_layer"][layer] == pytest.approx(mlp, abs=1e-4)


@pytest.mark.parametrize("foil", [None, 5])
def test_the_contrast_explains_the_logit_over_the_foils(foil: int | None) -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model("llama")), recorded, target_function="contrast", foil=foil)
    for item in findings(context, "alti_logit"):
        model, ids = inside_of("llama", recorded, item.target), recorded.sequences[item.target.sequence].token_ids
        logits = model.logits.copy()
        logits[np.arange(len(ids) - 1), ids[1:]] = -np.inf
        foils = logits.argmax(-1) if foil is None else np.full(len(ids), foil)
        reference = expected_logit("llama", model, ids, item.target, foils)
        np.testing.assert_allclose(item.scores, reference, atol=2e-5 * np.abs(reference).max())
        rows = np.arange(item.target.start - 1, item.target.end - 1)
        contrast = (model.logits[rows, ids[rows + 1]] - model.logits[rows, foils[rows]]).sum()
        assert item.details["logit"] == pytest.approx(contrast, abs=1e-4)


def test_hops_hand_shares_of_earlier_steps_on_to_what_they_read() -> None:
    # Three steps in one sequence: the third reads the second, the second the first.
    recorded = Recorded(small_trace([random_ids(10, seed=1)], [[random_ids(12, seed=2)]], steps=3))
    first, second, third = recorded.targets
    model = inside_of("llama", recorded, third)
    plain = {target: np.append(expected_span(model, target), np.zeros(12)) for target in recorded.targets}
    read_first = plain[first][: first.start] / plain[first][: first.start].sum()
    read_second = plain[second][: second.start] / plain[second][: second.start].sum()
    on_first = plain[third][first.start : first.end].sum()
    on_second = plain[third][second.start : second.end].sum()
    once = plain[third].copy()
    once[first.start : second.end] = 0
    once[: first.start] += on_first * read_first
    once[: second.start] += on_second * read_second
    again = once[first.start : first.end].sum()
    twice = once.copy()
    twice[first.start : first.end] = 0
    twice[: first.start] += again * read_first
    context = Context(Replica(tiny_model("llama")), recorded)
    assert on_first > 0.01 and on_second > 0.01 and again > 0.001
    for hops, reference, moved in [
        (0, plain[third], []),
        (1, once, [on_first + on_second]),
        (2, twice, [on_first + on_second, again]),
        (9, twice, [on_first + on_second, again]),
    ]:
        [item] = run(context, [request("span", {"hops": hops})], [third])
        np.testing.assert_allclose(item.scores, reference[: third.end], atol=1e-6)
        assert item.details["handed_on"] == pytest.approx(moved, abs=1e-6)
        assert item.details["own"] == pytest.approx(plain[third][third.start :].sum(), abs=1e-6)
    [item] = run(context, [request("span", {"hops": 3})], [first])
    np.testing.assert_allclose(item.scores, plain[first][: first.end], atol=1e-6)


def test_hops_go_through_steps_of_earlier_calls_but_not_through_other_branches() -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model("qwen3")), recorded)
    plain = {item.target: item for item in findings(context, "span", hops=0)}
    for item in findings(context, "span", hops=1):
        target = item.target
        model = inside_of("qwen3", recorded, target)
        before = [
            other
            for other in recorded.targets
            if other.end <= target.start
            and (
                recorded.sequences[other.sequence].token_ids[: other.end]
                == recorded.sequences[target.sequence].token_ids[: other.end]
            ).all()
        ]
        # A second step knows the first one; the last call continues the first sample with its two steps.
        assert len(before) == recorded.targets.index(target) % 2 + 2 * (target.sequence == 3)
        moved = sum(float(plain[target].scores[other.start : other.end].sum()) for other in before)
        assert sum(item.details["handed_on"]) == pytest.approx(moved, abs=1e-6)  # type: ignore[arg-type]
        for other in before:
            left = item.scores[other.start : other.end].sum()
            later = [step for step in before if step.start > other.start]
            arrived = 0.0
            for step in later:
                read = expected_span(model, step)[: step.start]
                mass = float(plain[target].scores[step.start : step.end].sum())
                arrived += mass * float(read[other.start : other.end].sum() / read.sum())
            assert left == pytest.approx(arrived, abs=1e-5)


def test_what_branches_wrote_alike_is_handed_on_once() -> None:
    """Samples that begin with the same steps have them in one place of the tree."""
    alike = random_ids(8, seed=5)
    samples = [[*alike, *random_ids(4, seed=60 + number)] for number in range(3)]
    trace = small_trace([random_ids(14, seed=1)], [samples], steps=3)
    alone = small_trace([random_ids(14, seed=1)], [samples[:1]], steps=3)
    context, single = (Context(Replica(tiny_model("llama")), Recorded(item)) for item in (trace, alone))
    found = findings(context, "span", hops=2)
    for item in found:
        assert item.scores.sum() == pytest.approx(1, abs=1e-5)
        assert sum(item.details["handed_on"]) <= 2  # type: ignore[arg-type]
    expected = {item.target.step_id: item.scores for item in findings(single, "span", hops=2)}
    for item in found:
        if item.target.step_id in expected:
            assert item.scores == pytest.approx(expected[item.target.step_id], abs=1e-6)


def test_one_pass_serves_all_methods_and_steps() -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model("llama")), recorded)
    requests = [request("alti"), request("alti_logit"), *(request("span", {"hops": hops}) for hops in (0, 1, 2))]
    found = list(run(context, requests, recorded.targets))
    assert len(found) == 5 * len(recorded.targets)
    assert context.cost.forward_tokens == len(recorded.tree) and context.cost.seconds > 0
    assert context.cost.backward_passes == 0


def test_tokens_are_targets_whose_logits_add_up_to_the_steps() -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model("llama")), recorded)
    step = recorded.targets[-1]
    [whole, *each] = run(context, [request("alti_logit")], [step, *recorded.tokens_of(step)])
    summed = np.zeros(step.end)
    for item in each:
        summed[: item.target.end] += item.scores
    np.testing.assert_allclose(whole.scores, summed, atol=1e-5 * np.abs(summed).max())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_neox", "phi3"])
def test_other_architectures_are_refused(family: str, name: str) -> None:
    context = Context(Replica(tiny_model(family)), Recorded(TRACE))
    with pytest.raises(InputError, match="grad_x_input"):
        findings(context, name)
    assert context.cost.forward_tokens == 0


def test_a_bias_of_the_out_projection_is_refused() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj.bias = torch.nn.Parameter(torch.ones(WIDTH))
    with pytest.raises(InputError, match="has a bias"):
        findings(Context(Replica(model), Recorded(TRACE)), "alti")


@pytest.mark.parametrize("hops", [-1, 1.5, True, "all"])
def test_bad_hops_are_refused_before_the_replay(hops: object) -> None:
    context = Context(Replica(tiny_model("llama")), Recorded(TRACE))
    with pytest.raises(InputError, match="hops of span"):
        findings(context, "span", hops=hops)
    assert context.cost.forward_tokens == 0


@pytest.mark.parametrize("low_memory", [False, True])
def test_progress_only_grows_and_reaches_its_total(low_memory: bool) -> None:
    seen: list[tuple[float, int]] = []
    context = Context(
        Replica(tiny_model("llama")),
        Recorded(TRACE),
        low_memory=low_memory,
        progress=lambda done, total: seen.append((done, total)),
    )
    list(run(context, [request(name) for name in NAMES], context.recorded.targets))
    assert seen == sorted(seen) and len({total for _, total in seen}) == 1
    assert seen[-1][0] == seen[-1][1]


def test_cancel_stops_between_layers() -> None:
    cancel = threading.Event()
    context = Context(Replica(tiny_model("llama")), Recorded(TRACE), cancel=cancel)

    def stop_after_the_replay(done: float, total: int) -> None:
        if done > total // 2:
            cancel.set()

    context.progress = stop_after_the_replay
    with pytest.raises(CancelledError):
        list(run(context, [request(name) for name in NAMES], context.recorded.targets))


@pytest.mark.model
def test_the_demo_models_parts_add_up_and_the_first_token_is_no_sink() -> None:
    recorded = Recorded(Trace.load("examples/traces/copied_from_the_exemplar.json"))
    [answer] = recorded.answer()
    context = Context(Replica.load("demo"), recorded)
    alti, updates = run(context, [request(name) for name in ("alti", "alti_logit")], [answer])
    parts: Any = updates.details
    total = parts["embedding"] + parts["attention"] + parts["mlp"]
    assert total == pytest.approx(parts["logit"], rel=1e-4)
    assert updates.scores.sum() == pytest.approx(parts["attention"], rel=1e-3)
    # Rollout leaves more than 0.9 on it.
    assert alti.scores[0] < 0.1
    assert alti.scores.sum() == pytest.approx(1, abs=1e-4)
