"""Layers that run again against whole passes of transformers' own eager attention."""

from __future__ import annotations

import copy
import threading
from typing import Any

import numpy as np
import pytest
import torch

from tests.explain.planted import random_ids
from tests.tiny_models import FAMILIES, LAYERS, tiny_model
from tracer.errors import CancelledError
from tracer.replay import layers as layers_module
from tracer.replay.architectures import architecture_of, part
from tracer.replay.attention import Rule
from tracer.replay.layers import Captured, capture
from tracer.replay.model import Replica, first_tensor
from tracer.replay.tree import Ids, Node

TOKENS = 18


def eager_pass(model: Any, ids: Ids, *, layer: int | None = None, rows: Any = None, value: Any = None) -> torch.Tensor:
    """Residual stream behind the last layer, with some rows of a layer's input replaced."""
    seen: list[torch.Tensor] = []
    module = part(model, architecture_of(model.config.model_type).layers)
    handles = [module[-1].register_forward_hook(lambda _m, _i, output: seen.append(first_tensor(output)))]
    if layer is not None:

        def replace(_module: Any, arguments: Any, named: dict[str, Any]) -> Any:
            hidden = (arguments[0] if arguments else named["hidden_states"]).clone()
            hidden[0, rows] = value
            return ((hidden, *arguments[1:]), {k: v for k, v in named.items() if k != "hidden_states"})

        handles.append(module[layer].register_forward_pre_hook(replace, with_kwargs=True))
    with torch.no_grad():
        model(torch.as_tensor(ids)[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return seen[0]


def pair(family: str) -> tuple[Any, Replica]:
    """An eager copy and a replica of the same weights."""
    model = tiny_model(family)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    return eager, Replica(model)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_unchanged_rows_give_what_the_whole_pass_gave(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Chunks, so that arguments are joined and cut too.
    monkeypatch.setattr(layers_module, "CHUNK", 7)
    eager, replica = pair(family)
    ids = np.asarray(random_ids(TOKENS, seed=1))
    captured = capture(replica, ids)
    expected = eager_pass(eager, ids)
    assert close(captured.inputs[LAYERS], expected)
    for layer in range(LAYERS):
        for first in (0, 5):
            plan = captured.versions(2, first, TOKENS)
            positions = np.tile(np.arange(first, TOKENS), 2)
            found = captured.run(range(layer, LAYERS), captured.inputs[layer][positions], positions, plan)
            assert close(found.view(2, TOKENS - first, -1), expected[first:].expand(2, -1, -1)), (layer, first)


@pytest.mark.parametrize("family", FAMILIES)
def test_changed_rows_give_what_a_whole_pass_with_them_gives(family: str) -> None:
    eager, replica = pair(family)
    ids = np.asarray(random_ids(TOKENS, seed=2))
    captured = capture(replica, ids)
    rows = [6, 9]
    for layer in range(LAYERS):
        changes = torch.randn(3, len(rows), captured.inputs[layer].shape[1], generator=torch.manual_seed(layer))
        positions = np.tile(np.arange(rows[0], TOKENS), 3)
        hidden = captured.inputs[layer][positions].view(3, TOKENS - rows[0], -1).clone()
        hidden[:, [row - rows[0] for row in rows]] = changes
        plan = captured.versions(3, rows[0], TOKENS)
        found = captured.run(range(layer, LAYERS), hidden.flatten(0, 1), positions, plan).view_as(hidden)
        for version in range(3):
            expected = eager_pass(eager, ids, layer=layer, rows=rows, value=changes[version])
            assert not close(expected, captured.inputs[LAYERS])
            assert close(found[version], expected[rows[0] :])


def test_what_is_kept_is_what_the_model_computed() -> None:
    eager, replica = pair("llama")
    ids = np.asarray(random_ids(TOKENS, seed=3))
    captured = capture(replica, ids, layers=range(1, LAYERS))
    with torch.no_grad():
        output = eager(torch.as_tensor(ids)[None], output_hidden_states=True, use_cache=False)
    assert set(captured.inputs) == {1, 2, 3} and set(captured.heads) == set(captured.keys) == {1, 2}
    for layer in (1, 2):
        assert close(captured.inputs[layer], output.hidden_states[layer][0])
    projected = replica.out_projection(2)(captured.heads[2])
    attention = captured.inputs[2] + projected
    block = replica.layers[2]
    assert close(attention + block.mlp(block.post_attention_layernorm(attention)), captured.inputs[3])
    normed = block.input_layernorm(captured.inputs[2])
    assert close(captured.values[2].transpose(0, 1).flatten(1), block.self_attn.v_proj(normed))


def test_attend_stops_at_the_attention_of_the_last_node() -> None:
    _, replica = pair("gemma3")
    ids = np.asarray(random_ids(TOKENS, seed=4))
    captured = capture(replica, ids)
    seen: list[tuple[int, int, torch.Tensor]] = []

    def look(layer: int, node: Node, queries: torch.Tensor, keys: torch.Tensor, _v: torch.Tensor, _r: Rule) -> None:
        seen.append((layer, node.number, queries))

    plan = captured.versions(2, 4, TOKENS, intervene=look)
    plan.keep = True
    ran: list[int] = []
    handle = replica.layers[1].mlp.register_forward_hook(lambda *_: ran.append(1))
    positions = np.tile(np.arange(4, TOKENS), 2)
    captured.attend(1, captured.inputs[1][positions], positions, plan)
    handle.remove()
    assert ran == [] and [item[:2] for item in seen] == [(1, 1), (1, 2)]
    assert close(seen[1][2][0], captured.queries[1][:, 4:])
    assert close(plan.memory[1, 2][0][0], captured.keys[1][:, 4:])
    assert plan.intervene is look


def test_a_capture_can_be_cancelled() -> None:
    event = threading.Event()
    event.set()
    _, replica = pair("gpt2")
    with pytest.raises(CancelledError):
        capture(replica, np.asarray(random_ids(TOKENS, seed=5)), cancel=event)


def test_gradients_flow_through_layers_that_run_again() -> None:
    _, replica = pair("phi")
    captured: Captured = capture(replica, np.asarray(random_ids(TOKENS, seed=6)))
    positions = np.arange(3, TOKENS)
    hidden = captured.inputs[1][3:].clone().requires_grad_()
    weight = torch.randn(hidden.shape, generator=torch.manual_seed(0))

    def value(rows: torch.Tensor) -> torch.Tensor:
        return (captured.run(range(1, LAYERS), rows, positions, captured.versions(1, 3, TOKENS)) * weight).sum()

    direction = torch.randn(hidden.shape, generator=torch.manual_seed(1))
    (gradient,) = torch.autograd.grad(value(hidden), hidden)
    step = 1e-2
    with torch.no_grad():
        difference = (value(hidden + step * direction) - value(hidden - step * direction)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(float(difference), rel=2e-2)
