"""Attention methods against eager transformers, and against products of whole matrices in float64."""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.explain.planted import random_ids, small_trace
from tests.tiny_models import FAMILIES, tiny_model
from tracer.errors import CancelledError, InputError
from tracer.explain.attribution.attention import run
from tracer.explain.attribution.sinks import APART, ROWS
from tracer.explain.attribution.tree_attention import TreeAttention
from tracer.explain.base import Context, Finding
from tracer.explain.methods import METHODS, request
from tracer.replay.model import Replica
from tracer.replay.recorded import Recorded, Target
from tracer.replay.tree import build_tree
from tracer.trace.trace import Trace

Matrix = NDArray[np.float64]

NAMES = tuple(name for name, method in METHODS.items() if method.family == "attention")
PROMPT = random_ids(34, seed=1)
# Two samples of one prompt; a second prompt that begins like the first one; a third that goes on where a sample ended.
SAMPLES = [random_ids(11, seed=2), random_ids(8, seed=3)]
TRACE = small_trace(
    [PROMPT, [*PROMPT[:20], *random_ids(17, seed=4)], [*PROMPT, *SAMPLES[0], *random_ids(5, seed=5)]],
    [SAMPLES, [random_ids(9, seed=6)], [random_ids(7, seed=7)]],
)


@cache
def eager(family: str, ids: tuple[int, ...]) -> Matrix:
    """Head-mean attention of all layers from transformers itself, ``(layers, tokens, tokens)``."""
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(torch.tensor([ids]), output_attentions=True).attentions
    return torch.stack([weights[0].double().mean(0) for weights in attentions]).numpy()


def matrices(family: str, recorded: Recorded, target: Target) -> Matrix:
    return eager(family, tuple(recorded.sequences[target.sequence].token_ids.tolist()))


def start(target: Target, length: int) -> Matrix:
    vector = np.zeros(length)
    vector[target.start - 1 : target.end - 1] = 1 / (target.end - target.start)
    return vector


def sinks_of(layers: Matrix, share: float, factor: float) -> list[int]:
    mean = layers.mean(0)
    length = len(mean)
    even = np.tril(np.ones_like(mean)) / np.arange(1, length + 1)[:, None]
    return [
        column
        for column in range(length)
        if length - column - APART >= ROWS
        and mean[column + APART :, column].mean() > max(share, factor * even[column + APART :, column].mean())
    ]


def without(layers: Matrix, sinks: list[int]) -> Matrix:
    cut = layers.copy()
    cut[:, :, sinks] = 0
    for matrix in cut:
        for row in range(len(matrix)):
            if matrix[row].sum() > 0:
                matrix[row] /= matrix[row].sum()
            else:
                matrix[row, row] = 1
    return cut


def expected(name: str, layers: Matrix, target: Target, parameters: dict[str, Any]) -> Matrix:
    """The method's definition on whole matrices."""
    one = np.eye(layers.shape[1])
    if name == "attention":
        total = layers.mean(0) if parameters["layer"] is None else layers[parameters["layer"]]
    elif name == "attention_resolvent":
        decay, mean = parameters["decay"], layers.mean(0)
        total = (1 - decay) * mean @ np.linalg.inv(one - decay * mean)
    else:
        if name == "attention_rollout_sinkless":
            layers = without(layers, sinks_of(layers, parameters["sink_share"], parameters["sink_factor"]))
        total = one
        for matrix in layers:
            total = (matrix if name == "attention_product" else (matrix + one) / 2) @ total
    scores: Matrix = (start(target, len(one)) @ total)[: target.end]
    return scores


def findings(context: Context, *names: str, **parameters: Any) -> list[Finding]:
    return list(run(context, [request(name, parameters) for name in names], context.recorded.targets))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_equal_eager_attention(family: str) -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model(family)), recorded)
    tree = build_tree([sequence.token_ids for sequence in recorded.sequences], longest=13)
    attention = TreeAttention(context, tree)
    for layer in range(attention.layers):
        found = np.zeros((len(tree), len(tree)))
        for block in attention.blocks(layer, torch.ones(len(tree), dtype=torch.bool)):
            assert not found[block.rows].any()
            found[block.rows, block.columns] = block.weights
        for sequence, places in zip(recorded.sequences, tree.sequences, strict=True):
            reference = eager(family, tuple(sequence.token_ids.tolist()))[layer]
            np.testing.assert_allclose(found[np.ix_(places, places)], reference, atol=1e-5)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_equals_products_of_whole_matrices(family: str, low_memory: bool) -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model(family)), recorded, low_memory=low_memory)
    found = findings(context, *NAMES)
    assert len(found) == len(NAMES) * len(recorded.targets)
    for item in found:
        name, parameters = item.request.method.name, dict(item.request.parameters)
        reference = expected(name, matrices(family, recorded, item.target), item.target, parameters)
        assert item.scores.shape == (item.target.end,) and item.scores.dtype == np.float32
        np.testing.assert_allclose(item.scores, reference, atol=1e-5, err_msg=f"{name} {item.target}")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        *(("attention", {"layer": layer}) for layer in (0, 2, -1, -3)),
        *(("attention_resolvent", {"decay": decay}) for decay in (0.0, 0.1, 0.99)),
        *(("attention_rollout_sinkless", {"sink_share": share, "sink_factor": 0}) for share in (0.005, 0.02, 0.03, 1)),
        *(("attention_rollout_sinkless", {"sink_share": 0.001, "sink_factor": factor}) for factor in (1, 1.2)),
    ],
)
def test_parameters(name: str, parameters: dict[str, Any]) -> None:
    recorded = Recorded(TRACE)
    for item in findings(Context(Replica(tiny_model("llama")), recorded), name, **parameters):
        layers = matrices("llama", recorded, item.target)
        np.testing.assert_allclose(item.scores, expected(name, layers, item.target, parameters), atol=1e-5)


