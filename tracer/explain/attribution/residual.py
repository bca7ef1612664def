"""What each token adds to another one's residual stream, over a prefix tree, a layer and a block of rows at a time.

With alpha the attention weights of head h in one layer, v the values as the model computes them (bias included), W_O^h
the columns of the out projection that read the head, and x what enters the layer, token j adds

    T_ij = sum_h alpha^h_ij W_O^h v^g(h)_j + delta_ij x_i

to token i, where g(h) is the group of heads that share values. The sum over j is y_i, the residual stream behind
attention. The share of a contribution is its proximity to the whole, c_ij = max(0, |y_i|_1 - |y_i - T_ij|_1) with rows
scaled to one (Ferrando et al. 2022, arXiv:2203.04212, for layers that normalise in front).

Proximity is not linear, so every T_ij has to be written out, but only ``rows x columns x width`` numbers of a small
block at once, from W_O^h v_j, which is computed once for each token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from tracer.errors import InputError
from tracer.explain.attribution.carriers import TINY
from tracer.explain.attribution.tree_attention import Block, TreeAttention
from tracer.explain.base import Context, Progress
from tracer.replay.attention import Plan, Rule
from tracer.replay.forward import Replayed, Wanted, replay
from tracer.replay.model import Replica
from tracer.replay.tree import Node, PrefixTree

_BLOCK = {"cpu": 1 << 19, "cuda": 1 << 27}
"""Numbers of contributions that are written out at once; on a CPU they shall stay in its cache."""
_WRITTEN = 1 << 26
"""Numbers of W_O^h v_j that are kept for a layer, 256 MiB; those of further nodes are computed where they are read."""


def check_derivation(replica: Replica) -> None:
    """Refuse a model whose residual stream is not what the formulas of this module say.

    Raises:
        InputError: It is built in another way.
    """
    name = str(replica.identity["architecture"])
    reason = None
    if not (replica.architecture.gated_rms and replica.additive):
        reason = f"{name} is built in another way"
    elif getattr(replica.out_projection(0), "bias", None) is not None:
        reason = f"the out projection of this {name} has a bias, which belongs to no token"
    if reason is not None:
        raise InputError(
            "decomposition is derived for layers with an RMSNorm in front, separate projections and an out projection "
            f"without bias, and {reason}; use attention_rollout_sinkless, grad_x_input or contextcite"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """What consecutive tokens of a node read in one layer.

    Args:
        heads: The attention weights, ``(heads, rows, columns)``.
        values: Values of the columns, ``(kv_heads, columns, head_width)``.
        attended: What the heads put out, concatenated, ``(rows, heads * head_width)``.
    """

    heads: Block
    values: torch.Tensor
    attended: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Passing:
    """What passes attention by: the delta term of the contributions.

    Args:
        rows: Rows that it belongs to, ``(passing,)``.
        columns: Its columns, ``(passing,)``.
        states: What is added, ``(passing, width)``.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    states: torch.Tensor


