"""Jobs in real worker processes, on a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from tests.explain.tiny_runs import recorded_run
from tests.jobs.endless import write_endless
from tracer.errors import InputError
from tracer.jobs import Job, Jobs
from tracer.jobs.jobs import KEPT
from tracer.jobs.record import DEAD, LOG, PROCESS, STATUS, read_process
from tracer.jobs.worker import TURN
from tracer.store import Store

SECONDS = 120
"""How long anything may take before a test gives up; torch alone takes ten seconds to load on a busy machine."""
QUESTION = "What is 3 + 4?"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that never ends its turn."""
    return write_endless(tmp_path_factory.mktemp("model"))


@pytest.fixture
def store(tmp_path: Path, model: Path) -> Iterator[Store]:
    """A store that holds one run of the model."""
    with Store(tmp_path / "runs.db") as opened:
        opened.import_trace(recorded_run(model))
        yield opened


@pytest.fixture
def jobs(store: Store) -> Iterator[Jobs]:
    """The jobs beside the store; none outlives the test."""
    found = Jobs.of_store(store.where)
    yield found
    for job in found.list():
        found.remove(job.id)


def until(jobs: Jobs, job: Job, wanted: Callable[[Job], bool]) -> Job:
    """The job once it is as wanted."""
    deadline = time.monotonic() + SECONDS
    while not wanted(job):
        assert time.monotonic() < deadline, f"{job}\n{job.log}"
        assert not job.is_over, f"{job}\n{job.log}"
        time.sleep(0.05)
        job = jobs.get(job.id)
    return job


def over(jobs: Jobs, job: Job) -> Job:
    """The job once it is over."""
    return until(jobs, job, lambda job: job.is_over)


def waiting(jobs: Jobs) -> Job:
    """A job that waits for its turn while the test holds the lock."""
    job = jobs.start("explain", {"trace": "run-1"})
    return until(jobs, job, lambda job: "waiting" in job.stage)


def pid_of(job: Job) -> int:
    """Its worker."""
    process = read_process(job.folder)
    assert process is not None
    return process.pid


def test_a_run_is_recorded_streams_and_is_cancelled_with_what_it_has(jobs: Jobs, store: Store, model: Path) -> None:
    given = {"kind": "cot", "question": QUESTION, "engine": "local", "model": str(model), "max_tokens": 40_000}
    job = jobs.start("run", given)
    writing = until(jobs, job, lambda job: len(job.live_text) > 5 and job.tokens > 5)
    assert writing.status == "running" and writing.trace_id is not None and writing.started_at is not None
    assert store.summary(writing.trace_id).status == "running"
    jobs.cancel(job.id)
    ended = over(jobs, writing)
    assert (ended.status, ended.trace_id, ended.live_text, ended.stopping) == ("cancelled", writing.trace_id, "", False)
    trace = store.load(writing.trace_id)
    assert trace.status == "cancelled"
    assert trace.task.question == QUESTION and trace.steps[0].kind == "question"
    assert "question: What is 3 + 4?" in ended.log


def test_an_explanation_lands_in_the_store(jobs: Jobs, store: Store) -> None:
    job = over(
        jobs,
        jobs.start("explain", {"trace": "run-1", "methods": ["grad_x_input"], "targets": "answer", "probes": []}),
    )
    assert (job.status, job.error, job.trace_id) == ("completed", None, "run-1")
    explanation = store.load("run-1").explanations[0]
    assert (explanation["method"], explanation["targets"]) == ("grad_x_input", ["s6"])
    assert explanation["faithfulness"] is not None
    assert job.result == {"methods": ["grad_x_input"], "targets": ["s6"], "probes": [], "probe_hint": None}
    assert job.seconds is not None and job.seconds > 0


def test_an_answer_is_cited(jobs: Jobs, store: Store) -> None:
    job = over(jobs, jobs.start("cite", {"trace": "run-1"}))
    assert (job.status, job.error) == ("completed", None)
    assert isinstance(job.result, list) and isinstance(job.result[0], dict)
    assert job.result[0]["step_id"] == "s6"
    assert store.load("run-1").explanations[0]["method"] == "mirage"


