"""One pass over a prefix tree that yields what was asked for and nothing more."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from tracer.errors import CancelledError, PromptTooLongError
from tracer.replay.attention import AttentionWatcher, Plan
from tracer.replay.model import Replica
from tracer.replay.tree import Ids, Node, PrefixTree

CHUNK = 1024
"""Most tokens of one forward pass."""
_LOGITS = 1 << 26
"""Logits that are held at once: 256 MiB in float32."""

Progress = Callable[[int, int], None]
"""Called with tokens (or other units) done and their total."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Tokens whose probability is wanted.

    Args:
        rows: Index of the token before each one, ``(scored,)``.
        token_ids: Their ids, ``(scored,)``.
    """

    rows: Ids
    token_ids: Ids


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a replay shall yield.

    Args:
        scored: Tokens whose log-probability, and the entropy of the distribution they were drawn from, is wanted.
        hidden_indices: Tokens whose residual stream is wanted.
        hidden_layers: After which layers.
        watcher: Sees queries and keys of every layer.
    """

    scored: Scored | None = None
    hidden_indices: Ids = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    hidden_layers: Sequence[int] = ()
    watcher: AttentionWatcher | None = None


@dataclass(slots=True)
class Replayed:
    """What a replay yielded.

    Args:
        logprobs: ``(scored,)``, natural logarithms, float64.
        entropy: ``(scored,)``, nats.
        hidden: ``(hidden_layers, hidden_indices, width)`` on the CPU; layer outputs before the final norm.
        tokens: Tokens that went through the layers.
    """

    logprobs: NDArray[np.float64]
    entropy: NDArray[np.float64]
    hidden: torch.Tensor
    tokens: int


@torch.inference_mode()
def replay(
    replica: Replica,
    tree: PrefixTree,
    wanted: Wanted,
    *,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
    plan: Plan | None = None,
) -> Replayed:
    """Run every token of a tree through the replica once.

    Args:
        replica: The model.
        tree: The tokens; build it with ``longest=CHUNK`` to bound memory.
        wanted: What to keep.
        progress: Told tokens done and their total.
        cancel: Ends the pass between two chunks.
        plan: Attention with interventions; an ordinary one if not given.

    Raises:
        PromptTooLongError: A sequence is longer than the replica's context.
        CancelledError: ``cancel`` was set.
        EngineUnavailableError: Memory ran out.
    """
    check_length(replica, tree)
    plan = plan or Plan(watcher=wanted.watcher)
    scored = wanted.scored or Scored(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
    logprobs = np.full(len(scored.rows), np.nan)
    entropy = np.full(len(scored.rows), np.nan)
    hidden = torch.zeros(len(wanted.hidden_layers), len(wanted.hidden_indices), replica.width, dtype=replica.dtype)
    uses = _uses(tree)
    done = 0
    for nodes in chunks(tree):
        check_cancel(cancel)
        plan.nodes = nodes
        indices = np.concatenate([np.arange(node.start, node.end) for node in nodes])
        with replica.outputs_of(wanted.hidden_layers) as outputs:
            rows = replica.forward(replica.embed(tree.token_ids[indices]), tree.positions[indices], plan)
        slots, places = _find(indices, wanted.hidden_indices)
        for number, layer in enumerate(wanted.hidden_layers):
            hidden[number, slots] = outputs[layer][places].to("cpu")
        slots, places = _find(indices, scored.rows)
        _score(replica, rows, places, scored.token_ids[slots], slots, logprobs, entropy)
        for node in nodes:
            _release(node, uses, plan)
        done += len(indices)
        if progress is not None:
            progress(done, len(tree))
    return Replayed(logprobs, entropy, hidden, done)


def chunks(tree: PrefixTree, size: int = CHUNK) -> Iterator[list[Node]]:
    """Nodes in passes of about ``size`` tokens: parents before children, siblings and cousins together."""
    for level in tree.levels():
        batch: list[Node] = []
        for node in level:
            if batch and sum(len(other.token_ids) for other in batch) + len(node.token_ids) > size:
                yield batch
                batch = []
            batch.append(node)
        if batch:
            yield batch


def check_length(replica: Replica, tree: PrefixTree) -> None:
    """Refuse sequences that do not fit in the replica's context.

    Raises:
        PromptTooLongError: One is longer.
    """
    longest = max((len(sequence) for sequence in tree.sequences), default=0)
    if longest > replica.context_length:
        raise PromptTooLongError(longest, 0, replica.context_length)


def check_cancel(cancel: threading.Event | None) -> None:
    """Stop where somebody asked for it.

    Raises:
        CancelledError: ``cancel`` is set.
    """
    if cancel is not None and cancel.is_set():
        raise CancelledError("stopped; what was finished is kept")


def log_softmax_blocks(replica: Replica, rows: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Log-probabilities of rows that `Replica.forward` returned, ``(block, vocabulary)`` at a time, with the start."""
    size = max(1, _LOGITS // replica.vocabulary)
    for start in range(0, len(rows), size):
        logits = replica.unembed(rows[start : start + size])
        # PyTorch's float32 log_softmax is off by 5e-6 in one direction over a large vocabulary, which adds up over a
        # target's tokens; its logsumexp sums pairwise and is not.
        yield start, logits - logits.logsumexp(-1, keepdim=True)


def _score(
    replica: Replica,
    rows: torch.Tensor,
    places: Ids,
    token_ids: Ids,
    slots: Ids,
    logprobs: NDArray[np.float64],
    entropy: NDArray[np.float64],
) -> None:
    # Branches that begin alike are scored off the same row: it is unembedded once.
    unique, inverse = np.unique(places, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    bounds = np.searchsorted(inverse[order], np.arange(len(unique) + 1))
    for start, block in log_softmax_blocks(replica, rows[torch.as_tensor(unique, device=rows.device)]):
        members = order[bounds[start] : bounds[start + len(block)]]
        own = torch.as_tensor(inverse[members] - start, device=block.device)
        ids = torch.as_tensor(token_ids[members], device=block.device)
        logprobs[slots[members]] = block[own, ids].double().cpu().numpy()
        spread = -(block.exp() * block).nan_to_num(0.0).sum(-1)
        entropy[slots[members]] = spread[own].double().cpu().numpy()


def _find(indices: Ids, wanted: Ids) -> tuple[Ids, Ids]:
    """Which of ``wanted`` are among ``indices``, and where."""
    order = np.argsort(indices)
    spots = np.searchsorted(indices, wanted, sorter=order)
    spots = order[np.minimum(spots, len(indices) - 1)]
    slots = np.flatnonzero(indices[spots] == wanted)
    return slots, spots[slots]


def _uses(tree: PrefixTree) -> list[int]:
    """For each node, how many nodes continue it."""
    counts = [0] * len(tree.nodes)
    for node in tree.nodes:
        if node.parent is not None:
            counts[node.parent.number] += 1
    return counts


def _release(node: Node, uses: list[int], plan: Plan) -> None:
    """Forget keys and values that no later node reads."""
    current: Node | None = node
    while current is not None and uses[current.number] == 0:
        plan.forget(current)
        current = current.parent
        if current is not None:
            uses[current.number] -= 1
