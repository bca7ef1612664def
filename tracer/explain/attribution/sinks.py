"""Attention sinks: tokens that others rest their attention on, whatever they say (Xiao et al. 2023, arXiv:2309.17453).

A position of a sequence is a sink where the attention that it receives from tokens at least `APART` later, the mean
over those tokens, heads and layers, exceeds a share and also a multiple of what it would receive if every token spread
its attention evenly: in a short sequence an even spread is a large share too. All rows of the sequence count, so the
answer depends on neither chance, nor the targets, nor other branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tracer.explain.attribution.tree_attention import Branches, TreeAttention

APART = 16
"""Nearer tokens don't count: they may well read each other for what they say."""
ROWS = 16
"""Fewer tokens to count say nothing: the last positions of a sequence are never sinks."""


@dataclass(frozen=True, slots=True, eq=False)
class Sinks:
    """The sinks of each target's sequence.

    Args:
        positions: For each target.
        kept: For each distinct set of sinks, one where a token is none, zero where it is, ``(tokens, sets)``.
        sets: Which set is each target's, ``(targets,)``.
    """

    positions: Sequence[list[int]]
    kept: torch.Tensor
    sets: torch.Tensor

    @classmethod
    def of(cls, received: Sequence[NDArray[np.float64]], branches: Branches, *, share: float, factor: float) -> Sinks:
        """Choose the positions that receive more than ``share``, and more than ``factor`` times an even spread.

        Args:
            received: From `mean_received`.
            branches: The targets.
            share: Share of a token's attention.
            factor: Multiple of the even spread.
        """
        found = [
            np.flatnonzero(np.nan_to_num(values) > np.maximum(share, factor * _even(values))) for values in received
        ]
        masks = np.ones((len(received), len(branches.tree)), dtype=np.float32)
        for mask, positions, places in zip(masks, found, branches.tree.sequences, strict=True):
            mask[places[positions]] = 0
        kept, sets = np.unique(masks, axis=0, return_inverse=True)
        numbers = list(branches.sequences)
        return cls(
            [found[number].tolist() for number in numbers],
            torch.from_numpy(np.ascontiguousarray(kept.T)),
            torch.from_numpy(sets.reshape(-1)[numbers].astype(np.int64)),
        )


def mean_received(attention: TreeAttention) -> list[NDArray[np.float64]]:
    """Attention that the positions of each sequence receive from at least `APART` later.

    Args:
        attention: Attention of the tree; one sweep through its layers.

    Returns:
        For each sequence ``(length,)``: mean over layers, heads and the tokens that count; NaN where they are fewer
        than `ROWS`.
    """
    tree = attention.tree
    received = [
        torch.zeros(node.position + len(node.token_ids), dtype=torch.float64, device=attention.device)
        for node in tree.nodes
    ]
    everything = torch.ones(len(tree), dtype=torch.bool)
    for layer in range(attention.layers):
        for block in attention.blocks(layer, everything):
            # Entries of row r and column c count where r is at least so much later than c.
            late = block.weights.tril(block.first_row - block.position - APART).sum(0)
            received[block.node.number][block.position : block.position + len(late)] += late
    by_node = [values.cpu().numpy() / attention.layers for values in received]
    node_of = tree.node_of()
    means: list[NDArray[np.float64]] = []
    for places in tree.sequences:
        total = np.zeros(len(places))
        for number in np.unique(node_of[places]):
            total[: len(by_node[number])] += by_node[number]
        counts = len(places) - APART - np.arange(len(places))
        means.append(np.where(counts >= ROWS, total / np.maximum(counts, 1), np.nan))
    return means


def _even(received: NDArray[np.float64]) -> NDArray[np.float64]:
    """What `mean_received` would be if every token read all tokens up to itself alike, ``(length,)``."""
    length = len(received)
    behind = np.append(np.cumsum(1 / np.arange(length, 0, -1))[::-1], 0.0)
    first = np.minimum(np.arange(length) + APART, length)
    shares: NDArray[np.float64] = behind[first] / np.maximum(length - first, 1)
    return shares
