"""`tracer explain` and `tracer methods`, as a user runs them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.command_line import Run, runner
from tests.explain.tiny_runs import Families, perturbed, recorded_run, register, write_replica
from tracer.errors import CancelledError
from tracer.explain.attribution import contrastive
from tracer.explain.methods import METHODS
from tracer.store import Store
from tracer.trace.explanation import Explanation
from tracer.trace.trace import Trace


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_replica(tmp_path_factory.mktemp("replica"))


@pytest.fixture(scope="module")
def trace(folder: Path) -> Trace:
    return recorded_run(folder)


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> Families:
    return register(monkeypatch)


@pytest.fixture
def home(tmp_path: Path, trace: Trace, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRACER_STORE", str(tmp_path / "runs.db"))
    monkeypatch.setenv("COLUMNS", "200")
    with Store(tmp_path / "runs.db") as store:
        store.import_trace(trace)
    trace.save(tmp_path / "run.json")
    return tmp_path


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """The command line on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield runner(capfd, monkeypatch)
    torch.set_num_threads(threads)


def test_help_teaches(run: Run) -> None:
    done = run("explain", "--help")
    assert done.code == 0
    for option in (
        "--methods", "--targets", "--target-function", "--foil", "--model", "--dtype", "--param", "--chunk", "--seed",
        "--low-memory", "--top", "--out", "--force", "--json", "--store",
    ):  # fmt: skip
        assert option in done.out
    assert "tracer methods" in done.out


def test_methods_are_listed(run: Run) -> None:
    done = run("methods")
    assert done.code == 0 and all(name in done.out for name in METHODS)
    assert "integrated_gradients  slow, nats, signed" in done.out and "points=16" in done.out
    assert "arXiv:1703.01365" in done.out
    listed = json.loads(run("methods", "--json").out)
    assert [method["name"] for method in listed] == list(METHODS)
    assert set(listed[0]) == {"name", "family", "summary", "unit", "signed", "cost", "paper", "parameters", "follows"}


def test_what_scores_are_worth_is_printed(run: Run, home: Path, families: Families) -> None:
    done = run("explain", "run", "--methods", "near,surprise", "--targets", "answer")
    assert done.code == 0, done.err
    for name in ("near", "surprise"):
        assert re.search(
            rf"s6 {name}: LDS [+-]\d\.\d\d; without the \d of \d+ sources most in its favour the target loses", done.out
        )
    # One target with few sources cannot prove anything.
    assert "is not shown to be better than random on this trace" in done.out
    assert "not measured" not in done.out


def test_a_stored_run_is_explained_and_keeps_it(run: Run, home: Path, families: Families) -> None:
    done = run("explain", "run", "--methods", "near,surprise", "--top", "2", "--faithfulness", "none")
    assert done.code == 0, done.err
    assert re.search(r"s5 thought  So in y\.", done.out)
    assert "near (per token)" in done.out and "surprise (nats)" in done.out
    # Signed values carry their sign, others a bar alone; two sources each.
    section = done.out.split("surprise (nats)")[1].splitlines()[1:4]
    assert all(re.match(r"\s+-\d", line) for line in section[:2]) and "█" in section[0]
    assert "parity: log-probabilities differ by" in done.out and "over 33 tokens" in done.out
    assert "faithfulness not measured: near, surprise on s2, s3, s5, s6; nothing shows" in done.out
    assert "s6 by near, through all steps (directly)" in done.out
    with Store(home / "runs.db") as store:
        kept = store.load("run-1")
    assert [Explanation.read(item).targets for item in kept.explanations] == [["s2", "s3", "s5", "s6"]] * 2
    shown = run("show", "run-1", "--json")
    assert Trace.from_json(shown.out).explanations == kept.explanations

    families.asked.clear()
    assert run("explain", "run-1", "--methods", "near,surprise").code == 0
    assert families.computed == []


