"""Pick an engine: a given server, one that runs, one that is started, or the model in this process."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, get_args

from tracer.engines import models, server
from tracer.engines.install import Dtype, ServeOptions
from tracer.engines.weights.cache import ProgressCallback
from tracer.errors import EngineError, InputError, UnknownNameError

if TYPE_CHECKING:
    from tracer.engines.local import LocalEngine
    from tracer.engines.models import ResolvedModel
    from tracer.engines.vllm import VllmEngine

URL_VARIABLE: Final = "TRACER_ENGINE_URL"
KEY_VARIABLE: Final = "TRACER_API_KEY"
IDLE_SECONDS: Final = 1800.0
"""A server that nobody asked for by name ends itself after half an hour without a request."""
_WORDS: Final = ("auto", "local", "vllm", "an http:// or https:// address")


def connect(
    engine: str = "auto",
    *,
    model: str | None = None,
    dtype: str | None = None,
    progress: ProgressCallback | None = None,
) -> VllmEngine | LocalEngine:
    """Give an engine for a model; its ``description`` says which one it is and why.

    Args:
        engine: ``auto`` takes the server that ``TRACER_ENGINE_URL`` names, else a running one, else starts one, else
            loads the model in this process. ``vllm`` is a running or a new server, ``local`` the model in this
            process, and an address a server of any origin (its key is read from ``TRACER_API_KEY``).
        model: ``demo``, a local folder, a GGUF file or a hub id; ``None`` is ``demo``, or whatever a given address
            serves.
        dtype: ``float32``, ``bfloat16`` or ``float16``; ``None`` takes a running server's, or what suits the machine.
        progress: Called during anything slow: fetching, converting, starting.

    Raises:
        UnknownNameError: There is no such engine, model or precision.
        ModelError: The model cannot be had.
        EngineError: The engine that was asked for cannot be had.
    """
    precision = _dtype(dtype)
    named = os.environ.get(URL_VARIABLE)
    if engine.startswith(("http://", "https://")):
        return _at(engine, model, "as given")
    if engine not in ("auto", "local", "vllm"):
        raise UnknownNameError("engine", engine, _WORDS)
    if engine == "auto" and named:
        return _at(named, model, f"named by {URL_VARIABLE}")
    resolved = models.resolve(model or models.DEMO_NAME, progress=progress)
    if engine == "local":
        return _local(resolved, precision, "as asked for")
    if engine == "vllm":
        return _served(resolved, precision, progress)
    try:
        return _served(resolved, precision, progress)
    except (EngineError, InputError) as error:
        return _local(resolved, precision, f"since vLLM cannot be used: {error}")


def _dtype(name: str | None) -> Dtype | None:
    known: tuple[Dtype, ...] = get_args(Dtype)
    for dtype in known:
        if dtype == name:
            return dtype
    if name is not None:
        raise UnknownNameError("precision", name, known)
    return None


def _at(url: str, model: str | None, why: str) -> VllmEngine:
    from tracer.engines.vllm import VllmEngine

    engine = VllmEngine(url, model=model, api_key=os.environ.get(KEY_VARIABLE))
    engine.description = f"{engine.description}, {why}"
    return engine


def _served(model: ResolvedModel, dtype: Dtype | None, progress: ProgressCallback | None) -> VllmEngine:
    from tracer.engines.vllm import VllmEngine

    handle = server.reuse_or_start(model, ServeOptions(dtype=dtype, idle_timeout=IDLE_SECONDS), progress=progress)
    engine = VllmEngine(handle.url, model=model.name, process=handle)
    how = "already running" if handle.reused else f"started now, ends after {IDLE_SECONDS / 60:g} idle minutes"
    engine.description = f"{engine.description}, {how}"
    return engine


def _local(model: ResolvedModel, dtype: Dtype | None, why: str) -> LocalEngine:
    from tracer.engines.local import LocalEngine

    engine = LocalEngine(model, dtype=dtype or "float32")
    engine.description = f"{engine.description}, {why}"
    return engine
