"""Head-mean attention over a prefix tree from kept queries and keys, a layer and a block of rows at a time.

One replay keeps the queries and keys of every layer, ``layers x tokens x (heads + kv_heads) x width`` numbers.
Attention weights are written out of them where they are read and dropped at once, so ``layers x heads x tokens x
tokens`` never exists, and a stretch of tokens that several branches share is worked through once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from tracer.engines.loading import out_of_memory
from tracer.explain.base import Context, Progress
from tracer.replay.attention import Rule, weights
from tracer.replay.forward import CHUNK, Replayed, Wanted, replay
from tracer.replay.model import memory_error
from tracer.replay.recorded import Recorded, Target
from tracer.replay.tree import Ids, Node, PrefixTree, build_tree

_SCORES = {"cpu": 1 << 21, "cuda": 1 << 25}
"""Scores of one block over all heads, by device: on a CPU they shall stay in its cache, 8 MiB in float32."""
_MOST_ROWS = 128
_KEPT = 1 << 28
"""Bytes of head-mean weights that are kept for a second sweep, where all of them fit: up to about 1,600 tokens of
24 layers."""
_LOW_MEMORY_GROUPS = 4


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Attention of consecutive tokens of a node.

    Args:
        node: The node.
        rows: Indices of the tokens that read.
        columns: Indices of the tokens that they may read, ``(columns,)``, at consecutive positions.
        position: Position of the first column.
        weights: Mean over heads, ``(rows, columns)`` in float32, or those of each head, ``(heads, rows, columns)``;
            each row sums to one.
    """

    node: Node
    rows: slice
    columns: torch.Tensor
    position: int
    weights: torch.Tensor

    @property
    def first_row(self) -> int:
        """Position of the first token that reads."""
        return self.node.position + int(self.rows.start) - self.node.start

    def trimmed(self, first: int, last: int) -> Block | None:
        """The part between two rows of the node, ``None`` if there is none."""
        start, stop = max(self.rows.start, self.node.start + first), min(self.rows.stop, self.node.start + last)
        if start >= stop:
            return None
        columns = self.node.position + stop - self.node.start - self.position
        weights = self.weights[start - self.rows.start : stop - self.rows.start, :columns]
        return Block(self.node, slice(start, stop), self.columns[:columns], self.position, weights)


@dataclass(frozen=True, slots=True, eq=False)
class Branches:
    """Targets and the sequences that they were written in.

    Args:
        tree: The sequences that hold targets, and no others; a node begins where one of them ends.
        targets: The targets.
        sequences: For each target, its sequence's number in ``tree.sequences``.
    """

    tree: PrefixTree
    targets: Sequence[Target]
    sequences: Sequence[int]

    @classmethod
    def of(cls, recorded: Recorded, targets: Sequence[Target]) -> Branches:
        """Build the tree of the sequences that hold targets."""
        numbers = sorted({target.sequence for target in targets})
        chosen = [recorded.sequences[number].token_ids for number in numbers]
        # What is said of a sequence as a whole shall not depend on one that goes on where it ends.
        tree = build_tree(chosen, cuts=[[len(token_ids)] for token_ids in chosen], longest=CHUNK)
        return cls(tree, targets, [numbers.index(target.sequence) for target in targets])

    def places(self, number: int) -> Ids:
        """Indices of the tokens before a target's end, ``(target.end,)``."""
        return self.tree.sequences[self.sequences[number]][: self.targets[number].end]

    def starts(self, device: torch.device) -> torch.Tensor:
        """Where each target is predicted, ``(tokens, targets)``.

        A token is predicted at the token before it; a target is the mean over its tokens, so columns sum to one.
        """
        starts = torch.zeros(len(self.tree), len(self.targets))
        for number, target in enumerate(self.targets):
            starts[self.places(number)[target.start - 1 : target.end - 1], number] = 1 / (target.end - target.start)
        return starts.to(device)

    def scores(self, shares: torch.Tensor, number: int) -> NDArray[np.float32]:
        """Values of the tree's tokens, ``(tokens,)``, in the order of a target's sequence, ``(target.end,)``."""
        values: NDArray[np.float32] = shares.numpy()[self.places(number)].astype(np.float32)
        return values


