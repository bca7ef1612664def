"""Ticking runs: comparing and deleting them; what was found out about them."""

from __future__ import annotations

from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from tests.ui import samples
from tests.ui.test_pages import run_page
from tracer.errors import TraceNotFoundError
from tracer.store import Store
from ui import state
from ui.app_pages import runs


def button(at: AppTest, label: str) -> None:
    """Click a button of the main page."""
    next(found for found in at.button if found.label == label).click()


def disabled(at: AppTest, label: str) -> bool:
    """Whether a button can be clicked."""
    return next(found for found in at.button if found.label == label).proto.disabled


def tick(at: AppTest, *ids: str) -> AppTest:
    """Tick runs, as a click on their markers does."""
    at.session_state["runs_selected"] = ids
    return at.run()


def test_methods_and_cost_are_listed(store: Store) -> None:
    trace = samples.cot()
    store.import_trace(trace)
    store.put_document(trace.id, "explanation", key="a", document={"method": "alti", "cost": {"seconds": 4.5}})
    store.put_document(trace.id, "probe", key="b", document={"name": "truth"})
    table = run_page().dataframe[0].value
    assert list(table["methods"]) == ["alti, probe truth"]
    assert list(table["explained"]) == [4.5]


def test_runs_are_found_by_their_task(store: Store) -> None:
    samples.fill(store)
    at = run_page()
    at.text_input(key=state.TASK).set_value("add 3").run()
    assert list(at.dataframe[0].value["question"]) == ["Add 3 and 4."]


def test_nothing_is_done_with_runs_that_are_not_ticked(store: Store) -> None:
    ids = samples.fill(store)
    at = run_page()
    assert disabled(at, "Compare") and disabled(at, "Delete")
    tick(at, ids[0])
    assert disabled(at, "Compare") and not disabled(at, "Delete")
    tick(at, ids[0], ids[1])
    assert not disabled(at, "Compare")
    button(at, "Tick none")
    assert disabled(at.run(), "Delete")


def test_runs_are_deleted_only_after_a_question(store: Store) -> None:
    ids = samples.fill(store)
    at = tick(run_page(), ids[0], ids[3])
    button(at, "Delete")
    at.run()
    assert any("Add 3 and 4." in text.value for text in at.text)
    button(at, "Keep them")
    at.run()
    assert store.count() == len(ids)
    button(at, "Delete")
    at.run()
    at.button(key="delete_runs").click().run()
    assert store.count() == len(ids) - 2
    for gone in (ids[0], ids[3]):
        with pytest.raises(TraceNotFoundError):
            store.load(gone)
    assert len(at.dataframe[0].value) == len(ids) - 2
    assert disabled(at, "Delete")


def test_a_run_under_way_is_not_deleted(store: Store) -> None:
    with samples.running(store) as run:
        at = tick(run_page(), run.trace_id)
        button(at, "Delete")
        at.run()
        assert "kept" in at.warning[0].value
        assert at.button(key="delete_runs").proto.disabled
        assert store.count() == 1


@pytest.mark.skipif(
    not Path(runs.__file__).with_name("compare.py").exists(), reason="the page that compares is not there yet"
)
def test_two_ticked_runs_are_compared(store: Store) -> None:
    ids = samples.fill(store)
    at = tick(run_page(), ids[1], ids[0])
    button(at, "Compare")
    at.run()
    assert {at.query_params[state.RUN], at.query_params[state.WITH]} == {ids[0], ids[1]}


def test_an_empty_store_offers_a_new_run(store: Store) -> None:
    at = run_page()
    assert [link.proto.label for link in at.get("page_link")] == ["New run"]
