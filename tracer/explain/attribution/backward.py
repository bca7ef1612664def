"""Gradients of targets at their input embeddings, over a prefix tree.

The tree is walked depth first. Keys and values of a node stay in the autograd graph, so that several targets and
branches share one forward pass of what they have in common, and the backward pass of a target ends at the node that
holds its last token: later rows, which cannot matter to it, are not in its graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import psutil
import torch
from torch.utils.checkpoint import checkpoint

from tracer.explain.attribution.objective import objective
from tracer.explain.base import Context
from tracer.replay.attention import Plan
from tracer.replay.forward import check_length
from tracer.replay.model import Replica
from tracer.replay.recorded import Target
from tracer.replay.tree import Ids, Node, PrefixTree, build_tree

_SHORTEST = 64
"""Fewest tokens between two cuts: shorter passes cost nearly as much, since they read all weights."""
_KEPT_WIDTHS = 30
"""Hidden widths that autograd keeps for a token in one layer, roughly, beside the feed-forward ones."""

Change = Callable[[torch.Tensor], torch.Tensor]
"""Turns the embeddings of tokens, ``(tokens, width)``, into those that are fed in."""
Aims = Callable[[Context, Target, torch.Tensor], Sequence[torch.Tensor]]
"""Scalars of a target, made from the rows that predict its tokens, ``(tokens, width)``, which can be unembedded."""


@dataclass(frozen=True, slots=True, eq=False)
class Gradients:
    """What is known of one scalar of one target.

    Args:
        target: The target.
        value: The scalar; the target function in nats unless other aims were given.
        gradient: At the embeddings fed in, ``(target.end - 1, width)`` float32; empty if it was not asked for.
    """

    target: Target
    value: float
    gradient: torch.Tensor


@dataclass(slots=True)
class _Walk:
    """What a depth-first walk holds: for each node on the way, its input and its last hidden states."""

    plan: Plan = field(default_factory=Plan)
    inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)

    def leave(self, node: Node) -> None:
        self.plan.forget(node)
        del self.inputs[node.number], self.hidden[node.number]


def target_function(context: Context, target: Target, rows: torch.Tensor) -> Sequence[torch.Tensor]:
    """The one scalar that most methods explain: the target function summed over the target's tokens."""
    ids = context.recorded.sequences[target.sequence].token_ids[target.start : target.end]
    tokens = torch.as_tensor(ids, device=rows.device)
    each = objective(context.replica.unembed(rows), tokens, function=context.target_function, foil=context.foil)
    return [each.sum()]


def gradients(
    context: Context,
    targets: Sequence[Target],
    *,
    change: Change | None = None,
    backward: bool = True,
    aims: Aims = target_function,
) -> Iterator[Gradients]:
    """Gradient of each target, as soon as it is known.

    Args:
        context: Replica, trace and target function.
        targets: What to explain.
        change: What is fed in place of the embeddings; the gradient is taken there.
        backward: Whether gradients are wanted, or values only.
        aims: What to differentiate. All scalars of a target share its forward pass; each has a backward pass of its
            own and is yielded on its own, in their order.

    Raises:
        PromptTooLongError: A sequence is longer than the replica's context.
        CancelledError: Somebody stopped it.
        EngineUnavailableError: Memory ran out.
    """
    if backward and (context.low_memory or not _fits(context, targets)):
        yield from _recomputed(context, targets, change, aims)
        return
    tree, due = _plan(context, targets)
    check_length(context.replica, tree)
    walk = _Walk()
    open_nodes: list[Node] = []
    for node in tree.nodes:
        while open_nodes and open_nodes[-1] is not node.parent:
            walk.leave(open_nodes.pop())
        open_nodes.append(node)
        context.check_cancel()
        with context.cost.timed(), torch.set_grad_enabled(backward):
            _enter(context, walk, node, change)
        for target in due[node.number]:
            yield from _explain(context, walk, node, target, aims, backward=backward)


