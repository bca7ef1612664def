"""Hidden states over the wire: the format, what the guard lets through, and a real server."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import zstandard

from tests.explain.probes.truthful_model import direction_probe, truth_probe
from tracer.agents.base import Budget
from tracer.agents.react import ReAct
from tracer.agents.tools import calculator
from tracer.engines import lens, server
from tracer.engines.install import ServeOptions, VllmInstall, command, environment, find_vllm
from tracer.engines.models import ResolvedModel
from tracer.engines.server import ServerHandle
from tracer.engines.server_state import ServerState, fits
from tracer.engines.vllm import VllmEngine
from tracer.errors import EngineResponseError, EngineUnavailableError, InputError, PromptTooLongError
from tracer.explain.probes.live import LiveProbes
from tracer.explain.service import explain
from tracer.replay.forward import Wanted, replay
from tracer.replay.model import Replica, identity_of
from tracer.replay.tree import build_tree
from tracer.store import Store
from tracer.trace.probes import ProbeScore, probe_scores
from tracer.trace.trace import Trace

GUARD = Path(lens.__file__).with_name("lens_server") / "tracer_lens_guard.py"


def packed(values: torch.Tensor, **other: Any) -> dict[str, Any]:
    """An array as the plugin sends it."""
    raw = values.view(torch.int16) if values.dtype == torch.bfloat16 else values
    content = zstandard.ZstdCompressor().compress(raw.numpy().tobytes())
    return {
        "data": base64.b64encode(content).decode(),
        "dtype": str(raw.dtype).removeprefix("torch."),
        "original_dtype": str(values.dtype),
        "shape": list(values.shape),
        "compression": "zstd",
        **other,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_arrays_come_out_as_they_went_in(dtype: torch.dtype) -> None:
    values = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = lens.decode_array(packed(values))
    assert found.dtype == np.float32
    assert np.array_equal(found, values.float().numpy())
    answer: Any = {"activations": {"residual_stream": packed(values)}}
    assert lens.residual_stream(answer, [4, 7], 3).shape == (2, 3, 5)


VALUES = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        "text",
        {"__type__": "cloudpickle", "data": "gASVBQAAAAAAAABLKi4="},
        packed(VALUES, compression="pickle"),
        packed(VALUES, dtype="object"),
        packed(VALUES, shape=[2, 4]),
        packed(VALUES, shape=[2, -3]),
        packed(VALUES, shape="23"),
        packed(VALUES, shape=[1 << 20, 1 << 20]),
        packed(VALUES, data="!!"),
        packed(VALUES, data=base64.b64encode(b"no zstd").decode()),
        packed(torch.zeros(2, dtype=torch.int16), original_dtype="torch.int16"),
        {key: value for key, value in packed(VALUES).items() if key != "shape"},
    ],
)
def test_anything_else_is_refused(entry: Any) -> None:
    with pytest.raises(EngineResponseError, match="hidden states cannot be read"):
        lens.decode_array(entry)


def test_a_bomb_does_not_unpack() -> None:
    bomb = base64.b64encode(zstandard.ZstdCompressor().compress(b"\0" * (64 << 20))).decode()
    with pytest.raises(EngineResponseError):
        lens.decode_array(packed(VALUES, data=bomb))


def test_answers_that_are_not_what_was_asked_for() -> None:
    with pytest.raises(EngineResponseError, match="gave no hidden states; it must be started with"):
        lens.residual_stream({"choices": []}, [0], 1)
    answer: Any = {"activations": {"residual_stream": packed(torch.zeros(1, 4, 8))}}
    with pytest.raises(EngineResponseError, match=r"shape \(1, 4, 8\) where 2 layers of 4 tokens"):
        lens.residual_stream(answer, [0, 1], 4)


def test_only_this_machine_is_asked() -> None:
    lens.check_loopback("http://127.0.0.1:8000")
    for url in ("http://10.0.0.4:8000", "https://models.example.org", "http://127.0.0.1.example.org"):
        with pytest.raises(InputError, match="only read from a server on this machine"):
            lens.check_loopback(url)


def guarded(method: str, path: str, body: bytes = b"", *, kind: str = "application/json") -> tuple[int, Any]:
    """What the guard makes of a request: the status, and the body that reached the server behind it."""
    spec = importlib.util.spec_from_file_location("tracer_lens_guard", GUARD)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reached: list[Any] = []
    sent: list[Any] = []
    parts = [body[start : start + 10] for start in range(0, len(body), 10)] or [b""]
    coming = [
        {"type": "http.request", "body": part, "more_body": number < len(parts) - 1}
        for number, part in enumerate(parts)
    ]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        length = next((int(value) for name, value in scope["headers"] if name == b"content-length"), 0)
        assert length == len(message["body"])
        reached.append(message["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Any:
        return coming.pop(0) if coming else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "method": method, "path": path, "headers": headers}
    asyncio.run(module.Guard(app)(scope, receive, send))
    return sent[0]["status"], reached[0] if reached else None


def test_the_guard_lets_through_what_tracer_asks() -> None:
    for path in ("/health", "/metrics", "/version", "/v1/models"):
        assert guarded("GET", path) == (200, b"")
    body = {"prompt": [1, 2], "vllm_xargs": {"output_residual_stream": [3]}}
    status, reached = guarded("POST", "/v1/completions", json.dumps(body).encode())
    assert (status, json.loads(reached)) == (200, body)
    assert guarded("POST", "/tokenize", b'{"prompt": "x"}', kind="application/json; charset=utf-8")[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/hooks/register", b"{}"),
        ("POST", "/v1/chat/completions", b"{}"),
        ("POST", "/invocations", b'{"prompt": [1]}'),
        ("POST", "/inference/v1/generate", b"{}"),
        ("POST", "/collective_rpc", b"{}"),
        ("GET", "/v1/hooks/collect", b""),
        ("GET", "/docs", b""),
        ("OPTIONS", "/v1/completions", b""),
        ("DELETE", "/v1/models", b""),
        ("POST", "/v1/completions", b'{"vllm_xargs": {"apply_hooks": "x"}}'),
        ("POST", "/v1/completions", b'{"vllm_xargs": {"apply_\\u0068ooks": "x"}}'),
        ("POST", "/v1/completions", b'{"vllm_xargs": {"apply_steering_vectors": []}}'),
        ("POST", "/v1/completions", b'{"vllm_xargs": []}'),
        ("POST", "/v1/completions", b'{"extra_args": {}}'),
        ("POST", "/v1/completions", b"[1]"),
        ("POST", "/v1/completions", b"no json"),
        ("POST", "/v1/completions", b'{"a":' * 100_000),
        ("POST", "//v1/completions", b"{}"),
    ],
)
def test_the_guard_refuses_the_rest(method: str, path: str, body: bytes) -> None:
    assert guarded(method, path, body) == (403, None)


def test_the_guard_passes_on_what_it_understood() -> None:
    # Two keys of one name: the one that was checked is the one that the server sees.
    twice = b'{"vllm_xargs": {"apply_hooks": "x"}, "vllm_xargs": {"output_qk": [1]}}'
    status, reached = guarded("POST", "/v1/completions", twice)
    assert status == 200 and json.loads(reached) == {"vllm_xargs": {"output_qk": [1]}}
    assert guarded("POST", "/v1/completions", b"{}", kind="text/plain") == (403, None)


def test_the_guard_needs_nothing_but_python() -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import tracer_lens_guard, sys; print('tracer' in sys.modules)"],
        env={"PYTHONPATH": str(GUARD.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"
    assert [file.name for file in GUARD.parent.glob("*.py")] == ["tracer_lens_guard.py"]


INSTALL = VllmInstall(Path("/opt/vllm/bin/python"), "0.32.0", cpu=True)
MODEL = ResolvedModel("m", Path("/models/m"), "folder", None)


def test_the_plugin_sleeps_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LENS_DISABLE", "0")
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    plain = environment(INSTALL, ServeOptions())
    assert plain["VLLM_LENS_DISABLE"] == "1" and "PYTHONPATH" not in plain and plain["VLLM_PLUGINS"] == "other"
    assert "--middleware" not in command(INSTALL, MODEL, ServeOptions(), port=1)
    opened = environment(INSTALL, ServeOptions(lens=True))
    assert opened["VLLM_LENS_DISABLE"] == "0" and opened["PYTHONPATH"] == str(GUARD.parent)
    assert opened["VLLM_PLUGINS"] == "other,activations"
    arguments = command(INSTALL, MODEL, ServeOptions(lens=True), port=1)
    assert arguments[arguments.index("--middleware") + 1] == "tracer_lens_guard.Guard"
    assert arguments[arguments.index("--host") + 1] == "127.0.0.1"


def test_a_server_without_the_plugin_is_no_lens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACER_STATE", str(tmp_path))
    state = ServerState.model_validate(
        {
            "id": "a",
            "url": "http://127.0.0.1:1",
            "port": 1,
            "model": "m",
            "path": "/models/m",
            "dtype": "float32",
            "max_model_len": 64,
            "version": "0.32.0",
            "log": "/log",
            "owned": False,
            "idle_timeout": None,
            "started_at": "2026-01-01T00:00:00Z",
            "startup_timeout": 1.0,
            "pid": 1,
            "created": 1.0,
            "supervisor": 1,
            "supervisor_created": 1.0,
        }
    )
    assert fits(state, MODEL, None, 0) and not fits(state, MODEL, None, 0, lens=True)
    assert fits(state.model_copy(update={"lens": True}), MODEL, None, 0, lens=True)
    monkeypatch.setattr(server, "find_vllm", lambda: INSTALL)
    with pytest.raises(EngineUnavailableError, match="tracer serve --lens` installs it"):
        server.start(MODEL, ServeOptions(lens=True))


def test_an_installation_that_fails_says_what_to_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = VllmInstall(Path("x"), "1", cpu=True, lens=lens.VERSION)
    assert lens.ensure_lens(there) is there
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'no pip here' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(lens, "find_vllm", lambda: None)
    with pytest.raises(EngineUnavailableError, match=r"no pip here; try python -m pip install .* vllm-lens==1\.3\.0"):
        lens.ensure_lens(VllmInstall(broken, "1", cpu=True))


@pytest.fixture(scope="module")
def lens_server(demo_model: ResolvedModel) -> Iterator[ServerHandle]:
    """A real vLLM with the plugin behind the guard."""
    state = next((item.state for item in server.status() if item.health == "ready" and item.state.lens), None)
    if state is not None and fits(state, demo_model, "float32", 2048, lens=True):
        yield ServerHandle(state, reused=True)
        return
    install = find_vllm()
    if install is None or install.lens is None:
        pytest.skip("vLLM with the plugin vllm-lens is not installed (`tracer serve --lens` installs it)")
    with server.serve(demo_model, ServeOptions(dtype="float32", max_model_len=2048, lens=True)) as handle:
        yield handle


@pytest.fixture(scope="module")
def replica() -> Replica:
    return Replica.load("demo")


@pytest.mark.vllm
def test_steps_are_scored_while_the_agent_runs_as_a_replay_scores_them(
    lens_server: ServerHandle, replica: Replica, tmp_path: Path
) -> None:
    files = []
    for name, layer, position in (("statements", 12, "last"), ("steps", 23, "answer")):
        files.append(str(tmp_path / f"{name}.safetensors"))
        direction_probe(identity_of(replica), replica.width, name=name, layer=layer, position=position).save(
            Path(files[-1])
        )
    batches: list[list[ProbeScore]] = []
    with VllmEngine(lens_server.url) as engine, Store(f"sqlite:///{tmp_path / 'runs.db'}") as store:
        live = LiveProbes(engine, files, on_scores=lambda scores: batches.append(list(scores)))
        agent = ReAct(engine, tools=[calculator()], budget=Budget(steps=2))
        trace = agent.run("What is 17 * 24 + 3?", store=store, on_event=live.watch)
        assert live.error is None
        assert live.attach(trace, store).probes == store.load(trace.id).probes
        assert probe_scores(store.load(trace.id)) == live.scores
    # They come with the steps, not at the end.
    assert len(batches) > 1 and [score for batch in batches for score in batch] == live.scores
    report = explain(trace, methods=[], probes=files, replica=replica, faithfulness="none")
    replayed = {(score.name, score.step_id, score.sentence): score for score in report.probes}
    assert {(score.name, score.step_id, score.sentence) for score in live.scores} == set(replayed)
    for score in live.scores:
        other = replayed[score.name, score.step_id, score.sentence]
        assert (score.layer, score.token, score.text, score.held_out) == (
            other.layer,
            other.token,
            other.text,
            other.held_out,
        )
        assert score.flags == other.flags
        assert score.score is not None and score.score == pytest.approx(other.score, abs=5e-4)
        assert score.probability == pytest.approx(other.probability, abs=5e-4)
        assert score.baselines.mean_logprob == pytest.approx(other.baselines.mean_logprob, abs=1e-3)
        # A replay has more to say, and takes their place.
        assert score.key is None and score.baselines.entropy is None and other.key is not None


@pytest.mark.vllm
def test_only_probes_of_the_served_model_score_its_steps(
    lens_server: ServerHandle, replica: Replica, tmp_path: Path
) -> None:
    foreign = truth_probe({**identity_of(replica), "weights_sha256": "0" * 64})
    foreign.save(tmp_path / "foreign.safetensors")
    with VllmEngine(lens_server.url) as engine:
        with pytest.raises(InputError, match="weights differ"):
            LiveProbes(engine, [str(tmp_path / "foreign.safetensors")])
        own = direction_probe(identity_of(replica), replica.width, name="statements", layer=3, position="last")
        own.save(tmp_path / "own.safetensors")
        live = LiveProbes(engine, [str(tmp_path / "own.safetensors")])
        trace = Trace.load(Path(__file__).parents[1] / "bench" / "traces" / "six_steps.json")
        with pytest.raises(InputError, match="another tokenizer"):
            live.score(
                trace.model_copy(update={"model": trace.model.model_copy(update={"tokenizer_sha256": "0" * 64})})
            )


@pytest.mark.vllm
def test_a_served_model_gives_the_replicas_hidden_states(lens_server: ServerHandle, replica: Replica) -> None:

    with VllmEngine(lens_server.url) as engine:
        texts = ["The capital of France is Paris.", "Two plus two is five, and five is less than three."]
        sequences = [engine.tokenizer.encode(text).token_ids for text in texts]
        layers = [23, 0, 12]
        served = engine.hidden_states(sequences, layers)
        tree = build_tree(sequences)
        for values, places in zip(served, tree.sequences, strict=True):
            own = replay(replica, tree, Wanted(hidden_indices=places, hidden_layers=layers)).hidden.numpy()
            assert values.shape == own.shape
            # The tolerance of ENVIRONMENT.md, for hidden states of ordinary length; the first token's is 20 times that.
            scale = np.maximum(1.0, np.linalg.norm(own, axis=-1, keepdims=True) / 30.0)
            assert (np.abs(values - own) / scale).max() < 5e-4
        with pytest.raises(PromptTooLongError):
            engine.hidden_states([[5] * 2048], [0])
        with pytest.raises(InputError, match="different layers"):
            engine.hidden_states(sequences, [1, 1])


@pytest.mark.vllm
def test_a_real_server_runs_no_pickle(lens_server: ServerHandle, tmp_path: Path) -> None:
    target = tmp_path / "owned"

    class Malicious:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {target}",)

    import pickle

    bad = base64.b64encode(pickle.dumps(Malicious())).decode()
    hook = json.dumps([{"fn": bad, "layer_indices": [0]}])
    body = {"model": "demo", "prompt": [5, 6], "max_tokens": 1, "vllm_xargs": {"apply_hooks": hook}}
    with httpx.Client(base_url=lens_server.url, trust_env=False, timeout=60) as client:
        for path in ("/v1/completions", "/invocations", "/v1/chat/completions", "/v1/hooks/register"):
            assert client.post(path, json=body).status_code == 403
        assert client.get("/health").status_code == 200
    assert not target.exists()
