"""`tracer probe train` and `tracer probe evaluate`, as a user runs them."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.command_line import Run, runner
from tests.explain.tiny_runs import perturbed, write_replica
from tracer import cli
from tracer.errors import InputError
from tracer.explain.probes.saved import SavedProbe, probe_path
from tracer.explain.probes.statements import generate
from tracer.replay.model import Replica, identity_of
from tracer.store.probe_reports import list_reports


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_replica(tmp_path_factory.mktemp("replica"), context=2048)


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
    """The commands of `tracer probe` on one thread, with nothing that was made before."""
    monkeypatch.setenv("TRACER_PROBES", str(tmp_path / "probes"))
    monkeypatch.setenv("TRACER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield runner(capfd, monkeypatch, "probe")
    torch.set_num_threads(threads)


def test_probes_are_made_where_explain_looks_for_them(run: Run, folder: Path, data: Path, tmp_path: Path) -> None:
    few = ("--problems", "10", "--test-problems", "10")
    done = run("train", "--model", folder, "--data", data, "--kind", "mass_mean", "--prefix", "Note: ", *few)
    assert done.code == 0, done.err
    identity = identity_of(Replica.load(str(folder)))
    for text in (
        "Probe of statements, mass_mean",
        "Probe of steps, logistic_l2",
        "shuffled labels",
        "random direction",
    ):
        assert text in done.out
    # Each of the two tables has all controls.
    assert done.out.count("TF-IDF of the text") == 2 and done.out.count("layer 0") >= 2
    # A random model writes no results, so that nobody can tell what the probes are worth on its steps.
    assert done.out.count("was not measured: an experimental signal, no truth") == 2
    for name in ("statements", "steps"):
        path = probe_path(identity, name)
        assert path.parent == tmp_path / "probes"
        assert f"wrote {path}" in done.err
        assert SavedProbe.load(path, identity=identity).record.name == name
    record = SavedProbe.load(probe_path(identity)).record
    assert (record.kind, record.prefix, record.training.source, record.training.rows) == (
        "mass_mean",
        "Note: ",
        "mine.csv",
        96,
    )
    other = identity_of(Replica.load(str(perturbed(folder, tmp_path / "other"))))
    with pytest.raises(InputError, match="weights differ"):
        SavedProbe.load(probe_path(identity), identity=other)
    (report,) = list_reports()
    assert [(item.name, item.rows) for item in report.probes[:1]] == [("statements", 96)]
    assert report.probes[0].held_out == record.held_out
    assert report.probes[1].name == "steps" and report.statements is None
    assert report.model["weights_sha256"] == identity["weights_sha256"]


def test_an_evaluation_is_printed_and_written_as_json(run: Run, folder: Path, data: Path, tmp_path: Path) -> None:
    options = ("--model", folder, "--data", data, "--methods", "mass_mean,ttpd", "--repeats", "2")
    done = run("evaluate", *options, "--only", "statements")
    assert done.code == 0, done.err
    for text in ("each topic left out in turn, 2 repeats", "mass_mean", "shuffled labels", "by layer", "Calibration"):
        assert text in done.out
    document = json.loads(run("evaluate", *options, "--only", "statements", "--json").out)["statements"]
    assert document["topics"] == ["arithmetic", "comparisons", "numbers"]
    assert [item["name"] for item in document["methods"]] == ["mass_mean", "ttpd"]
    assert {item["layer"] for item in document["by_layer"]} == {0, 1}
    (tmp_path / "chains").mkdir()
    with (tmp_path / "chains" / "sums.jsonl").open("w", encoding="utf-8") as file:
        for number in range(6):
            wrong = number % 3 or None
            steps = ["1 + 1 = 2.", f"2 + {number} = {number + (5 if wrong == 1 else 2)}.", "So that is it."]
            file.write(json.dumps({"input": f"1 + 1 + {number} =", "steps": steps, "mistake_index": wrong}) + "\n")
    few = ("--problems", "10", "--no-ask", "--mistakes", tmp_path / "chains", "--limit", "5")
    done = run("evaluate", *options, "--only", "mistakes,steps", *few)
    assert done.code == 0, done.err
    for text in (
        "Transfer to reasoning: right steps and the same with a made-up wrong result",
        "nothing to tell apart",
        "probe ttpd",
        "probe logistic_l2, shuffled labels",
        "probe logistic_l2, layer 0",
        "probe random direction",
        "probe steps",
        "answer_logprob",
        "TF-IDF of the text",
        "First wrong step, sums: 5 chains",
        "asking the model",
        "most common place",
        "chance",
    ):
        assert text in done.out, text
    # What probes are not shown to beat is said below the table.
    assert "not shown to be better than the log-probability: " in done.out
    # Sections that were evaluated at different times are in one report.
    (report,) = list_reports()
    assert report.statements is not None and report.statements.source == "mine.csv"
    assert report.steps is not None and report.steps.own is None
    assert report.mistakes is not None and report.mistakes.tasks[0].chains == 5
    assert {item.method for item in report.statements.pictures} == {"mass_mean", "ttpd"}


def test_statements_of_our_own_need_no_file(run: Run, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    options = ("--per-topic", "4", "--kind", "mass_mean", "--test-problems", "10")
    done = run("train", "--model", folder, *options, "--only", "statements", "--out", path, "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["file"] == str(path)
    assert len(document["training"]["topics"]) == 12
    assert SavedProbe.load(path).record.training.rows == document["training"]["rows"]
    # A probe that is kept elsewhere is not the model's usual one.
    assert list_reports() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--kind", "tpdt"), "unknown kind of probe 'tpdt'; did you mean 'ttpd'"),
        (("evaluate", "--methods", ","), "empty list of methods"),
        (("evaluate", "--normalisation", "zscore"), "use one of none, rms"),
        (("evaluate", "--only", "statments"), "unknown section 'statments'; did you mean 'statements'"),
        (("evaluate", "--only", "mistakes", "--mistakes", "NONE"), "no chains with known mistakes in"),
        (("train", "--out", "NONE"), "--out holds one probe; add --only statements or --only steps"),
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


def test_only_a_served_model_scores_steps_while_it_runs(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = ["run", "cot", "What is 1 + 1?", "--engine", "local", "--model", str(folder), "--probes", "truth"]
    monkeypatch.setattr(sys, "argv", ["tracer", *arguments, "--store", str(tmp_path / "runs.db")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "only a served model scores steps while an agent runs: start one with `tracer serve --lens`" in (
        capfd.readouterr().err
    )
