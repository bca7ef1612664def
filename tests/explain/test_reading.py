"""Two-hop reading against whole attention matrices of eager transformers."""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.explain.planted import random_ids, small_trace
from tests.tiny_models import FAMILIES, LAYERS, tiny_model
from tracer.errors import CancelledError, InputError
from tracer.explain.attribution.reading import run
from tracer.explain.base import Context
from tracer.explain.methods import request
from tracer.replay.model import Replica
from tracer.replay.recorded import Recorded

PROMPT = random_ids(22, seed=1)
TRACE = small_trace(
    [PROMPT, [*PROMPT[:12], *random_ids(9, seed=4)]],
    [[random_ids(10, seed=2), random_ids(7, seed=3)], [random_ids(8, seed=5)]],
)


@cache
def eager(family: str, ids: tuple[int, ...]) -> NDArray[np.float64]:
    """Head-mean attention, ``(layers, tokens, tokens)``."""
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(torch.tensor([ids]), output_attentions=True).attentions
    return np.stack([weights[0].double().mean(0).numpy() for weights in found])


def scaled(row: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Without its first column, and what that held; no other token is a sink in traces as short as these."""
    kept = np.r_[0.0, row[1:]]
    return kept / kept.sum(), float(row[0])


def brute(matrix: NDArray[np.float64], start: int, end: int, count: int) -> tuple[NDArray[np.float64], list[int]]:
    first, _ = scaled(matrix[start - 1 : end - 1].mean(0))
    chosen = sorted(range(1, start - 1), key=lambda position: -first[position])[:count]
    weights = first[chosen] / first[chosen].sum()
    second, _ = scaled(sum(weight * matrix[position] for weight, position in zip(weights, chosen, strict=True)))
    return (first + second) / 2, chosen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [None, -1])
def test_both_hops_equal_whole_matrices(family: str, layer: int | None) -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model(family)), recorded)
    asked = request("two_hop", {"first_hop": 3, "layer": layer})
    found = list(run(context, [asked], recorded.targets))
    assert [finding.target for finding in found] == list(recorded.targets) and len(found) == 6
    for finding in found:
        ids = recorded.sequences[finding.target.sequence].token_ids
        layers = eager(family, tuple(ids.tolist()))
        matrix = layers.mean(0) if layer is None else layers[layer]
        expected, chosen = brute(matrix, finding.target.start, finding.target.end, 3)
        assert finding.scores.shape == (finding.target.end,) and finding.scores.dtype == np.float32
        np.testing.assert_allclose(finding.scores, expected[: finding.target.end], atol=1e-5)
        assert [item["token"] for item in details(finding.details["first_hop"])] == chosen
        assert finding.scores.sum() == pytest.approx(1, abs=1e-5)
        removed = matrix[finding.target.start - 1 : finding.target.end - 1, 0].mean()
        assert finding.details["first_hop_removed"] == pytest.approx(removed, abs=1e-5)
    assert context.cost.forward_tokens == len(recorded.tree) and context.cost.seconds > 0


def details(value: Any) -> list[dict[str, Any]]:
    assert isinstance(value, list)
    return value


def test_low_memory_and_other_targets_change_nothing() -> None:
    recorded = Recorded(TRACE)
    replica = Replica(tiny_model("qwen3"))
    asked = [request("two_hop"), request("two_hop", {"layer": 0, "first_hop": 2})]
    whole = {
        (f.request.parameters["layer"], f.target): f for f in run(Context(replica, recorded), asked, recorded.targets)
    }
    assert len(whole) == 12
    for finding in run(Context(replica, recorded, low_memory=True), asked, recorded.targets[2:3]):
        same = whole[finding.request.parameters["layer"], finding.target]
        np.testing.assert_allclose(finding.scores, same.scores, atol=1e-6)
        assert finding.details["sinks"] == same.details["sinks"] == [0]


def test_a_sink_is_not_followed() -> None:
    # Long enough for sinks to be found: with a share this small, every token that can be one is.
    trace = small_trace([random_ids(60, seed=7)], [[random_ids(6, seed=8)]], steps=1)
    recorded = Recorded(trace)
    (found,) = run(
        Context(Replica(tiny_model("llama")), recorded),
        [request("two_hop", {"sink_share": 1e-6, "sink_factor": 0})],
        recorded.targets,
    )
    sinks = found.details["sinks"]
    assert isinstance(sinks, list) and len(sinks) > 10
    assert not found.scores[np.asarray(sinks)].any() and found.scores.sum() == pytest.approx(1, abs=1e-5)
    hop = [item["token"] for item in details(found.details["first_hop"])]
    assert hop and not any(token in sinks for token in hop)


def test_without_anything_to_go_on_to_the_first_hop_is_all() -> None:
    recorded = Recorded(small_trace([[5, 6]], [[[7, 8, 9, 10]]]))
    found = list(run(Context(Replica(tiny_model("gpt2")), recorded), [request("two_hop")], recorded.targets))
    assert found[0].details["first_hop"] == [] and found[0].scores.sum() == pytest.approx(1, abs=1e-5)
    assert found[1].details["first_hop"] != []


@pytest.mark.parametrize(
    "parameters",
    [
        {"layer": LAYERS},
        {"layer": "last"},
        {"first_hop": 0},
        {"first_hop": True},
        {"sink_share": 0},
        {"sink_factor": -1},
    ],
)
def test_parameters_out_of_range_are_refused(parameters: dict[str, Any]) -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model("opt")), recorded)
    with pytest.raises(InputError, match=next(iter(parameters))):
        list(run(context, [request("two_hop", parameters)], recorded.targets))
    assert context.cost.forward_tokens == 0


def test_progress_ends_at_its_total_and_a_cancel_is_heard() -> None:
    recorded = Recorded(TRACE)
    told: list[tuple[float, int]] = []
    context = Context(Replica(tiny_model("phi")), recorded, progress=lambda done, total: told.append((done, total)))
    list(run(context, [request("two_hop")], recorded.targets))
    assert told[-1][0] == told[-1][1] and [done for done, _ in told] == sorted(done for done, _ in told)
    event = threading.Event()
    event.set()
    with pytest.raises(CancelledError):
        list(run(Context(context.replica, recorded, cancel=event), [request("two_hop")], recorded.targets))
