"""The same store on a real PostgreSQL server, started for these tests."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.store.test_append import run_events
from tests.store.test_list import TEXTS
from tests.strategies import small_trace
from tracer.errors import StoreError, TraceNotFoundError
from tracer.store import Store, TraceFilter
from tracer.trace.trace import Step, Task

pytestmark = pytest.mark.postgres


def _programs() -> Path | None:
    found = shutil.which("pg_ctl")
    candidates = [Path(found).parent] if found else []
    return next(iter([*candidates, *sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]), None)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    pytest.importorskip("psycopg")
    programs = _programs()
    if programs is None:
        pytest.skip("PostgreSQL's programs are not installed")
    # The server refuses to run as root.
    prefix = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"] if os.geteuid() == 0 else []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Not under pytest's folder, which only its owner may enter.
    with tempfile.TemporaryDirectory() as folder:
        if prefix:
            shutil.chown(folder, "nobody", "nogroup")

        def call(*command: str) -> None:
            subprocess.run(
                [*prefix, *command], check=True, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )

        call(str(programs / "initdb"), "-D", f"{folder}/data", "-A", "trust", "-U", "tracer", "-E", "UTF8", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -k {folder} -c fsync=off"
        call(str(programs / "pg_ctl"), "-D", f"{folder}/data", "-o", options, "-l", f"{folder}/log", "-w", "start")
        try:
            yield f"postgresql+psycopg://tracer@127.0.0.1:{port}/postgres"
        finally:
            call(str(programs / "pg_ctl"), "-D", f"{folder}/data", "-m", "immediate", "stop")


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with Store(url) as store:
        for found in store.list(limit=None):
            store.delete(found.id)
        yield store


def test_runs_are_stored_and_imported_to_the_byte(store: Store) -> None:
    for count, event in enumerate(run_events("run"), start=1):
        assert store.append("run", event) == count
    assert store.summary("run").status == "completed"
    trace = small_trace(explanations=[{"a": 0.1}], colour="red", name="with a \x00 in it")
    store.import_trace(trace)
    store.put_document("run", "probe", key="k", document={"x": 1})
    store.put_document("run", "probe", key="k", document={"x": 2})
    assert store.load("t1").to_json() == trace.to_json()
    assert store.load("ru").probes == [{"x": 2}]
    with pytest.raises(TraceNotFoundError):
        store.resolve("x")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("fox", "plain"), ('"quick brown"', "plain"), ("don't", "quoted"), ("NEAR", "operators"), ("==", "symbols")],
)
def test_steps_are_searched(store: Store, text: str, expected: str) -> None:
    for name, content in TEXTS.items():
        steps = [Step(id="s", kind="thought", text=content)]
        store.import_trace(small_trace(name, name=name, task=Task(question=content), calls=[], steps=steps, edges=[]))
    assert [found.id for found in store.list(TraceFilter(text=text))] == [expected]
    assert store.count(TraceFilter(text=text)) == 1
    assert store.count(TraceFilter(text="'; DROP TABLE traces; -- & | ! :*")) == 0
    assert [found.id for found in store.list(TraceFilter(about="STRASSE"))] == ["unicode"]


def test_threads_record_at_once(store: Store) -> None:
    def record(trace_id: str) -> None:
        for event in run_events(trace_id):
            store.append(trace_id, event)

    threads = [threading.Thread(target=record, args=(f"run-{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(6):
        assert [seq for seq, _ in store.events(f"run-{number}")] == [1, 2, 3, 4, 5, 6]


def test_a_server_that_is_not_there_is_reported() -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(StoreError, match="failed: connection"):
        Store("postgresql+psycopg://tracer@127.0.0.1:1/postgres").count()
