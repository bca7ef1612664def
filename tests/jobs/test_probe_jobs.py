"""Jobs about probes in real worker processes, on a tiny model."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.explain.tiny_runs import recorded_run, write_replica
from tracer.jobs import Job, Jobs
from tracer.store import Store
from tracer.store.probe_reports import list_reports
from tracer.trace.layer_map import layer_maps

SECONDS = 120
"""How long anything may take before a test gives up; torch alone takes ten seconds to load on a busy machine."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_replica(tmp_path_factory.mktemp("model"), context=8192)


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACER_PROBES", str(tmp_path / "probes"))
    monkeypatch.setenv("TRACER_CACHE", str(tmp_path / "cache"))


def done(jobs: Jobs, kind: str, parameters: dict[str, object]) -> Job:
    """The job of that kind, once it is over."""
    job = jobs.start(kind, parameters)
    deadline = time.monotonic() + SECONDS
    while not job.is_over:
        assert time.monotonic() < deadline, f"{job}\n{job.log}"
        time.sleep(0.1)
        job = jobs.get(job.id)
    return job


def test_all_layers_are_read_at_the_tokens_of_a_step(tmp_path: Path, model: Path) -> None:
    with Store(tmp_path / "runs.db") as store:
        store.import_trace(recorded_run(model))
        job = done(Jobs.of_store(store.where), "probe_map", {"trace": "run-1", "steps": ["s6"], "dtype": "float32"})
        assert (job.status, job.error, job.result) == ("completed", None, {"steps": ["s6"]})
        assert "fitting probes" in job.log and "reading hidden states" in job.log
        assert list(layer_maps(store.load("run-1"))) == ["s6"]


def test_an_evaluation_is_kept_where_the_app_finds_it(tmp_path: Path, model: Path) -> None:
    with Store(tmp_path / "runs.db") as store:
        parameters = {"model": str(model), "sections": ["statements"], "per_topic": 4, "repeats": 1, "dtype": "float32"}
        job = done(Jobs.of_store(store.where), "probe_evaluate", parameters)
    assert (job.status, job.error) == ("completed", None)
    [report] = list_reports()
    assert report.statements is not None and report.statements.repeats == 1 and report.statements.by_layer
