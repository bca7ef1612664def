"""Two runs side by side: which step of one corresponds to which of the other.

The longest runs of equal steps are paired first (Ratcliff and Metzener's method, as in `difflib`), equal meaning kind,
branch and text. What stands between two such runs is paired in the same way by kind and branch, and what is left by
kind. A fork and what it was forked from, or two samples of one question, so keep their common beginning together.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from difflib import SequenceMatcher
from itertools import takewhile
from typing import Literal, NamedTuple

from tracer.trace.trace import Step, Trace

Change = Literal["same", "changed", "left", "right"]
MOST_COMPARED = 2_000_000
"""Most pairs of steps among which equal ones are looked for; of longer stretches only the common beginning is."""
_KEYS: tuple[Callable[[Step], Hashable], ...] = (
    lambda step: (step.kind, step.branch, step.text),
    lambda step: (step.kind, step.branch),
    lambda step: step.kind,
)


class Pair(NamedTuple):
    """A step of the left run beside one of the right, by their places from 0; ``None`` where it has no partner."""

    left: int | None
    right: int | None
    change: Change


def align(left: Trace, right: Trace) -> list[Pair]:
    """Pairs that cover every step of both runs once, in the order of each.

    Args:
        left: One run.
        right: The other.
    """
    return list(_pairs(left.steps, right.steps, 0, 0, level=0))


def word_changes(left: str, right: str) -> Iterator[tuple[str, str]]:
    """What became of a text, word by word: pieces that stay (a space), went (``-``) or came (``+``)."""
    before, after = left.split(), right.split()
    for kind, a, b, c, d in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind == "equal":
            yield " ", " ".join(before[a:b])
            continue
        if b > a:
            yield "-", " ".join(before[a:b])
        if d > c:
            yield "+", " ".join(after[c:d])


def _pairs(left: Sequence[Step], right: Sequence[Step], a: int, b: int, *, level: int) -> Iterator[Pair]:
    """Pairs of two stretches of steps that begin at the places ``a`` and ``b`` of their runs."""
    if level == len(_KEYS) or not left or not right:
        yield from (Pair(a + number, None, "left") for number in range(len(left)))
        yield from (Pair(None, b + number, "right") for number in range(len(right)))
        return
    ours, theirs = ([_KEYS[level](step) for step in side] for side in (left, right))
    i = j = 0
    for start, other, size in (*_blocks(ours, theirs), (len(left), len(right), 0)):
        yield from _pairs(left[i:start], right[j:other], a + i, b + j, level=level + 1)
        for number in range(size):
            same = left[start + number].text == right[other + number].text
            yield Pair(a + start + number, b + other + number, "same" if same else "changed")
        i, j = start + size, other + size


def _blocks(ours: Sequence[Hashable], theirs: Sequence[Hashable]) -> list[tuple[int, int, int]]:
    """Runs of equal keys: where they begin on both sides, and how long they are."""
    head = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False)))
    found = [(0, 0, head)]
    if (len(ours) - head) * (len(theirs) - head) <= MOST_COMPARED:
        blocks = SequenceMatcher(None, ours[head:], theirs[head:], autojunk=False).get_matching_blocks()
        found += [(block.a + head, block.b + head, block.size) for block in blocks if block.size]
    return found
