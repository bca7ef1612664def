"""What is installed, what works, and how to mend what does not."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, NamedTuple

import psutil

from tracer.errors import TracerError

PACKAGES = ("torch", "transformers", "langchain", "streamlit", "networkx", "pydantic", "numpy", "bm25s")


class Finding(NamedTuple):
    """The result of one examination."""

    what: str
    state: Literal["ok", "missing", "broken"]
    detail: str
    remedy: str = ""


class Server(NamedTuple):
    """A vLLM that tracer started and that lives."""

    id: str
    url: str
    model: str
    dtype: str
    context: int
    """Tokens of a prompt and its completion together."""
    health: str
    """``ready``, ``starting`` or ``not answering``."""
    log: str
    """Where it writes."""


class Weights(NamedTuple):
    """A model on this machine, or the demo model."""

    name: str
    source: str
    size_bytes: int
    """On disk; 0 while it is not fetched."""
    fetched: bool


def servers() -> list[Server]:
    """Living servers, oldest first.

    Raises:
        EngineUnavailableError: The folder of their state cannot be used.
    """
    from tracer.engines.server_state import status

    return [
        Server(
            item.state.id,
            item.state.url,
            item.state.model,
            item.state.dtype,
            item.state.max_model_len,
            item.health,
            str(item.state.log),
        )
        for item in status()
    ]


def models() -> list[Weights]:
    """Models on this machine, and the demo model."""
    from tracer.engines.models import list_models

    return [Weights(entry.name, entry.source, entry.size_bytes, entry.fetched) for entry in list_models()]


def examine(store: str | None = None) -> list[Finding]:
    """Examine this installation.

    Args:
        store: The store to look at; the default one if not given.

    Returns:
        One finding for each part; ``missing`` is something that tracer does without.
    """
    checks: list[Callable[[], Finding]] = [_machine, _packages, _gpu, _vllm, _server, _model, lambda: _store(store)]
    return [_guarded(check) for check in checks]


def _guarded(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except TracerError as error:
        return Finding(getattr(check, "__name__", "check").strip("_<>"), "broken", str(error))


def _machine() -> Finding:
    memory = psutil.virtual_memory()
    detail = (
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {os.cpu_count()} cores, "
        f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB of memory free"
    )
    if memory.total < 6 * 2**30:
        return Finding("machine", "broken", detail, "the demo model needs 6 GiB; take a smaller model or bfloat16")
    return Finding("machine", "ok", detail)


def _packages() -> Finding:
    found: list[str] = []
    lacking: list[str] = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lacking.append(name)
    if lacking:
        return Finding(
            "packages", "broken", f"not installed: {', '.join(lacking)}", "run `make setup`, or pip install ."
        )
    return Finding("packages", "ok", ", ".join(found))


def _gpu() -> Finding:
    if shutil.which("nvidia-smi") is None:
        return Finding("gpu", "missing", "no NVIDIA driver; everything runs on the CPU")
    return Finding("gpu", "ok", "an NVIDIA driver is installed")


def _vllm() -> Finding:
    from tracer.engines.install import find_vllm

    found = find_vllm()
    if found is None:
        return Finding(
            "vllm", "missing", "not installed; the model runs in process, which is slower", "run `make setup`"
        )
    return Finding("vllm", "ok", f"{found.version} ({'CPU build' if found.cpu else 'GPU build'}), {found.python}")


def _server() -> Finding:
    found = servers()
    if not found:
        return Finding("server", "ok", "none running; `tracer serve` or any run starts one")
    return Finding("server", "ok", "; ".join(f"{item.url} {item.model} {item.health}" for item in found))


def _model() -> Finding:
    from tracer.engines.models import list_models

    demo = next(entry for entry in list_models() if entry.name == "demo")
    if not demo.fetched:
        return Finding("demo model", "missing", "not fetched", "run `tracer models fetch demo`")
    return Finding("demo model", "ok", f"{demo.size_bytes / 1e9:.2f} GB, {demo.source}, {demo.path}")


def _store(location: str | None) -> Finding:
    from tracer.store import Store

    with Store(location) as store:
        return Finding("store", "ok", f"{store.count()} runs in {store.where}")
