"""Listing, counting and searching."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue

from tests.strategies import CREATED, relaxed, small_trace
from tracer.store import Store, TraceFilter, schema, search
from tracer.trace.trace import AgentInfo, ModelInfo, Outcome, Step, Task

TEXTS = {
    "plain": "the quick brown fox",
    "quoted": 'he said "stop" and don\'t go',
    "operators": "NEAR the * AND or NOT x:y -minus (paren) ^caret {set}",
    "unicode": "naïve Straße ÉCOLE 橋は川を渡る ไทย",
    "symbols": "100% == _under_ a\\b ***",
}


@pytest.fixture(params=["fts5", "scan", "one by one"])
def store(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store with full-text search, without it, and with it where every word counts as frequent."""
    if request.param == "scan":
        monkeypatch.setattr("tracer.store.store.has_fts5", lambda: False)
        monkeypatch.setattr(schema, "has_fts5", lambda: False)
    elif request.param == "one by one":
        monkeypatch.setattr(search, "SPARSE_LIMIT", 0)
    store = Store(tmp_path / "runs.db")
    for number, (name, text) in enumerate(TEXTS.items()):
        steps = [Step(id="s1", kind="question", text="common words"), Step(id="s2", kind="thought", text=text)]
        trace = small_trace(name, name=name, task=Task(question=text), calls=[], steps=steps, edges=[])
        store.import_trace(trace.model_copy(update={"created_at": CREATED + timedelta(hours=number)}))
    return store


def ids(store: Store, **wanted: object) -> list[str]:
    chosen = TraceFilter(**wanted)  # type: ignore[arg-type]
    found = [summary.id for summary in store.list(chosen)]
    assert store.count(chosen) == len(found)
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fox", ["plain"]),
        ("FOX quick", ["plain"]),
        ("fox stop", []),
        ('"quick brown"', ["plain"]),
        ('"brown quick"', []),
        ("common", ["symbols", "unicode", "operators", "quoted", "plain"]),
        ("the", ["operators", "plain"]),
        ("don't", ["quoted"]),
        ('"stop"', ["quoted"]),
        ("NEAR", ["operators"]),
        ("x:y", ["operators"]),
        ("-minus", ["operators"]),
        ("^caret", ["operators"]),
        ("川", ["unicode"]),
        ("川を", ["unicode"]),
        ("を川", []),
        ("==", ["symbols"]),
        ("100% ==", ["symbols"]),
        ("***", ["symbols"]),
        ("a\\b", ["symbols"]),
        ("missing", []),
        ("   ", ["symbols", "unicode", "operators", "quoted", "plain"]),
    ],
)
def test_text_search(store: Store, text: str, expected: list[str]) -> None:
    assert ids(store, text=text) == expected


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        ("OWN FO", ["plain"]),
        ("strasse", ["unicode"]),
        ("école", ["unicode"]),
        ("橋は", ["unicode"]),
        ('"stop"', ["quoted"]),
        ("%", ["symbols"]),
        ("_un", ["symbols"]),
        ("x", ["operators", "plain"]),
        ("symb", ["symbols"]),
        ("nothing like it", []),
        ("* AND or NOT", ["operators"]),
    ],
)
def test_name_and_question_search(store: Store, about: str, expected: list[str]) -> None:
    assert ids(store, about=about) == expected


@pytest.fixture(scope="module")
def searchable(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("store") / "runs.db")
    store.import_trace(small_trace())
    return store


_NASTY = st.text(alphabet=st.sampled_from("ab\"'*^:()-+{}[]\\%_; \x00\n\tNEARéß川\U0001f600"), max_size=12)


@relaxed
@given(_NASTY | st.text(max_size=12))
def test_no_text_breaks_a_search(searchable: Store, text: str) -> None:
    for wanted in (TraceFilter(text=text), TraceFilter(about=text), TraceFilter(agent=text, model=text, status=text)):
        assert searchable.count(wanted) in (0, 1)


@relaxed
@given(st.text(min_size=1, max_size=20))
def test_a_question_is_found_by_each_of_its_parts(tmp_path_factory: pytest.TempPathFactory, question: str) -> None:
    store = Store(tmp_path_factory.mktemp("store") / "runs.db")
    store.import_trace(small_trace(task=Task(question=question)))
    for start in range(0, len(question), 3):
        assert store.count(TraceFilter(about=question[start : start + 4])) == 1