class TreeResidual(TreeAttention):
    """Attention weights, values and the residual stream of a tree's tokens by layer, in float32.

    Args:
        context: Model, progress and cancellation; the replays are added to its cost. With ``low_memory`` a quarter of
            the layers is kept at a time, and the tree is replayed for each quarter.
        tree: The tokens.
    """

    def __init__(self, context: Context, tree: PrefixTree) -> None:
        super().__init__(context, tree)
        self.replica = context.replica
        self._values: dict[tuple[int, int], torch.Tensor] = {}
        self._entering: dict[int, torch.Tensor] = {}
        self._written: dict[int, torch.Tensor] = {}
        self._written_layer = -1

    def entering(self, layer: int) -> torch.Tensor:
        """The residual stream in front of a layer, ``(tokens, width)``.

        Args:
            layer: One of the layers that are held, those of the last `readings`; the number behind the last one for
                what leaves it.

        Raises:
            EngineUnavailableError: Memory ran out in a replay.
        """
        if layer not in self._entering:
            self._hold(min(layer, self.layers - 1))
        return self._entering[layer].to(self.device).float()

    def out_weight(self, layer: int) -> torch.Tensor:
        """Weight of the out projection, ``(width, heads * head_width)``."""
        weight: torch.Tensor = self.replica.out_projection(layer).weight
        return weight.float()

    def readings(self, layer: int, needed: torch.Tensor) -> Iterator[Reading]:
        """What tokens read in a layer.

        Args:
            layer: Its number.
            needed: Which tokens' rows are wanted, ``(tokens,)`` of bool; rows between two of them may come as well.

        Raises:
            CancelledError: The context's ``cancel`` was set.
            EngineUnavailableError: Memory ran out in a replay.
        """
        number, values = -1, torch.empty(0)
        for block in self.heads(layer, needed):
            if block.node.number != number:
                number = block.node.number
                values = torch.cat([self._values[layer, item.number] for item in block.node.path], dim=1).float()
            columns = values[:, block.position : block.position + len(block.columns)]
            # Heads that share values are rows of one product.
            grouped = block.weights.reshape(len(columns), -1, len(block.columns)) @ columns
            attended = grouped.view(*block.weights.shape[:2], -1).transpose(0, 1).flatten(1)
            yield Reading(block, columns, attended)

    def written(self, layer: int, node: Node) -> torch.Tensor:
        """W_O^h v_j of a node's tokens, ``(len(node.token_ids), heads, width)``."""
        if layer != self._written_layer:
            self._written.clear()
            self._written_layer = layer
        if node.number in self._written:
            return self._written[node.number]
        values = self._values[layer, node.number].float()
        heads = self.replica.heads
        by_head = self.out_weight(layer).view(self.replica.width, heads, -1).permute(1, 2, 0)
        spread = values.repeat_interleave(heads // len(values), dim=0)
        found = torch.bmm(spread, by_head).transpose(0, 1).contiguous()
        if sum(item.numel() for item in self._written.values()) + found.numel() <= _WRITTEN:
            self._written[node.number] = found
        return found

    def shares(self, layer: int, reading: Reading, entering: torch.Tensor) -> Block:
        """The share that each column has in the residual stream behind attention, C of ALTI.

        Args:
            layer: The layer.
            reading: What was read in it.
            entering: From `entering`.

        Returns:
            The block with weights ``(rows, columns)``: rows sum to one. A token that nothing is near to keeps itself.
        """
        block = reading.heads
        states = entering[block.rows]
        totals = reading.attended @ self.out_weight(layer).T + states
        found = torch.empty(len(states), len(block.columns), device=self.device)
        own = torch.arange(len(states), device=self.device)
        coefficients = block.weights.permute(2, 1, 0)
        for node in block.node.path:
            first = max(node.position, block.position)
            stop = min(node.position + len(node.token_ids), block.position + len(block.columns))
            if first >= stop:
                continue
            written = self.written(layer, node)[first - node.position : stop - node.position]
            here = slice(first - block.position, stop - block.position)
            passing = Passing(own, own + (block.first_row - first), states) if node is block.node else None
            found[:, here] = proximity(coefficients[here], written, totals, passing)
        found.clamp_(min=0)
        sums = found.sum(1, keepdim=True)
        alone = sums < TINY
        found.div_(sums.masked_fill_(alone, 1))
        found[own, own + (block.first_row - block.position)] += alone[:, 0]
        return replace(block, weights=found)

    def _replay(self, progress: Progress) -> Replayed:
        self._values.clear()
        self._entering.clear()
        first = max(self._held.start - 1, 0)
        replayed = replay(
            self.replica,
            self.tree,
            Wanted(hidden_indices=np.arange(len(self.tree)), hidden_layers=range(first, self._held.stop)),
            progress=progress,
            cancel=self._context.cancel,
            plan=Plan(watcher=self, intervene=self._keep_values),
        )
        self._entering = {first + number + 1: hidden for number, hidden in enumerate(replayed.hidden)}
        if self._held.start == 0:
            self._entering[0] = self.replica.embed(self.tree.token_ids)
        return replayed

    def _keep_values(
        self, layer: int, node: Node, _queries: torch.Tensor, _keys: torch.Tensor, values: torch.Tensor, _rule: Rule
    ) -> None:
        if layer in self._held:
            self._values[layer, node.number] = values[0, :, node.position :].clone(
                memory_format=torch.contiguous_format
            )


def proximity(
    coefficients: torch.Tensor, written: torch.Tensor, totals: torch.Tensor, passing: Passing | None
) -> torch.Tensor:
    """How near contributions are to their sums, |y|_1 - |y - T|_1.

    Args:
        coefficients: Weight of each head in them, ``(columns, rows, heads)``.
        written: What the heads would write of each column, ``(columns, heads, width)``.
        totals: The sums y, ``(rows, width)``.
        passing: What some of them hold beside what attention carries.

    Returns:
        ``(rows, columns)``.
    """
    rows, width = totals.shape
    norms = totals.abs().sum(1)
    found = torch.empty(rows, len(written), device=totals.device)
    size = _BLOCK.get(totals.device.type, _BLOCK["cpu"])
    step = max(1, size // (rows * width))
    buffer = torch.empty(min(step, len(written)), rows, width, device=totals.device)
    for start in range(0, len(written), step):
        stop = min(start + step, len(written))
        apart = torch.bmm(coefficients[start:stop], written[start:stop], out=buffer[: stop - start])
        found[:, start:stop] = norms[:, None] - apart.sub_(totals).abs_().sum(-1).T
    if passing is not None:
        step = max(1, size // (written.shape[1] * width))
        for start in range(0, len(passing.rows), step):
            at, columns = passing.rows[start : start + step], passing.columns[start : start + step]
            carried = torch.bmm(coefficients[columns, at][:, None], written[columns])[:, 0]
            apart = carried.add_(passing.states[start : start + step]).sub_(totals[at])
            found[at, columns] = norms[at] - apart.abs_().sum(-1)
    return found
