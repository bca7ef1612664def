"""How a worker is stopped: by a signal that work looks at, or that interrupts it where nobody looks."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from tracer.errors import CancelledError
from tracer.jobs import record

STOPPED = "stopped by a person; what was finished is kept"


class Stop:
    """Takes SIGTERM and Ctrl-C while it is entered; a second one interrupts at once.

    Args:
        folder: The job's folder: a person may have stopped it before it could take signals.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._interrupts = False
        self._previous: dict[int, Any] = {}
        self.event = threading.Event()
        """Set once somebody wants the job to stop."""

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        if (self._folder / record.CANCEL).exists():
            self.event.set()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """End the work here if somebody wants it to stop.

        Raises:
            CancelledError: Somebody does.
        """
        if self.event.is_set():
            raise CancelledError(STOPPED)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Work that never looks whether it shall stop: the first signal raises ``KeyboardInterrupt`` in it.

        Raises:
            CancelledError: It shall stop before it begins.
        """
        self._interrupts = True
        try:
            self.check()
            yield
        finally:
            self._interrupts = False

    def _handle(self, number: int, _: FrameType | None) -> None:
        again = self.event.is_set()
        self.event.set()
        if again or self._interrupts:
            raise KeyboardInterrupt