def _plan(context: Context, targets: Sequence[Target]) -> tuple[PrefixTree, dict[int, list[Target]]]:
    """The tree of what the targets depend on, cut behind targets, and the targets that are due at each node."""
    recorded = context.recorded
    by_sequence: dict[int, list[Target]] = defaultdict(list)
    for target in targets:
        by_sequence[target.sequence].append(target)
    sequences: list[Ids] = []
    cuts: list[list[int]] = []
    for number, own in by_sequence.items():
        ends = sorted({target.end - 1 for target in own})
        sequences.append(recorded.sequences[number].token_ids[: ends[-1]])
        cuts.append(_spaced(ends))
    tree = build_tree(sequences, cuts=cuts)
    owner = tree.node_of()
    due: dict[int, list[Target]] = defaultdict(list)
    for own, places in zip(by_sequence.values(), tree.sequences, strict=True):
        for target in own:
            due[int(owner[places[target.end - 2]])].append(target)
    return tree, due


def _spaced(ends: list[int]) -> list[int]:
    chosen = [0]
    for end in ends:
        if end - chosen[-1] >= _SHORTEST:
            chosen.append(end)
    return chosen[1:]


def _enter(context: Context, walk: _Walk, node: Node, change: Change | None) -> None:
    embeddings = context.replica.embed(node.token_ids)
    fed = (embeddings if change is None else change(embeddings)).detach().requires_grad_(torch.is_grad_enabled())
    walk.plan.nodes = [node]
    positions = np.arange(node.position, node.position + len(node.token_ids))
    walk.inputs[node.number] = fed
    walk.hidden[node.number] = context.replica.forward(fed, positions, walk.plan)
    context.cost.forward_tokens += len(node.token_ids)


def _explain(
    context: Context, walk: _Walk, node: Node, target: Target, aims: Aims, *, backward: bool
) -> Iterator[Gradients]:
    path = node.path
    first = _first(path, target.start - 1)
    offset = path[first].position
    context.check_cancel()
    with context.cost.timed(), torch.set_grad_enabled(backward):
        rows = torch.cat([walk.hidden[item.number] for item in path[first:]])
        values = aims(context, target, rows[target.start - 1 - offset : target.end - 1 - offset])
    inputs = [walk.inputs[item.number] for item in path]
    for value in values:
        context.check_cancel()
        if not backward:
            yield Gradients(target, value.item(), torch.empty(0))
            continue
        with context.cost.timed(), context.replica.running(walk.plan):
            # A scalar of an early token does not depend on a later node.
            parts = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
        context.cost.backward_passes += 1
        yield Gradients(target, value.item(), torch.cat([part.float() for part in parts])[: target.end - 1])


def _first(path: tuple[Node, ...], position: int) -> int:
    """Which node of a path holds a position."""
    return max(index for index, node in enumerate(path) if node.position <= position)


def _recomputed(context: Context, targets: Sequence[Target], change: Change | None, aims: Aims) -> Iterator[Gradients]:
    """One target at a time, layer by layer: only layer inputs are kept, the rest is computed again on the way back."""
    replica = context.replica
    for target in targets:
        context.check_cancel()
        ids = context.recorded.sequences[target.sequence].token_ids[: target.end - 1]
        tree = build_tree([ids])
        check_length(replica, tree)
        walk = _Walk(Plan(keep=False))
        with context.cost.timed(), torch.enable_grad(), _checkpointed(replica):
            _enter(context, walk, tree.nodes[0], change)
        for found in _explain(context, walk, tree.nodes[0], target, aims, backward=True):
            context.cost.forward_tokens += len(ids)
            yield found


@contextmanager
def _checkpointed(replica: Replica) -> Iterator[None]:
    """Keep only the inputs of layers for the backward pass."""
    for layer in replica.layers:
        forward = layer.forward
        layer.forward = lambda *inputs, _forward=forward, **named: checkpoint(
            _forward, *inputs, use_reentrant=False, context_fn=_no_context, **named
        )
    try:
        yield
    finally:
        for layer in replica.layers:
            del layer.forward


def _no_context() -> tuple[nullcontext[None], nullcontext[None]]:
    return nullcontext(), nullcontext()


def _fits(context: Context, targets: Sequence[Target]) -> bool:
    """Whether what autograd would keep fits in memory; running out would end the process, not raise an error."""
    replica = context.replica
    tokens = max((target.end for target in targets), default=0)
    config = replica.model.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * replica.width
    per_layer = _KEPT_WIDTHS * replica.width + 5 * inner
    needed = tokens * len(replica.layers) * per_layer * torch.finfo(replica.dtype).bits // 8
    if replica.device.type == "cuda":
        free = torch.cuda.mem_get_info(replica.device)[0]
    else:
        free = psutil.virtual_memory().available
    return bool(needed < 0.7 * free)
