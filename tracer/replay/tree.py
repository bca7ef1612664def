"""The prefix tree of token sequences: what several calls and branches share is there, and computed, once.

The tokens of the tree are numbered in one row, node after node, parents before children. That number is called the
token's *index*; its *position* is its place in its own sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tracer.engines.kv_cache import common_length

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """A stretch of tokens that is not branched.

    Args:
        number: The node's place in `PrefixTree.nodes`.
        parent: The node that it continues, or ``None``.
        start: Index of its first token.
        position: Position of its first token.
        token_ids: Its tokens, ``(length,)``.
    """

    number: int
    parent: Node | None
    start: int
    position: int
    token_ids: Ids

    @property
    def end(self) -> int:
        """One past the index of its last token."""
        return self.start + len(self.token_ids)

    @property
    def path(self) -> tuple[Node, ...]:
        """The nodes from the root to this one."""
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None:
            nodes.append(node)
            node = node.parent
        return tuple(reversed(nodes))

    @property
    def columns(self) -> Ids:
        """Indices of all tokens from the first one to this node's last one, ``(position + length,)``."""
        return np.concatenate([np.arange(node.start, node.end) for node in self.path])


@dataclass(frozen=True, slots=True, eq=False)
class PrefixTree:
    """Token sequences with their shared beginnings merged.

    Args:
        nodes: Parents before children.
        token_ids: Ids of all tokens by index, ``(tokens,)``.
        positions: Positions of all tokens by index, ``(tokens,)``.
        sequences: For each sequence the indices of its tokens, ``(length,)``.
    """

    nodes: tuple[Node, ...]
    token_ids: Ids
    positions: Ids
    sequences: tuple[Ids, ...]

    def __len__(self) -> int:
        return len(self.token_ids)

    def node_of(self) -> Ids:
        """Number of the node that holds each token, ``(tokens,)``."""
        return np.repeat(np.arange(len(self.nodes)), [len(node.token_ids) for node in self.nodes])

    def levels(self) -> list[list[Node]]:
        """Nodes by their distance from the root."""
        depth: list[int] = []
        levels: list[list[Node]] = []
        for node in self.nodes:
            depth.append(0 if node.parent is None else depth[node.parent.number] + 1)
            if depth[-1] == len(levels):
                levels.append([])
            levels[depth[-1]].append(node)
        return levels


@dataclass(slots=True)
class _Branch:
    token_ids: Ids
    children: dict[int, _Branch] = field(default_factory=dict)


def build_tree(
    sequences: Sequence[Sequence[int] | Ids], *, cuts: Sequence[Iterable[int]] = (), longest: int | None = None
) -> PrefixTree:
    """Merge the shared beginnings of sequences.

    Args:
        sequences: Token ids; none may be empty.
        cuts: For each sequence positions at which a node must begin; none if left out.
        longest: Most tokens of a node; longer ones are cut. This bounds what one forward pass holds.

    Returns:
        The tree. Equal sequences share all of their tokens.
    """
    arrays = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
    root = _Branch(np.empty(0, dtype=np.int64))
    for array in arrays:
        _insert(root, array)
    wanted = [set(positions) for positions in cuts] or [set() for _ in arrays]
    nodes: list[Node] = []
    _number(root, None, arrays, wanted, list(range(len(arrays))), longest, nodes)
    by_first: dict[tuple[int, int], Node] = {
        (-1 if node.parent is None else node.parent.number, int(node.token_ids[0])): node for node in nodes
    }
    return PrefixTree(
        tuple(nodes),
        _joined([node.token_ids for node in nodes]),
        _joined([np.arange(node.position, node.position + len(node.token_ids)) for node in nodes]),
        tuple(_indices(array, by_first) for array in arrays),
    )


def _insert(root: _Branch, array: Ids) -> None:
    branch, position = root, 0
    while position < len(array):
        child = branch.children.get(int(array[position]))
        if child is None:
            branch.children[int(array[position])] = _Branch(array[position:])
            return
        shared = common_length(child.token_ids, array[position:])
        if shared < len(child.token_ids):
            rest = _Branch(child.token_ids[shared:], child.children)
            child.token_ids, child.children = child.token_ids[:shared], {int(rest.token_ids[0]): rest}
        branch, position = child, position + shared


def _number(
    branch: _Branch,
    parent: Node | None,
    arrays: list[Ids],
    cuts: list[set[int]],
    members: list[int],
    longest: int | None,
    nodes: list[Node],
) -> None:
    """Append the nodes below ``branch``, depth first; ``members`` are the sequences that pass through it."""
    stack: list[tuple[_Branch, Node | None, list[int]]] = [(branch, parent, members)]
    while stack:
        branch, parent, members = stack.pop()
        begin = 0 if parent is None else parent.position + len(parent.token_ids)
        end = begin + len(branch.token_ids)
        at = sorted({position for member in members for position in cuts[member] if begin < position < end})
        for left, right in zip([begin, *at], [*at, end], strict=True):
            step = longest or max(right - left, 1)
            for start in range(left, right, step):
                stop = min(start + step, right)
                index = nodes[-1].end if nodes else 0
                parent = Node(len(nodes), parent, index, start, branch.token_ids[start - begin : stop - begin])
                nodes.append(parent)
        for first, child in reversed(branch.children.items()):
            through = [member for member in members if len(arrays[member]) > end and int(arrays[member][end]) == first]
            stack.append((child, parent, through))


def _indices(array: Ids, by_first: dict[tuple[int, int], Node]) -> Ids:
    parts: list[Ids] = []
    number, position = -1, 0
    while position < len(array):
        node = by_first[number, int(array[position])]
        used = min(len(node.token_ids), len(array) - position)
        parts.append(np.arange(node.start, node.start + used))
        number, position = node.number, position + used
    return _joined(parts)


def _joined(parts: list[Ids]) -> Ids:
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
