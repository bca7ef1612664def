"""Gradient methods against plain autograd over each sequence alone, identities and a model that is linear."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.explain.planted import random_ids, small_trace
from tests.tiny_models import FAMILIES, VOCABULARY, tiny_model
from tracer.errors import CancelledError, InputError
from tracer.explain.attribution.gradient import run
from tracer.explain.attribution.objective import objective
from tracer.explain.base import Context, Finding, TargetFunction
from tracer.explain.methods import request
from tracer.replay.model import Replica
from tracer.replay.recorded import Recorded, Target

COMMON = random_ids(14, seed=1)
# Two samples of one prompt, and a second prompt that begins like the first and its completion.
TRACE = small_trace(
    [COMMON, [*COMMON, *random_ids(6, seed=2)]],
    [[random_ids(9, seed=3), random_ids(7, seed=4)], [random_ids(8, seed=5)]],
)
METHODS = ("grad_x_input", "grad_l1", "grad_l2")


def findings(
    context: Context, *names: str, targets: tuple[Target, ...] | None = None, **parameters: Any
) -> dict[tuple[str, str], Finding]:
    requests = [request(name, parameters) for name in names]
    chosen = context.recorded.targets if targets is None else targets
    return {(found.request.method.name, found.target.step_id): found for found in run(context, requests, chosen)}


def by_hand(
    family: str, recorded: Recorded, target: Target, function: TargetFunction, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Embeddings, their gradient and the target function's value, from an eager model of its own."""
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    ids = torch.as_tensor(recorded.sequences[target.sequence].token_ids[: target.end])
    embeddings = (scale * model.get_input_embeddings()(ids[:-1])).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings[None]).logits[0, target.start - 1 :].float()
    value = objective(logits, ids[target.start :], function=function, foil=None).sum()
    [gradient] = torch.autograd.grad(value, embeddings)
    return embeddings.detach(), gradient, value.item()


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_over_the_tree_equals_autograd_on_each_sequence(family: str, low_memory: bool) -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model(family)), recorded, low_memory=low_memory)
    found = findings(context, *METHODS)
    for target in recorded.targets:
        inputs, gradient, _ = by_hand(family, recorded, target, "logprob")
        expected = {
            "grad_x_input": (inputs * gradient).sum(-1),
            "grad_l1": gradient.abs().sum(-1),
            "grad_l2": gradient.square().sum(-1).sqrt(),
        }
        for name in METHODS:
            scores = found[name, target.step_id].scores
            assert scores.shape == (target.end,)
            assert scores[-1] == 0
            theirs = expected[name].numpy()
            assert scores[:-1] == pytest.approx(theirs, abs=2e-5 * float(np.abs(theirs).max()))


@pytest.mark.parametrize("family", ["llama", "qwen2_tied", "gpt2", "opt"])
def test_an_eager_model_with_left_padding_has_the_same_gradients(family: str) -> None:
    """A sequence that begins with BOS, and the same behind padding that is masked, as a batch would hold it."""
    padding = 5
    recorded = Recorded(small_trace([[1, *random_ids(12, seed=6)]], [[random_ids(6, seed=7)]]))
    target = recorded.targets[0]
    found = findings(Context(Replica(tiny_model(family)), recorded), *METHODS)
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    ids = torch.as_tensor(recorded.sequences[0].token_ids[: target.end])
    padded = torch.cat([torch.zeros(padding, dtype=ids.dtype), ids[:-1]])
    seen = torch.arange(len(padded)) >= padding
    embeddings = model.get_input_embeddings()(padded).detach().requires_grad_()
    logits = model(
        inputs_embeds=embeddings[None],
        attention_mask=seen[None].long(),
        position_ids=(torch.arange(len(padded)) - padding).clamp_min(0)[None],
    ).logits[0, padding + target.start - 1 :]
    value = objective(logits, ids[target.start :], function="logprob", foil=None).sum()
    [whole] = torch.autograd.grad(value, embeddings)
    assert not whole[:padding].any()
    gradient, inputs = whole[padding:], embeddings.detach()[padding:]
    expected = {
        "grad_x_input": (inputs * gradient).sum(-1),
        "grad_l1": gradient.abs().sum(-1),
        "grad_l2": gradient.square().sum(-1).sqrt(),
    }
    for name, theirs in expected.items():
        assert found[name, target.step_id].scores[:-1] == pytest.approx(
            theirs.numpy(), abs=2e-5 * float(theirs.abs().max())
        )


@pytest.mark.parametrize("function", ["logprob", "logit", "contrast"])
def test_target_functions(function: TargetFunction) -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model("qwen2_tied")), recorded, target_function=function)
    target = recorded.targets[-1]
    found = findings(context, "grad_x_input", targets=(target,))["grad_x_input", target.step_id]
    inputs, gradient, value = by_hand("qwen2_tied", recorded, target, function)
    assert found.details["target_function"] == pytest.approx(value, rel=1e-5)
    theirs = (inputs * gradient).sum(-1).numpy()
    assert found.scores[:-1] == pytest.approx(theirs, abs=1e-5 * float(np.abs(theirs).max()))


def test_a_foil_of_the_users_choice() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    written = torch.tensor([1])
    assert objective(logits, written, function="contrast", foil=None).item() == 1.0
    assert objective(logits, torch.tensor([2]), function="contrast", foil=None).item() == -2.0
    assert objective(logits, written, function="contrast", foil=2).item() == 2.0
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model("llama")), recorded, target_function="contrast", foil=VOCABULARY)
    with pytest.raises(InputError, match="foil is token 97.*vocabulary has 97"):
        findings(context, "grad_x_input")


