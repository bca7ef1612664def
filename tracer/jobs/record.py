"""A job on disk: a folder with what was asked for, how far it is, what it wrote, and what came of it.

``spec.json`` and ``process.json`` are written by whoever starts the job, ``status.json``, ``result.json`` and
``log.txt`` by its worker. A file ``cancel`` means that somebody asked it to stop.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError
from pydantic_core import from_json

from tracer.errors import InputError
from tracer.files import write_atomic
from tracer.store import Owner

SPEC, PROCESS, STATUS, RESULT, LOG, CANCEL = (
    "spec.json",
    "process.json",
    "status.json",
    "result.json",
    "log.txt",
    "cancel",
)
LOG_BYTES = 40_000
"""Of the end of a log that are shown."""
STARTING_SECONDS = 10.0
"""How long a job may be without a process before it counts as dead."""
DEAD = (
    "the process of this job ended before its work did; what was finished until then is kept, and its log may say why"
)

State = Literal["queued", "running", "completed", "failed", "cancelled"]
JobStatus = Literal["queued", "running", "completed", "failed", "cancelled", "interrupted"]

_ID = re.compile(r"\d{8}-\d{6}-\d{6}-[0-9a-f]{6}", re.ASCII)
_SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD")
_SECRET_LENGTH = 6
_CREDENTIALS = re.compile(r"(://)[^/\s@]+@")


class Spec(BaseModel):
    """What was asked for."""

    model_config = ConfigDict(frozen=True)

    kind: str
    parameters: dict[str, JsonValue]
    created_at: datetime


class Process(BaseModel):
    """The worker, as `tracer.store.Owner` knows it."""

    model_config = ConfigDict(frozen=True)

    host: str
    pid: int
    started: float

    @property
    def owner(self) -> Owner:
        """The process."""
        return Owner(host=self.host, pid=self.pid, started=self.started)


class Status(BaseModel):
    """How far a job is."""

    state: State = "queued"
    stage: str = ""
    done: float = 0
    total: float = 0
    """0 while unknown."""
    unit: str = ""
    error: str | None = None
    trace_id: str | None = None
    """The run that it records or explains."""
    live_text: str = ""
    """The end of what the model is writing now."""
    tokens: int = 0
    """That the model has written so far."""
    started_at: datetime | None = None
    ended_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it was when it was read; everything that it says about a run or a model is untrusted text.

    Args:
        id: Its id.
        folder: Its folder.
        kind: What it does.
        parameters: What was asked for, complete.
        status: How it is; ``interrupted`` where its process died.
        stage: What it is doing.
        done: Part of the stage that is done.
        total: The whole stage; 0 while unknown.
        unit: Of both.
        stopping: Whether somebody asked it to stop and it has not yet.
        error: Why it failed, in a sentence.
        trace_id: The run that it records or explains, once known.
        live_text: The end of what the model is writing.
        tokens: That the model has written.
        created_at: When it was asked for.
        started_at: When its work began.
        ended_at: When it ended.
    """

    id: str
    folder: Path
    kind: str
    parameters: dict[str, JsonValue]
    status: JobStatus
    stage: str
    done: float
    total: float
    unit: str
    stopping: bool
    error: str | None
    trace_id: str | None
    live_text: str
    tokens: int
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.status not in ("queued", "running")

    @property
    def fraction(self) -> float | None:
        """How much of the stage is done, 0 to 1; ``None`` while unknown."""
        return min(max(self.done / self.total, 0.0), 1.0) if self.total > 0 else None

    @property
    def seconds(self) -> float | None:
        """From the beginning of the work until its end or now; ``None`` before it began or where it died."""
        if self.started_at is None or (self.is_over and self.ended_at is None):
            return None
        return ((self.ended_at or datetime.now(UTC)) - self.started_at).total_seconds()

    @property
    def log(self) -> str:
        """The end of its log, without anything secret of this process's environment."""
        return read_log(self.folder / LOG)

    @property
    def result(self) -> JsonValue:
        """What came of it, where that is more than a run or an explanation in the store; ``None`` otherwise."""
        with suppress(OSError, ValueError):
            found: JsonValue = from_json((self.folder / RESULT).read_bytes())
            return found
        return None


_Model = TypeVar("_Model", bound=BaseModel)


def check_id(job_id: str) -> str:
    """An id that may be the name of a folder.

    Raises:
        InputError: It is none of ours.
    """
    if not _ID.fullmatch(job_id):
        raise InputError(f"{job_id[:80]!r} is not the id of a job")
    return job_id


def is_id(name: str) -> bool:
    """Whether a name is that of a job's folder."""
    return _ID.fullmatch(name) is not None


def read_spec(folder: Path) -> Spec:
    """What was asked for.

    Raises:
        InputError: There is no such job, or it cannot be read.
    """
    spec = _read(folder / SPEC, Spec)
    if spec is None:
        raise InputError(f"there is no job {folder.name}; it may have been removed")
    return spec


def read_job(folder: Path) -> Job:
    """A job as it is now.

    Raises:
        InputError: There is no such job, or it cannot be read.
    """
    spec = read_spec(folder)
    status = _read(folder / STATUS, Status)
    # Only then: what a worker writes last stands in its status before it is gone.
    dead = (status is None or status.state in ("queued", "running")) and _is_dead(folder, spec)
    status = (_read(folder / STATUS, Status) if dead else status) or Status()
    asked_to_stop = (folder / CANCEL).exists()
    state: JobStatus = status.state
    error = status.error
    if dead and state in ("queued", "running"):
        state = "cancelled" if asked_to_stop else "interrupted"
        error = None if asked_to_stop else DEAD
    return Job(
        id=folder.name,
        folder=folder,
        kind=spec.kind,
        parameters=spec.parameters,
        status=state,
        stage=status.stage,
        done=status.done,
        total=status.total,
        unit=status.unit,
        stopping=asked_to_stop and state in ("queued", "running"),
        error=error,
        trace_id=status.trace_id,
        live_text=status.live_text,
        tokens=status.tokens,
        created_at=spec.created_at,
        started_at=status.started_at,
        ended_at=status.ended_at,
    )


def read_process(folder: Path) -> Process | None:
    """The worker of a job, if it is known."""
    return _read(folder / PROCESS, Process)


def write(folder: Path, name: str, content: BaseModel) -> None:
    """Write one of a job's files, whole or not at all.

    Raises:
        OSError: It cannot be written.
    """
    write_atomic(folder / name, content.model_dump_json())


def read_log(path: Path) -> str:
    """The end of a log file; empty where there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LOG_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    return without_secrets(text.partition("\n")[2] if size > LOG_BYTES else text)


def without_secrets(text: str) -> str:
    """A text without passwords in addresses and without the secrets of this process's environment."""
    for name, value in os.environ.items():
        if len(value) >= _SECRET_LENGTH and any(word in name.upper() for word in _SECRET_WORDS):
            text = text.replace(value, "***")
    return _CREDENTIALS.sub(r"\1***@", text)


def _is_dead(folder: Path, spec: Spec) -> bool:
    process = _read(folder / PROCESS, Process)
    if process is None:
        return (datetime.now(UTC) - spec.created_at).total_seconds() > STARTING_SECONDS
    return process.owner.is_dead()


def _read(path: Path, kind: type[_Model]) -> _Model | None:
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
