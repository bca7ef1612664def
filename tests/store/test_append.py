"""Appending events: numbers, summaries, owners, and what is refused."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path

import pytest

from tests.strategies import CREATED, small_trace
from tracer.errors import StoreError, TraceNotFoundError
from tracer.store import Store
from tracer.trace.events import CallFailed, CallStarted, Event, RunFinished, RunStarted, StepAdded, fold, unfold
from tracer.trace.trace import Outcome, Step


def run_events(trace_id: str = "t1") -> list[Event]:
    events = unfold(small_trace(trace_id))
    end = RunFinished(
        at=CREATED + timedelta(seconds=9), status="completed", outcome=Outcome(answer="Lira", correct=True)
    )
    return [*events[:-1], end]


def test_a_run_loads_as_the_fold_of_what_was_appended(tmp_path: Path) -> None:
    events = run_events()
    with Store(tmp_path / "runs.db") as store:
        for count, event in enumerate(events, start=1):
            assert store.append("t1", event) == count
            assert store.load("t1").to_json() == fold(events[:count]).to_json()


def test_the_summary_follows_every_event(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs.db")
    seen = []
    for event in run_events():
        store.append("t1", event)
        found = store.summary("t1")
        seen.append(
            (found.events, found.status, found.calls, found.steps, found.prompt_tokens, found.completion_tokens)
        )
    assert seen == [
        (1, "running", 0, 0, 0, 0),
        (2, "running", 1, 0, 3, 2),
        (3, "running", 1, 1, 3, 2),
        (4, "running", 1, 2, 3, 2),
        (5, "running", 1, 2, 3, 2),
        (6, "completed", 1, 2, 3, 2),
    ]
    assert (found.answer, found.correct, found.seconds, found.created_at) == ("Lira", True, 9.0, CREATED)
    assert (found.agent, found.model, found.engine) == ("cot", "demo", "external")
    assert found.question == "Which river crosses the valley?"


def test_failed_calls_and_error_steps_are_counted(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs.db")
    store.append("t1", run_events()[0])
    call = small_trace().calls[0].model_copy(update={"completions": [], "seconds": None, "segments": []})
    call.prompt_token_ids = []
    store.append("t1", CallStarted(call=call))
    store.append("t1", CallFailed(call_id="c1", error="refused", seconds=1))
    store.append("t1", StepAdded(step=Step(id="s", kind="error", text="no")))
    store.append("t1", StepAdded(step=Step(id="o", kind="observation", text="", error="tool failed")))
    assert store.summary("t1").errors == 3


def test_a_batch_is_stored_whole_or_not_at_all(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs.db")
    events = run_events()
    assert store.append_many("t1", events[:3]) == 3
    with pytest.raises(StoreError, match="stored already"):
        store.append_many("t1", events)
    assert store.summary("t1").events == 3
    assert store.append_many("t1", []) == 3


def test_an_event_of_an_unknown_run_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs.db")
    with pytest.raises(TraceNotFoundError, match="run_started"):
        store.append("nobody", run_events()[1])
    with pytest.raises(StoreError, match="cannot be stored for run 'other'"):
        store.append("other", run_events()[0])


def test_only_new_events_are_polled(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs.db")
    events = run_events()
    store.append_many("t1", events[:2])
    assert list(store.events("t1")) == [(1, events[0]), (2, events[1])]
    assert list(store.events("t1", after=2)) == []
    store.append_many("t1", events[2:])
    assert [seq for seq, _ in store.events("t1", after=2)] == [3, 4, 5, 6]


def test_polling_reads_runs_longer_than_one_batch(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs.db")
    many = [StepAdded(step=Step(id=f"s{number}", kind="thought", text="x")) for number in range(450)]
    store.append_many("t1", [run_events()[0], *many])
    assert [seq for seq, _ in store.events("t1")] == list(range(1, 452))


def test_long_payloads_come_back_unchanged(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs.db")
    text = "a long observation \u2603 " * 20_000
    store.append_many("t1", [run_events()[0], StepAdded(step=Step(id="s", kind="observation", text=text))])
    assert store.load("t1").steps[0].text == text


def test_one_store_is_used_by_many_threads(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs.db")
    failures: list[BaseException] = []

    def record(trace_id: str) -> None:
        try:
            for event in run_events(trace_id):
                store.append(trace_id, event)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=record, args=(f"run-{number}",)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [store.summary(f"run-{number}").events for number in range(12)] == [6] * 12


def test_the_newest_writer_owns_a_run(tmp_path: Path) -> None:
    import os
    import socket

    store = Store(tmp_path / "runs.db")
    started = run_events()[0]
    assert isinstance(started, RunStarted)
    store.append("t1", started)
    owner = store.summary("t1").owner
    assert owner is not None
    assert (owner.host, owner.pid) == (socket.gethostname(), os.getpid())
    assert not owner.is_dead()
