"""Scores of single tokens, as the token map shows them. Draws nothing.

A target is a whole step, or one of its tokens where those were explained by themselves (``ID#N``).
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tracer.trace.trace import Call, Step, Trace
from ui.evidence import Evidence

TOP = 32
"""Sources that are sent for each target; a click fetches the others."""
LONGEST = (1 << 16) - 1
"""Tokens that the packed form can number."""
Values = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Written:
    """A prompt and one of its completions.

    Args:
        call: The call.
        completion: Number of the completion.
    """

    call: Call
    completion: int

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.call.prompt_token_ids)

    def steps(self, trace: Trace) -> list[str]:
        """Ids of the steps that the completion was cut into."""
        return [step.id for step in _steps(trace, self)]

    @property
    def token_ids(self) -> list[int]:
        """Those of prompt and completion."""
        return [*self.call.prompt_token_ids, *self.call.completions[self.completion].token_ids]


class Run(NamedTuple):
    """Tokens ``[start, end)`` that show one thing."""

    start: int
    end: int
    kind: str
    step_id: str | None


class Target(NamedTuple):
    """Tokens whose sources are known together."""

    name: str
    """A step's id, or ``ID#N``."""
    start: int
    end: int
    values: Values
    """One for each token before ``end``; those of the target itself are zero."""


def written(trace: Trace) -> list[Written]:
    """All completions of a trace that have tokens."""
    return [
        Written(call, number)
        for call in trace.calls
        for number, completion in enumerate(call.completions)
        if completion.token_ids
    ]


def written_in(found: Sequence[Written], step: Step) -> int | None:
    """Number of the completion that a step was written in, or of the first whose prompt shows it."""
    for number, item in enumerate(found):
        if (item.call.id, item.completion) == (step.call_id, step.completion):
            return number
    for number, item in enumerate(found):
        if any(segment.step_id == step.id for segment in item.call.segments):
            return number
    return None


def runs(trace: Trace, item: Written) -> list[Run]:
    """A prompt and its completion cut by what the tokens show; the rest of a completion is ``template``."""
    found = [Run(part.start, part.end, part.kind, part.step_id) for part in item.call.segments]
    at, end = item.prompt, len(item.token_ids)
    for step in _steps(trace, item):
        start, stop = item.prompt + (step.start or 0), min(end, item.prompt + (step.end or 0))
        if start > at:
            found.append(Run(at, start, "template", None))
        if stop > max(start, at):
            found.append(Run(max(start, at), stop, step.kind, step.id))
        at = max(at, stop)
    return [*found, Run(at, end, "template", None)] if at < end else found


def targets(
    evidence: Evidence, item: Written, method: str, arrays: Mapping[str, Values], *, only: str | None = None
) -> list[Target]:
    """What a method explains of a completion: its steps, then their single tokens.

    Args:
        evidence: The trace's.
        item: The completion.
        method: One of the trace's methods.
        arrays: Its token scores by target.
        only: One step, without its single tokens.
    """
    length = len(item.token_ids)
    steps: list[Target] = []
    tokens: list[Target] = []
    for step in _steps(evidence.trace, item):
        if only not in (None, step.id):
            continue
        start, end = item.prompt + (step.start or 0), item.prompt + (step.end or 0)
        if step.id in arrays and end <= length:
            steps.append(_target(step.id, start, end, arrays[step.id]))
        for number, name in sorted(evidence.token_targets(method, step.id).items() if only is None else ()):
            if name in arrays and start + number < end <= length:
                tokens.append(_target(name, start + number, start + number + 1, arrays[name]))
    return [found for found in [*steps, *tokens] if len(found.values) == found.end]


def pack(found: Sequence[Target], *, top: int = TOP) -> str:
    """The largest sources of every target.

    Returns:
        Base64 of, for each target: its start and end (two uint16), whether it is a single token of a step (uint8), its
        largest absolute value (float32), the share of the absolute values that is left out (float32), the number of
        sources (uint8), and for each its position (uint16) and its value in 127ths of the largest (int8).
    """
    packed = bytearray()
    for target in found:
        sizes = np.abs(target.values)
        largest, total = float(sizes.max(initial=0.0)), float(sizes.sum())
        best = np.argpartition(-sizes, min(top, len(sizes) - 1))[:top] if len(sizes) else np.empty(0, dtype=np.int64)
        scaled = np.round(target.values[best] / (largest or 1.0) * 127).astype(np.int8)
        kept = scaled != 0
        best, scaled = best[kept], scaled[kept]
        left = 1.0 - float(sizes[best].sum()) / total if total else 0.0
        head = (target.start, target.end, "#" in target.name, largest, max(0.0, left), len(best))
        packed += struct.pack("<HHBffB", *head)
        packed += b"".join(
            struct.pack("<Hb", at, value) for at, value in zip(best.tolist(), scaled.tolist(), strict=True)
        )
    return base64.b64encode(packed).decode()


@dataclass(frozen=True, eq=False)
class Span:
    """What is known of the sources of some tokens together.

    Args:
        found: All targets of the completion.
        start: First token.
        end: One past the last.
        signed: Whether the method's scores add up.
    """

    found: Sequence[Target]
    start: int
    end: int
    signed: bool

    @cached_property
    def members(self) -> list[Target]:
        """Its single tokens where those are known, else the steps that it lies in."""
        tokens = [item for item in self.found if "#" in item.name and self.start <= item.start < self.end]
        if tokens:
            return tokens
        return [item for item in self.found if "#" not in item.name and item.start < self.end and self.start < item.end]

    @property
    def of_steps(self) -> bool:
        """Whether only scores of whole steps are known."""
        return bool(self.members) and "#" not in self.members[0].name

    @property
    def bounds(self) -> tuple[int, int]:
        """The tokens that the scores are about: the whole steps where only those are known."""
        if not self.of_steps:
            return self.start, self.end
        return min(item.start for item in self.members), max(item.end for item in self.members)

    @property
    def values(self) -> Values:
        """Scores of the tokens before its end: added up, or their mean where scores do not add up."""
        start, end = self.bounds
        total = np.zeros(end, dtype=np.float32)
        for item in self.members:
            total[: len(item.values)] += item.values[:end]
        if not self.signed and self.members:
            total /= len(self.members)
        total[start:] = 0.0
        return total

    def packed(self) -> str:
        """Base64 of one int8 for each token before its end, in 127ths of the largest."""
        values = self.values
        largest = float(np.abs(values).max(initial=0.0)) or 1.0
        return base64.b64encode(np.round(values / largest * 127).astype(np.int8).tobytes()).decode()


def _target(name: str, start: int, end: int, values: Values) -> Target:
    own = np.array(values, dtype=np.float32)
    own[start:] = 0.0
    return Target(name, start, end, own)


def _steps(trace: Trace, item: Written) -> list[Step]:
    found = [
        step
        for step in trace.steps
        if (step.call_id, step.completion) == (item.call.id, item.completion)
        and step.start is not None
        and step.end is not None
    ]
    return sorted(found, key=lambda step: step.start or 0)


def peak(values: Values, start: int, end: int, *, window: int = 7) -> int | None:
    """Where in ``[start, end)`` scores are largest: the middle of a few tokens, or ``None`` where they are alike."""
    part = np.abs(values[start:end]).astype(np.float64)
    if len(part) <= window or float(part.max() - part.min()) <= 1e-6 * float(part.max()):
        return None
    smooth = np.convolve(part, np.ones(window), mode="same")
    return start + int(smooth.argmax())
