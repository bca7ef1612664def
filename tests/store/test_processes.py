"""Several processes, and processes that die."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.store.test_append import run_events
from tests.strategies import small_trace
from tracer.errors import StoreError
from tracer.store import Owner, Store, TraceFilter
from tracer.store.schema import traces
from tracer.trace.events import StepAdded
from tracer.trace.trace import Step

_WRITER = """
import sys
from tracer.store import Store
from tracer.trace.events import RunStarted, StepAdded
from tracer.trace.trace import AgentInfo, ModelInfo, Step, Task
from datetime import UTC, datetime

path, trace_id, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
store = Store(path)
started = RunStarted(trace_id=trace_id, name="n", at=datetime.now(UTC), agent=AgentInfo(kind="react"),
                     model=ModelInfo(name="m"), task=Task(question="q"))
store.append(trace_id, started)
for number in range(count):
    seq = store.append(trace_id, StepAdded(step=Step(id=f"s{number}", kind="thought", text=f"text {number} " * 20)))
    print(seq, flush=True)
"""


def start_writer(path: Path, trace_id: str, *, count: int) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(path), trace_id, str(count)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    )


def set_owner(store: Store, trace_id: str, owner: Owner) -> None:
    changed = {"owner_host": owner.host, "owner_pid": owner.pid, "owner_started": owner.started}
    with store._database.write() as connection:
        connection.execute(traces.update().where(traces.c.id == trace_id).values(changed))


def test_nothing_acknowledged_is_lost_by_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    writer = start_writer(path, "run", count=1_000_000)
    assert writer.stdout is not None
    for line in writer.stdout:
        if int(line) >= 120:
            break
    os.kill(writer.pid, signal.SIGKILL)
    acknowledged = max([120, *(int(line) for line in writer.stdout if line.endswith("\n"))])
    writer.wait()
    writer.stdout.close()
    store = Store(path)
    trace = store.load("run")
    assert trace.status == "interrupted"
    # The first event is run_started; one more may have been committed and not yet acknowledged.
    assert len(trace.steps) in (acknowledged - 1, acknowledged)
    assert [step.id for step in trace.steps] == [f"s{number}" for number in range(len(trace.steps))]
    assert [seq for seq, _ in store.events("run")] == list(range(1, len(trace.steps) + 2))
    assert store.summary("run").steps == len(trace.steps)


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    # Both also create the file, which neither finds there.
    writers = [start_writer(path, name, count=150) for name in ("a", "b")]
    printed = [writer.communicate()[0].split() for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0]
    assert printed == [[str(seq) for seq in range(2, 152)]] * 2
    store = Store(path)
    for name in ("a", "b"):
        assert [seq for seq, _ in store.events(name)] == list(range(1, 152))


def test_two_processes_append_to_one_run(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    store = Store(path)
    store.append("shared", run_events("shared")[0])
    code = _WRITER.replace("store.append(trace_id, started)", "pass").replace('f"s{number}"', 'f"{path}{number}"')
    root = Path(__file__).parents[2]
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path), "shared", "100"],
            stdout=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(root)},
        )
        for _ in range(2)
    ]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert [seq for seq, _ in store.events("shared")] == list(range(1, 202))
    assert store.summary("shared").steps == 200


def test_a_store_is_used_on_both_sides_of_a_fork(tmp_path: Path) -> None:
    code = """
import os, sys
from tests.strategies import small_trace
from tracer.store import Store
store = Store(sys.argv[1])
store.import_trace(small_trace("before"))
child = os.fork()
store.import_trace(small_trace("parent" if child else "child"))
if child:
    assert os.waitpid(child, 0)[1] == 0
    store.import_trace(small_trace("after"))
"""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "runs.db")], check=True, env=environment)
    assert {found.id for found in Store(tmp_path / "runs.db").list()} == {"before", "parent", "child", "after"}


def test_a_locked_store_is_reported_after_the_timeout(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    holder, store = Store(path), Store(path, timeout=0.1)
    store.import_trace(small_trace())
    with holder._database.write(), pytest.raises(StoreError, match=r"locked by another process for 0\.1 s"):
        store.import_trace(small_trace("other"))
    store.import_trace(small_trace("other"))


def test_a_run_of_this_process_is_running(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs.db")
    store.append("t1", run_events()[0])
    assert store.load("t1").status == "running"
    assert [found.status for found in store.list()] == ["running"]


@pytest.fixture
def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    return child.pid


def test_a_run_whose_process_is_gone_is_interrupted(tmp_path: Path, dead_pid: int) -> None:
    store = Store(tmp_path / "runs.db")
    store.append("t1", run_events()[0])
    set_owner(store, "t1", Owner(host=socket.gethostname(), pid=dead_pid, started=psutil.Process().create_time()))
    assert store.count(TraceFilter(status="running")) == 0
    assert [found.id for found in store.list(TraceFilter(status="interrupted"))] == ["t1"]
    assert store.load("t1").status == "interrupted"


def test_a_reused_process_id_does_not_keep_a_run_alive(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs.db")
    store.append("t1", run_events()[0])
    earlier = psutil.Process().create_time() - 3600
    set_owner(store, "t1", Owner(host=socket.gethostname(), pid=os.getpid(), started=earlier))
    assert store.summary("t1").status == "interrupted"


def test_a_killed_process_that_nobody_waited_for_is_dead(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = Owner(host=socket.gethostname(), pid=child.pid, started=psutil.Process(child.pid).create_time())
    assert not owner.is_dead()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert owner.is_dead()
    child.communicate()


def test_a_run_on_another_host_is_left_running(tmp_path: Path, dead_pid: int) -> None:
    store = Store(tmp_path / "runs.db")
    store.append("t1", run_events()[0])
    set_owner(store, "t1", Owner(host="another-host.invalid", pid=dead_pid, started=0.0))
    assert store.summary("t1").status == "running"


def test_an_interrupted_run_is_shown_where_it_cannot_be_written(tmp_path: Path, dead_pid: int) -> None:
    path = tmp_path / "runs.db"
    store = Store(path, timeout=0.05)
    store.append("t1", run_events()[0])
    set_owner(store, "t1", Owner(host=socket.gethostname(), pid=dead_pid, started=0.0))
    with Store(path)._database.write():
        assert [found.status for found in store.list(TraceFilter(status="interrupted"))] == ["interrupted"]
        assert store.count(TraceFilter(status="running")) == 0
        assert store.load("t1").status == "interrupted"


def test_a_run_that_goes_on_after_all_can_still_finish(tmp_path: Path, dead_pid: int) -> None:
    store = Store(tmp_path / "runs.db")
    events = run_events()
    store.append("t1", events[0])
    set_owner(store, "t1", Owner(host=socket.gethostname(), pid=dead_pid, started=0.0))
    assert store.summary("t1").status == "interrupted"
    store.append("t1", StepAdded(step=Step(id="s", kind="thought", text="still here")))
    store.append("t1", events[-1])
    assert store.load("t1").status == store.summary("t1").status == "completed"
