"""Running decoder layers again from changed hidden states, for only the rows that can change.

One pass over a sequence keeps what enters each layer. Afterwards any later layer runs again: of versions of some rows,
packed side by side, over keys and values of the untouched rows before them, which the first pass left behind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tracer.errors import ModelError
from tracer.replay.attention import Intervention, Plan, Rule
from tracer.replay.forward import CHUNK, check_cancel, check_length
from tracer.replay.model import Replica, first_tensor
from tracer.replay.tree import Ids, Node, build_tree

_Hook = Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any]], None]


@dataclass(slots=True)
class _Pass:
    """What the hooks see, chunk after chunk."""

    calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=dict)
    inputs: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    heads: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    queries: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    rules: dict[int, Rule] = field(default_factory=dict)

    def see(self, layer: int, _node: Node, queries: torch.Tensor, _keys: torch.Tensor, rule: Rule) -> None:
        self.rules[layer] = rule
        if layer in self.calls:
            self.queries[layer].append(queries)


class Captured:
    """What one pass over a sequence left behind in some layers, and the means to run them again.

    Tokens are named by their positions. All tensors are in the replica's type and on its device.

    Attributes:
        replica: The model.
        layers: The layers that can be run again.
        inputs: What entered each of them, ``(tokens, width)``; under ``layers.stop`` what left the last one.
        heads: What the heads of each layer put out, concatenated, ``(tokens, heads * head_width)``.
        queries: ``(heads, tokens, head_width)`` by layer.
        keys: ``(kv_heads, tokens, head_width)`` by layer.
        values: ``(kv_heads, tokens, head_width)`` by layer.
        rules: Each layer's rule.
    """

    def __init__(self, replica: Replica, layers: range, seen: _Pass, plan: Plan, nodes: Sequence[Node]) -> None:
        self.replica = replica
        self.layers = layers
        # One layer after the other, so that parts and wholes are not all there at once.
        self.inputs = {layer: torch.cat(seen.inputs.pop(layer)) for layer in list(seen.inputs)}
        self.heads = {layer: torch.cat(seen.heads.pop(layer)) for layer in list(seen.heads)}
        self.queries = {layer: torch.cat(seen.queries.pop(layer), dim=1) for layer in list(seen.queries)}
        self.rules = {layer: seen.rules[layer] for layer in layers}
        lengths = [len(node.token_ids) for node in nodes]
        self._calls = {
            layer: (
                _joined([arguments for arguments, _ in calls], lengths),
                _joined([named for _, named in calls], lengths),
            )
            for layer, calls in seen.calls.items()
        }
        self._tokens = sum(lengths)
        self.keys, self.values = (
            {layer: torch.cat([plan.memory[layer, node.number][part][0] for node in nodes], dim=1) for layer in layers}
            for part in (0, 1)
        )

    def __len__(self) -> int:
        return self._tokens

    def versions(self, count: int, first: int, stop: int, *, intervene: Intervention | None = None) -> Plan:
        """A plan for versions of the rows ``[first, stop)`` over the untouched rows before them.

        Args:
            count: Versions; version ``i`` is node ``i + 1`` of the plan, packed in this order.
            first: First row.
            stop: One past the last.
            intervene: Replaces outputs of heads.
        """
        base = Node(0, None, 0, 0, np.zeros(first, dtype=np.int64)) if first else None
        rows = np.zeros(stop - first, dtype=np.int64)
        nodes = [Node(number + 1, base, first + number * len(rows), first, rows) for number in range(count)]
        plan = Plan(intervene=intervene, keep=False, nodes=nodes)
        if base is not None:
            for layer in self.layers:
                plan.memory[layer, 0] = self.keys[layer][None, :, :first], self.values[layer][None, :, :first]
        return plan

    def run(self, layers: Iterable[int], hidden: torch.Tensor, positions: Ids, plan: Plan) -> torch.Tensor:
        """Run layers on packed rows.

        Args:
            layers: Consecutive ones.
            hidden: What enters the first of them, ``(rows, width)``.
            positions: Position of each row, ``(rows,)``.
            plan: Which row reads which.

        Returns:
            What leaves the last of them, ``(rows, width)``.

        Raises:
            EngineUnavailableError: Memory ran out.
        """
        rows = torch.as_tensor(positions, device=hidden.device)
        with self.replica.running(plan):
            for layer in layers:
                hidden = self._call(layer, hidden, rows)
        return hidden

    def attend(self, layer: int, hidden: torch.Tensor, positions: Ids, plan: Plan) -> None:
        """Run a layer up to its attention and no further: the plan keeps keys and values, and its hook sees them.

        Args:
            layer: The layer.
            hidden: What enters it, ``(rows, width)``.
            positions: Position of each row, ``(rows,)``.
            plan: Which row reads which; what its ``intervene`` returns is dropped.

        Raises:
            EngineUnavailableError: Memory ran out.
        """
        with self.replica.running(plan), _stopping(plan):
            self._call(layer, hidden, torch.as_tensor(positions, device=hidden.device))

    def _call(self, layer: int, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        arguments, named = (_taken(part, rows, self._tokens) for part in self._calls[layer])
        return first_tensor(self.replica.layers[layer](hidden[None], *arguments, **named))


@torch.no_grad()
def capture(
    replica: Replica, token_ids: Ids, *, layers: range | None = None, cancel: threading.Event | None = None
) -> Captured:
    """Run a sequence through the replica and keep what its layers need to run again.

    Args:
        replica: The model.
        token_ids: The sequence, ``(tokens,)``.
        layers: Consecutive layers to keep; all if not given. Each takes about three hidden states of memory a token.
        cancel: Ends the pass between two chunks.

    Raises:
        PromptTooLongError: The sequence is longer than the replica's context.
        CancelledError: ``cancel`` was set.
        EngineUnavailableError: Memory ran out.
        ModelError: A layer is called with something that cannot be cut into rows.
    """
    layers = range(len(replica.layers)) if layers is None else layers
    tree = build_tree([token_ids], longest=CHUNK)
    check_length(replica, tree)
    seen = _Pass()
    plan = Plan(watcher=seen)
    with _hooked(replica, layers, seen):
        for node in tree.nodes:
            check_cancel(cancel)
            plan.nodes = [node]
            replica.forward(replica.embed(node.token_ids), tree.positions[node.start : node.end], plan)
    return Captured(replica, layers, seen, plan, tree.nodes)


@contextmanager
def _hooked(replica: Replica, layers: range, seen: _Pass) -> Iterator[None]:
    handles = []
    for layer in layers:
        seen.calls[layer], seen.inputs[layer], seen.heads[layer], seen.queries[layer] = [], [], [], []
        handles.append(replica.layers[layer].register_forward_pre_hook(_enters(seen, layer), with_kwargs=True))
        handles.append(replica.out_projection(layer).register_forward_pre_hook(_projected(seen, layer)))
    seen.inputs[layers.stop] = []
    handles.append(replica.layers[layers.stop - 1].register_forward_hook(_leaves(seen, layers.stop)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _enters(seen: _Pass, layer: int) -> _Hook:
    def hook(_module: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        others = {key: value for key, value in named.items() if key != "hidden_states"}
        seen.inputs[layer].append(first_tensor(arguments[0] if arguments else named["hidden_states"]))
        seen.calls[layer].append((arguments[1:], others))

    return hook


def _projected(seen: _Pass, layer: int) -> Callable[[torch.nn.Module, tuple[Any, ...]], None]:
    def hook(_module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.heads[layer].append(first_tensor(arguments[0]))

    return hook


def _leaves(seen: _Pass, layer: int) -> Callable[[torch.nn.Module, Any, Any], None]:
    def hook(_module: torch.nn.Module, _arguments: Any, output: Any) -> None:
        seen.inputs[layer].append(first_tensor(output))

    return hook


def _joined(parts: list[Any], lengths: Sequence[int]) -> Any:
    """One argument out of those of several chunks; tensors hold tokens in their second dimension."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        if first.dim() < 2:
            return first
        if any(part.shape[1] != length for part, length in zip(parts, lengths, strict=True)):
            raise ModelError(
                f"a layer is called with a tensor of shape {tuple(first.shape)} that has no dimension of tokens, so "
                "it cannot run again for some of them; this architecture needs support in tracer/replay/layers.py"
            )
        return torch.cat(parts, dim=1)
    if isinstance(first, (tuple, list)):
        return tuple(_joined(list(items), lengths) for items in zip(*parts, strict=True))
    if isinstance(first, dict):
        return {key: _joined([part[key] for part in parts], lengths) for key in first}
    return first


def _taken(argument: Any, rows: torch.Tensor, tokens: int) -> Any:
    """The rows of an argument that `_joined` made."""
    if isinstance(argument, torch.Tensor):
        return argument[:, rows] if argument.dim() >= 2 and argument.shape[1] == tokens else argument
    if isinstance(argument, tuple):
        return tuple(_taken(item, rows, tokens) for item in argument)
    if isinstance(argument, dict):
        return {key: _taken(item, rows, tokens) for key, item in argument.items()}
    return argument


class _Stopped(Exception):  # noqa: N818
    """A layer has come as far as it should."""


@contextmanager
def _stopping(plan: Plan) -> Iterator[None]:
    """End a layer once the attention of the plan's last node has been asked for."""
    before = plan.intervene
    last = plan.nodes[-1]

    def intervene(
        layer: int, node: Node, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        if before is not None:
            before(layer, node, queries, keys, values, rule)
        if node is last:
            raise _Stopped
        return queries

    plan.intervene = intervene
    try:
        yield
    except _Stopped:
        pass
    finally:
        plan.intervene = before
