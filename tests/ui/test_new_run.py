"""Starting runs from the app, and following them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from filelock import FileLock
from streamlit.testing.v1 import AppTest

from tests.ui import samples
from tests.ui.test_pages import app
from tracer.jobs import Job, Jobs, record
from tracer.jobs.worker import TURN
from tracer.store import Store
from ui import state

SECONDS = 60
NOWHERE = "http://127.0.0.1:9"
"""An engine that cannot be reached, so that a run ends at once."""


@pytest.fixture
def jobs(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    """The app's jobs; none outlives the test."""
    monkeypatch.setenv("TRACER_ENGINE_URL", NOWHERE)
    found = Jobs.of_store(store.where)
    yield found
    for job in found.list():
        found.remove(job.id)


def page(name: str, **query: str) -> AppTest:
    """A page, as a link would open it."""
    at = app().run().switch_page(name)
    for key, value in query.items():
        at.query_params[key] = value
    at.run()
    assert not at.exception
    return at


def new_run(**query: str) -> AppTest:
    """The page that starts runs."""
    return page(state.NEW_RUN_PAGE, **query)


def choose_agent(at: AppTest, kind: str) -> None:
    """Choose an agent; the test library cannot click these buttons yet."""
    at.session_state["new_agent"] = kind
    at.run()


def start(at: AppTest) -> AppTest:
    """Press Start."""
    at.button(key="new_start").click()
    at.run()
    assert not at.exception
    return at


def over(jobs: Jobs, job: Job) -> Job:
    """The job once it is over."""
    job = jobs.wait(job.id, SECONDS)
    assert job.is_over
    return job


def test_no_run_starts_without_a_question(store: Store, jobs: Jobs) -> None:
    at = start(new_run())
    assert at.error[0].value == "The run cannot be started."
    assert any("the question is empty" in text.value for text in at.text)
    assert jobs.list() == []


def test_what_was_asked_for_reaches_the_job(store: Store, jobs: Jobs) -> None:
    at = new_run()
    choose_agent(at, "cot-sc")
    at.text_area(key="new_question").set_value("What is 3 + 4?")
    at.text_input(key="new_reference").set_value("7")
    at.number_input(key="new_chains").set_value(3)
    at.number_input(key="new_max_tokens").set_value(40)
    at.selectbox(key="new_vote").select("weighted")
    start(at)
    (job,) = jobs.list()
    assert at.query_params[state.JOB] == job.id
    wanted = {"kind": "cot-sc", "question": "What is 3 + 4?", "reference": "7", "engine": "auto", "n": 3}
    wanted |= {"max_tokens": 40, "vote": "weighted", "shots": "few", "model": "demo"}
    assert {name: job.parameters[name] for name in wanted} == wanted
    over(jobs, job)
    at.run()
    assert at.error[0].value == "This job failed."
    assert any(NOWHERE in text.value for text in at.text)


def test_what_cannot_be_started_is_a_sentence(store: Store, jobs: Jobs) -> None:
    at = new_run()
    choose_agent(at, "react")
    at.text_area(key="new_question").set_value("Where?")
    at.multiselect(key="new_tools").select("search")
    start(at)
    assert at.error[0].value == "The run cannot be started."
    assert any("needs a folder of documents" in text.value for text in at.text)
    assert jobs.list() == []


def test_dropped_documents_are_given_to_the_agent(store: Store, jobs: Jobs) -> None:
    at = new_run()
    choose_agent(at, "react")
    at.text_area(key="new_question").set_value("Where?")
    at.file_uploader[0].upload("../../notes.md", b"# Notes\nIn the valley.", "text/markdown")
    start(at)
    (job,) = jobs.list()
    folder = Path(str(job.parameters["docs"]))
    assert folder.parent == Path(f"{store.where}.documents")
    assert [path.read_text() for path in folder.rglob("*.md")] == ["# Notes\nIn the valley."]
    over(jobs, job)


@pytest.mark.parametrize("job", ["nothing", "../..", "20260101-000000-000000-abcdef"])
def test_a_link_to_no_job_says_so(store: Store, job: str) -> None:
    at = new_run(job=job)
    assert "not being recorded here" in at.warning[0].value
    assert at.button(key="new_start")


def test_a_job_is_found_again_after_a_reload_and_can_be_cancelled(store: Store, jobs: Jobs) -> None:
    """A job that waits for its turn, shown where it was started and on the settings page."""
    jobs.folder.mkdir()
    with FileLock(jobs.folder / TURN):
        job = jobs.start("explain", {"trace": "x"})
        at = page(state.SETTINGS_PAGE, job=job.id)
        deadline = time.monotonic() + SECONDS
        while not any("waiting for another job" in text.value for text in at.text):
            assert time.monotonic() < deadline
            at.run()
        next(button for button in at.button if button.label == "Cancel").click()
        at.run()
        over(jobs, job)
    at.run()
    assert any("stopped by a person" in warning.value for warning in at.warning)
    next(button for button in at.button if button.label == "Remove this job").click()
    at.run()
    assert jobs.list() == []


def test_settings_say_what_is_there(store: Store, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRACER_STATE", str(tmp_path / "state"))
    at = page(state.SETTINGS_PAGE)
    shown = [text.value for text in at.text]
    assert any(text.startswith("✓ packages: torch") for text in shown)
    assert store.where in shown
    assert any("No server is running" in caption.value for caption in at.caption)
    assert "demo" in list(at.dataframe[0].value["name"])


def test_a_model_is_fetched_from_the_settings(store: Store, jobs: Jobs, tmp_path: Path) -> None:
    at = page(state.SETTINGS_PAGE)
    at.text_input(key="fetch_name").set_value(str(tmp_path)).run()
    next(button for button in at.button if button.label == "Fetch").click()
    at.run()
    (job,) = jobs.list()
    assert over(jobs, job).status == "failed"
    at.run()
    assert any("config.json" in text.value for text in at.text)


@pytest.mark.parametrize("text", samples.CORPUS)
def test_hostile_text_in_a_job_stays_text(store: Store, jobs: Jobs, text: str) -> None:
    """In its parameters, its status, its error and its log."""
    folder = jobs.folder / "20260101-000000-000000-abcdef"
    folder.mkdir(parents=True)
    given = {"kind": "cot", "question": text, "model": text}
    spec = record.Spec(kind="run", parameters=given, created_at=datetime.now(UTC))
    record.write(folder, record.SPEC, spec)
    record.write(folder, record.STATUS, record.Status(state="failed", stage=text, error=text, live_text=text))
    (folder / record.LOG).write_text(text)
    for at in (new_run(job=folder.name), page(state.SETTINGS_PAGE, job=folder.name)):
        rendered = [*at.markdown, *at.caption, *at.title, *at.subheader, *at.error, *at.warning, *at.info, *at.success]
        labels = [widget.label for widget in (*at.button, *at.selectbox, *at.multiselect, *at.expander)]
        assert not [value for value in [element.value for element in rendered] + labels if "example" in value]
        assert text in [element.value for element in at.text]
        assert text in [element.value for element in at.code]
