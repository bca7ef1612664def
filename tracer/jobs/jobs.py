"""Starting, finding and stopping jobs."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from uuid import uuid4

import psutil

import tracer
from tracer.errors import InputError, StoreError
from tracer.jobs import record
from tracer.jobs.parameters import parse
from tracer.jobs.record import Job
from tracer.store import Store
from tracer.store.arrays import SUFFIX as ARRAYS_SUFFIX

SUFFIX: Final = ".jobs"
KEPT: Final = 100
"""Jobs that are over and stay to be looked at."""
REMOVE_SECONDS: Final = 20.0
"""How long a job that is removed may take to stop."""
_PACKAGE_ROOT: Final = Path(tracer.__file__).parents[1]
Found = list[Job]
# A dropped Popen would complain about its running process, and an unreaped child stays a zombie.
_workers: Final[list[subprocess.Popen[bytes]]] = []


class Jobs:
    """The jobs of one folder. Each runs in a process and session of its own and outlives whoever started it.

    Args:
        folder: Where they are kept; it is made when the first one starts.
        store: The store that they work on unless told otherwise; ``None`` for the default one.
    """

    def __init__(self, folder: Path, *, store: str | Path | None = None) -> None:
        self.folder = folder
        self._store = store
        self._over: dict[str, Job] = {}

    @classmethod
    def of_store(cls, location: str | Path | None = None) -> Jobs:
        """The jobs of a store: in ``FILE.jobs`` beside its database, or for a server's in the user's data folder.

        Args:
            location: A file or a database URL; ``None`` for the default store.
        """
        arrays = Store(location).arrays.root
        return cls(arrays.with_name(arrays.name.removesuffix(ARRAYS_SUFFIX) + SUFFIX), store=location)

    def start(self, kind: str, parameters: Mapping[str, object], *, store: str | Path | None = None) -> Job:
        """Start a job; jobs that load a model of their own wait for each other.

        Args:
            kind: One of `tracer.jobs.KINDS`.
            parameters: What it takes; see there.
            store: The store that it works on, if not that of all. It is handed on in the environment, so that a
                password in it is written nowhere.

        Raises:
            UnknownNameError: There is no such kind, or a parameter names nothing.
            InputError: The parameters cannot be used.
            StoreError: The folder cannot be written.
        """
        found = parse(kind, parameters)
        spec = record.Spec(kind=kind, parameters=found.model_dump(mode="json"), created_at=datetime.now(UTC))
        folder = self.folder / f"{spec.created_at:%Y%m%d-%H%M%S-%f}-{uuid4().hex[:6]}"
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(mode=0o700)
            record.write(folder, record.SPEC, spec)
            self._spawn(folder, self._store if store is None else store)
        except OSError as error:
            raise StoreError(f"cannot write a job below {self.folder}: {error.strerror or error}") from None
        self._prune()
        return record.read_job(folder)

    def list(self, *, limit: int | None = None) -> Found:
        """Jobs, newest first; those that cannot be read are left out."""
        found: Found = []
        for job_id in self._ids():
            if limit is not None and len(found) >= limit:
                break
            with suppress(InputError):
                found.append(self.get(job_id))
        return found

    def get(self, job_id: str) -> Job:
        """A job as it is now.

        Raises:
            InputError: There is none of that id.
        """
        record.check_id(job_id)
        _reap()
        if job_id in self._over:
            return self._over[job_id]
        job = record.read_job(self.folder / job_id)
        if job.is_over:
            self._over[job_id] = job
        return job

    def latest(self, kind: str, parameters: Mapping[str, object]) -> Job | None:
        """The newest job of that kind with the same parameters.

        Raises:
            UnknownNameError: There is no such kind, or a parameter names nothing.
            InputError: The parameters cannot be used.
        """
        wanted = parse(kind, parameters).model_dump(mode="json")
        return next((job for job in self.list() if job.kind == kind and job.parameters == wanted), None)

    def cancel(self, job_id: str, *, at_once: bool = False) -> None:
        """Ask a job to stop; what is finished is kept. Nothing happens if it is over.

        Args:
            job_id: Its id.
            at_once: Kill it instead of letting it end in good order.

        Raises:
            InputError: There is none of that id.
        """
        job = self.get(job_id)
        if job.is_over:
            return
        with suppress(OSError):
            (job.folder / record.CANCEL).touch()
        process = record.read_process(job.folder)
        if process is None or process.owner.is_dead():
            return
        # It may have ended just now.
        with suppress(OSError):
            if at_once:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                os.kill(process.pid, signal.SIGTERM)

    def remove(self, job_id: str) -> None:
        """Delete a job with its log; one that is not over is stopped first. Runs and explanations stay in the store.

        Raises:
            InputError: There is none of that id.
            StoreError: It cannot be stopped or deleted.
        """
        self.cancel(job_id)
        job = self.wait(job_id, REMOVE_SECONDS)
        if not job.is_over:
            self.cancel(job_id, at_once=True)
            job = self.wait(job_id, REMOVE_SECONDS)
        if not job.is_over or not self._has_ended(job):
            raise StoreError(f"job {job_id} cannot be stopped, so it is not removed")
        _reap()
        self._delete(job_id)

    def wait(self, job_id: str, seconds: float) -> Job:
        """A job once it is over, or as it is when the time has passed.

        Raises:
            InputError: There is none of that id.
        """
        deadline = time.monotonic() + seconds
        while not (job := self.get(job_id)).is_over and time.monotonic() < deadline:
            time.sleep(0.05)
        return job

    def _has_ended(self, job: Job) -> bool:
        """Whether nothing more is written to its folder: its process says how it ended shortly before it does."""
        process = record.read_process(job.folder)
        deadline = time.monotonic() + REMOVE_SECONDS
        while process is not None and not process.owner.is_dead():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def _ids(self) -> Sequence[str]:
        try:
            return sorted((entry.name for entry in os.scandir(self.folder) if record.is_id(entry.name)), reverse=True)
        except OSError:
            return []

    def _spawn(self, folder: Path, store: str | Path | None) -> None:
        environment = dict(os.environ)
        # The tracer of this process, wherever the worker is started from.
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(_PACKAGE_ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        )
        if store is not None:
            environment["TRACER_STORE"] = str(store)
        with (folder / record.LOG).open("ab") as log:
            worker = subprocess.Popen(  # noqa: S603
                [sys.executable, "-P", "-m", "tracer.jobs", str(folder.absolute())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=environment,
            )
        _workers.append(worker)
        with suppress(psutil.Error):
            owner = psutil.Process(worker.pid)
            started = record.Process(host=socket.gethostname(), pid=worker.pid, started=owner.create_time())
            record.write(folder, record.PROCESS, started)

    def _prune(self) -> None:
        """Delete the oldest of the jobs that are over, so that the folder does not grow for ever."""
        for job_id in self._ids()[KEPT:]:
            with suppress(InputError, StoreError):
                if self.get(job_id).is_over:
                    self._delete(job_id)

    def _delete(self, job_id: str) -> None:
        self._over.pop(job_id, None)
        try:
            shutil.rmtree(self.folder / job_id)
        except OSError as error:
            raise StoreError(f"job {job_id} cannot be deleted: {error.strerror or error}") from None


def _reap() -> None:
    """Collect workers of this process that have ended."""
    for worker in list(_workers):
        if worker.poll() is not None:
            with suppress(ValueError):
                _workers.remove(worker)
