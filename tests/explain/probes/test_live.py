"""Scoring while an agent runs, where it cannot be done; `tests/engines/test_lens.py` has a server that can."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.explain.probes.truthful_model import truth_probe
from tracer.agents.cot import ChainOfThought
from tracer.engines.vllm import VllmEngine
from tracer.errors import EngineResponseError, InputError, UnknownNameError
from tracer.explain.probes.live import LiveProbes


@pytest.mark.vllm
def test_a_server_without_hidden_states_ends_the_scoring_and_not_the_run(
    vllm_engine: VllmEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACER_PROBES", str(tmp_path / "none"))
    with pytest.raises(InputError, match="tracer probe train --model demo` makes one"):
        LiveProbes(vllm_engine)
    with pytest.raises(UnknownNameError, match="unknown probe"):
        LiveProbes(vllm_engine, ["trut"])
    live = LiveProbes(vllm_engine, [str(_own_probe(vllm_engine, tmp_path))])
    trace = ChainOfThought(vllm_engine, max_tokens=48).run("What is 2 + 3?", on_event=live.watch)
    assert trace.status == "completed"
    assert isinstance(live.error, EngineResponseError) and "tracer serve --lens" in str(live.error)
    assert live.scores == [] and live.attach(trace).probes == []


def _own_probe(engine: VllmEngine, folder: Path) -> Path:
    from tracer.engines.weights.identity import tokenizer_sha256
    from tracer.replay.model import weights_sha256

    identity = {
        "name": "demo",
        "weights_sha256": weights_sha256(engine.folder),
        "tokenizer_sha256": tokenizer_sha256(engine.folder),
    }
    path = folder / "own.safetensors"
    truth_probe(identity).save(path)
    return path