def test_json_is_the_trace_and_nothing_else(run: Run, home: Path, families: Families) -> None:
    done = run("explain", "run-1", "--methods", "near", "--targets", "s2,s6#*", "--json")
    assert done.code == 0 and done.err == ""
    (document,) = Trace.from_json(done.out).explanations
    assert document["targets"] == ["s2", "s6#0", "s6#1"]
    assert "s6#1 answer  y." in run("explain", "run-1", "--methods", "near", "--targets", "s6#1").out


def test_options_reach_the_methods(run: Run, home: Path, families: Families) -> None:
    done = run(
        "explain", "run-1", "--methods", "near", "--targets", "answer", "--param", "near.scale=2.5", "--seed", "7",
        "--target-function", "contrast", "--foil", "id:9", "--chunk", "4", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    (document,) = Trace.from_json(done.out).explanations
    found = Explanation.read(document)
    assert (found.parameters, found.seed, found.target_function, found.foil, found.chunk_tokens) == (
        {"scale": 2.5}, 7, "contrast", 9, 4,
    )  # fmt: skip


def test_a_file_is_explained_into_a_file(run: Run, home: Path, families: Families) -> None:
    source, first, second = home / "run.json", home / "first.json", home / "deep" / "second.json"
    done = run("explain", str(source), "--methods", "near", "--out", str(first))
    assert done.code == 0 and f"wrote {first}" in done.err
    (document,) = Trace.load(first).explanations
    arrays = Explanation.read(document).arrays
    assert arrays is not None and (home / "first.json.arrays" / arrays.file).is_file()
    with Store(home / "runs.db") as store:
        assert store.load("run-1").explanations == []

    families.asked.clear()
    assert run("explain", str(first), "--methods", "near,surprise", "--out", str(second)).code == 0
    assert {method for method, _ in families.computed} == {"surprise"}
    assert [item["method"] for item in Trace.load(second).explanations] == ["near", "surprise"]
    # Into the same file.
    assert run("explain", str(first), "--methods", "surprise", "--out", str(first)).code == 0
    assert len(Trace.load(first).explanations) == 2


def test_a_file_without_out_says_that_nothing_is_kept(run: Run, home: Path, trace: Trace, families: Families) -> None:
    other = trace.model_copy(update={"id": "elsewhere"}).save(home / "other.json")
    done = run("explain", str(other), "--methods", "near")
    assert done.code == 0 and "--out FILE keeps it" in done.err
    assert "not in the store" not in run("explain", str(home / "run.json"), "--methods", "near").err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["zzz"], "no trace has the id 'zzz'"),
        (["/nowhere.json"], "cannot read /nowhere.json"),
        (["run-1", "--targets", "s9"], "no step 's9'; steps with tokens: s2, s3, s5, s6"),
        (["run-1", "--targets", "s4"], "step s4 (observation) has no tokens"),
        (["run-1", "--targets", "s6#9"], "s6 has tokens 0 to 1"),
        (["run-1", "--targets", ","], "empty list of names"),
        (["run-1", "--methods", "grad_x_inptu"], "did you mean 'grad_x_input'"),
        (["run-1", "--param", "near.scael=1"], "no parameter 'scael'; it has: scale"),
        (["run-1", "--param", "scale=1"], "--param takes METHOD.NAME=VALUE, found 'scale=1'"),
        (["run-1", "--param", "near.scale"], "--param takes METHOD.NAME=VALUE"),
        (["run-1", "--param", "surprise.x=1"], "surprise, which is not among the methods"),
        (["run-1", "--target-function", "prob"], "unknown target function 'prob'"),
        (["run-1", "--foil", "x"], "only used by the target function contrast"),
        (["run-1", "--target-function", "contrast", "--foil", "id:x"], "give id:NUMBER"),
        (["run-1", "--dtype", "int3"], "unknown dtype 'int3'"),
        (["run-1", "--model", "./nothing"], "no folder or file './nothing'"),
        (["run-1", "--chunk", "0"], "at least 1"),
        (["run-1", "--out", "/"], "it is a folder"),
        (["run-1", "--top", "0"], "--top"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, run: Run, home: Path, families: Families
) -> None:
    methods = [] if "--methods" in arguments else ["--methods", "near"]
    done = run("explain", *arguments, *methods)
    assert done.code == 2, done.err
    assert message in done.err and done.out == "" and "Traceback" not in done.err
    assert families.computed == []


