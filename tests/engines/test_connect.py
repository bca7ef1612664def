"""Which engine is picked, and what it says about itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tracer.engines.connect import connect
from tracer.engines.models import ResolvedModel
from tracer.engines.server import ServerHandle
from tracer.engines.vllm import VllmEngine
from tracer.errors import EngineUnavailableError, UnknownNameError


@pytest.fixture(autouse=True)
def no_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRACER_ENGINE_URL", raising=False)


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where no server runs."""
    monkeypatch.setenv("TRACER_STATE", str(tmp_path))


def test_unknown_engine() -> None:
    with pytest.raises(UnknownNameError, match="unknown engine 'vlm'; did you mean 'vllm'"):
        connect("vlm")


def test_unknown_model(alone: None) -> None:
    with pytest.raises(UnknownNameError, match="model 'nothing'"):
        connect("auto", model="nothing")


def test_unknown_precision() -> None:
    with pytest.raises(UnknownNameError, match="precision 'fp32'"):
        connect("local", dtype="fp32")


def test_address_where_nobody_listens_is_not_replaced_by_another_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACER_ENGINE_URL", "http://127.0.0.1:9")
    with pytest.raises(EngineUnavailableError, match="cannot connect"):
        connect("auto")


@pytest.mark.model
def test_auto_falls_back_to_this_process_and_says_why(
    demo_model: ResolvedModel, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACER_VLLM_PYTHON", "/bin/false")
    engine = connect("auto")
    try:
        assert engine.info.engine == "local"
        assert "TRACER_VLLM_PYTHON names /bin/false" in engine.description
    finally:
        engine.close()
    with pytest.raises(EngineUnavailableError, match="/bin/false"):
        connect("vllm")


@pytest.mark.vllm
@pytest.mark.model
def test_address_of_a_real_server(vllm_server: ServerHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    with connect(f"{vllm_server.url}/v1") as engine:
        assert isinstance(engine, VllmEngine)
        assert engine.description.endswith("model demo (float32), as given")
    monkeypatch.setenv("TRACER_ENGINE_URL", vllm_server.url)
    with connect("auto", model="demo") as engine:
        assert "named by TRACER_ENGINE_URL" in engine.description
    with pytest.raises(UnknownNameError, match="known: demo"):
        connect("auto", model="other/model")
