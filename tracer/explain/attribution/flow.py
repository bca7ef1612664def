"""Attention flow: how much can run from a target to a source (Abnar & Zuidema 2020, arXiv:2005.00928, section 3.2).

The graph has a node for each token in front of the first layer and behind every layer; the edge from a token behind a
layer to a token in front of it has the capacity of rollout's matrix, (A + I) / 2 with A the mean over heads. The tokens
of a source are merged into one sink, so a target costs one maximum flow for each source it could read, not for each
token. All tokens that predict the target are origins of one unit each, and the flow is divided by their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from tracer.errors import InputError
from tracer.explain.attribution.tree_attention import Branches, TreeAttention, memory_guard
from tracer.explain.base import Context, Finding, Request
from tracer.replay.recorded import Recorded, Target
from tracer.replay.tree import Ids

_LARGEST = 2**31 - 1
"""Capacities are whole numbers of 32 bits, and so is the flow."""


def run(context: Context, requests: Sequence[Request], targets: Sequence[Target]) -> Iterator[Finding]:
    """Run attention flow for targets; `tracer.explain.base.Family`.

    The flow of a source is spread evenly over its tokens, so that summing by source gives it back. It is at most one,
    and sources don't add up to one: each has the network for itself.

    Raises:
        InputError: A target could read more than ``max_tokens`` tokens.
        CancelledError: The context's ``cancel`` was set.
        EngineUnavailableError: Memory ran out.
    """
    if not requests or not targets:
        return
    _check(requests, targets)
    branches = Branches.of(context.recorded, targets)
    attention = TreeAttention(replace(context, progress=None), branches.tree)
    total = sum(len(_visible(context.recorded, target)) for target in targets)
    done = 0
    for sequence in dict.fromkeys(branches.sequences):
        members = [number for number, other in enumerate(branches.sequences) if other == sequence]
        with context.cost.timed(), memory_guard():
            length = max(targets[number].end for number in members) - 1
            capacities = _capacities(attention, branches.tree.sequences[sequence][:length])
        for number in members:
            target = targets[number]
            scores = np.zeros(target.end, dtype=np.float32)
            with context.cost.timed(), memory_guard():
                for tokens in _visible(context.recorded, target):
                    context.check_cancel()
                    rows = slice(target.start - 1, target.end - 1)
                    scores[tokens] = largest_flow(capacities, rows, tokens) / len(tokens)
                    done += 1
                    context.report(done, total)
            for request in requests:
                yield Finding(request, target, scores)


def largest_flow(capacities: NDArray[np.float32], rows: slice, tokens: Ids) -> float:
    """The flow from tokens at the top to tokens at the bottom.

    Capacities are rounded to whole multiples of ``rows / 2**31``, so the flow is off by at most half of that for each
    edge of the smallest cut.

    Args:
        capacities: Of each layer, ``(layers, tokens, tokens)``; from the row to the column, which is not behind it.
        rows: Tokens that the flow comes from, one unit each.
        tokens: Tokens that it goes to, consecutive, the first of them not behind the last row.

    Returns:
        The flow over the number of ``rows``; from 0 to 1.
    """
    count = int(rows.stop - rows.start)
    first = int(tokens[0])
    # Room for the whole flow, and for a row whose capacities add up to a little over one when they are rounded.
    scale = _LARGEST // max(count, 2)
    # Nothing reaches a token from one before it, so tokens and rows before the source can be left out.
    scaled = np.rint(capacities[:, first : rows.stop, first : rows.stop].astype(np.float64) * scale).astype(np.int32)
    graph = _graph(scaled, slice(max(rows.start - first, 0), rows.stop - first), len(tokens), scale)
    flow = int(maximum_flow(graph, 0, graph.shape[0] - 1).flow_value)
    return flow / (scale * count)


def _graph(scaled: NDArray[np.int32], rows: slice, tokens: int, scale: int) -> csr_array:
    """The network as a sparse matrix.

    Args:
        scaled: Capacities, ``(layers, length, length)``.
        rows: Tokens that the flow comes from.
        tokens: How many tokens from the first one on are merged into the sink.
        scale: One unit.

    Returns:
        Node 0 is the origin, then come ``length`` nodes behind each layer from the top one down, then the sink.
    """
    layers, length, _ = scaled.shape
    lower = np.tril_indices(length)
    sink = layers * length + 1
    starts = [np.arange(rows.start, rows.stop) + 1]
    data = [np.full(rows.stop - rows.start, scale)]
    degrees = [np.array([rows.stop - rows.start])]
    for below in range(1, layers):
        starts.append(lower[1] + below * length + 1)
        data.append(scaled[layers - below][lower])
        degrees.append(np.arange(1, length + 1))
    starts.append(np.full(length, sink))
    data.append(scaled[0, :, :tokens].sum(1))
    degrees.append(np.append(np.ones(length, dtype=np.int64), 0))
    bounds = np.concatenate([[0], np.cumsum(np.concatenate(degrees))])
    return csr_array(
        (
            np.concatenate(data).astype(np.int32),
            np.concatenate(starts).astype(np.int32),
            bounds.astype(np.int32),
        ),
        shape=(sink + 1, sink + 1),
    )


@torch.inference_mode()
def _capacities(attention: TreeAttention, places: Ids) -> NDArray[np.float32]:
    """(A + I) / 2 of each layer for the first tokens of a sequence, ``(layers, length, length)``."""
    needed = torch.zeros(len(attention.tree), dtype=torch.bool)
    needed[places] = True
    found = np.zeros((attention.layers, len(places), len(places)), dtype=np.float32)
    for layer in range(attention.layers):
        for block in attention.blocks(layer, needed):
            rows = slice(block.first_row, block.first_row + block.weights.shape[0])
            columns = slice(block.position, block.position + block.weights.shape[1])
            found[layer, rows, columns] = block.weights.cpu().numpy()
    found += np.eye(len(places), dtype=np.float32)
    found /= 2
    return found


def _visible(recorded: Recorded, target: Target) -> list[Ids]:
    """Tokens of each source that a target could read."""
    owner = recorded.source_of[target.sequence][: target.end - 1]
    return [np.flatnonzero(owner == number) for number in np.unique(owner)]


def _check(requests: Sequence[Request], targets: Sequence[Target]) -> None:
    longest = max(targets, key=lambda target: target.end)
    for request in requests:
        most = request.parameters["max_tokens"]
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise InputError(f"max_tokens of {request.method.name} is {most!r}; it must be a whole number above 0")
        if longest.end - 1 > most:
            raise InputError(
                f"step {longest.step_id} could read {longest.end - 1:,} tokens, and {request.method.name} takes "
                f"{most:,}: explain an earlier step, raise max_tokens (time and memory grow with its square), or use "
                "attention_resolvent"
            )
