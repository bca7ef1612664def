"""Which process records a run, so that a run whose process died is told from one that is under way."""

from __future__ import annotations

import functools
import os
import socket
from dataclasses import dataclass

import psutil

CLOCK_TOLERANCE = 2.0
"""Seconds by which two readings of one process's creation time may differ when the system clock is corrected."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A process: its host, its id there, and when it was created (seconds since the epoch).

    The creation time tells a process from a later one that was given the same id.
    """

    host: str
    pid: int
    started: float

    def is_dead(self) -> bool:
        """Whether the process is known to be gone; a process on another host is taken to be alive."""
        if self.host != socket.gethostname():
            return False
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
            return abs(process.create_time() - self.started) > CLOCK_TOLERANCE
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False


def current_owner() -> Owner:
    """The process that calls this."""
    return _owner(os.getpid())


@functools.lru_cache(maxsize=2)
def _owner(pid: int) -> Owner:
    return Owner(host=socket.gethostname(), pid=pid, started=psutil.Process(pid).create_time())
