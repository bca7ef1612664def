"""RPI against autograd over whole attention matrices, in float64, with an attention function of the test's own."""

from __future__ import annotations

import copy
import math
import threading
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AttentionInterface

from tests.explain.planted import random_ids, small_trace
from tests.tiny_models import FAMILIES, HEADS, LAYERS, tiny_model
from tracer.errors import CancelledError, InputError
from tracer.explain.attribution import path_attention
from tracer.explain.attribution.path_attention import noise, retained, run
from tracer.explain.base import Context, Finding, TargetFunction
from tracer.explain.methods import request
from tracer.replay.architectures import architecture_of, part
from tracer.replay.attention import Rule
from tracer.replay.model import Replica
from tracer.replay.recorded import Recorded, Target

TRACE = small_trace([random_ids(14, seed=1)], [[random_ids(8, seed=2)]])
IDS = Recorded(TRACE).sequences[0].token_ids


class Matrices:
    """What the test's attention function uses and sees: weights to use by layer, and those it computed."""

    given: dict[int, torch.Tensor] = {}
    computed: dict[int, torch.Tensor] = {}


def _written_out(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **named: Any
) -> tuple[torch.Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    cap, window = named.get("softcap"), named.get("sliding_window")
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    rows, columns = torch.meshgrid(torch.arange(query.shape[2]), torch.arange(query.shape[2]), indexing="ij")
    hidden = (columns > rows) | (columns <= rows - (window or len(rows)))
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    Matrices.computed[module.test_layer] = weights[0].detach()
    if module.test_layer in Matrices.given:
        weights = Matrices.given[module.test_layer][None]
    return (weights @ value).transpose(1, 2), None


AttentionInterface.register("test_written_out", _written_out)


class Whole:
    """A model in float64 whose attention weights of one layer can be given."""

    def __init__(self, family: str, layer: int) -> None:
        self.model = copy.deepcopy(tiny_model(family)).double().requires_grad_(False)
        self.model.set_attn_implementation("test_written_out")
        names = architecture_of(self.model.config.model_type)
        for number, block in enumerate(part(self.model, names.layers)):
            part(block, names.attention).test_layer = number
        self.layer = layer
        Matrices.given = {}
        self.logits = self.model(torch.as_tensor(IDS)[None], use_cache=False).logits[0]
        self.weights = Matrices.computed[layer]

    def gradient(self, given: torch.Tensor, target: Target, function: TargetFunction) -> torch.Tensor:
        """dF/dv at weights ``(heads, tokens, tokens)``."""
        leaf = given.detach().clone().requires_grad_()
        Matrices.given = {self.layer: leaf}
        logits = self.model(torch.as_tensor(IDS)[None], use_cache=False).logits[0]
        Matrices.given = {}
        rows = torch.arange(target.start - 1, target.end - 1)
        tokens = torch.as_tensor(IDS)[rows + 1]
        chosen = logits[rows, tokens]
        if function == "logprob":
            value = logits.log_softmax(-1)[rows, tokens].sum()
        elif function == "logit":
            value = chosen.sum()
        else:
            others = self.logits[rows].scatter(1, tokens[:, None], float("-inf")).argmax(-1)
            value = (chosen - logits[rows, others]).sum()
        (gradient,) = torch.autograd.grad(value, leaf)
        return gradient

    def score(self, target: Target, points: int, drawn: torch.Tensor, function: TargetFunction) -> NDArray[np.float64]:
        kept = retained()
        baseline = math.sqrt(kept) * self.weights + (1 - kept) * drawn.double()
        total = torch.zeros_like(self.weights)
        for point in range(1, points + 1):
            given = baseline + point / points * (self.weights - baseline)
            total += given * self.gradient(given, target, function)
        rows = (total / points * self.weights)[:, target.start - 1 : target.end - 1]
        found: NDArray[np.float64] = rows.mean(0).sum(0).numpy()
        return found


def explained(
    family: str, *, seed: int = 0, function: TargetFunction = "logprob", **parameters: int
) -> tuple[list[Finding], Context]:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model(family)), recorded, target_function=function, seed=seed)
    return list(run(context, [request("rpi", parameters)], recorded.targets)), context


def agree(finding: Finding, expected: NDArray[np.float64], tolerance: float) -> None:
    assert finding.scores.shape == (finding.target.end,) and finding.scores.dtype == np.float32
    largest = np.abs(expected).max()
    assert largest > 1e-6
    np.testing.assert_allclose(finding.scores, expected[: finding.target.end], atol=tolerance * largest)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_one_point_is_the_attention_times_its_gradient_times_the_attention(family: str, layer: int) -> None:
    # The only point is the end of the way, where the baseline plays no part.
    found, context = explained(family, samples=1, points=1, layer=layer)
    whole = Whole(family, layer)
    for finding in found:
        gradient = whole.gradient(whole.weights, finding.target, "logprob")
        rows = (whole.weights * gradient * whole.weights)[:, finding.target.start - 1 : finding.target.end - 1]
        agree(finding, rows.mean(0).sum(0).numpy(), 1e-4)
    assert context.cost.backward_passes == len(found) == 2


