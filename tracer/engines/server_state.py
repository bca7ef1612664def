"""What is known about the vLLM servers on this machine: one state file each, removed when the server ends."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import httpx
import psutil
from platformdirs import user_state_dir
from pydantic import BaseModel, ConfigDict, ValidationError

from tracer.engines import supervise
from tracer.errors import EngineUnavailableError

if TYPE_CHECKING:
    from tracer.engines.models import ResolvedModel


class ServerState(BaseModel):
    """What is known about a server that tracer started; the content of its state file."""

    model_config = ConfigDict(frozen=True)

    id: str
    url: str
    port: int
    model: str
    path: Path
    dtype: str
    max_model_len: int
    version: str
    """Of vLLM."""
    log: Path
    owned: bool
    """Whether it ends with the process that started it; such a server is not offered to others."""
    idle_timeout: float | None
    started_at: datetime
    startup_timeout: float
    pid: int
    """Of the main process, which is also the id of the server's process group."""
    created: float
    supervisor: int
    """Its process id, which is also the id of the session."""
    supervisor_created: float
    lens: bool = False
    """Whether it gives hidden states, and answers nothing but what tracer asks."""


Health = Literal["ready", "starting", "not answering"]


class ServerStatus(NamedTuple):
    """A living server and how it is."""

    state: ServerState
    health: Health


def state_dir() -> Path:
    """The folder of state files and logs: ``$TRACER_STATE``, or the platform's state folder for tracer."""
    chosen = os.environ.get("TRACER_STATE")
    folder = Path(chosen).expanduser().resolve() if chosen else Path(user_state_dir("tracer"))
    try:
        (folder / "servers").mkdir(parents=True, exist_ok=True)
        (folder / "logs").mkdir(exist_ok=True)
    except OSError as error:
        raise EngineUnavailableError(
            f"cannot write below {folder}: {error.strerror or error}; TRACER_STATE chooses another folder"
        ) from None
    return folder


def status() -> list[ServerStatus]:
    """Every living server that tracer started, oldest first; state files of dead ones are removed."""
    found: list[ServerStatus] = []
    for file in sorted((state_dir() / "servers").glob("*.json")):
        try:
            state = ServerState.model_validate_json(file.read_bytes())
        except (OSError, ValidationError):
            continue
        if supervise.find_process(state.pid, state.created) is not None:
            found.append(ServerStatus(state, _health(state)))
        elif supervise.find_process(state.supervisor, state.supervisor_created) is None:
            supervise.kill(family(state))
            file.unlink(missing_ok=True)
    return sorted(found, key=lambda item: item.state.started_at)


def find(url: str) -> ServerState | None:
    """The living server at an address, if tracer started it."""
    return next((item.state for item in status() if item.state.url == url.rstrip("/")), None)


def running(
    model: ResolvedModel | None = None, *, dtype: str | None = None, max_model_len: int = 0
) -> ServerState | None:
    """A server that answers, is free to be shared, and runs that model in that precision.

    Args:
        model: Its name and its folder must match; ``None`` matches any.
        dtype: ``None`` matches any.
        max_model_len: The context that it must have at least.
    """
    return next((i.state for i in status() if i.health == "ready" and fits(i.state, model, dtype, max_model_len)), None)


def fits(
    state: ServerState, model: ResolvedModel | None, dtype: str | None, max_model_len: int, *, lens: bool = False
) -> bool:
    """Whether a server may be used for that model, precision and context, and gives hidden states where it must."""
    same_model = model is None or (state.model == model.name and state.path == model.path)
    if lens and not state.lens:
        return False
    return not state.owned and same_model and dtype in (None, state.dtype) and state.max_model_len >= max_model_len


def state_file(identifier: str) -> Path:
    """Where the state of a server is kept."""
    return state_dir() / "servers" / f"{identifier}.json"


def read_state(identifier: str) -> ServerState | None:
    """The state of a server, once it is written."""
    try:
        return ServerState.model_validate_json(state_file(identifier).read_bytes())
    except (OSError, ValidationError):
        return None


def is_healthy(state: ServerState) -> bool:
    """Whether the server answers its health check."""
    with suppress(httpx.HTTPError):
        return httpx.get(f"{state.url}/health", timeout=5, trust_env=False).status_code == 200
    return False


def _health(state: ServerState) -> Health:
    if is_healthy(state):
        return "ready"
    young = datetime.now(UTC) - state.started_at < timedelta(seconds=state.startup_timeout)
    return "starting" if young else "not answering"


def family(state: ServerState) -> set[psutil.Process]:
    """All living processes of a server, its supervisor included."""
    members = supervise.group_members(state.pid, state.supervisor)
    for pid, created in ((state.supervisor, state.supervisor_created), (state.pid, state.created)):
        process = supervise.find_process(pid, created)
        if process is not None:
            members.add(process)
            with suppress(psutil.Error):
                members.update(process.children(recursive=True))
    return members
