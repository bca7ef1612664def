"""Head patching: which heads the target rests on, what they read, and which heads gave it to them to read.

The causal form of two-hop reading, after path patching (Wang et al. 2022, arXiv:2211.00593, section 3.1). With F the
target function, summed over the target's tokens and read off the residual stream at the rows that predict them:

* The direct effect of a head is F less F with the head's output at these rows replaced and everything else held: what
  the target loses without it. *Group A* are the heads with the largest ones in size. Nothing has to run again for them.
* What group A reads at these rows, weighted by its effects, gives the tokens of the first hop.
* The effect of a head *on group A* is F less F with group A's outputs, and nothing else, as they become when that
  head's output at the first hop's tokens is replaced. *Group B* are the heads with the largest ones in size. Layers run
  again from the head's own to group A's last one, rows from the first replaced one on, all heads of a layer side by
  side.

Replaced means set to zero, or to the head's mean over the rows of the sequence. A head's replacement goes through the
norm behind attention where the architecture has one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import JsonValue

from tracer.errors import InputError, ModelError
from tracer.explain.attribution.objective import check_foil
from tracer.explain.attribution.parameters import sink_rule, whole
from tracer.explain.attribution.reading import strongest
from tracer.explain.attribution.rerun import Meant, captured_targets, versions_at_once
from tracer.explain.attribution.sinks import Sinks, mean_received
from tracer.explain.attribution.tree_attention import Branches, TreeAttention, memory_guard
from tracer.explain.base import Context, Finding, Request
from tracer.replay.architectures import part
from tracer.replay.attention import Rule, attention, weights
from tracer.replay.layers import Captured
from tracer.replay.model import Replica
from tracer.replay.recorded import Target
from tracer.replay.tree import Node

_SCORES = 1 << 24
"""Attention weights that are held at once."""


@dataclass(frozen=True, slots=True)
class Head:
    """A head and what patching it changes, nats."""

    layer: int
    head: int
    effect: float


@dataclass(frozen=True, slots=True)
class _Settings:
    group_a: int
    group_b: int
    first_hop: int
    mean: bool
    sinks: tuple[float, float]


def run(context: Context, requests: Sequence[Request], targets: Sequence[Target]) -> Iterator[Finding]:
    """Run head patching for targets; `tracer.explain.base.Family`.

    A score is the mean of what group A reads at the rows that predict the target and what group B reads at the tokens
    of the first hop, heads weighted by the size of their effects, sinks set aside and the rest scaled back to one.
    Details are both groups with their effects, the tokens of the first hop and the target function.

    Raises:
        InputError: A parameter is out of its range.
        ModelError: The architecture does not add its heads' outputs to the residual stream.
        CancelledError: Somebody stopped it.
        EngineUnavailableError: Memory ran out.
    """
    chosen = [_settings(request) for request in requests]
    check_foil(context.replica, context.foil)
    if not context.replica.additive:
        raise ModelError(
            "head_patching needs an architecture that adds the outputs of heads to the residual stream; this one "
            "normalises their sum. Use another method"
        )
    if not requests or not targets:
        return
    sinks = _sinks(context, targets, chosen)
    layers = len(context.replica.layers)
    done = 0
    for target, captured, meant in captured_targets(context, targets, range(layers)):
        for request, settings in zip(requests, chosen, strict=True):
            with context.cost.timed(), memory_guard(), torch.no_grad():
                patched = _Patched(context, target, captured, meant, settings)
                scores, details = patched.explain(
                    sinks[settings.sinks, target.step_id], (done, len(targets) * len(requests))
                )
            done += 1
            context.report(done * layers, len(targets) * len(requests) * layers)
            yield Finding(request, target, scores, details)


class _Patched:
    """One target and the heads that are patched for it."""

    def __init__(self, context: Context, target: Target, captured: Captured, meant: Meant, settings: _Settings) -> None:
        self._context = context
        self._captured = captured
        self._meant = meant
        self._settings = settings
        self._target = target
        self._rows = slice(target.start - 1, target.end - 1)
        self._residual = captured.inputs[captured.layers.stop][self._rows]

    def explain(self, sinks: list[int], done: tuple[int, int]) -> tuple[NDArray[np.float32], dict[str, JsonValue]]:
        """Scores ``(target.end,)`` and details; ``done`` are the findings before this one, and their total."""
        group_a = self._group(self._direct_effects(), self._settings.group_a)
        first, removed = self._aside(self._read_by(group_a, {row: 1.0 for row in self._predicting}), sinks)
        hop = strongest(first, self._target, self._settings.first_hop)
        group_b = self._group(self._effects_on(group_a, list(hop), done), self._settings.group_b) if hop else []
        second, second_removed = self._aside(self._read_by(group_b, hop), sinks)
        scores = np.zeros(self._target.end, dtype=np.float32)
        scores[:-1] = ((first + second) / 2 if second.any() else first).cpu().numpy()
        details: dict[str, JsonValue] = {
            "target_function": self._meant.value,
            "group_a": [_described(head) for head in group_a],
            "first_hop": [{"token": token, "weight": weight} for token, weight in hop.items()],
            "group_b": [_described(head) for head in group_b],
            "sinks": list(sinks),
            "first_hop_removed": removed,
            "second_hop_removed": second_removed,
        }
        return scores, details

    @property
    def _predicting(self) -> range:
        return range(self._rows.start, self._rows.stop)

    def _direct_effects(self) -> NDArray[np.float64]:
        """Direct effect of every head, ``(layers, heads)``."""
        effects = []
        for layer in self._captured.layers:
            self._context.check_cancel()
            without = self._silenced(layer, list(self._predicting))
            change = self._added(layer, without) - self._added(layer, self._captured.heads[layer][self._rows])
            effects.append(self._meant.value - self._meant(self._changed(change)).cpu().numpy())
        return np.stack(effects)

    def _effects_on(self, group: Sequence[Head], hop: list[int], done: tuple[int, int]) -> NDArray[np.float64]:
        """Effect on a group of every head in a layer below the group's last one, ``(layers, heads)``."""
        last = max(head.layer for head in group)
        layers, heads = len(self._captured.layers), self._context.replica.heads
        effects = np.zeros((last, heads))
        hop = sorted(hop)
        rows = range(hop[0], self._rows.stop)
        step = versions_at_once(self._context.replica, len(rows))
        run_rows = 0
        for layer in range(last):
            without = self._silenced(layer, hop)
            for start in range(0, heads, step):
                self._context.check_cancel()
                block = without[start : start + step]
                recorded = self._patch(layer, block, hop, rows, _Recorder(group, len(self._predicting), layer))
                change = self._group_change(recorded)
                effects[layer, start : start + len(block)] = (
                    self._meant.value - self._meant(self._changed(change)).cpu().numpy()
                )
                run_rows += len(block) * (len(hop) + len(rows) * (last - layer))
            self._context.report(done[0] * layers + layer + 1, done[1] * layers)
        self._context.cost.forward_tokens += run_rows // layers
        return effects

    def _patch(self, layer: int, heads: torch.Tensor, hop: list[int], rows: range, recorder: _Recorder) -> _Recorder:
        """Run what can change when outputs of heads at the hop's rows become ``heads``, ``(versions, hop, width)``."""
        captured, count = self._captured, len(heads)
        node_rows = np.zeros(len(hop), dtype=np.int64)
        # The outputs are given, so nothing is read: these rows need no neighbours.
        own = captured.versions(count, 0, len(node_rows), intervene=_Injector(heads, self._context.replica.heads))
        at_hop = captured.inputs[layer][hop].repeat(count, 1)
        changed = captured.run([layer], at_hop, np.tile(hop, count), own).view(count, len(hop), -1)
        hidden = captured.inputs[layer + 1][rows.start : rows.stop].repeat(count, 1, 1)
        hidden[:, [row - rows.start for row in hop]] = changed
        positions = np.tile(np.arange(rows.start, rows.stop), count)
        plan = captured.versions(count, rows.start, rows.stop, intervene=recorder)
        above = captured.run(range(layer + 1, recorder.last), hidden.flatten(0, 1), positions, plan)
        captured.attend(recorder.last, above, positions, plan)
        return recorder

    def _group_change(self, recorder: _Recorder) -> torch.Tensor:
        """What changed outputs of a group add to the residual stream at the target's rows, float32."""
        change: torch.Tensor | None = None
        for layer, heads in recorder.heads.items():
            before = self._captured.heads[layer][self._rows]
            outputs = torch.stack(recorder.outputs[layer])
            after = before.repeat(len(outputs), 1, 1)
            width = after.shape[-1] // self._context.replica.heads
            after.view(*after.shape[:2], -1, width)[:, :, heads] = outputs.transpose(1, 2)
            own = self._added(layer, after) - self._added(layer, before)
            change = own if change is None else change + own
        if change is None:
            raise AssertionError("no head of the group lies above")
        return change

    def _silenced(self, layer: int, rows: list[int]) -> torch.Tensor:
        """Outputs of a layer's heads at some rows, one head replaced in each version, ``(heads, rows, width)``."""
        outputs = self._captured.heads[layer]
        heads = self._context.replica.heads
        width = outputs.shape[-1] // heads
        versions = outputs[rows].repeat(heads, 1, 1)
        instead = outputs[: self._rows.stop].float().mean(0).to(outputs.dtype) * self._settings.mean
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            versions[head, :, own] = instead[own]
        return versions

    def _added(self, layer: int, heads: torch.Tensor) -> torch.Tensor:
        """What outputs of heads ``(..., heads * head_width)`` add to the residual stream, ``(..., width)``, float32."""
        return _added(self._context.replica, layer, heads)

    def _changed(self, change: torch.Tensor) -> torch.Tensor:
        return (self._residual.float() + change).to(self._residual.dtype)

    def _group(self, effects: NDArray[np.float64], count: int) -> list[Head]:
        """The heads with the largest effects in size."""
        order = np.argsort(-np.abs(effects), axis=None, kind="stable")[:count]
        places = [divmod(int(place), effects.shape[1]) for place in order]
        return [Head(layer, head, float(effects[layer, head])) for layer, head in places if effects[layer, head]]

    def _read_by(self, group: Sequence[Head], rows: dict[int, float]) -> torch.Tensor:
        """What heads read at weighted rows, weighted by the size of their effects, ``(rows.stop,)``."""
        captured = self._captured
        total = torch.zeros(self._rows.stop, device=self._residual.device)
        for layer in sorted({head.layer for head in group}):
            own = [head for head in group if head.layer == layer]
            effects = torch.tensor([abs(head.effect) for head in own], device=total.device)
            rule, keys = captured.rules[layer], captured.keys[layer].float()
            for first, stop in _runs(rows, max(1, _SCORES // (len(captured.queries[layer]) * self._rows.stop))):
                read = weights(captured.queries[layer][:, first:stop].float(), keys[:, :stop], rule)
                factors = torch.tensor([rows[row] for row in range(first, stop)], device=total.device)
                mean = torch.einsum("hrc,r,h->c", read[[head.head for head in own]], factors, effects)
                total[:stop] += mean
        size = sum(abs(head.effect) for head in group) * sum(rows.values())
        return total / size if size else total

    def _aside(self, shares: torch.Tensor, sinks: list[int]) -> tuple[torch.Tensor, float]:
        kept = shares.clone()
        kept[[sink for sink in sinks if sink < len(kept)]] = 0
        left = float(kept.sum())
        return (kept / left if left > 0 else kept), float(shares.sum()) - left


class _Injector:
    """Gives each version outputs of heads in place of what its rows would read."""

    def __init__(self, outputs: torch.Tensor, heads: int) -> None:
        self._outputs = outputs.view(*outputs.shape[:2], heads, -1).transpose(1, 2)

    def __call__(
        self, _layer: int, node: Node, _q: torch.Tensor, _k: torch.Tensor, _v: torch.Tensor, _rule: Rule
    ) -> torch.Tensor:
        return self._outputs[node.number - 1][None]


class _Recorder:
    """Keeps what the heads of a group put out in the last rows, for the group's layers above one.

    Attributes:
        heads: The group's heads by layer.
        outputs: For each version, in order, ``(heads, rows, head_width)``, by layer.
        last: The group's last layer.
    """

    def __init__(self, group: Sequence[Head], rows: int, above: int) -> None:
        layers = sorted({head.layer for head in group if head.layer > above})
        self.heads = {layer: [head.head for head in group if head.layer == layer] for layer in layers}
        self.outputs: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
        self.last = layers[-1]
        self._rows = rows

    def __call__(
        self, layer: int, _node: Node, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rule: Rule
    ) -> torch.Tensor | None:
        if layer not in self.heads:
            return None
        # Nothing runs behind the last layer's attention, so there only the rows that count are needed.
        asked = queries[:, :, -self._rows :] if layer == self.last else queries
        outputs = attention(asked, keys, values, rule)
        self.outputs[layer].append(outputs[0, self.heads[layer], -self._rows :])
        return outputs


def _added(replica: Replica, layer: int, heads: torch.Tensor) -> torch.Tensor:
    names = replica.architecture
    added: torch.Tensor = replica.out_projection(layer)(heads)
    if names.attention_out != names.attention:
        added = part(replica.layers[layer], names.attention_out)(added)
    return added.float()


def _runs(rows: dict[int, float], longest: int) -> list[tuple[int, int]]:
    """Runs of consecutive rows, ``[first, stop)``."""
    runs: list[tuple[int, int]] = []
    for row in sorted(rows):
        if runs and runs[-1][1] == row and row - runs[-1][0] < longest:
            runs[-1] = runs[-1][0], row + 1
        else:
            runs.append((row, row + 1))
    return runs


def _described(head: Head) -> dict[str, JsonValue]:
    return {"layer": head.layer, "head": head.head, "effect": head.effect}


def _sinks(
    context: Context, targets: Sequence[Target], settings: Sequence[_Settings]
) -> dict[tuple[tuple[float, float], str], list[int]]:
    """The sinks of each target's sequence, its first position among them, by what makes a sink and by target."""
    with context.cost.timed(), memory_guard(), torch.inference_mode():
        branches = Branches.of(context.recorded, targets)
        # Without the context's progress: this is a small part of the work.
        quiet = Context(context.replica, context.recorded, low_memory=context.low_memory, cancel=context.cancel)
        received = mean_received(TreeAttention(quiet, branches.tree))
        context.cost.forward_tokens += quiet.cost.forward_tokens
    found: dict[tuple[tuple[float, float], str], list[int]] = {}
    for rule in {setting.sinks for setting in settings}:
        sinks = Sinks.of(received, branches, share=rule[0], factor=rule[1])
        for target, positions in zip(targets, sinks.positions, strict=True):
            found[rule, target.step_id] = sorted({0, *positions})
    return found


def _settings(request: Request) -> _Settings:
    ablation = request.parameters["ablation"]
    if ablation not in ("zero", "mean"):
        raise InputError(f"ablation of {request.method.name} is {ablation!r}; it must be 'zero' or 'mean'")
    return _Settings(
        group_a=whole(request, "group_a", least=1, most=1000),
        group_b=whole(request, "group_b", least=1, most=1000),
        first_hop=whole(request, "first_hop", least=1, most=1000),
        mean=ablation == "mean",
        sinks=sink_rule(request),
    )
