"""`tracer probe map`, as a user runs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.explain.tiny_runs import recorded_run, write_replica
from tracer import cli
from tracer.store import Store
from tracer.trace.layer_map import layer_maps
from tracer.trace.trace import Trace


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_replica(tmp_path_factory.mktemp("model"))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Runs the command line in this process, so that torch is loaded once."""
    monkeypatch.setattr(sys, "argv", ["tracer", "probe", "map", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_maps_of_a_stored_run_are_kept_and_replaced(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACER_CACHE", str(tmp_path / "cache"))
    trace = recorded_run(folder)
    location = tmp_path / "runs.db"
    with Store(location) as store:
        store.import_trace(trace)
    assert run(monkeypatch, trace.id, "--store", location, "--dtype", "float32") == 0
    assert "held-out AUROC" in capfd.readouterr().out
    assert run(monkeypatch, trace.id, "--store", location, "--dtype", "float32", "--steps", "s2,s6", "--json") == 0
    printed = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    with Store(location) as store:
        again = store.load(trace.id)
    assert list(layer_maps(again)) == ["s6", "s2"] and len(again.probes) == 2
    assert [item["step_id"] for item in printed] == ["s2", "s6"]
    assert printed[1]["values"] == layer_maps(again)["s6"].values
    assert run(monkeypatch, trace.id, "--store", location, "--steps", "s4") == 2
    assert "has no tokens of the model's own" in capfd.readouterr().err


def test_maps_of_a_file_go_into_another_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACER_CACHE", str(tmp_path / "cache"))
    path = recorded_run(folder).save(tmp_path / "run.json")
    store = ("--store", tmp_path / "runs.db")
    assert run(monkeypatch, path, "--dtype", "float32", "--out", tmp_path / "mapped.json", *store) == 0
    assert "s6" in layer_maps(Trace.load(tmp_path / "mapped.json"))
    assert layer_maps(Trace.load(path)) == {}
    # What is in no store cannot be kept there, and is shown all the same.
    assert run(monkeypatch, path, "--dtype", "float32", *store) == 0
    assert "not in the store" in " ".join(capfd.readouterr().err.split())
