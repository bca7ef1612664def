"""Head patching against plain passes of eager transformers in float64, one for each patched head."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from tests.explain.planted import random_ids, small_trace
from tests.tiny_models import FAMILIES, HEADS, LAYERS, tiny_model
from tracer.errors import CancelledError, InputError, ModelError
from tracer.explain.attribution.patching import run
from tracer.explain.base import Context, Finding, TargetFunction
from tracer.explain.methods import request
from tracer.replay.architectures import architecture_of, part
from tracer.replay.model import Replica
from tracer.replay.recorded import Recorded, Target

TRACE = small_trace([random_ids(16, seed=1)], [[random_ids(8, seed=2)]])
Heads = dict[int, torch.Tensor]
"""What the out projection reads, ``(tokens, heads * width)``, by layer."""


class Plain:
    """An eager model with hooks; knows nothing of tracer's passes."""

    def __init__(self, family: str, ids: list[int]) -> None:
        self.model = copy.deepcopy(tiny_model(family)).double()
        self.model.set_attn_implementation("eager")
        self.ids = torch.tensor([ids])
        names = architecture_of(self.model.config.model_type)
        self.layers = list(part(self.model, names.layers))
        self.projections = [part(layer, f"{names.attention}.{names.out_projection}") for layer in self.layers]
        self.parts = [part(layer, name) for layer in self.layers for name in (names.attention_out, names.mlp_out)]
        self.fixed: dict[int, Any] = {}
        handles = [
            module.register_forward_hook(lambda _m, _i, output, number=number: self.fixed.update({number: output}))
            for number, module in enumerate(self.parts)
        ]
        self.logits, self.heads = self.run()
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            output = self.model(self.ids, output_attentions=True, use_cache=False)
        self.attentions = [weights[0].numpy() for weights in output.attentions]

    def run(self, change: Callable[[int, torch.Tensor], torch.Tensor] | None = None) -> tuple[torch.Tensor, Heads]:
        """Logits and heads of a pass in which ``change`` sees what each out projection reads."""
        seen: Heads = {}
        with torch.no_grad(), self._changing(change or (lambda _layer, heads: heads), seen):
            return self.model(self.ids, use_cache=False).logits[0], seen

    def held(self, heads: Heads) -> torch.Tensor:
        """Logits with some layers' heads given and what every other part adds held at its unchanged value."""

        def fix(number: int) -> Any:
            return lambda _m, _i, _o: self.fixed[number]

        # Parts come in pairs, attention and feed-forward; an attention whose heads are given runs.
        free = {2 * layer for layer in heads}
        handles = [
            module.register_forward_hook(fix(number)) for number, module in enumerate(self.parts) if number not in free
        ]
        logits, _ = self.run(lambda layer, before: heads.get(layer, before))
        for handle in handles:
            handle.remove()
        return logits

    @contextmanager
    def _changing(self, change: Callable[[int, torch.Tensor], torch.Tensor], seen: Heads) -> Iterator[None]:
        def hook(layer: int) -> Any:
            def replace(_module: Any, arguments: Any) -> Any:
                heads = change(layer, arguments[0][0].clone())
                seen[layer] = heads
                return (heads[None],)

            return replace

        handles = [module.register_forward_pre_hook(hook(layer)) for layer, module in enumerate(self.projections)]
        yield
        for handle in handles:
            handle.remove()


def value(plain: Plain, logits: torch.Tensor, target: Target, function: TargetFunction) -> float:
    rows = torch.arange(target.start - 1, target.end - 1)
    tokens = plain.ids[0, rows + 1]
    chosen = logits[rows, tokens]
    if function == "logit":
        return float(chosen.sum())
    if function == "logprob":
        return float(logits.log_softmax(-1)[rows, tokens].sum())
    # The runner-up of the unchanged model.
    others = plain.logits[rows].scatter(1, tokens[:, None], float("-inf")).argmax(-1)
    return float((chosen - logits[rows, others]).sum())


def silenced(heads: torch.Tensor, head: int, rows: list[int], target: Target, ablation: str) -> torch.Tensor:
    width = heads.shape[1] // HEADS
    own = slice(head * width, (head + 1) * width)
    changed = heads.clone()
    changed[rows, own] = heads[: target.end - 1, own].mean(0) if ablation == "mean" else 0
    return changed


def listed(details: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    found = details[name]
    assert isinstance(found, list)
    return found


def effects(details: Mapping[str, Any], name: str) -> dict[tuple[int, int], float]:
    return {(item["layer"], item["head"]): item["effect"] for item in listed(details, name)}


def agree(found: dict[tuple[int, int], float], expected: dict[tuple[int, int], float]) -> None:
    assert set(found) == set(expected)
    largest = max(abs(effect) for effect in expected.values())
    assert largest > 1e-3
    for place, effect in expected.items():
        assert abs(found[place] - effect) <= 1e-4 * largest, (place, found[place], effect)


def explained(family: str, function: TargetFunction = "logprob", **parameters: Any) -> tuple[list[Finding], Context]:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model(family)), recorded, target_function=function)
    return list(run(context, [request("head_patching", parameters)], recorded.targets)), context


