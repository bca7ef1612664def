"""What a target's probability becomes when sources are removed: the ground that ablation and faithfulness stand on.

A source can be removed in two ways. *Deleting* takes its tokens out of the sequence; what follows moves up. *Masking*
leaves everything in its place and hides the tokens from all later ones. Hidden tokens are read by nobody, so they need
not be computed: masking is the shorter sequence at the original positions. Either way all masks of a target form one
prefix tree, and what they share at their beginning is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from tracer.errors import InputError
from tracer.explain.base import Context
from tracer.replay.forward import CHUNK, Scored, Wanted, replay
from tracer.replay.recorded import GLUE, SINK, Recorded, Source, Target
from tracer.replay.tree import Ids, PrefixTree, build_tree

Kind = Literal["delete", "mask"]
Masks = NDArray[np.bool_]
_RESOLUTION = 2.0**-19
"""Distance of neighbouring float32 logits of usual size, 16 to 32."""
_AT_ONCE = 1 << 15
"""Tokens of sequences that are laid out in one tree, which bounds the memory for keys and values."""


class Backend(Protocol):
    """Scores shortened sequences."""

    def logprobs(
        self, context: Context, sequences: Sequence[Ids], positions: Sequence[Ids], written: int
    ) -> NDArray[np.float64]:
        """Log-probabilities of the last ``written`` tokens of each sequence, ``(sequences, written)``."""
        ...


class ReplicaBackend:
    """Runs the replica over the prefix tree of all sequences, unembedding only the rows that predict the target."""

    def logprobs(
        self, context: Context, sequences: Sequence[Ids], positions: Sequence[Ids], written: int
    ) -> NDArray[np.float64]:
        """Log-probabilities of the last ``written`` tokens of each sequence, ``(sequences, written)``."""
        found = np.empty((len(sequences), written))
        groups = batches([len(sequence) for sequence in sequences])
        for number, batch in enumerate(groups):
            tree = placed_tree(
                [sequences[index][:-1] for index in batch],
                [positions[index][:-1] for index in batch],
                vocabulary=context.replica.vocabulary,
            )
            rows = np.concatenate([places[-written:] for places in tree.sequences])
            ids = np.concatenate([sequences[index][-written:] for index in batch])
            wanted = Wanted(scored=Scored(rows, ids))
            with context.part(number, len(groups)):
                out = replay(context.replica, tree, wanted, progress=context.inside, cancel=context.cancel)
            context.cost.forward_tokens += out.tokens
            found[batch] = out.logprobs.reshape(len(batch), written)
        return found


@dataclass(slots=True)
class Removal:
    """A target with the sources that can be taken away from it.

    Args:
        context: Replica and trace.
        target: The target.
        kind: How sources are removed.
        kinds: Kinds of sources that may be removed; ``None`` for all that say something.
        backend: What scores the shortened sequences.

    Raises:
        InputError: There is nothing to remove, or these weights cannot be masked.
    """

    context: Context
    target: Target
    kind: Kind = "delete"
    kinds: frozenset[str] | None = None
    backend: Backend = field(default_factory=ReplicaBackend)
    units: tuple[int, ...] = field(init=False)
    """Numbers of the removable sources, in the order of their first token; the columns of a mask."""
    _unit_of: Ids = field(init=False)
    _known: dict[bytes, NDArray[np.float64]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        owner = self.context.recorded.source_of[self.target.sequence][: self.target.start]
        found = removable(self.context.recorded, self.target, self.kinds)
        if not found:
            wanted = "" if self.kinds is None else f" of the kinds {', '.join(sorted(self.kinds))}"
            raise InputError(f"step {self.target.step_id} read no source{wanted} that could be removed")
        if self.kind == "mask" and self.context.replica.windowed:
            raise InputError(
                "this architecture reads through a sliding window, where masking is not the same as leaving out; "
                "use removal=delete"
            )
        self.units = found
        numbers = {source: unit for unit, source in enumerate(found)}
        self._unit_of = np.array([numbers.get(int(number), -1) for number in owner])
        # Something must be left to read.
        self._unit_of[0] = -1

    def values(self, masks: Masks) -> NDArray[np.float64]:
        """Log-probability of the target under each mask.

        Args:
            masks: ``(masks, units)``; true keeps a source. What was asked before is not computed again.

        Returns:
            ``(masks,)``, the sum over the target's tokens, nats.
        """
        return np.asarray(self.token_values(masks).sum(1))

    def token_values(self, masks: Masks) -> NDArray[np.float64]:
        """Log-probability of each of the target's tokens under each mask, ``(masks, tokens)``."""
        names = [np.packbits(mask).tobytes() for mask in masks]
        missing = {name: mask for name, mask in zip(names, masks, strict=True) if name not in self._known}
        if missing:
            # In the order of their beginnings: what is laid out in one tree shares as much as it can.
            missing = dict(sorted(missing.items()))
            ids, positions = zip(*(self.shortened(mask) for mask in missing.values()), strict=True)
            written = self.target.end - self.target.start
            with self.context.cost.timed():
                found = self.backend.logprobs(self.context, ids, positions, written)
            self._known.update(zip(missing, found, strict=True))
        return np.stack([self._known[name] for name in names])

    @property
    def evaluated(self) -> int:
        """How many different masks were computed."""
        return len(self._known)

    def spread(self, values: NDArray[np.floating]) -> NDArray[np.float32]:
        """Values of units as token scores: each spread evenly over its tokens, ``(target.end,)``."""
        scores = np.zeros(self.target.end, dtype=np.float32)
        sizes = np.bincount(self._unit_of[self._unit_of >= 0], minlength=len(self.units))
        inside = np.flatnonzero(self._unit_of >= 0)
        scores[inside] = (np.asarray(values) / sizes)[self._unit_of[inside]]
        return scores

    def of_units(self, by_source: NDArray[np.floating]) -> NDArray[np.float64]:
        """The columns of ``(sources,)`` values that can be removed, ``(units,)``."""
        return np.asarray(by_source, dtype=np.float64)[list(self.units)]

    def shortened(self, mask: NDArray[np.bool_]) -> tuple[Ids, Ids]:
        """What is left under a mask, up to the target's end: ids and positions, both ``(length,)``."""
        before = (self._unit_of < 0) | mask[self._unit_of]
        keep = np.concatenate([before, np.ones(self.target.end - self.target.start, dtype=bool)])
        ids = self.context.recorded.sequences[self.target.sequence].token_ids[: self.target.end][keep]
        positions = np.flatnonzero(keep) if self.kind == "mask" else np.arange(len(ids))
        return ids, positions


