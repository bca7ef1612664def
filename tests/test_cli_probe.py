"""`tracer probe train` and `tracer probe evaluate`, as a user runs them."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.explain.tiny_runs import perturbed, write_replica
from tracer import cli
from tracer.errors import InputError
from tracer.explain.probes.saved import SavedProbe, probe_path
from tracer.explain.probes.statements import generate
from tracer.replay.model import Replica, identity_of


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_replica(tmp_path_factory.mktemp("replica"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "mine.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["statement", "label", "topic", "polarity", "entity"])
        for item in generate(per_topic=8, topics=["arithmetic", "numbers", "comparisons"]):
            side = "negated" if item.negated else "affirmative"
            writer.writerow([item.text, int(item.label), item.topic, side, item.entity])
    return path


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Run]:
    """Runs the command line in this process, so that torch is loaded once."""
    monkeypatch.setenv("TRACER_PROBES", str(tmp_path / "probes"))
    monkeypatch.setenv("TRACER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def call(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["tracer", "probe", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capfd.readouterr()
        return Done(code, captured.out, captured.err)

    yield call
    torch.set_num_threads(threads)


def test_a_probe_is_made_where_explain_looks_for_it(run: Run, folder: Path, data: Path, tmp_path: Path) -> None:
    done = run("train", "--model", folder, "--data", data, "--kind", "mass_mean", "--prefix", "Note: ")
    assert done.code == 0, done.err
    assert "Truth probe mass_mean" in done.out
    assert "TF-IDF of the text" in done.out
    identity = identity_of(Replica.load(str(folder)))
    path = probe_path(identity)
    assert path.parent == tmp_path / "probes"
    assert f"wrote {path}" in done.err
    probe = SavedProbe.load(path, identity=identity)
    assert (probe.record.kind, probe.record.prefix, probe.record.training.source) == ("mass_mean", "Note: ", "mine.csv")
    assert probe.record.training.rows == 96
    other = identity_of(Replica.load(str(perturbed(folder, tmp_path / "other"))))
    with pytest.raises(InputError, match="weights differ"):
        SavedProbe.load(path, identity=other)


def test_an_evaluation_is_printed_and_written_as_json(run: Run, folder: Path, data: Path) -> None:
    options = ("--model", folder, "--data", data, "--methods", "mass_mean,ttpd", "--repeats", "2")
    done = run("evaluate", *options)
    assert done.code == 0, done.err
    for text in ("each topic left out in turn, 2 repeats", "mass_mean", "shuffled labels", "by layer", "Calibration"):
        assert text in done.out
    document = json.loads(run("evaluate", *options, "--json").out)["statements"]
    assert document["topics"] == ["arithmetic", "comparisons", "numbers"]
    assert [item["name"] for item in document["methods"]] == ["mass_mean", "ttpd"]
    assert {item["layer"] for item in document["by_layer"]} == {0, 1}


def test_statements_of_our_own_need_no_file(run: Run, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    done = run("train", "--model", folder, "--per-topic", "4", "--kind", "mass_mean", "--out", path, "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["file"] == str(path)
    assert len(document["training"]["topics"]) == 12
    assert SavedProbe.load(path).record.training.rows == document["training"]["rows"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--kind", "tpdt"), "unknown kind of probe 'tpdt'; did you mean 'ttpd'"),
        (("evaluate", "--methods", ","), "empty list of methods"),
        (("evaluate", "--normalisation", "zscore"), "use one of none, rms"),
        (("train", "--data", "BAD"), "bad.csv, line 3: the label 'perhaps' is neither true nor false"),
        (("evaluate", "--data", "NONE"), "cannot read"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    run: Run, folder: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("statement,label\nIt is.,1\nIt is not.,perhaps\n", encoding="utf-8")
    named = {"BAD": str(bad), "NONE": str(tmp_path / "none.csv")}
    done = run(*(named.get(item, item) for item in arguments), "--model", folder)
    assert done.code == 2
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert done.out == ""


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nsys.argv = ['tracer', 'probe', 'train', '--help']\n"
        "from tracer import cli\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'transformers', 'sklearn', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout.splitlines()[-1] == "[]"
