"""A small process that runs one vLLM server and never lets a part of it outlive the whole.

It starts the server in a process group of its own, keeps the state file while it runs, and kills what is left of it

- when the server's main process ends for any reason (a killed one leaves its engine and workers behind);
- when told to stop (SIGTERM);
- when the process that owns the server is gone, however it died: the pipe to it closes;
- when nobody has used the server for a given time.

`tracer.engines.server` starts this file as a script, isolated: it imports nothing of tracer, which keeps it light.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

import psutil

TICK_SECONDS: Final = 0.25
GRACE_SECONDS: Final = 10.0
_CLOCK_SECONDS: Final = 2.0
"""Start times of processes move by this much at most when the clock is set."""
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36


def main() -> int:
    """Read the order from standard input, run the server, clean up."""
    order = json.loads(sys.stdin.buffer.readline())
    with Path(order["log"]).open("ab", buffering=0) as log:
        supervisor = Supervisor(order, log)
        reason = "the supervisor failed"
        try:
            supervisor.start()
            reason = supervisor.watch()
        finally:
            code = supervisor.end()
            log.write(f"tracer: the server ended ({reason}; exit code {code})\n".encode())
            Path(order["state"]).unlink(missing_ok=True)
    return 0


class Supervisor:
    """Runs and watches one server.

    Args:
        order: What `tracer.engines.server` asked for.
        log: Where the server's output goes.
    """

    def __init__(self, order: dict[str, Any], log: BinaryIO) -> None:
        self._order = order
        self._log = log
        self._child: subprocess.Popen[bytes] | None = None
        self._family: set[psutil.Process] = set()
        self._stop = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        self._stop = True

    def start(self) -> None:
        """Start the server and write its state file."""
        # Orphans of a killed server become children of this process, where they can be found.
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        child = self._child = subprocess.Popen(  # noqa: S603
            self._order["argv"],
            env=self._order["env"],
            cwd=Path(self._order["state"]).parent,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            process_group=0,
            preexec_fn=_end_with_parent,  # noqa: PLW1509
        )
        own = psutil.Process()
        record = {
            **self._order["record"],
            "pid": child.pid,
            "created": psutil.Process(child.pid).create_time(),
            "supervisor": own.pid,
            "supervisor_created": own.create_time(),
        }
        write_json(Path(self._order["state"]), record)

    def watch(self) -> str:
        """Wait for a reason to end, and return it."""
        owner = self._order["owner"]
        idle = _Idle(self._order["record"]["url"], self._order["idle_timeout"])
        pipe_open = owner is not None
        while True:
            if pipe_open and select.select([sys.stdin], [], [], 0)[0] and not os.read(sys.stdin.fileno(), 1024):
                return "its owner is gone"
            if owner is not None and find_process(owner[0], owner[1]) is None:
                return "its owner is gone"
            if self._child is None or self._child.poll() is not None:
                return "by itself"
            if self._stop:
                return "stopped"
            if idle.expired():
                return f"unused for {self._order['idle_timeout']:g} s"
            self._remember()
            time.sleep(TICK_SECONDS)

    def _remember(self) -> None:
        self._family.update(psutil.Process().children(recursive=True))

    def end(self) -> int | None:
        """Stop the server and everything it started; return its exit code."""
        child = self._child
        if child is None:
            return None
        self._remember()
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                child.wait(GRACE_SECONDS)
        self._remember()
        kill(self._family | group_members(child.pid, os.getsid(0)))
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_SECONDS)
        return child.returncode


class _Idle:
    """Knows from the server's own counters for how long nobody has used it."""

    def __init__(self, url: str, timeout: float | None) -> None:
        self._url = url
        self._timeout = timeout
        self._interval = min(10.0, (timeout or 0) / 4)
        self._next = 0.0
        self._last = time.monotonic()
        self._seen: list[str] = []

    def expired(self) -> bool:
        if self._timeout is None:
            return False
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._interval
        lines = self._counters()
        busy = any(line.startswith("vllm:num_requests_") and float(line.rsplit(" ", 1)[1]) > 0 for line in lines)
        if busy or not lines or lines != self._seen:
            self._seen = lines
            self._last = now
        return now - self._last > self._timeout

    def _counters(self) -> list[str]:
        # No proxy of the environment stands between this machine and itself.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self._url}/metrics", timeout=2) as answer:
                text = answer.read().decode()
        except (OSError, ValueError):
            return []
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting{", "vllm:request_success_total")
        return [line for line in text.splitlines() if line.startswith(names)]


def find_process(pid: int, created: float) -> psutil.Process | None:
    """The process that had this id and start time, unless it has ended."""
    try:
        process = psutil.Process(pid)
        if abs(process.create_time() - created) > _CLOCK_SECONDS or process.status() == psutil.STATUS_ZOMBIE:
            return None
    except psutil.Error:
        return None
    return process


def group_members(pgid: int, session: int) -> set[psutil.Process]:
    """Living processes of one process group of one session."""
    members: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError, PermissionError):
            if os.getpgid(process.pid) == pgid and os.getsid(process.pid) == session and is_alive(process):
                members.add(process)
    return members


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def kill(processes: Iterable[psutil.Process], timeout: float = GRACE_SECONDS) -> list[psutil.Process]:
    """SIGKILL processes and those that they start meanwhile; return those that are still there after ``timeout``."""
    left = {process for process in processes if is_alive(process)}
    deadline = time.monotonic() + timeout
    while left and time.monotonic() < deadline:
        for process in list(left):
            with suppress(psutil.Error):
                left.update(process.children(recursive=True))
                process.kill()
        psutil.wait_procs(left, timeout=0.2)
        left = {process for process in left if is_alive(process)}
    return list(left)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Replace a file in one step, readable by its owner alone."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(data, file)
        file.flush()
        os.fsync(file.fileno())
    Path(temporary).replace(path)


def _end_with_parent() -> None:
    """In the new server: be interrupted when the supervisor dies, even by SIGKILL."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGINT)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