@pytest.mark.parametrize("ablation", ["zero", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_direct_effects_equal_a_pass_for_each_head(family: str, ablation: str) -> None:
    plain = Plain(family, Recorded(TRACE).sequences[0].token_ids.tolist())
    found, _ = explained(family, group_a=LAYERS * HEADS, ablation=ablation)
    for finding in found:
        target = finding.target
        whole = value(plain, plain.logits, target, "logprob")
        assert finding.details["target_function"] == pytest.approx(whole, rel=1e-5)
        rows = list(range(target.start - 1, target.end - 1))
        expected = {
            (layer, head): whole
            - value(
                plain,
                plain.held({layer: silenced(plain.heads[layer], head, rows, target, ablation)}),
                target,
                "logprob",
            )
            for layer in range(LAYERS)
            for head in range(HEADS)
        }
        agree(effects(finding.details, "group_a"), expected)


@pytest.mark.parametrize(
    ("family", "function", "ablation"),
    [
        *((family, "logprob", "zero") for family in FAMILIES),
        ("gemma2", "logit", "mean"),
        ("phi", "contrast", "mean"),
        ("llama", "contrast", "zero"),
    ],
)
def test_effects_on_group_a_equal_a_pass_for_each_head(
    family: str, function: TargetFunction, ablation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Heads of a layer in several blocks.
    monkeypatch.setattr("tracer.explain.attribution.rerun._ROWS", {"cpu": 40})
    plain = Plain(family, Recorded(TRACE).sequences[0].token_ids.tolist())
    found, _ = explained(family, function, group_a=5, group_b=100, first_hop=3, ablation=ablation)
    for finding in found:
        target = finding.target
        whole = value(plain, plain.logits, target, function)
        rows = list(range(target.start - 1, target.end - 1))
        group = list(effects(finding.details, "group_a"))
        hop = [item["token"] for item in listed(finding.details, "first_hop")]
        assert len(group) == 5 and len(hop) == 3 and 0 not in hop and max(hop) < target.start - 1
        expected: dict[tuple[int, int], float] = {}
        for layer in range(max(layer for layer, _ in group)):
            for head in range(HEADS):

                def patch(number: int, heads: torch.Tensor, layer: int = layer, head: int = head) -> torch.Tensor:
                    return silenced(heads, head, hop, target, ablation) if number == layer else heads  # noqa: B023

                _, patched = plain.run(patch)
                given: Heads = {}
                for above, own in group:
                    heads = given.setdefault(above, plain.heads[above].clone())
                    width = heads.shape[1] // HEADS
                    columns = slice(own * width, (own + 1) * width)
                    # A head of the group that is itself patched keeps its output: nothing of it passes by itself.
                    heads[rows, columns] = (patched if above > layer else plain.heads)[above][rows, columns]
                effect = whole - value(plain, plain.held(given), target, function)
                if effect:
                    expected[layer, head] = effect
        agree(effects(finding.details, "group_b"), expected)


@pytest.mark.parametrize("family", ["qwen2_tied", "gemma3", "gpt2"])
def test_scores_are_what_both_groups_read(family: str) -> None:
    plain = Plain(family, Recorded(TRACE).sequences[0].token_ids.tolist())
    found, _ = explained(family, group_a=6, group_b=4, first_hop=2)
    for finding in found:
        rows = dict.fromkeys(range(finding.target.start - 1, finding.target.end - 1), 1.0)
        first = read(plain, effects(finding.details, "group_a"), rows)
        order = sorted(range(finding.target.start - 1), key=lambda position: -first[position])[:2]
        hop = {token: first[token] / sum(first[order]) for token in order}
        assert [item["token"] for item in listed(finding.details, "first_hop")] == order
        second = read(plain, effects(finding.details, "group_b"), hop)
        assert finding.scores.shape == (finding.target.end,)
        np.testing.assert_allclose(finding.scores, ((first + second) / 2)[: finding.target.end], atol=1e-5)


def read(plain: Plain, group: dict[tuple[int, int], float], rows: dict[int, float]) -> Any:
    total = sum(
        abs(effect) * weight * plain.attentions[layer][head, row]
        for (layer, head), effect in group.items()
        for row, weight in rows.items()
    )
    assert isinstance(total, np.ndarray)
    total[0] = 0
    return total / total.sum()


def test_where_nothing_lies_before_the_target_group_a_is_all() -> None:
    recorded = Recorded(small_trace([[5, 6]], [[[7, 8, 9, 10]]]))
    found = list(run(Context(Replica(tiny_model("opt")), recorded), [request("head_patching")], recorded.targets))
    assert found[0].details["first_hop"] == found[0].details["group_b"] == []
    assert found[0].scores.sum() == pytest.approx(1, abs=1e-5)
    assert found[1].details["group_b"] != []


def test_cost_and_progress_are_told_and_a_cancel_is_heard() -> None:
    recorded = Recorded(TRACE)
    told: list[tuple[float, int]] = []
    context = Context(Replica(tiny_model("llama")), recorded, progress=lambda done, total: told.append((done, total)))
    list(run(context, [request("head_patching")], recorded.targets))
    assert told[-1][0] == told[-1][1] == 2 * LAYERS and told == sorted(told)
    assert context.cost.forward_tokens > 2 * len(recorded.tree) and context.cost.seconds > 0
    event = threading.Event()
    context.cancel, context.progress = event, lambda done, _total: event.set() if done >= LAYERS else None
    kept: list[Finding] = []
    with pytest.raises(CancelledError):
        for finding in run(context, [request("head_patching")], recorded.targets):
            kept.append(finding)
    assert [finding.target for finding in kept] == list(recorded.targets[:1])


@pytest.mark.parametrize("parameters", [{"ablation": "noise"}, {"group_a": 0}, {"first_hop": 1.5}, {"sink_share": 2}])
def test_parameters_out_of_range_are_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(parameters))):
        explained("llama", **parameters)


def test_an_architecture_that_does_not_add_is_refused() -> None:
    recorded = Recorded(TRACE)
    replica = Replica(tiny_model("llama"))
    replica.additive = False
    with pytest.raises(ModelError, match="residual stream"):
        list(run(Context(replica, recorded), [request("head_patching")], recorded.targets))