def removable(recorded: Recorded, target: Target, kinds: frozenset[str] | None) -> tuple[int, ...]:
    """Numbers of the sources that a target read and that can be taken away, in the order of their first token.

    Template glue and the first token are no sources of anything, and the target's own tokens are what is asked about.
    """
    owner = recorded.source_of[target.sequence][1 : target.start]
    found = [int(number) for number in dict.fromkeys(owner.tolist())]
    return tuple(number for number in found if _says_something(recorded.sources[number], target, kinds))


def _says_something(source: Source, target: Target, kinds: frozenset[str] | None) -> bool:
    if source.kind in (GLUE, SINK) or source.step_id == target.step_id.partition("#")[0]:
        return False
    return kinds is None or source.kind in kinds


def logit(logprob: NDArray[np.floating]) -> NDArray[np.float64]:
    """``log(p / (1 - p))`` from ``log p`` (Cohen-Wang et al. 2024, section 3).

    It ends at 13.2, where p is as close to one as float32 logits can tell: what lies beyond is rounding.
    """
    values = np.minimum(np.asarray(logprob, dtype=np.float64), -_RESOLUTION)
    return np.asarray(values - np.log(-np.expm1(values)))


def placed_tree(sequences: Sequence[Ids], positions: Sequence[Ids], *, vocabulary: int) -> PrefixTree:
    """A prefix tree of sequences with gaps: a token is shared only where its position is the same too."""
    keys = [ids + vocabulary * places for ids, places in zip(sequences, positions, strict=True)]
    merged = build_tree(keys, longest=CHUNK)
    return PrefixTree(merged.nodes, merged.token_ids % vocabulary, merged.token_ids // vocabulary, merged.sequences)


def batches(lengths: Sequence[int], *, at_once: int = _AT_ONCE) -> list[list[int]]:
    """Numbers of sequences in groups that are laid out in one tree each, which bounds the memory."""
    groups: list[list[int]] = [[]]
    used = 0
    for number, length in enumerate(lengths):
        if groups[-1] and used + length > at_once:
            groups.append([])
            used = 0
        groups[-1].append(number)
        used += length
    return groups