def test_several_parameters_of_one_method_share_a_pass() -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model("llama")), recorded)
    requests = [request("attention", {"layer": layer}) for layer in (0, 1, None)]
    for item in run(context, requests, recorded.targets):
        parameters = dict(item.request.parameters)
        reference = expected("attention", matrices("llama", recorded, item.target), item.target, parameters)
        np.testing.assert_allclose(item.scores, reference, atol=1e-5)
    assert context.cost.forward_tokens == len(recorded.tree) and context.cost.seconds > 0


def test_scores_are_shares_and_end_where_the_last_token_is_predicted() -> None:
    context = Context(Replica(tiny_model("gemma2")), Recorded(TRACE))
    for item in findings(context, *NAMES):
        assert item.scores.sum() == pytest.approx(1, abs=1e-5)
        assert item.scores.min() >= 0 and item.scores[item.target.end - 1] == 0


def test_padding_and_first_token_are_tokens_like_others() -> None:
    recorded = Recorded(small_trace([[0, 0, 0, 1, *random_ids(20, seed=8)]], [[random_ids(6, seed=9)]]))
    for item in findings(Context(Replica(tiny_model("llama")), recorded), *NAMES):
        layers = matrices("llama", recorded, item.target)
        reference = expected(item.request.method.name, layers, item.target, dict(item.request.parameters))
        np.testing.assert_allclose(item.scores, reference, atol=1e-5)


@pytest.mark.parametrize("share", [0.02, 0.03])
def test_removed_sinks_are_told_with_their_mass(share: float) -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model("llama")), recorded)
    for item in findings(context, "attention_rollout_sinkless", sink_share=share, sink_factor=1.0):
        layers = matrices("llama", recorded, item.target)
        sinks = sinks_of(layers, share, 1.0)
        mass = (start(item.target, layers.shape[1]) @ layers.mean(0))[sinks].sum()
        assert item.details["sinks"] == sinks != []
        assert item.details["removed"] == pytest.approx(mass, abs=1e-5)
        assert not item.scores[[place for place in sinks if place < item.target.start - 1]].any()


def test_a_planted_sink_is_found_and_gets_nothing() -> None:
    model = tiny_model("gpt2")
    for block in model.transformer.h:
        # The first position's embedding is all that a query looks for.
        width = block.attn.embed_dim
        block.ln_1.weight.data[:], block.ln_1.bias.data[:] = 1, 0
        block.attn.c_attn.bias.data[:] = 0
        block.attn.c_attn.bias.data[:width] = 3 * torch.ones(width)
        block.attn.c_attn.weight.data[:, width : 2 * width] = 0
        block.attn.c_attn.weight.data[0, width : 2 * width] = 1
    model.transformer.wpe.weight.data[:, 0] = -1
    model.transformer.wpe.weight.data[0, 0] = 20
    recorded = Recorded(TRACE)
    context = Context(Replica(model), recorded)
    plain, sinkless = (findings(context, name) for name in ("attention_rollout", "attention_rollout_sinkless"))
    for before, after in zip(plain, sinkless, strict=True):
        assert after.details["sinks"] == [0]
        assert before.scores[0] > 0.5
        assert after.scores[0] < 1e-6


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("attention", {"layer": 3}, "from -3 to 2"),
        ("attention", {"layer": -4}, "from -3 to 2"),
        ("attention", {"layer": 1.5}, "whole number"),
        ("attention", {"layer": True}, "whole number"),
        ("attention_resolvent", {"decay": 1}, "below 1"),
        ("attention_resolvent", {"decay": "half"}, "must be a number"),
        ("attention_rollout_sinkless", {"sink_share": 0}, "above 0"),
        ("attention_rollout_sinkless", {"sink_factor": -1}, "at least 0"),
        ("attention_rollout_sinkless", {"sink_share": float("nan")}, "above 0"),
    ],
)
def test_bad_parameters_are_refused_before_the_replay(name: str, parameters: dict[str, Any], message: str) -> None:
    context = Context(Replica(tiny_model("llama")), Recorded(TRACE))
    with pytest.raises(InputError, match=message):
        findings(context, name, **parameters)
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
    findings(context, *NAMES)
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
        findings(context, *NAMES)


def test_only_the_sequences_of_the_targets_are_replayed() -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model("llama")), recorded)
    target = recorded.targets[0]
    everything = findings(context, *NAMES)
    context.cost.forward_tokens = 0
    alone = list(run(context, [request(name) for name in NAMES], [target]))
    assert context.cost.forward_tokens == len(recorded.sequences[target.sequence].token_ids)
    for item in alone:
        [same] = [
            other
            for other in everything
            if other.target == target and other.request.method.name == item.request.method.name
        ]
        np.testing.assert_allclose(item.scores, same.scores, atol=1e-6)


@pytest.mark.model
def test_the_demo_models_sinks_are_removed_by_default() -> None:
    recorded = Recorded(Trace.load("examples/traces/copied_from_the_exemplar.json"))
    context = Context(Replica.load("demo"), recorded)
    [answer] = recorded.answer()
    requests = [request(name) for name in ("attention_rollout", "attention_rollout_sinkless")]
    plain, sinkless = run(context, requests, [answer])
    sinks = sinkless.details["sinks"]
    removed = sinkless.details["removed"]
    assert isinstance(sinks, list) and sinks[0] == 0 and len(sinks) < 12
    assert isinstance(removed, float) and 0.1 < removed < 0.5
    assert plain.scores[0] > 0.9
    assert not sinkless.scores[np.array(sinks)].any()
    assert sinkless.scores.sum() == pytest.approx(1, abs=1e-4)