def test_another_vocabulary_and_other_weights(
    run: Run, home: Path, tmp_path: Path, folder: Path, families: Families
) -> None:
    small = write_replica(tmp_path / "small", vocabulary=64)
    done = run("explain", "run-1", "--methods", "near", "--model", str(small))
    assert done.code == 2 and "has a vocabulary of 64" in done.err
    short = write_replica(tmp_path / "short", context=60)
    done = run("explain", "run-1", "--methods", "near", "--model", str(short))
    assert done.code == 2 and "the replica's context holds 60" in done.err
    other = perturbed(folder, tmp_path / "other")
    done = run("explain", "run-1", "--methods", "near", "--model", str(other))
    assert done.code == 1 and "does not behave like the model" in done.err and "--force" in done.err
    assert families.computed == []
    done = run("explain", "run-1", "--methods", "near", "--model", str(other), "--force")
    assert done.code == 0 and "FORCED" in done.out


def test_a_trace_without_ids(run: Run, home: Path, trace: Trace, families: Families) -> None:
    bare = Trace.from_json(trace.to_json())
    bare.id, bare.calls = "bare", []
    for step in bare.steps:
        step.call_id = step.completion = step.start = step.end = None
    bare.save(home / "bare.json")
    done = run("explain", str(home / "bare.json"), "--methods", "near")
    assert done.code == 2 and "without token ids" in done.err and "--force" in done.err
    done = run("explain", str(home / "bare.json"), "--methods", "near", "--force")
    assert done.code == 0 and "RETOKENISED" in done.out and "not checked" in done.out


def test_what_failed_is_kept_up_to_there(run: Run, home: Path, families: Families) -> None:
    def fail(method: str, step: str) -> None:
        if (method, step) == ("surprise", "s5"):
            raise torch.OutOfMemoryError("CUDA out of memory")

    families.before_target = fail
    out_file = home / "out.json"
    done = run("explain", "run-1", "--methods", "near,surprise", "--out", str(out_file))
    assert done.code == 1 and "--low-memory" in done.err and done.out == ""
    assert [item["targets"] for item in Trace.load(out_file).explanations] == [["s2", "s3", "s5", "s6"], ["s2", "s3"]]


def test_a_trace_cannot_write_to_the_terminal(run: Run, home: Path, trace: Trace, families: Families) -> None:
    evil = Trace.from_json(trace.to_json())
    evil.id = "evil"
    evil.steps[0].text = "\x1b[2J[bold]q[/bold]"
    evil.steps[3].text = "\x1b]0;owned\x07 seen"
    evil.steps[4].text = "\x1b[31mred"
    for call in evil.calls:
        old, call.id = call.id, f"\x1b[1m{call.id}"
        for step in evil.steps:
            step.call_id = call.id if step.call_id == old else step.call_id
    evil.save(home / "evil.json")
    done = run("explain", str(home / "evil.json"), "--methods", "near", "--top", "20")
    assert done.code == 0, done.err
    for text in (done.out, done.err):
        assert "\x1b" not in text and "\x07" not in text
    assert "[bold]q[/bold]" in done.out