@pytest.mark.parametrize(
    ("family", "function"),
    [("llama", "logprob"), ("mistral_window", "logit"), ("gemma2", "contrast"), ("gpt_neox", "logprob")],
)
def test_a_randomised_path_equals_autograd_over_whole_matrices(
    family: str, function: TargetFunction, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[range, torch.Tensor]] = []

    def kept(rows: range, heads: int, length: int, rule: Rule, generator: torch.Generator) -> torch.Tensor:
        drawn.append((rows, noise(rows, heads, length, rule, generator)))
        return drawn[-1][1]

    monkeypatch.setattr(path_attention, "noise", kept)
    # Several blocks of noise and several batches of points.
    monkeypatch.setattr(path_attention, "_BLOCK", 5)
    monkeypatch.setattr("tracer.explain.attribution.rerun._ROWS", {"cpu": 50})
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model(family)), recorded, target_function=function, seed=3)
    whole = Whole(family, 1)
    for target in recorded.targets:
        drawn.clear()
        (finding,) = run(context, [request("rpi", {"samples": 2, "points": 5, "layer": 1})], [target])
        samples = torch.zeros(2, HEADS, len(IDS), len(IDS))
        bounds = [0, *(index + 1 for index, (rows, _) in enumerate(drawn) if rows.stop == target.end - 1)]
        for number, (first, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
            for rows, block in drawn[first:stop]:
                samples[number, :, rows.start : rows.stop, : block.shape[2]] = block
        assert len(bounds) == 3 and not torch.equal(samples[0], samples[1])
        expected = np.mean([whole.score(target, 5, sample, function) for sample in samples], axis=0)
        agree(finding, expected, 1e-3)


def test_noise_is_normal_where_a_token_may_read_and_nowhere_else() -> None:
    rule = Rule(1.0, window=40)
    whole = noise(range(100), 8, 100, rule, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    parts = [noise(rows, 8, 100, rule, generator) for rows in (range(30), range(30, 100))]
    assert torch.equal(whole, torch.cat(parts, dim=1))
    rows, columns = torch.meshgrid(torch.arange(100), torch.arange(100), indexing="ij")
    readable = (columns <= rows) & (columns > rows - 40)
    assert not whole[:, ~readable].any()
    assert whole[:, readable].mean().abs() < 0.02 and abs(float(whole[:, readable].std()) - 1) < 0.02


def test_the_diffusion_retains_what_its_closed_form_says() -> None:
    # log(1 - b) = -b - b^2/2 - ..., summed over a linear schedule.
    betas = np.linspace(1e-4, 0.02, 500)
    expected = math.exp(-sum((betas**power).sum() / power for power in range(1, 8)))
    assert retained() == pytest.approx(expected, rel=1e-9) and 0.006 < retained() < 0.0065


def test_a_seed_gives_the_same_scores_whatever_else_is_explained() -> None:
    found, _ = explained("qwen3", seed=5, samples=2, points=3)
    again, _ = explained("qwen3", seed=5, samples=2, points=3)
    other, _ = explained("qwen3", seed=6, samples=2, points=3)
    for first, second, third in zip(found, again, other, strict=True):
        np.testing.assert_array_equal(first.scores, second.scores)
        assert np.abs(first.scores - third.scores).max() > 1e-3 * np.abs(first.scores).max()
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model("qwen3")), recorded, seed=5)
    (alone,) = run(context, [request("rpi", {"samples": 2, "points": 3})], recorded.targets[1:])
    np.testing.assert_allclose(alone.scores, found[1].scores, rtol=1e-4, atol=1e-6)


def test_a_target_behind_one_token_has_nothing_before_its_rows() -> None:
    recorded = Recorded(small_trace([[5]], [[[7, 8, 9]]], steps=1))
    asked = request("rpi", {"samples": 1, "points": 2})
    (found,) = run(Context(Replica(tiny_model("opt")), recorded), [asked], recorded.targets)
    assert found.scores.shape == (4,) and np.isfinite(found.scores).all() and found.scores[:3].any()


def test_progress_counts_samples_and_a_cancel_is_heard() -> None:
    recorded = Recorded(TRACE)
    told: list[tuple[float, int]] = []
    event = threading.Event()

    def progress(done: float, total: int) -> None:
        told.append((done, total))
        if done == 3:
            event.set()

    context = Context(Replica(tiny_model("phi3")), recorded, progress=progress, cancel=event)
    kept: list[Finding] = []
    with pytest.raises(CancelledError):
        for finding in run(context, [request("rpi", {"samples": 2, "points": 2})], recorded.targets):
            kept.append(finding)
    assert told == [(1, 4), (2, 4), (3, 4)] and len(kept) == 1 and context.cost.forward_tokens > len(IDS)


@pytest.mark.parametrize("parameters", [{"samples": 0}, {"points": 0}, {"layer": -LAYERS - 1}])
def test_parameters_out_of_range_are_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(parameters))):
        explained("llama", **parameters)