def test_a_step_is_the_sum_of_its_tokens_for_signed_methods_only() -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model("llama")), recorded)
    target = recorded.targets[1]
    tokens = recorded.tokens_of(target)
    found = findings(context, *METHODS, targets=(target, *tokens))
    for name in METHODS:
        total = np.zeros(target.end)
        for token in tokens:
            total[: token.end] += found[name, token.step_id].scores
        whole = found[name, target.step_id].scores
        same = np.abs(total - whole).max() <= 1e-5 * np.abs(whole).max()
        assert same == (name == "grad_x_input")


# torch.func itself still uses what it deprecates.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_gradient_times_input_is_the_derivative_along_the_input() -> None:
    """JVP = VJP: the scores add up to the forward derivative of the target function in the inputs' direction."""
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model("gemma2")), recorded)
    target = recorded.targets[2]
    total = float(findings(context, "grad_x_input", targets=(target,))["grad_x_input", target.step_id].scores.sum())
    model = tiny_model("gemma2")
    model.set_attn_implementation("eager")
    ids = torch.as_tensor(recorded.sequences[target.sequence].token_ids[: target.end])

    def value(embeddings: torch.Tensor) -> torch.Tensor:
        logits = model(inputs_embeds=embeddings[None], use_cache=False).logits[0, target.start - 1 :]
        return objective(logits, ids[target.start :], function="logprob", foil=None).sum()

    inputs = model.get_input_embeddings()(ids[:-1]).detach()
    with sdpa_kernel(SDPBackend.MATH):
        derivative: torch.Tensor = torch.func.jvp(value, (inputs,), (inputs,))[1]
    assert total == pytest.approx(derivative.item(), rel=1e-4)


def test_integrated_gradients_become_complete() -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model("llama")), recorded)
    targets = (recorded.targets[0], recorded.targets[3])
    errors: list[float] = []
    for points in (1, 8, 64):
        found = findings(context, "integrated_gradients", targets=targets, points=points, baseline=7)
        errors.append(max(abs(float(str(item.details["completeness_error"]))) for item in found.values()))
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert errors[2] < 0.02


def test_integrated_gradients_know_both_ends_of_their_path() -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model("llama")), recorded)
    for item in findings(context, "integrated_gradients", points=1).values():
        _, _, value = by_hand("llama", recorded, item.target, "logprob")
        _, _, start = by_hand("llama", recorded, item.target, "logprob", scale=0.0)
        assert item.details["change"] == pytest.approx(value - start, abs=1e-4)


def test_integrated_gradients_equal_a_sum_by_hand_over_the_same_points() -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model("qwen3")), recorded)
    target = recorded.targets[0]
    found = findings(context, "integrated_gradients", targets=(target,), points=3)
    shares, shares_weights = np.polynomial.legendre.leggauss(3)
    total = torch.zeros(())
    for share, weight in zip((shares + 1) / 2, shares_weights / 2, strict=True):
        _, gradient, _ = by_hand("qwen3", recorded, target, "logprob", scale=float(share))
        total = total + float(weight) * gradient
    inputs, _, _ = by_hand("qwen3", recorded, target, "logprob")
    theirs = (inputs * total).sum(-1).numpy()
    scores = found["integrated_gradients", target.step_id].scores
    assert scores[:-1] == pytest.approx(theirs, abs=1e-5 * float(np.abs(theirs).max()))


def test_a_token_as_baseline_leaves_that_token_without_score() -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model("llama")), recorded)
    target = recorded.targets[0]
    token = int(recorded.sequences[0].token_ids[4])
    found = findings(context, "integrated_gradients", targets=(target,), points=2, baseline=token)
    scores = found["integrated_gradients", target.step_id].scores
    assert scores[4] == 0
    assert np.count_nonzero(scores) >= target.end - 3


@pytest.mark.parametrize(
    ("parameters", "message"),
    [({"points": 0}, "points is 0"), ({"points": "many"}, "points is 'many'"), ({"baseline": 97}, "baseline is 97")],
)
def test_parameters_that_cannot_be_used(parameters: dict[str, Any], message: str) -> None:
    context = Context(Replica(tiny_model("llama")), Recorded(TRACE))
    with pytest.raises(InputError, match=message):
        findings(context, "integrated_gradients", **parameters)


def test_gradient_times_input_of_a_linear_model_is_exact() -> None:
    """Without attention and feed-forward blocks and with a norm that divides by a constant, logits are linear."""
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.model.norm = torch.nn.Identity()
    recorded = Recorded(TRACE)
    context = Context(Replica(model), recorded, target_function="logit")
    target = recorded.targets[0]
    found = findings(context, "grad_x_input", targets=(target,))["grad_x_input", target.step_id]
    ids = recorded.sequences[target.sequence].token_ids
    embed, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    expected = np.zeros(target.end)
    for position in range(target.start, target.end):
        expected[position - 1] = float(embed[ids[position - 1]] @ head[ids[position]])
    assert found.scores == pytest.approx(expected, abs=1e-5)
    assert float(str(found.details["target_function"])) == pytest.approx(expected.sum(), abs=1e-4)


def test_shared_prefixes_go_through_the_layers_once() -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model("llama")), recorded)
    findings(context, *METHODS)
    # The last token of each sequence is not read by anything.
    ends = {tuple(item.token_ids[: end + 1]) for item in recorded.sequences for end in range(len(item.token_ids) - 1)}
    assert context.cost.forward_tokens == len(ends)
    assert context.cost.backward_passes == len(recorded.targets)


def test_cancelling_keeps_the_findings_before() -> None:
    cancel = threading.Event()
    context = Context(Replica(tiny_model("llama")), Recorded(TRACE), cancel=cancel)
    seen: list[Finding] = []
    with pytest.raises(CancelledError):
        for found in run(context, [request("grad_l2")], context.recorded.targets):
            seen.append(found)
            cancel.set()
    assert len(seen) == 1
