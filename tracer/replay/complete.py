"""What the replica would write next: greedy continuations of many prompts, what they share computed once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch

from tracer.errors import PromptTooLongError
from tracer.replay.attention import Plan
from tracer.replay.forward import CHUNK, check_cancel, chunks
from tracer.replay.model import Replica
from tracer.replay.tree import Ids, Node, PrefixTree, build_tree


@torch.inference_mode()
def complete(
    replica: Replica,
    prompts: Sequence[Ids],
    *,
    max_tokens: int,
    enough: Callable[[Sequence[int]], bool] = lambda ids: False,
    cancel: threading.Event | None = None,
) -> list[list[int]]:
    """The most likely next tokens of each prompt, one after another.

    Keys and values of all prompts stay in memory until the end: give it as many prompts as that allows.

    Args:
        replica: The model.
        prompts: Token ids, none of them empty.
        max_tokens: How many tokens to add at most.
        enough: Says of a prompt's new ids whether it needs no more.
        cancel: Ends the work between two passes.

    Returns:
        For each prompt its new ids.

    Raises:
        PromptTooLongError: A prompt with its continuation is longer than the replica's context.
        CancelledError: ``cancel`` was set.
        EngineUnavailableError: Memory ran out.
    """
    if not prompts or max_tokens < 1:
        return [[] for _ in prompts]
    longest = max(len(prompt) for prompt in prompts)
    if longest + max_tokens > replica.context_length:
        raise PromptTooLongError(longest, max_tokens, replica.context_length)
    # A prompt may end inside a longer one: its own continuation must not read the rest.
    tree = build_tree(prompts, cuts=[[len(prompt)] for prompt in prompts], longest=CHUNK)
    plan = Plan()
    ends = np.array([places[-1] for places in tree.sequences])
    written = [[token] for token in _prompts(replica, tree, ends, plan, cancel)]
    leaves = [tree.nodes[number] for number in tree.node_of()[ends]]
    going = list(range(len(prompts)))
    for number in range(max_tokens - 1):
        check_cancel(cancel)
        kept = [place for place, prompt in enumerate(going) if not enough(written[prompt])]
        going, leaves = [going[place] for place in kept], [leaves[place] for place in kept]
        if not going:
            break
        last = [written[prompt][-1] for prompt in going]
        leaves = _grow(leaves, last, first=len(tree) + number * len(prompts))
        plan.nodes = leaves
        positions = np.array([leaf.position for leaf in leaves])
        rows = replica.forward(replica.embed(last), positions, plan)
        for prompt, token in zip(going, _likeliest(replica, rows), strict=True):
            written[prompt].append(token)
    return written


def _prompts(replica: Replica, tree: PrefixTree, ends: Ids, plan: Plan, cancel: threading.Event | None) -> list[int]:
    """Run the prompts and give the likeliest token behind each."""
    found = np.zeros(len(ends), dtype=np.int64)
    for nodes in chunks(tree):
        check_cancel(cancel)
        plan.nodes = nodes
        indices = np.concatenate([np.arange(node.start, node.end) for node in nodes])
        rows = replica.forward(replica.embed(tree.token_ids[indices]), tree.positions[indices], plan)
        here = np.flatnonzero(np.isin(ends, indices))
        if len(here):
            order = np.argsort(indices)
            places = order[np.searchsorted(indices, ends[here], sorter=order)]
            found[here] = _likeliest(replica, rows[torch.as_tensor(places, device=rows.device)])
    return [int(token) for token in found]


def _grow(leaves: Sequence[Node], tokens: Sequence[int], *, first: int) -> list[Node]:
    """One more token behind each leaf; ``first`` is above all numbers and indices in use."""
    return [
        Node(first + number, leaf, first + number, leaf.position + len(leaf.token_ids), np.array([token]))
        for number, (leaf, token) in enumerate(zip(leaves, tokens, strict=True))
    ]


def _likeliest(replica: Replica, rows: torch.Tensor) -> list[int]:
    return [int(token) for token in replica.unembed(rows).argmax(-1)]
