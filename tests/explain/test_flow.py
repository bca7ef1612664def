"""Attention flow against networkx on the whole graph, written down edge by edge."""

from __future__ import annotations

import threading
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.explain.planted import random_ids, small_trace
from tests.tiny_models import tiny_model
from tracer.errors import CancelledError, InputError
from tracer.explain.attribution.flow import largest_flow, run
from tracer.explain.base import Context, Finding
from tracer.explain.methods import request
from tracer.replay.model import Replica
from tracer.replay.recorded import Recorded, Target

PROMPT = random_ids(9, seed=1)
TRACE = small_trace(
    [PROMPT, [*PROMPT[:6], *random_ids(4, seed=2)]],
    [[random_ids(6, seed=3), random_ids(5, seed=4)], [random_ids(4, seed=5)]],
)


def by_networkx(capacities: NDArray[np.floating], rows: list[int], tokens: list[int]) -> float:
    """Whole numbers, with a rounding of their own: networkx need not end on fractions."""
    unit = 10**9
    graph: nx.DiGraph[Any] = nx.DiGraph()
    layers, length, _ = capacities.shape
    for row in rows:
        graph.add_edge("origin", (layers, row), capacity=unit)
    for layer in range(layers):
        for row in range(length):
            for column in range(row + 1):
                capacity = round(unit * float(capacities[layer, row, column]))
                graph.add_edge((layer + 1, row), (layer, column), capacity=capacity)
    for token in tokens:
        graph.add_edge((0, token), "sink")
    return float(nx.maximum_flow_value(graph, "origin", "sink")) / unit / len(rows)


def eager_capacities(family: str, recorded: Recorded, target: Target) -> NDArray[np.float64]:
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    ids = torch.as_tensor(recorded.sequences[target.sequence].token_ids[: target.end - 1])
    with torch.no_grad():
        attentions = model(ids[None], output_attentions=True).attentions
    return np.stack([(weights[0].double().mean(0).numpy() + np.eye(len(ids))) / 2 for weights in attentions])


def findings(context: Context, **parameters: Any) -> list[Finding]:
    return list(run(context, [request("attention_flow", parameters)], context.recorded.targets))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_flow_of_every_source_equals_networkx(family: str) -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model(family)), recorded)
    found = findings(context)
    assert [item.target for item in found if item.target.sequence == 0] == list(recorded.targets[:2])
    assert {item.target for item in found} == set(recorded.targets)
    for item in found:
        target = item.target
        capacities = eager_capacities(family, recorded, target)
        owner = recorded.source_of[target.sequence][: target.end - 1]
        aggregated = recorded.aggregate(target, item.scores)
        for number in range(len(recorded.sources)):
            tokens = np.flatnonzero(owner == number).tolist()
            rows = list(range(target.start - 1, target.end - 1))
            expected = by_networkx(capacities, rows, tokens) if tokens else 0.0
            assert aggregated[number] == pytest.approx(expected, abs=1e-5)
            assert len(set(item.scores[tokens].tolist())) <= 1
        assert item.scores.shape == (target.end,) and item.scores[-1] == 0
    assert context.cost.forward_tokens == len(recorded.tree)


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_flow_on_random_capacities_equals_networkx(layers: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    raw = np.tril(generator.exponential(size=(layers, 8, 8)) ** 4)
    capacities = ((raw / raw.sum(-1, keepdims=True) + np.eye(8)) / 2).astype(np.float32)
    for rows in (slice(7, 8), slice(3, 8), slice(2, 5)):
        for tokens in ([0], [1, 2], [4], [3, 4]):
            wanted = [token for token in tokens if token < rows.stop]
            expected = by_networkx(capacities, list(range(rows.start, rows.stop)), wanted)
            assert largest_flow(capacities, rows, np.array(wanted)) == pytest.approx(expected, abs=1e-7)


def test_a_flow_through_one_narrow_edge() -> None:
    # Token 2 reads itself and token 1; only token 1 reads token 0, by a tenth.
    weights = np.array([[1, 0, 0], [0.1, 0.9, 0], [0, 0.5, 0.5]], dtype=np.float32)
    capacities = np.stack([(weights + np.eye(3)) / 2] * 2).astype(np.float32)
    assert largest_flow(capacities, slice(2, 3), np.array([0])) == pytest.approx(0.05, abs=1e-6)
    assert largest_flow(capacities, slice(2, 3), np.array([2])) == pytest.approx(0.75, abs=1e-6)


def test_longer_targets_are_refused_with_what_to_do() -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model("llama")), recorded)
    longest = max(target.end for target in recorded.targets) - 1
    with pytest.raises(InputError, match="raise max_tokens"):
        findings(context, max_tokens=longest - 1)
    assert context.cost.forward_tokens == 0
    assert len(findings(context, max_tokens=longest)) == len(recorded.targets)


@pytest.mark.parametrize("value", [0, True, 12.5, "many"])
def test_a_bad_limit_is_refused(value: object) -> None:
    context = Context(Replica(tiny_model("llama")), Recorded(TRACE))
    with pytest.raises(InputError, match="whole number above 0"):
        findings(context, max_tokens=value)


def test_cancel_keeps_what_was_finished_and_progress_counts_flows() -> None:
    cancel = threading.Event()
    seen: list[tuple[float, int]] = []
    recorded = Recorded(TRACE)
    context = Context(
        Replica(tiny_model("llama")),
        recorded,
        cancel=cancel,
        progress=lambda done, total: seen.append((done, total)),
    )
    running = run(context, [request("attention_flow")], recorded.targets)
    assert next(running).target == recorded.targets[0]
    cancel.set()
    with pytest.raises(CancelledError):
        next(running)
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1)) and len({total for _, total in seen}) == 1
