"""Replay of a tree against transformers' own eager pass over each sequence."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny_models import FAMILIES, HEADS, LAYERS, VOCABULARY, tiny_model
from tracer.errors import CancelledError, ModelError, PromptTooLongError
from tracer.replay.attention import Rule, attention, weights
from tracer.replay.forward import Replayed, Scored, Wanted, replay
from tracer.replay.model import Replica
from tracer.replay.tree import Node, PrefixTree, build_tree

RANDOM = np.random.default_rng(5)
COMMON = RANDOM.integers(3, VOCABULARY, 12)
SEQUENCES = [
    RANDOM.integers(3, VOCABULARY, 20),
    np.concatenate([COMMON, RANDOM.integers(3, VOCABULARY, 9)]),
    np.concatenate([COMMON, RANDOM.integers(3, VOCABULARY, 5)]),
    np.concatenate([COMMON, RANDOM.integers(3, VOCABULARY, 5)])[:14],
]


def eager(family: str) -> list[Any]:
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return [
            model(torch.as_tensor(ids)[None], output_hidden_states=True, output_attentions=True) for ids in SEQUENCES
        ]


def everything(tree: PrefixTree) -> Scored:
    rows = np.concatenate([places[:-1] for places in tree.sequences])
    return Scored(rows, np.concatenate([tree.token_ids[places[1:]] for places in tree.sequences]))


def run(replica: Replica, tree: PrefixTree, **wanted: Any) -> Replayed:
    return replay(replica, tree, Wanted(scored=everything(tree), **wanted))


@pytest.mark.parametrize("longest", [None, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tree_gives_what_each_sequence_gives_alone(family: str, longest: int | None) -> None:
    tree = build_tree(SEQUENCES, longest=longest)
    replica = Replica(tiny_model(family))
    found = run(replica, tree, hidden_indices=tree.sequences[2], hidden_layers=range(LAYERS - 1))
    expected = [output.logits[0, :-1].log_softmax(-1) for output in eager(family)]
    chosen = [
        logs[torch.arange(len(logs)), torch.as_tensor(ids[1:])] for logs, ids in zip(expected, SEQUENCES, strict=True)
    ]
    entropy = [-(logs.exp() * logs).sum(-1) for logs in expected]
    assert found.logprobs == pytest.approx(torch.cat(chosen).numpy(), abs=3e-5)
    assert found.entropy == pytest.approx(torch.cat(entropy).numpy(), abs=3e-5)
    hidden = torch.cat(eager(family)[2].hidden_states[1:LAYERS])
    assert torch.allclose(found.hidden, hidden, atol=5e-5)
    assert replica.additive
    # Nothing is computed twice.
    assert found.tokens == len(tree) == len({tuple(ids[: end + 1]) for ids in SEQUENCES for end in range(len(ids))})


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_rows_are_those_of_eager_attention(family: str) -> None:
    tree = build_tree(SEQUENCES, longest=7)
    outputs = eager(family)

    class Watcher:
        largest = 0.0
        seen = 0

        def see(self, layer: int, node: Node, queries: torch.Tensor, keys: torch.Tensor, rule: Rule) -> None:
            own = weights(queries, keys, rule)
            assert own.shape == (HEADS, len(node.token_ids), node.position + len(node.token_ids))
            for output, places in zip(outputs, tree.sequences, strict=True):
                if node.end - 1 in places:
                    end = node.position + len(node.token_ids)
                    theirs = output.attentions[layer][0, :, node.position : end, :end]
                    self.largest = max(self.largest, float((own - theirs).abs().max()))
                    self.seen += 1

    watcher = Watcher()
    run(Replica(tiny_model(family)), tree, watcher=watcher)
    assert watcher.seen >= LAYERS * len(tree.nodes)
    assert watcher.largest < 1e-5


@pytest.mark.parametrize(
    "rule", [Rule(0.3), Rule(0.3, softcap=2.0), Rule(0.3, window=4), Rule(0.3, softcap=2.0, window=4)]
)
def test_attention_equals_its_weights_times_values(rule: Rule) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(1, 6, 5, 8, generator=generator)
    keys, values = torch.randn(2, 1, 2, 9, 8, generator=generator)
    expected = weights(queries, keys, rule) @ values.repeat_interleave(3, dim=1)
    assert torch.allclose(attention(queries, keys, values, rule), expected, atol=1e-6)


def test_memory_holds_only_what_later_nodes_read() -> None:
    from tracer.replay.attention import Plan

    tree = build_tree(SEQUENCES, longest=5)
    plan = Plan()
    replay(Replica(tiny_model("llama")), tree, Wanted(scored=everything(tree)), plan=plan)
    assert plan.memory == {}


def test_a_sequence_longer_than_the_context() -> None:
    replica = Replica(tiny_model("llama"), context_length=16)
    with pytest.raises(PromptTooLongError, match="21 tokens.*16"):
        run(replica, build_tree(SEQUENCES))


def test_it_stops_between_two_chunks() -> None:
    cancel = threading.Event()
    tree = build_tree(SEQUENCES, longest=5)

    def progress(done: int, total: int) -> None:
        assert 0 < done < total
        cancel.set()

    with pytest.raises(CancelledError):
        replay(Replica(tiny_model("llama")), tree, Wanted(), progress=progress, cancel=cancel)


def test_an_unknown_architecture_and_one_that_does_not_fit_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    from tracer.replay import architectures

    model = tiny_model("llama")
    monkeypatch.setattr(model.config, "model_type", "mamba")
    with pytest.raises(ModelError, match="cannot be replayed; known: .*llama"):
        Replica(model)
    assert architectures.architecture_of("llama").gated_rms

    class Shifted(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden + 1

    broken = tiny_model("llama")
    broken.lm_head = torch.nn.Sequential(Shifted(), broken.lm_head)
    replica = Replica(broken)
    assert replica.additive
    # The head itself is consistent there; a table that names the wrong norm is not.
    monkeypatch.setitem(
        architectures._TABLE,
        "llama",
        architectures._TABLE["llama"].__class__(
            layers="model.layers",
            final_norm=None,
            attention="self_attn",
            out_projection="o_proj",
            attention_norm="input_layernorm",
            attention_out="self_attn",
            mlp_out="mlp",
        ),
    )
    with pytest.raises(ModelError, match="unembedding is off by"):
        Replica(tiny_model("llama"))