def test_ctrl_c_keeps_what_is_finished(home: Path, folder: Path) -> None:
    command = [
        sys.executable, "-m", "tracer", "explain", "run-1", "--methods", "attention,integrated_gradients",
        "--param", "integrated_gradients.points=1000",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    for line in process.stderr:
        if "integrated_gradients" in line:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "stopping" in err and "Traceback" not in err and out == ""
    with Store(home / "runs.db") as store:
        methods = [item["method"] for item in store.load("run-1").explanations]
    assert methods[0] == "attention"


def test_methods_are_compared_over_runs(run: Run, home: Path, families: Families) -> None:
    done = run("faithfulness", "run-1", str(home / "run.json"), "--methods", "near,surprise")
    assert done.code == 0, done.err
    header, *rows = done.out.splitlines()
    assert header.split()[:4] == ["method", "LDS", "top-k", "drop"]
    assert {row.split()[0] for row in rows[:3]} == {"near", "surprise", "random"}
    assert "not shown to be better than random on these runs" in done.out
    families.asked.clear()
    table = json.loads(run("faithfulness", "run-1", "--methods", "near,surprise", "--json").out)
    assert families.computed == []
    assert {row["method"] for row in table} == {"near", "surprise", "random"}
    # One target leaves nothing to draw an interval from.
    assert all(row["targets"] == 1 and row["lds"]["low"] is row["lds"]["high"] is None for row in table if row["lds"])


def test_what_is_known_is_shown_when_a_later_run_cannot_be_replayed(
    run: Run, home: Path, trace: Trace, families: Families
) -> None:
    other = trace.model_copy(deep=True, update={"id": "run-2"})
    other.model.name = str(perturbed(Path(trace.model.name), home / "others"))
    other.save(home / "other.json")
    done = run("faithfulness", "run-1", str(home / "other.json"), "--methods", "near")
    assert done.code == 1
    assert "1 of the 2 runs are not in the store" in done.err and "`tracer import FILE` first keeps it" in done.err
    assert "does not behave like" in done.err and "Traceback" not in done.err
    title, header, *_ = done.out.splitlines()
    assert title == "the first 1 of 2 runs:"
    assert header.split()[:2] == ["method", "LDS"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument 'RUNS...'"),
        (["zzz"], "no trace has the id 'zzz'"),
        (["run-1", "--targets", "s6"], "only answer and all in common"),
        (["run-1", "--methods", "naer"], "did you mean 'near'"),
        (["run-1", "--methods", "near", "--param", "near.scael=1"], "no parameter 'scael'"),
    ],
)
def test_a_comparison_that_cannot_be_made(
    run: Run, home: Path, families: Families, arguments: list[str], message: str
) -> None:
    done = run("faithfulness", *arguments)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err


def test_an_answer_is_shown_with_its_citations(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("explain", "run-1", "--methods", "mirage", "--targets", "answer", "--probes", "none").code == 0
    monkeypatch.setattr(contrastive, "rows_without", None)  # What is known is not computed again.
    done = run("cite", "run-1")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0] == "y[1]."
    assert re.fullmatch(r"  \[1\] 100\.0%  x is in y\.  \(observation s4\)", lines[2])
    assert re.fullmatch(r"changed at most by what can be cited \(KL of one token\): s6 by \d[\d.]* nats", lines[4])
    assert re.match(
        r"   s6 mirage: LDS [+-]\d\.\d\d; without the \d of \d+ sources most in its favour the target loses", lines[5]
    )
    assert "mirage is not shown to be better than random on this trace" in done.out