def test_every_filter_narrows_the_choice(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs.db")
    for number in range(8):
        store.import_trace(
            small_trace(
                f"t{number}",
                created_at=CREATED + timedelta(days=number),
                agent=AgentInfo(kind="react" if number % 2 else "cot"),
                model=ModelInfo(name="large" if number >= 4 else "demo"),
                status="failed" if number == 3 else "completed",
                outcome=Outcome(correct={0: True, 1: False}.get(number % 3)),
            )
        )
    assert ids(store) == [f"t{number}" for number in reversed(range(8))]
    assert ids(store, agent="react") == ["t7", "t5", "t3", "t1"]
    assert ids(store, agent="react", model="demo") == ["t3", "t1"]
    assert ids(store, agent="react", status="failed") == ["t3"]
    assert ids(store, correct=True) == ["t6", "t3", "t0"]
    assert ids(store, correct=False) == ["t7", "t4", "t1"]
    assert ids(store, since=CREATED + timedelta(days=5)) == ["t7", "t6", "t5"]
    assert ids(store, until=CREATED + timedelta(days=2)) == ["t1", "t0"]
    assert ids(store, agent="cot", text="rivers", about="VALLEY", model="large") == ["t6", "t4"]


def test_pages_follow_each_other(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs.db")
    for number in range(5):
        store.import_trace(small_trace(f"t{number}", created_at=CREATED + timedelta(seconds=number)))
    assert [found.id for found in store.list(limit=2)] == ["t4", "t3"]
    assert [found.id for found in store.list(limit=2, offset=2)] == ["t2", "t1"]
    assert [found.id for found in store.list(limit=2, offset=4)] == ["t0"]
    assert [found.id for found in store.list(limit=2, order="oldest")] == ["t0", "t1"]
    assert len(store.list(limit=None)) == 5
    assert [found.id for found in store.list(limit=None, offset=3)] == ["t1", "t0"]


def test_an_index_that_was_left_behind_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runs.db"
    with Store(path) as store:
        store.import_trace(small_trace("first"))
    with monkeypatch.context() as patch:
        patch.setattr("tracer.store.store.has_fts5", lambda: False)
        patch.setattr(schema, "has_fts5", lambda: False)
        with Store(path) as store:
            store.import_trace(small_trace("second"))
            store.delete("first")
            assert ids(store, text="rivers") == ["second"]
    with Store(path) as store:
        assert ids(store, text="rivers", about="valley") == ["second"]


def test_what_was_found_out_is_listed(tmp_path: Path) -> None:
    shared: dict[str, JsonValue] = {"cost": {"seconds": 4.0}}
    with Store(tmp_path / "runs.db") as store:
        store.import_trace(small_trace("t1", probes=[{"name": "truth"}, {"name": "truth"}, {"odd": 1}]))
        store.import_trace(small_trace("t2"))
        store.put_document("t1", "explanation", key="a", document={"method": "span", **shared})
        store.put_document("t1", "explanation", key="b", document={"method": "alti", **shared})
        store.put_document("t1", "explanation", key="c", document={"method": "random", "cost": {"seconds": None}})
        found = {row.id: row for row in store.list()}
        assert found["t1"] == store.summary("t1")
        assert (found["t1"].methods, found["t1"].probes) == (("alti", "random", "span"), ("truth", "unknown"))
        assert found["t1"].explained_seconds == 4.0, "methods that shared their passes cost them once"
        assert (found["t2"].methods, found["t2"].probes, found["t2"].explained_seconds) == ((), (), None)
        store.put_document("t1", "explanation", key="a", document={"method": "span", "cost": {"seconds": 6.0}})
        assert store.summary("t1").explained_seconds == 10.0
        assert store.delete_document("t1", "explanation", key="a")
        assert store.summary("t1").methods == ("alti", "random")


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"method": 3, "cost": "much"},
        {"method": "a\x00b", "cost": {"seconds": True}},
        {"method": "x" * 9999, "cost": {"seconds": float("inf")}},
    ],
)
def test_odd_documents_are_listed_all_the_same(tmp_path: Path, document: dict[str, JsonValue]) -> None:
    with Store(tmp_path / "runs.db") as store:
        store.import_trace(small_trace(explanations=[document]))
        (name,) = store.list()[0].methods
        assert name and len(name) <= 200 and "\x00" not in name