def test_probes_are_trained_where_explanations_look_for_them(
    jobs: Jobs, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACER_PROBES", str(tmp_path / "probes"))
    monkeypatch.setenv("TRACER_CACHE", str(tmp_path / "cache"))
    job = over(jobs, jobs.start("probe_train", {"model": str(model), "per_topic": 4, "kind": "mass_mean"}))
    assert (job.status, job.error) == ("completed", None)
    assert isinstance(job.result, dict) and isinstance(job.result["probes"], list)
    probes = [probe for probe in job.result["probes"] if isinstance(probe, dict)]
    assert [probe["name"] for probe in probes] == ["statements", "steps"] and probes[0]["kind"] == "mass_mean"
    assert {Path(str(probe["file"])).parent for probe in probes} == {tmp_path / "probes"}
    assert all(Path(str(probe["file"])).is_file() for probe in probes)
    assert "hidden states of statements" in job.log and "fitting probes" in job.log


def test_methods_are_compared_over_runs(jobs: Jobs) -> None:
    job = over(jobs, jobs.start("faithfulness", {"runs": ["run-1"], "methods": ["grad_x_input", "random"]}))
    assert (job.status, job.error) == ("completed", None)
    assert isinstance(job.result, list)
    assert {item["method"] for item in job.result if isinstance(item, dict)} == {"grad_x_input", "random"}


def test_a_model_is_found_without_loading_it(jobs: Jobs, model: Path) -> None:
    job = over(jobs, jobs.start("fetch_model", {"name": str(model)}))
    assert job.status == "completed"
    assert job.result == {"name": str(model), "path": str(model), "source": "folder"}


def test_what_goes_wrong_is_a_sentence(jobs: Jobs) -> None:
    job = over(jobs, jobs.start("explain", {"trace": "no-such-run"}))
    assert job.status == "failed"
    assert job.error == "no trace has the id 'no-such-run'; `tracer list` shows those that are stored"
    assert "Traceback" not in job.log


def test_heavy_jobs_wait_for_each_other_and_can_be_cancelled_meanwhile(jobs: Jobs) -> None:
    jobs.folder.mkdir()
    with FileLock(jobs.folder / TURN):
        job = waiting(jobs)
        assert job.status == "queued" and job.started_at is None
        jobs.cancel(job.id)
        assert over(jobs, job).status == "cancelled"
        other = jobs.start("fetch_model", {"name": str(jobs.folder)})
        assert "config.json" in (over(jobs, other).error or ""), "what loads no model waits for nobody"


def test_a_job_whose_process_died_is_interrupted(jobs: Jobs) -> None:
    jobs.folder.mkdir()
    with FileLock(jobs.folder / TURN):
        job = waiting(jobs)
        os.kill(pid_of(job), signal.SIGKILL)
        job = over(jobs, job)
    assert (job.status, job.error) == ("interrupted", DEAD)


def test_a_process_of_the_same_number_is_another_one(jobs: Jobs) -> None:
    jobs.folder.mkdir()
    with FileLock(jobs.folder / TURN):
        job = waiting(jobs)
        process = read_process(job.folder)
        assert process is not None
        later = process.model_copy(update={"pid": os.getpid()})
        (job.folder / PROCESS).write_text(later.model_dump_json())
        assert jobs.get(job.id).status == "interrupted"
        os.kill(process.pid, signal.SIGKILL)


def test_killing_at_once_counts_as_cancelled(jobs: Jobs) -> None:
    jobs.folder.mkdir()
    with FileLock(jobs.folder / TURN):
        job = waiting(jobs)
        jobs.cancel(job.id, at_once=True)
        ended = over(jobs, job)
    assert (ended.status, ended.error) == ("cancelled", None)


def test_a_job_outlives_the_process_that_started_it(jobs: Jobs, store: Store) -> None:
    jobs.folder.mkdir()
    code = (
        "import sys; from tracer.jobs import Jobs; "
        "print(Jobs.of_store(sys.argv[1]).start('explain', {'trace': 'run-1'}).id)"
    )
    with FileLock(jobs.folder / TURN):
        done = subprocess.run([sys.executable, "-c", code, store.where], capture_output=True, text=True, check=True)
        job = until(jobs, jobs.get(done.stdout.strip()), lambda job: "waiting" in job.stage)
        assert os.getsid(pid_of(job)) == pid_of(job), "a session of its own: Ctrl-C in a terminal does not reach it"
        jobs.cancel(job.id)
        assert over(jobs, job).status == "cancelled"


def test_jobs_are_found_again(jobs: Jobs, model: Path) -> None:
    first = over(jobs, jobs.start("fetch_model", {"name": str(model)}))
    second = over(jobs, jobs.start("fetch_model", {"name": str(model), "verify": True}))
    again = Jobs(jobs.folder)
    assert [job.id for job in again.list()] == [second.id, first.id]
    assert [job.id for job in again.list(limit=1)] == [second.id]
    found = again.latest("fetch_model", {"name": str(model), "verify": False})
    assert found is not None and found.id == first.id
    assert again.latest("fetch_model", {"name": "other"}) is None


def test_a_removed_job_is_gone(jobs: Jobs) -> None:
    jobs.folder.mkdir()
    with FileLock(jobs.folder / TURN):
        job = waiting(jobs)
        process = read_process(job.folder)
        jobs.remove(job.id)
    assert jobs.list() == [] and not job.folder.exists()
    assert process is not None and process.owner.is_dead()
    with pytest.raises(InputError, match="there is no job"):
        jobs.get(job.id)


@pytest.mark.parametrize("job_id", ["", "..", "../x", "20260101-000000-000000-abcdef/../..", "x" * 500, "heavy.lock"])
def test_an_id_from_elsewhere_is_no_path(jobs: Jobs, job_id: str) -> None:
    with pytest.raises(InputError, match="is not the id of a job"):
        jobs.get(job_id)


def test_old_jobs_make_room(jobs: Jobs, model: Path) -> None:
    first = over(jobs, jobs.start("fetch_model", {"name": str(model)}))
    for number in range(KEPT):
        copy = jobs.folder / f"20200101-000000-{number:06d}-abcdef"
        copy.mkdir()
        for name in ("spec.json", STATUS, PROCESS):
            (copy / name).write_bytes((first.folder / name).read_bytes())
    newest = jobs.start("fetch_model", {"name": str(model)})
    over(jobs, newest)
    assert len(jobs.list()) == KEPT
    assert {first.id, newest.id} <= {job.id for job in jobs.list()}


def test_secrets_are_neither_written_nor_shown(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACER_API_KEY", "very-secret-value")
    password = "postgresql+psycopg://me:hidden-word@127.0.0.1:1/none"  # noqa: S105
    jobs = Jobs(tmp_path / "jobs")
    job = over(jobs, jobs.start("explain", {"trace": "very-secret-value"}, store=password))
    assert job.status == "failed"
    written = b"".join(file.read_bytes() for file in job.folder.iterdir() if file.name != "spec.json")
    assert b"hidden-word" not in written and b"very-secret-value" not in written
    assert b"hidden-word" not in (job.folder / "spec.json").read_bytes()
    (job.folder / LOG).write_text("a library says very-secret-value and http://me:word@host/x")
    assert job.log == "a library says *** and http://***@host/x"


def test_a_long_log_is_shown_from_its_end(jobs: Jobs, model: Path) -> None:
    job = over(jobs, jobs.start("fetch_model", {"name": str(model)}))
    (job.folder / LOG).write_text("".join(f"line {number}\n" for number in range(20_000)))
    assert job.log.endswith("line 19999\n") and len(job.log) < 50_000
    assert job.log.startswith("line ")


def test_files_of_a_job_are_for_nobody_else(jobs: Jobs, model: Path) -> None:
    job = over(jobs, jobs.start("fetch_model", {"name": str(model)}))
    assert jobs.folder.stat().st_mode & 0o077 == job.folder.stat().st_mode & 0o077 == 0
    spec = json.loads((job.folder / "spec.json").read_text())
    assert spec["kind"] == "fetch_model"