class TreeAttention:
    """Attention weights of a tree's tokens by layer.

    Attributes:
        tree: The tokens.
        layers: Number of layers.
        device: Where the weights are.

    Args:
        context: Model, progress and cancellation; the replays are added to its cost. With ``low_memory`` queries and
            keys of a quarter of the layers are kept at a time, and the tree is replayed for each quarter.
        tree: The tokens.
        sweeps: How often the caller will go through all layers.
    """

    def __init__(self, context: Context, tree: PrefixTree, *, sweeps: int = 1) -> None:
        self.tree = tree
        self.layers = len(context.replica.layers)
        self.device = context.replica.device
        self._context = context
        self._held = range(0)
        self._size = -(-self.layers // (_LOW_MEMORY_GROUPS if context.low_memory else 1))
        self._queries: dict[tuple[int, int], torch.Tensor] = {}
        self._keys: dict[tuple[int, int], torch.Tensor] = {}
        self._rules: dict[int, Rule] = {}
        self._kept: dict[tuple[int, int], list[Block]] = {}
        pairs = sum(len(node.token_ids) * (node.position + len(node.token_ids)) for node in tree.nodes)
        self._keeps = sweeps > 1 and not context.low_memory and 4 * self.layers * pairs <= _KEPT
        self._done = 0
        replays = -(-self.layers // self._size)
        # The second of two sweeps, which go in opposite directions, begins with the layers that the first one left.
        self._total = self.layers * (sweeps + replays + (sweeps - 1) * (replays - 1))
        self._columns = [torch.as_tensor(node.columns, device=self.device) for node in tree.nodes]

    def see(self, layer: int, node: Node, queries: torch.Tensor, keys: torch.Tensor, rule: Rule) -> None:
        """Keep the queries and keys of a node; `tracer.replay.attention.AttentionWatcher`."""
        if layer in self._held:
            own = keys[:, node.position :]
            # Copies: both may be views of something larger that would live on with them.
            self._queries[layer, node.number] = queries.clone(memory_format=torch.contiguous_format)
            self._keys[layer, node.number] = own.clone(memory_format=torch.contiguous_format)
            self._rules[layer] = rule

    def blocks(self, layer: int, needed: torch.Tensor) -> Iterator[Block]:
        """Attention weights of a layer.

        Args:
            layer: Its number.
            needed: Which tokens' rows are wanted, ``(tokens,)`` of bool; rows between two of them may come as well.

        Raises:
            CancelledError: The context's ``cancel`` was set.
            EngineUnavailableError: Memory ran out in a replay.
        """
        self._context.check_cancel()
        self._hold(layer)
        wanted = needed.cpu().numpy()
        for node in self.tree.nodes:
            rows = np.flatnonzero(wanted[node.start : node.end])
            if not len(rows):
                continue
            first, last = int(rows[0]), int(rows[-1]) + 1
            if kept := self._kept.get((layer, node.number)):
                yield from (part for block in kept if (part := block.trimmed(first, last)) is not None)
                continue
            seen: list[Block] = []
            whole = self._keeps and (first, last) == (0, len(node.token_ids))
            for block in self._node_blocks(layer, node, first, last):
                if whole:
                    seen.append(block)
                yield block
            self._kept[layer, node.number] = seen
        self._advance(1)

    def heads(self, layer: int, needed: torch.Tensor) -> Iterator[Block]:
        """Attention weights of each head of a layer; see `blocks`."""
        self._context.check_cancel()
        self._hold(layer)
        wanted = needed.cpu().numpy()
        for node in self.tree.nodes:
            rows = np.flatnonzero(wanted[node.start : node.end])
            if len(rows):
                yield from self._head_blocks(layer, node, int(rows[0]), int(rows[-1]) + 1)
        self._advance(1)

    def _node_blocks(self, layer: int, node: Node, first: int, last: int) -> Iterator[Block]:
        for block in self._head_blocks(layer, node, first, last):
            yield replace(block, weights=block.weights.mean(0))

    def _head_blocks(self, layer: int, node: Node, first: int, last: int) -> Iterator[Block]:
        rule = self._rules[layer]
        queries = self._queries[layer, node.number].float()
        keys = torch.cat([self._keys[layer, ancestor.number] for ancestor in node.path], dim=1).float()
        scores = _SCORES.get(queries.device.type, _SCORES["cpu"]) // (queries.shape[0] * (node.position + last))
        step = max(1, min(scores, _MOST_ROWS))
        for start in range(first, last, step):
            stop = min(start + step, last)
            end = node.position + stop
            begin = 0 if rule.window is None else max(0, node.position + start - rule.window + 1)
            heads = weights(queries[:, start:stop], keys[:, begin:end], rule, last=end - begin)
            columns = self._columns[node.number][begin:end]
            yield Block(node, slice(node.start + start, node.start + stop), columns, begin, heads)

    def _hold(self, layer: int) -> None:
        if layer in self._held:
            return
        start = layer // self._size * self._size
        self._held = range(start, min(start + self._size, self.layers))
        self._queries.clear()
        self._keys.clear()
        done = self._done
        replayed = self._replay(
            lambda tokens, total: self._context.report(done + self.layers * tokens // total, self._total)
        )
        self._context.cost.forward_tokens += replayed.tokens
        self._advance(self.layers)

    def _replay(self, progress: Progress) -> Replayed:
        """Run the tree through the replica; what of the held layers passes by is kept."""
        return replay(
            self._context.replica, self.tree, Wanted(watcher=self), progress=progress, cancel=self._context.cancel
        )

    def _advance(self, units: int) -> None:
        self._done += units
        self._context.report(self._done, self._total)


@contextmanager
def memory_guard() -> Iterator[None]:
    """Say which option helps where memory runs out inside.

    Raises:
        EngineUnavailableError: It did.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            raise memory_error() from None
        raise
