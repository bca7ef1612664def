"""Attention over a prefix tree, as a transformers attention backend.

The model's linear layers see the tokens of several nodes packed in one row; attention alone has to know which token
may read which. So the backend gets a `Plan`: for every node of the pass it joins the keys and values of the node's
ancestors, which earlier passes left behind, with the node's own. Nothing is masked that could be left out, nothing is
computed twice, and no attention matrix is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.nn import functional
from transformers import AttentionInterface

from tracer.replay.tree import Node

BACKEND = "tracer_tree"
_SCORES = 1 << 24
"""Attention scores that are held at once where they must be written out: 64 MiB in float32."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What one layer does beside the softmax.

    Args:
        scaling: Factor of the scores.
        softcap: ``cap * tanh(score / cap)`` before the mask, as in Gemma 2.
        window: Tokens that a token can read, itself included; ``None`` for all before it.
    """

    scaling: float
    softcap: float | None = None
    window: int | None = None


class AttentionWatcher(Protocol):
    """Sees the queries and keys of every layer as they pass."""

    def see(self, layer: int, node: Node, queries: torch.Tensor, keys: torch.Tensor, rule: Rule) -> None:
        """Look at one node in one layer.

        Args:
            layer: Number of the layer.
            node: The node.
            queries: ``(heads, len(node.token_ids), width)``.
            keys: Keys of the node's whole path, ``(kv_heads, node.position + len(node.token_ids), width)``.
            rule: The layer's rule.
        """
        ...


Intervention = Callable[[int, Node, torch.Tensor, torch.Tensor, torch.Tensor, Rule], torch.Tensor | None]
"""Called with layer, node, queries, keys and values (of the path); returns the heads' outputs
``(1, heads, tokens, width)`` in place of the ordinary ones, or ``None``."""


@dataclass(slots=True)
class Plan:
    """One or more forward passes over the nodes of a tree.

    Args:
        watcher: Sees queries and keys.
        intervene: Replaces the outputs of heads.
        keep: Whether keys and values stay for later passes.
    """

    watcher: AttentionWatcher | None = None
    intervene: Intervention | None = None
    keep: bool = True
    nodes: Sequence[Node] = ()
    """The nodes of the present pass, in the order in which their tokens are packed."""
    memory: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Keys and values, each ``(1, kv_heads, tokens, width)``, by layer and number of the node."""

    def forget(self, node: Node) -> None:
        """Drop the keys and values of a node."""
        for key in [key for key in self.memory if key[1] == node.number]:
            del self.memory[key]

    def attend(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        """Outputs of all heads, ``(1, heads, tokens, width)``."""
        outputs: list[torch.Tensor] = []
        start = 0
        for node in self.nodes:
            rows = slice(start, start + len(node.token_ids))
            start = rows.stop
            own = (keys[:, :, rows], values[:, :, rows])
            if self.keep:
                self.memory[layer, node.number] = own
            before = [self.memory[layer, ancestor.number] for ancestor in node.path[:-1]]
            read, carried = (
                torch.cat([*(pair[part] for pair in before), own[part]], dim=2) if before else own[part]
                for part in (0, 1)
            )
            asked = queries[:, :, rows]
            if self.watcher is not None:
                self.watcher.see(layer, node, asked[0], read[0], rule)
            replaced = self.intervene(layer, node, asked, read, carried, rule) if self.intervene else None
            outputs.append(attention(asked, read, carried, rule) if replaced is None else replaced)
        if start != queries.shape[2]:
            raise AssertionError(f"the plan covers {start} of {queries.shape[2]} tokens")
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


@dataclass(slots=True)
class Slot:
    """What the attention layers of one model share.

    Args:
        plan: The plan of the pass that is under way.
        windowed: Whether any layer was seen to read through a sliding window.
    """

    plan: Plan | None = None
    windowed: bool = False


def attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Causal attention of the last tokens of a sequence to all of it.

    Args:
        queries: ``(batch, heads, tokens, width)``, those of the last tokens.
        keys: ``(batch, kv_heads, length, width)``.
        values: ``(batch, kv_heads, length, width)``.
        rule: The layer's rule.

    Returns:
        ``(batch, heads, tokens, width)``.
    """
    tokens, length = queries.shape[2], keys.shape[2]
    groups = queries.shape[1] // keys.shape[1]
    if rule.softcap is not None:
        outputs = [
            weights(queries[:, :, rows], keys, rule, last=length - tokens + rows.stop) @ _spread(values, groups)
            for rows in _blocks(tokens, queries.shape[0] * queries.shape[1] * length)
        ]
        return torch.cat(outputs, dim=2)
    keys, values = _spread(keys, groups), _spread(values, groups)
    windowed = rule.window is not None and rule.window < length
    if tokens == length and not windowed:
        return functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=rule.scaling)
    mask = None if tokens == 1 and not windowed else visible(tokens, length, rule, queries.device)
    return functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=rule.scaling)


def weights(queries: torch.Tensor, keys: torch.Tensor, rule: Rule, *, last: int | None = None) -> torch.Tensor:
    """Attention weights, written out.

    Args:
        queries: ``(..., heads, tokens, width)``.
        keys: ``(..., kv_heads, length, width)``.
        rule: The layer's rule.
        last: One past the position of the last query; the length if not given.

    Returns:
        ``(..., heads, tokens, length)`` in the type of the queries; the softmax itself runs in float32.
    """
    tokens, length = queries.shape[-2], keys.shape[-2]
    # Heads that share keys are rows of one product: no copy of the keys for each of them.
    grouped = queries.reshape(*queries.shape[:-3], keys.shape[-3], -1, queries.shape[-1])
    scores = (grouped @ keys.transpose(-1, -2)).view(*queries.shape[:-1], length).mul_(rule.scaling)
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    # Without a window every row reads everything before the first row: only the rest needs a mask.
    first = 0 if rule.window is not None else max(0, (length if last is None else last) - tokens)
    hidden = ~visible(tokens, length, rule, queries.device, last=last)[:, first:]
    scores[..., first:].masked_fill_(hidden, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(queries.dtype)


def visible(tokens: int, length: int, rule: Rule, device: torch.device, *, last: int | None = None) -> torch.Tensor:
    """Which keys a query may read, ``(tokens, length)`` of bool.

    Args:
        tokens: Queries, consecutive positions.
        length: Keys.
        rule: The layer's rule.
        device: Where the mask shall be.
        last: One past the position of the last query; ``length`` if not given.
    """
    end = length if last is None else last
    rows = torch.arange(end - tokens, end, device=device)[:, None]
    columns = torch.arange(length, device=device)[None]
    seen = columns <= rows
    if rule.window is not None:
        seen &= columns > rows - rule.window
    return seen


def _spread(states: torch.Tensor, groups: int) -> torch.Tensor:
    """Repeat grouped keys or values for each of their heads; expanding has a cheaper gradient than an interleave."""
    if groups == 1:
        return states
    batch, heads, tokens, width = states.shape
    return states[:, :, None].expand(batch, heads, groups, tokens, width).reshape(batch, -1, tokens, width)


def _blocks(tokens: int, scores_per_row: int) -> list[slice]:
    size = max(1, _SCORES // max(scores_per_row, 1))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _backend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """The function that transformers calls in every layer."""
    plan: Plan | None = module.tracer_slot.plan
    rule = Rule(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, sliding_window)
    module.tracer_slot.windowed |= sliding_window is not None
    if plan is None:
        return attention(query, key, value, rule).transpose(1, 2).contiguous(), None
    return plan.attend(module.tracer_layer, query, key, value, rule).transpose(1, 2).contiguous(), None


AttentionInterface.register(BACKEND, _backend)