def test_what_is_found_about_a_file_can_be_kept(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store(home / "runs.db") as store:
        store.delete("run-1")
    done = run("cite", str(home / "run.json"), "--out", str(home / "cited.json"))
    assert done.code == 0, done.err
    assert [item["method"] for item in Trace.load(home / "cited.json").explanations] == ["mirage"]
    monkeypatch.setattr(contrastive, "rows_without", None)  # What is known is not computed again.
    assert run("cite", str(home / "cited.json")).out.splitlines()[0] == "y[1]."


def test_stopping_says_so_where_nothing_is_kept(
    run: Run, home: Path, families: Families, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(method: str, step_id: str) -> None:
        raise CancelledError("stopped; what was finished is kept")

    families.before_target = stop
    assert "what was finished is kept" in run("explain", "run-1", "--methods", "near").err
    with Store(home / "runs.db") as store:
        store.delete("run-1")
    file = str(home / "run.json")
    for command in (["explain", file, "--methods", "near"], ["faithfulness", file, "--methods", "near"]):
        done = run(*command)
        assert done.code == 130
        assert "stopped; nothing is kept" in done.err and "what was finished is kept" not in done.err


def test_citations_of_all_steps_and_by_word(run: Run, home: Path) -> None:
    done = run("cite", "run-1", "--targets", "all", "--by", "word", "--rule", "top", "--share", "1")
    assert done.code == 0, done.err
    # The thought and the action before the observation read nothing that could be cited.
    assert [line.split()[0] for line in done.out.splitlines() if line.startswith("   s")][:2] == ["s5", "s6"]
    assert re.search(r"KL of one token\): s5 by \d[\d.]* nats, s6 by \d", done.out)
    assert "faithfulness not measured: s5 (see --faithfulness)" in done.out
    listed = json.loads(run("cite", "run-1", "--targets", "all", "--json").out)
    assert [answer["step_id"] for answer in listed] == ["s5", "s6"]
    assert [answer["text"] for answer in listed] == ["So in y. ", "y."]
    assert {answer["references"][0]["title"] for answer in listed} == {"x is in y."}
    assert listed[0]["trust"]["measured"] is None
    assert listed[1]["trust"]["measured"]["sources"] > 1


def test_citations_cannot_write_to_the_terminal(run: Run, home: Path, trace: Trace) -> None:
    evil = Trace.from_json(trace.to_json())
    evil.id = "evil"
    evil.steps[3].text = "\x1b]0;owned\x07[bold]seen[/bold]"
    evil.save(home / "evil.json")
    done = run("cite", str(home / "evil.json"), "--faithfulness", "none")
    assert done.code == 0, done.err
    assert "\x1b" not in done.out + done.err
    assert "[bold]seen[/bold]" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["zzz"], "no trace has the id 'zzz'"),
        (["run-1", "--rule", "best"], "unknown citation rule 'best'"),
        (["run-1", "--share", "2"], "share of the citation rule is 2"),
        (["run-1", "--by", "letter"], "--by is 'letter'; use sentence or word"),
        (["run-1", "--param", "mirage.kinds=document"], "trace run-1 holds no document that could be cited"),
        (["run-1", "--param", "mirage.kindz=document"], "mirage has no parameter 'kindz'"),
        (["run-1", "--targets", "s2"], "step s2 of trace run-1 read no document or observation"),
        (["run-1", "--faithfulness", "some"], "unknown choice of targets for faithfulness 'some'"),
    ],
)
def test_citations_that_cannot_be_made(arguments: list[str], message: str, run: Run, home: Path) -> None:
    done = run("cite", *arguments)
    assert done.code == 2, done.err
    assert message in done.err and done.out == "" and "Traceback" not in done.err


@pytest.mark.model
@pytest.mark.usefixtures("demo_model")
def test_a_run_is_explained_at_its_end(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACER_STORE", str(tmp_path / "runs.db"))
    file = tmp_path / "run.json"
    question = ["run", "cot", "What is 2 + 3?", "--engine", "local", "--max-tokens", "24", "--json"]
    done = run(*question, "--explain", "--out", str(file))
    assert done.code == 0 and done.err == ""
    trace = Trace.from_json(done.out.removesuffix("\n"))
    assert [Explanation.read(item).method for item in trace.explanations] == ["at2", "two_hop"]
    assert Trace.load(file).explanations == trace.explanations
    with Store(tmp_path / "runs.db") as store:
        assert store.load(trace.id).explanations == trace.explanations
