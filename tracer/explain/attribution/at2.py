"""AT2: attention, with a weight for each head that was learned from ablations (Cohen-Wang et al. 2025).

What a source gets of a head's attention is summed over the source's tokens and averaged over the tokens that predict
the target (arXiv:2504.13752, section 3). The score of a source is the sum of that over all heads, weighted. The weights
are fitted once for each model by `tracer.explain.attribution.at2_fit`; then a score costs a pass and the attention rows
of the target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tracer.errors import InputError
from tracer.explain.attribution.head_weights import HeadWeights, load_weights
from tracer.explain.attribution.tree_attention import Branches, TreeAttention, memory_guard
from tracer.explain.base import Context, Finding, Request
from tracer.explain.removal import removable
from tracer.replay.model import Replica
from tracer.replay.recorded import Recorded, Target


def prepare(request: Request, replica: Replica) -> Request:
    """Say which weights a request will be answered with, so that another fit is another explanation.

    Raises:
        InputError: There are none for this model, or others than were asked for.
    """
    return replace(request, parameters={**request.parameters, "fit": _weights(request, replica).sha256})


def run(context: Context, requests: Sequence[Request], targets: Sequence[Target]) -> Iterator[Finding]:
    """Run AT2 for targets; `tracer.explain.base.Family`.

    Scores are shares of attention under weights whose absolute values add up to one. What cannot be removed (template
    glue, the first token, the target itself) was not part of the fit and has none. Details carry the validation score
    of the weights.

    Raises:
        InputError: There are no weights for this model.
        CancelledError: The context's ``cancel`` was set.
        EngineUnavailableError: Memory ran out.
    """
    weights = [_weights(request, context.replica) for request in requests]
    if not requests or not targets:
        return
    with context.cost.timed(), memory_guard():
        branches = Branches.of(context.recorded, targets)
        totals = _weighted(context, branches, [item.values for item in weights])
    for request, fitted, total in zip(requests, weights, totals, strict=True):
        for number, target in enumerate(branches.targets):
            scores = branches.scores(total[:, number], number)
            scores[~_of_sources(context.recorded, target)] = 0
            yield Finding(request, target, scores, fitted.details())


@torch.inference_mode()
def features(context: Context, targets: Sequence[Target]) -> list[NDArray[np.float32]]:
    """What each source gets of each head's attention.

    Args:
        context: Model, trace and cancellation.
        targets: The targets.

    Returns:
        For each target ``(layers, heads, sources)``: summed over a source's tokens, averaged over the target's.

    Raises:
        CancelledError: The context's ``cancel`` was set.
        EngineUnavailableError: Memory ran out.
    """
    recorded, heads = context.recorded, context.replica.heads
    with context.cost.timed(), memory_guard():
        branches = Branches.of(recorded, targets)
        attention = TreeAttention(context, branches.tree)
        starts = branches.starts(attention.device)
        rows = starts.any(1)
        owners = [torch.as_tensor(recorded.source_of[target.sequence][: target.end]) for target in targets]
        found = torch.zeros(len(targets), attention.layers, heads, len(recorded.sources))
        for layer in range(attention.layers):
            received = torch.zeros(heads, *starts.shape, device=attention.device)
            for block in attention.heads(layer, rows):
                received.index_add_(1, block.columns, block.weights.transpose(1, 2) @ starts[block.rows])
            tokens = received.cpu()
            # The first token stays whatever is removed: what rests on it is nobody's.
            tokens[:, [int(places[0]) for places in branches.tree.sequences]] = 0
            for number, owner in enumerate(owners):
                found[number, layer].index_add_(1, owner, tokens[:, branches.places(number), number])
    return [item.numpy() for item in found]


@torch.inference_mode()
def _weighted(context: Context, branches: Branches, weights: Sequence[NDArray[np.float32]]) -> list[torch.Tensor]:
    """Attention of the targets under each set of weights, each ``(tokens, targets)``."""
    attention = TreeAttention(context, branches.tree)
    starts = branches.starts(attention.device)
    rows = starts.any(1)
    own = [torch.as_tensor(item, device=attention.device) for item in weights]
    totals = [torch.zeros_like(starts) for _ in weights]
    for layer in range(attention.layers):
        for block in attention.heads(layer, rows):
            for values, total in zip(own, totals, strict=True):
                mixed = torch.tensordot(values[layer], block.weights, dims=1)
                total.index_add_(0, block.columns, mixed.T @ starts[block.rows])
    return [total.cpu() for total in totals]


def _of_sources(recorded: Recorded, target: Target) -> NDArray[np.bool_]:
    """Which tokens before a target's end belong to a source that can be removed, ``(target.end,)``."""
    inside = np.isin(recorded.source_of[target.sequence][: target.end], removable(recorded, target, None))
    inside[0] = False
    return inside


def _weights(request: Request, replica: Replica) -> HeadWeights:
    path, fit = request.parameters["path"], request.parameters["fit"]
    if path is not None and not isinstance(path, str):
        raise InputError(f"path of at2 is {path!r}; name a file that `tracer at2 fit --out` wrote")
    found = load_weights(None if path is None else Path(path), replica)
    if fit not in (None, found.sha256):
        raise InputError(f"at2: the weights {fit!r} are asked for, and those of this model are now {found.sha256}")
    return found
