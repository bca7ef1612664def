"""What all explanation methods share: how they are described, asked, and what they answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from tracer.errors import CancelledError

if TYPE_CHECKING:
    from tracer.engines.base import Engine
    from tracer.replay.model import Replica
    from tracer.replay.recorded import Recorded, Target

TargetFunction = Literal["logprob", "logit", "contrast"]
Progress = Callable[[float, int], None]
"""Called with units done, the one in work by its share, and their total."""


@dataclass(frozen=True, slots=True)
class Method:
    """What is known of a method before it runs.

    Args:
        name: Its name on the command line and in the trace.
        family: Methods of one family share their passes.
        summary: One line.
        unit: What its values are.
        signed: Whether a value below zero means that the source spoke against the target.
        cost: ``cheap`` (about a forward pass), ``moderate`` (passes for each step) or ``slow``.
        paper: Where it comes from.
        parameters: Names of its parameters with their defaults.
        follows: Whether it explains the target function that is asked for. The others explain none, as attention, or
            always the log-probability.
    """

    name: str
    family: str
    summary: str
    unit: str
    signed: bool
    cost: Literal["cheap", "moderate", "slow"]
    paper: str
    parameters: Mapping[str, JsonValue] = field(default_factory=dict)
    follows: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """One method with the parameters that it shall run with."""

    method: Method
    parameters: Mapping[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Finding:
    """What one method says about one target.

    Args:
        request: The method.
        target: The target.
        scores: One for each token before the target's end, ``(target.end,)``; of tokens inside the target too, which
            later ones of its tokens read.
        details: What else is known, such as a completeness error or the mass on sinks.
    """

    request: Request
    target: Target
    scores: NDArray[np.float32]
    details: Mapping[str, JsonValue] = field(default_factory=dict)


@dataclass(slots=True)
class Cost:
    """What a family's run cost; its methods share it."""

    seconds: float = 0.0
    forward_tokens: int = 0
    """Tokens that went through all layers."""
    backward_passes: int = 0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the time spent inside."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began


@dataclass(slots=True)
class Context:
    """What a family of methods works with.

    Args:
        replica: The model.
        recorded: The trace.
        target_function: The scalar that is explained: the sum over a target's tokens of their log-probabilities, their
            logits, or the logit of each over a foil's.
        foil: Token id of the foil; ``None`` takes the runner-up at each position.
        seed: For everything drawn at random.
        low_memory: Recompute instead of keeping.
        progress: Told units done and their total.
        cancel: Ends the work between two targets; what was yielded before is kept.
        engine: Serves the replica's weights, for methods that can have sequences scored elsewhere.
        announce: Told what is done that has no units, such as the start of a server.
        cost: Filled as the work goes on.
    """

    replica: Replica
    recorded: Recorded
    target_function: TargetFunction = "logprob"
    foil: int | None = None
    seed: int = 0
    low_memory: bool = False
    progress: Progress | None = None
    cancel: threading.Event | None = None
    engine: Engine | None = None
    announce: Callable[[object], None] | None = None
    cost: Cost = field(default_factory=Cost)
    _done: float = 0.0
    _total: int = 0
    _part: tuple[float, float] = (0.0, 1.0)
    """Where in its unit the work is, and how large the part in work is, both as shares of the unit."""

    def check_cancel(self) -> None:
        """Stop where somebody asked for it.

        Raises:
            CancelledError: ``cancel`` is set.
        """
        if self.cancel is not None and self.cancel.is_set():
            raise CancelledError("stopped; what was finished is kept")

    def wait(self, what: object) -> None:
        """Tell what is being waited for; called again and again while it lasts.

        Raises:
            CancelledError: ``cancel`` is set.
        """
        self.check_cancel()
        if self.announce is not None:
            self.announce(what)

    def report(self, done: float, total: int) -> None:
        """Tell how far the work is."""
        self._done, self._total = done, total
        if self.progress is not None:
            self.progress(done, total)

    def inside(self, done: float, total: int) -> None:
        """Tell how far the part in work is, which `report` has not counted yet."""
        start, width = self._part
        if self.progress is not None and self._total:
            self.progress(min(self._done + start + width * done / total, self._total), self._total)

    @contextmanager
    def part(self, number: int, count: int) -> Iterator[None]:
        """Work on one of ``count`` parts of the unit, or of the part, that is in work."""
        start, width = outer = self._part
        self._part = (start + width * number / count, width / count)
        try:
            yield
        finally:
            self._part = outer


Family = Callable[[Context, Sequence[Request], "Sequence[Target]"], Iterator[Finding]]
"""Runs requests of one family for some targets and yields findings as they are made, in any order."""
