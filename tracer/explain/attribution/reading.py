"""Two-hop reading: what a target attends to, and what that attended to when it was read.

With A the mean of attention over heads and layers (or over the heads of one layer), the first hop is the mean of A's
rows at the tokens that predict the target. Its strongest tokens before the target are what the target took from the
text; the second hop is the mean of *their* rows, weighted by the first hop. In each hop sinks are set aside and the
rest is scaled back to one. A score is the mean of both hops, so that it stays a share of attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from pydantic import JsonValue

from tracer.explain.attribution.parameters import layer_number, sink_rule, whole
from tracer.explain.attribution.sinks import Sinks, mean_received
from tracer.explain.attribution.tree_attention import Branches, TreeAttention, memory_guard
from tracer.explain.base import Context, Finding, Request
from tracer.replay.recorded import Target


def run(context: Context, requests: Sequence[Request], targets: Sequence[Target]) -> Iterator[Finding]:
    """Run two-hop reading for targets; `tracer.explain.base.Family`.

    The scores of a target add up to one where anything but sinks was read. Details are the tokens of the first hop with
    their weights, and the shares of attention that went to sinks in both hops.

    Raises:
        InputError: A parameter is out of its range.
        CancelledError: The context's ``cancel`` was set.
        EngineUnavailableError: Memory ran out.
    """
    chosen = [_check(request, len(context.replica.layers)) for request in requests]
    if not requests or not targets:
        return
    with context.cost.timed(), memory_guard(), torch.inference_mode():
        branches = Branches.of(context.recorded, targets)
        attention = TreeAttention(context, branches.tree, sweeps=1 + 2 * len(requests))
        received = mean_received(attention)
        found: list[Finding] = []
        for request, (layers, count, (least, factor)) in zip(requests, chosen, strict=True):
            sinks = Sinks.of(received, branches, share=least, factor=factor)
            found.extend(_read(request, branches, attention, sinks, layers, count))
    yield from found


def _read(
    request: Request, branches: Branches, attention: TreeAttention, sinks: Sinks, layers: Sequence[int], count: int
) -> Iterator[Finding]:
    """Both hops of all targets at once; the second goes through the layers in the other direction than the first."""
    starts = branches.starts(attention.device)
    hops = [_aside(_mean_rows(attention, starts, layers[::-1]), branches, sinks)]
    seconds = torch.zeros_like(starts)
    chosen: list[dict[int, float]] = []
    for number, target in enumerate(branches.targets):
        places = branches.places(number)
        chosen.append(strongest(hops[0][0][places, number], target, count))
        for position, weight in chosen[-1].items():
            seconds[int(places[position]), number] = weight
    hops.append(_aside(_mean_rows(attention, seconds, layers), branches, sinks))
    (first, first_sinks), (second, second_sinks) = hops
    # Where there is nothing to go on to, the first hop is all.
    handed = second.any(0) * 0.5
    scores = (1 - handed) * first + handed * second
    for number, target in enumerate(branches.targets):
        details: dict[str, JsonValue] = {
            "first_hop": [{"token": token, "weight": weight} for token, weight in chosen[number].items()],
            "sinks": [*sorted({0, *sinks.positions[number]})],
            "first_hop_removed": first_sinks[number],
            "second_hop_removed": second_sinks[number],
        }
        yield Finding(request, target, branches.scores(scores[:, number].cpu(), number), details)


def strongest(shares: torch.Tensor, target: Target, count: int) -> dict[int, float]:
    """The tokens that a target read most.

    Only tokens before all of those that predict it: the rest of them are part of the first hop themselves.

    Args:
        shares: What it read, by position, ``(target.end,)`` or less.
        target: The target.
        count: At most so many.

    Returns:
        Weights that add up to one, by position, the largest first.
    """
    readable = shares[: target.start - 1]
    top = readable.topk(min(count, len(readable)))
    pairs = [pair for pair in zip(top.indices.tolist(), top.values.tolist(), strict=True) if pair[1] > 0]
    total = sum(weight for _, weight in pairs)
    return {position: weight / total for position, weight in pairs}


def _mean_rows(attention: TreeAttention, starts: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
    """Rows of the layers' mean attention, weighted by ``starts``, ``(tokens, targets)``."""
    total = torch.zeros_like(starts)
    rows = starts.any(1)
    for layer in layers:
        for block in attention.blocks(layer, rows):
            total.index_add_(0, block.columns, block.weights.T @ starts[block.rows])
    return total / len(layers)


def _aside(shares: torch.Tensor, branches: Branches, sinks: Sinks) -> tuple[torch.Tensor, list[float]]:
    """Set sinks and the first position aside and scale each target's shares back to one; with what was removed."""
    kept = shares * sinks.kept.to(shares.device)[:, sinks.sets.to(shares.device)]
    for number in range(len(branches.targets)):
        kept[int(branches.places(number)[0]), number] = 0
    left, before = kept.sum(0), shares.sum(0)
    return kept / left.clamp_min(1e-30), (before - left).tolist()


def _check(request: Request, layers: int) -> tuple[range, int, tuple[float, float]]:
    """The layers to read, the tokens to follow and what makes a sink."""
    chosen = range(layers)
    if request.parameters["layer"] is not None:
        layer = layer_number(request, "layer", layers)
        chosen = range(layer, layer + 1)
    return chosen, whole(request, "first_hop", least=1, most=1000), sink_rule(request)
