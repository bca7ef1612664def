"""The worker process of a job: waits for its turn, does the work, and says how it ended."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from tracer.errors import CancelledError, TracerError
from tracer.jobs import record
from tracer.jobs.parameters import Parameters, parse
from tracer.jobs.reporter import Reporter
from tracer.jobs.stop import STOPPED, Stop
from tracer.jobs.work import Context, perform

TURN: Final = "heavy.lock"
_POLL_SECONDS: Final = 0.2


def main(folder: Path) -> int:
    """Do the job of a folder.

    Returns:
        The exit status; what happened is in the folder.
    """
    with Reporter(folder) as reporter, Stop(folder) as stop:
        try:
            spec = record.read_spec(folder)
            reporter.log(f"job {spec.kind}")
            parameters = parse(spec.kind, spec.parameters)
            with _turn(folder.parent, parameters, reporter, stop):
                reporter.begin()
                perform(parameters, Context(reporter, stop))
        except (CancelledError, KeyboardInterrupt):
            reporter.end("cancelled", STOPPED)
        except TracerError as error:
            reporter.end("cancelled" if stop.event.is_set() else "failed", str(error))
        except MemoryError:
            reporter.end("failed", "memory ran out; close other programs, or take a smaller model")
        except Exception as error:
            reporter.log(traceback.format_exc())
            reporter.end("failed", f"something that tracer did not expect: {type(error).__name__}: {error}")
        else:
            reporter.end("completed")
            return 0
    return 1


@contextmanager
def _turn(folder: Path, parameters: Parameters, reporter: Reporter, stop: Stop) -> Iterator[None]:
    """Wait until no other job of the folder has a model of its own loaded: two of them may not fit in memory."""
    stop.check()
    if not parameters.heavy:
        yield
        return
    lock = FileLock(folder / TURN)
    while True:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            reporter.stage("waiting for another job to end")
            time.sleep(_POLL_SECONDS)
        else:
            break
        stop.check()
    try:
        yield
    finally:
        lock.release()
