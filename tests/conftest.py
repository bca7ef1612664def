"""Fixtures shared by all tests: the demo model, and one real vLLM for the whole session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tracer.engines import models, server
from tracer.engines.install import ServeOptions
from tracer.engines.models import ResolvedModel
from tracer.engines.server import ServerHandle
from tracer.engines.vllm import VllmEngine


@pytest.fixture(scope="session")
def demo_model() -> ResolvedModel:
    """The demo weights, fetched and converted on first use."""
    return models.resolve("demo")


@pytest.fixture(scope="session")
def vllm_server(demo_model: ResolvedModel) -> Iterator[ServerHandle]:
    """A vLLM with the demo model in float32: one that runs, or one that ends with the session."""
    state = server.running(demo_model, dtype="float32", max_model_len=4096)
    if state is not None:
        yield ServerHandle(state, reused=True)
        return
    if server.find_vllm() is None:
        pytest.skip("vLLM is not installed (`make setup` installs it)")
    with server.serve(demo_model, ServeOptions(dtype="float32", max_model_len=4096)) as handle:
        yield handle


@pytest.fixture
def vllm_engine(vllm_server: ServerHandle) -> Iterator[VllmEngine]:
    """An engine on that server."""
    with VllmEngine(vllm_server.url) as engine:
        yield engine
