"""What a worker tells the world: its status file, written a few times a second at most, and its log."""

from __future__ import annotations

import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from pydantic import JsonValue
from pydantic_core import to_json

from tracer.console import one_line
from tracer.engines.base import TokenChunk
from tracer.files import write_atomic
from tracer.jobs import record
from tracer.jobs.record import Status
from tracer.trace.events import CallFinished, CallStarted, Event, RunStarted, StepAdded

WRITE_SECONDS: Final = 0.25
LIVE_CHARACTERS: Final = 4_000


class Reporter:
    """Keeps a job's status, and writes it from a thread of its own; the last state is written when it is left.

    Args:
        folder: The job's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._status = Status()
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, name="job status", daemon=True)

    def __enter__(self) -> Self:
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._changed.set()
        self._thread.join()
        self._write()

    def begin(self) -> None:
        """The work begins."""
        self._update(state="running", stage="loading libraries", started_at=datetime.now(UTC))

    def stage(self, text: str) -> None:
        """What is being done now."""
        self._update(stage=one_line(record.without_secrets(text), 300), done=0, total=0, unit="")

    def progress(self, progress: object) -> None:
        """How far a stage is; takes whatever has ``stage``, ``done``, ``total`` and ``unit``."""
        stage = one_line(record.without_secrets(str(getattr(progress, "stage", progress))), 300)
        if stage != self._status.stage:
            self.log(stage)
        self._update(
            stage=stage,
            done=float(getattr(progress, "done", 0)),
            total=float(getattr(progress, "total", 0) or 0),
            unit=str(getattr(progress, "unit", "")),
        )

    def event(self, event: Event) -> None:
        """What a run has recorded."""
        match event:
            case RunStarted():
                self._update(trace_id=event.trace_id)
                self.stage("the model is working")
                self.log(f"run {event.trace_id}")
            case CallStarted():
                self._update(live_text="")
            case CallFinished():
                # Without streaming this is the first that is known of the tokens.
                self._update(live_text="")
            case StepAdded(step=step):
                self.log(f"{step.id} {step.kind}: {one_line(step.text, 160)}")
            case _:
                pass

    def tokens(self, chunk: TokenChunk) -> None:
        """Tokens as they arrive; of several completions the first one's text is shown."""
        with self._lock:
            self._status.tokens += len(chunk.token_ids)
            if chunk.prompt == 0 and chunk.completion == 0:
                self._status.live_text = (self._status.live_text + chunk.text)[-LIVE_CHARACTERS:]
        self._changed.set()

    def concerns(self, trace_id: str) -> None:
        """Say which run this is about."""
        self._update(trace_id=trace_id)

    def end(self, state: record.State, error: str | None = None) -> None:
        """The work is over."""
        message = None if error is None else one_line(record.without_secrets(error), 2_000)
        self._update(state=state, error=message, live_text="", ended_at=datetime.now(UTC))
        self.log(state if message is None else f"{state}: {message}")

    def result(self, result: JsonValue) -> None:
        """Keep what came of the job.

        Raises:
            OSError: It cannot be written.
        """
        write_atomic(self._folder / record.RESULT, to_json(result, inf_nan_mode="null"))

    def log(self, text: str) -> None:
        """Add lines to the log."""
        moment = f"{datetime.now(UTC):%H:%M:%S}"
        for line in record.without_secrets(text).splitlines():
            print(f"{moment} {line}", file=sys.stderr, flush=True)

    def _update(self, **changes: object) -> None:
        with self._lock:
            self._status = self._status.model_copy(update=changes)
        self._changed.set()

    def _keep_writing(self) -> None:
        while not self._ended.is_set():
            self._changed.wait()
            self._changed.clear()
            self._write()
            self._ended.wait(WRITE_SECONDS)

    def _write(self) -> None:
        with self._lock:
            status = self._status.model_copy()
        try:
            record.write(self._folder, record.STATUS, status)
        except OSError as error:
            # The work matters more than what is said about it.
            self.log(f"the status cannot be written: {error.strerror or error}")
