"""Attention attribution: raw, rollout, rollout without sinks, cumulative product and resolvent, all in one sweep.

With A the mean over heads of a layer's attention, and e the mean over a target's tokens of the unit vectors at the
tokens that predict them, every method is e times matrices. So it goes from the top layer down to the input, for all
targets at once and without a product of two matrices. Memory is ``tokens x targets`` numbers for each method beside
what `tracer.explain.attribution.tree_attention` keeps; the resolvent adds one mean matrix of the tree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import JsonValue

from tracer.errors import InputError
from tracer.explain.attribution.carriers import TINY, Carrier, Product
from tracer.explain.attribution.sinks import Sinks, mean_received
from tracer.explain.attribution.tree_attention import Block, Branches, TreeAttention, memory_guard
from tracer.explain.base import Context, Finding, Request
from tracer.replay.recorded import Target
from tracer.replay.tree import PrefixTree

_SINKLESS = "attention_rollout_sinkless"


def run(context: Context, requests: Sequence[Request], targets: Sequence[Target]) -> Iterator[Finding]:
    """Run attention methods for targets; `tracer.explain.base.Family`.

    The scores of a method add up to one for each target. Tokens behind the last one that predicts something have none.

    Raises:
        InputError: A parameter is out of its range.
        CancelledError: The context's ``cancel`` was set.
        EngineUnavailableError: Memory ran out.
    """
    for request in requests:
        _check(request, len(context.replica.layers))
    if not requests or not targets:
        return
    with context.cost.timed(), memory_guard():
        branches = Branches.of(context.recorded, targets)
        found = _findings(context, branches, requests)
    yield from found


@torch.inference_mode()
def _findings(context: Context, branches: Branches, requests: Sequence[Request]) -> list[Finding]:
    """Carry all targets down through all layers by all methods."""
    sinkless = any(request.method.name == _SINKLESS for request in requests)
    attention = TreeAttention(context, branches.tree, sweeps=2 if sinkless else 1)
    received = mean_received(attention) if sinkless else []
    starts = branches.starts(attention.device)
    carriers = [_carrier(request, starts, branches, attention.layers, received) for request in requests]
    for layer in reversed(range(attention.layers)):
        needed = torch.stack([carrier.needed(layer) for carrier in carriers]).any(0)
        for block in attention.blocks(layer, needed):
            for carrier in carriers:
                carrier.cross(layer, block)
        for carrier in carriers:
            carrier.descend()
    return [
        Finding(request, target, branches.scores(shares[:, number], number), carrier.details(number))
        for request, carrier in zip(requests, carriers, strict=True)
        for shares in [carrier.shares().cpu()]
        for number, target in enumerate(branches.targets)
    ]


class _Raw(Carrier):
    """The weights of one layer, or their mean over all."""

    def __init__(self, starts: torch.Tensor, layers: range) -> None:
        self._starts = starts
        self._layers = layers
        self._rows = starts.any(1)
        self._total = torch.zeros_like(starts)

    def needed(self, layer: int) -> torch.Tensor:
        return self._rows if layer in self._layers else torch.zeros_like(self._rows)

    def cross(self, layer: int, block: Block) -> None:
        if layer in self._layers:
            self._total.index_add_(0, block.columns, block.weights.T @ self._starts[block.rows])

    def shares(self) -> torch.Tensor:
        return self._total / len(self._layers)


class _Sinkless(Product):
    """Rollout over A with the sinks' columns removed and each row scaled back to a sum of one.

    A row that reads nothing but sinks keeps its own token. Neither needs a changed copy of A: rows are scaled before
    the product and columns dropped behind it.
    """

    def __init__(self, starts: torch.Tensor, sinks: Sinks, layers: int) -> None:
        super().__init__(starts, passing=0.5)
        self._starts = starts
        self._rows = starts.any(1)
        self._sinks = sinks
        self._kept, self._sets = sinks.kept.to(starts.device), sinks.sets.to(starts.device)
        self._layers = layers
        self._left = torch.zeros(starts.shape[1], dtype=torch.float64, device=starts.device)

    def needed(self, layer: int) -> torch.Tensor:
        return super().needed(layer) | self._rows

    def cross(self, layer: int, block: Block) -> None:
        kept = self._kept[block.columns]
        left = (block.weights @ kept)[:, self._sets]
        empty = left < TINY
        state = self._state[block.rows]
        scaled = (state / left).masked_fill_(empty, 0)
        self._received.index_add_(0, block.columns, (block.weights.T @ scaled) * kept[:, self._sets])
        self._received[block.rows] += state * empty
        self._left += (self._starts[block.rows] * left).sum(0, dtype=torch.float64)

    def details(self, number: int) -> Mapping[str, JsonValue]:
        positions: list[JsonValue] = list(self._sinks.positions[number])
        removed = max(0.0, 1 - float(self._left[number]) / self._layers) if positions else 0.0
        return {"sinks": positions, "removed": removed}


class _Resolvent(Carrier):
    """(1 - g) e A (I - g A)^-1 = (1 - g) (e A + g e A^2 + ...) with A the mean over heads and layers.

    A reads backwards only, so the solution goes over the tree from its leaves to its root, one triangular system for
    each node, and no inverse is formed.
    """

    def __init__(self, starts: torch.Tensor, tree: PrefixTree, decay: float, layers: int) -> None:
        self._starts = starts
        self._tree = tree
        self._decay = decay
        self._layers = layers
        reached = starts.any(1)
        ends = (reached * torch.arange(1, len(tree) + 1, device=starts.device)).cpu()
        self._limits = [max(0, int(ends[node.start : node.end].max()) - node.start) for node in tree.nodes]
        for node in reversed(tree.nodes):
            # What a later node reads, it reads of all of its ancestors.
            if node.parent is not None and self._limits[node.number]:
                self._limits[node.parent.number] = len(node.parent.token_ids)
        self._rows = torch.zeros_like(reached)
        for node, limit in zip(tree.nodes, self._limits, strict=True):
            self._rows[node.start : node.start + limit] = True
        self._total = [
            torch.zeros(limit, node.position + limit if limit else 0, device=starts.device)
            for node, limit in zip(tree.nodes, self._limits, strict=True)
        ]

    def needed(self, layer: int) -> torch.Tensor:
        return self._rows

    def cross(self, layer: int, block: Block) -> None:
        first, total = block.rows.start - block.node.start, self._total[block.node.number]
        end = block.position + block.weights.shape[1]
        total[first : first + block.weights.shape[0], block.position : end] += block.weights

    def shares(self) -> torch.Tensor:
        # x = b + g x A with b = (1 - g) e A, in float64: systems are small, and g near one is ill conditioned.
        columns = [torch.as_tensor(node.columns, device=self._starts.device) for node in self._tree.nodes]
        solution = torch.zeros_like(self._starts, dtype=torch.float64)
        for node, limit, total in zip(self._tree.nodes, self._limits, self._total, strict=True):
            rows = slice(node.start, node.start + limit)
            direct = (total.T @ self._starts[rows]) * ((1 - self._decay) / self._layers)
            solution.index_add_(0, columns[node.number][: total.shape[1]], direct.double())
        for node, limit, total in reversed(list(zip(self._tree.nodes, self._limits, self._total, strict=True))):
            rows = slice(node.start, node.start + limit)
            within = total[:, node.position :].double().mul_(-self._decay / self._layers)
            within.diagonal().add_(1)
            solution[rows] = torch.linalg.solve_triangular(within.T, solution[rows], upper=True)
            before = total[:, : node.position].T @ solution[rows].float()
            solution.index_add_(
                0, columns[node.number][: node.position], before.double() * (self._decay / self._layers)
            )
        return solution.float()


def _carrier(
    request: Request,
    starts: torch.Tensor,
    branches: Branches,
    layers: int,
    received: Sequence[NDArray[np.float64]],
) -> Carrier:
    name = request.method.name
    if name == "attention":
        layer = _layer(request, layers)
        return _Raw(starts, range(layers) if layer is None else range(layer, layer + 1))
    if name == "attention_rollout":
        return Product(starts, passing=0.5)
    if name == "attention_product":
        return Product(starts, passing=0.0)
    if name == _SINKLESS:
        share, factor = _number(request, "sink_share"), _number(request, "sink_factor")
        return _Sinkless(starts, Sinks.of(received, branches, share=share, factor=factor), layers)
    if name == "attention_resolvent":
        return _Resolvent(starts, branches.tree, _number(request, "decay"), layers)
    raise AssertionError(f"{name} is no method of the attention family")


def _check(request: Request, layers: int) -> None:
    """Refuse parameters out of their range before anything is computed."""
    if "layer" in request.parameters:
        _layer(request, layers)
    if "sink_share" in request.parameters and not 0 < _number(request, "sink_share") <= 1:
        raise InputError(f"sink_share is {request.parameters['sink_share']}; it must be above 0 and at most 1")
    if "sink_factor" in request.parameters and not 0 <= _number(request, "sink_factor") < math.inf:
        raise InputError(f"sink_factor is {request.parameters['sink_factor']}; it must be at least 0")
    if "decay" in request.parameters and not 0 <= _number(request, "decay") < 1:
        raise InputError(f"decay is {request.parameters['decay']}; it must be at least 0 and below 1")


def _number(request: Request, name: str) -> float:
    value = request.parameters[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{name} of {request.method.name} is {value!r}; it must be a number")
    return float(value)


def _layer(request: Request, layers: int) -> int | None:
    value = request.parameters["layer"]
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not -layers <= value < layers:
        raise InputError(
            f"layer of {request.method.name} is {value!r}; it must be a whole number from {-layers} to {layers - 1}, "
            "or none for the mean over all layers"
        )
    return value % layers
