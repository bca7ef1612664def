"""Import, load, delete, attached documents and ids."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given

from tests import strategies
from tests.strategies import small_trace
from tracer.errors import InputError, StoreError, TraceFormatError, TraceNotFoundError
from tracer.store import Store, TraceFilter
from tracer.trace.trace import Trace


@strategies.relaxed
@given(strategies.traces())
def test_an_imported_trace_loads_to_the_byte(trace: Trace) -> None:
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "runs.db") as store:
        assert store.import_trace(trace) == trace.id
        assert store.load(trace.id).to_json() == trace.to_json()
        assert store.summary(trace.id).status == trace.status
        store.delete(trace.id)
        assert store.count() == 0


def test_a_file_of_a_newer_minor_version_loads_to_the_byte(tmp_path: Path) -> None:
    raw = json.loads(small_trace().to_json())
    raw |= {"schema_version": "1.9", "status": "paused", "colour": {"a": [1, None]}, "event": "run_finished", "no": 7}
    raw["steps"][1] |= {"kind": "dream", "mood": "calm"}
    raw["calls"][0] |= {"region": {"x": 0.1}}
    raw["calls"][0]["segments"][0] |= {"kind": "whisper", "loud": False}
    raw["explanations"] = [{"method": "m", "values": [[0.1, 1e-300]], "flag": True}]
    raw["probes"] = [{"name": "truth", "score": 0.25}, {"name": "truth"}]
    trace = Trace.from_json(json.dumps(raw))
    store = Store(tmp_path / "runs.db")
    store.import_trace(trace)
    assert store.load("t1").to_json() == trace.to_json()
    assert store.count(TraceFilter(status="paused")) == 1


def test_the_summary_of_an_imported_trace(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs.db")
    store.import_trace(small_trace())
    found = store.summary("t1")
    assert (found.status, found.answer, found.correct, found.steps, found.calls) == ("completed", "Lira", True, 2, 1)
    assert (found.seconds, found.owner, found.prompt_tokens, found.completion_tokens) == (1.5, None, 3, 2)


def test_a_conflict_is_an_error_unless_told_otherwise(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs.db")
    store.import_trace(small_trace())
    other = small_trace(name="another")
    with pytest.raises(StoreError, match="there is a trace t1 already"):
        store.import_trace(other)
    assert store.import_trace(other, on_conflict="skip") == "t1"
    assert store.load("t1").name == "a run"
    fresh = store.import_trace(other, on_conflict="new_id")
    assert fresh != "t1"
    assert store.load(fresh).name == "another"
    assert store.import_trace(other, on_conflict="replace") == "t1"
    assert store.load("t1").name == "another"
    assert store.count() == 2


def test_an_inconsistent_trace_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs.db")
    trace = small_trace()
    trace.steps[1].parents = ["nowhere"]
    with pytest.raises(TraceFormatError, match="nowhere"):
        store.import_trace(trace)
    with pytest.raises(TraceFormatError, match="cannot be stored"):
        store.import_trace(small_trace(""))
    assert store.count() == 0


def test_a_deleted_trace_leaves_nothing_behind(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs.db")
    store.import_trace(small_trace("gone"))
    store.put_document("gone", "probe", key="truth", document={"score": 1})
    store.delete("gone")
    store.import_trace(small_trace("here", probes=[], name="second"))
    assert [found.id for found in store.list(TraceFilter(text="rivers"))] == ["here"]
    assert [found.id for found in store.list(TraceFilter(about="valley"))] == ["here"]
    with store._database.read() as connection:
        for table in ("step_fts", "about_fts"):
            # The index itself holds no posting of the deleted trace either.
            connection.exec_driver_sql(f"CREATE VIRTUAL TABLE temp.{table}_terms USING fts5vocab(main, {table}, row)")
            counts = connection.exec_driver_sql(f"SELECT max(doc) FROM {table}_terms").scalar_one()  # noqa: S608
            assert counts <= 2
    with pytest.raises(TraceNotFoundError):
        store.load("gone")


def test_documents_are_part_of_the_loaded_trace(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs.db")
    store.import_trace(small_trace(explanations=[{"method": "imported"}]))
    store.put_document("t1", "explanation", key="alti", document={"method": "alti", "values": [[0.5]]})
    store.put_document("t1", "explanation", key="grad", document={"method": "grad"})
    store.put_document("t1", "probe", key="truth", document={"name": "truth", "text": "x" * 100_000})
    store.put_document("t1", "explanation", key="alti", document={"method": "alti", "values": [[0.75]]})
    trace = store.load("t1")
    assert [found["method"] for found in trace.explanations] == ["imported", "alti", "grad"]
    assert trace.explanations[1]["values"] == [[0.75]]
    assert trace.probes == [{"name": "truth", "text": "x" * 100_000}]
    assert list(store.documents("t1", "explanation")) == ["imported-0", "alti", "grad"]
    assert store.delete_document("t1", "explanation", key="grad")
    assert not store.delete_document("t1", "explanation", key="grad")
    assert list(store.documents("t1", "explanation")) == ["imported-0", "alti"]


def test_a_trace_that_gets_a_document_was_updated(tmp_path: Path) -> None:
    """Whoever keeps a loaded trace can tell by its summary that there is more to it now."""
    store = Store(tmp_path / "runs.db")
    store.import_trace(small_trace())
    seen = [store.summary("t1").updated_at]
    store.put_document("t1", "probe", key="truth", document={"score": 1})
    seen.append(store.summary("t1").updated_at)
    store.put_document("t1", "probe", key="truth", document={"score": 2})
    seen.append(store.summary("t1").updated_at)
    store.delete_document("t1", "probe", key="truth")
    seen.append(store.summary("t1").updated_at)
    assert seen == sorted(set(seen))
    store.delete_document("t1", "probe", key="truth")
    assert store.summary("t1").updated_at == seen[-1]


def test_a_document_must_be_plain_json(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs.db")
    store.import_trace(small_trace())
    with pytest.raises(InputError, match="plain JSON"):
        store.put_document("t1", "probe", key="k", document={"x": object()})  # type: ignore[dict-item]


def test_ids_may_be_shortened_while_they_are_unique(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs.db")
    for name in ("abc1", "abc2", "abd", "ab", "Abc", "a%c", "é"):
        store.import_trace(small_trace(name))
    assert store.resolve("abc1") == "abc1"
    assert store.resolve("abd") == "abd"
    assert store.resolve("ab") == "ab"
    assert store.resolve("A") == "Abc"
    assert store.resolve("a%") == "a%c"
    assert store.load("é").id == "é"
    with pytest.raises(TraceNotFoundError, match="several trace ids begin with 'abc': abc1, abc2; give more"):
        store.resolve("abc")
    for unknown in ("x", "", "abc1x", "%", "\x00"):
        with pytest.raises(TraceNotFoundError, match="tracer list"):
            store.load(unknown)
