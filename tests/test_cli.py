"""The command line, as a user runs it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trace.test_trace import small_trace
from tracer.store import Store


def run(*arguments: str, home: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "TRACER_STORE": str(home / "runs.db"),
        "TRACER_STATE": str(home / "state"),
        "COLUMNS": "200",
        **extra,
    }
    command = [sys.executable, "-m", "tracer", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    with Store(tmp_path / "runs.db") as store:
        store.import_trace(small_trace())
    return tmp_path


def test_help_teaches(tmp_path: Path) -> None:
    top = run("--help", home=tmp_path)
    assert top.returncode == 0
    for command in ("run", "list", "show", "export", "import", "serve", "demo", "ui", "models", "doctor"):
        assert re.search(rf"^\s+{command}\s", top.stdout, re.MULTILINE)
    detail = run("run", "--help", home=tmp_path)
    for option in ("--docs", "--engine", "--model", "-n", "--out", "--json"):
        assert option in detail.stdout


def test_list_and_show(home: Path) -> None:
    listed = run("list", home=home)
    assert listed.returncode == 0 and "t1" in listed.stdout and "a run" in listed.stdout
    assert "no runs" in run("list", "--agent", "react", home=home).stderr
    row = json.loads(run("list", "--json", home=home).stdout)
    assert (row["id"], row["agent"], row["steps"]) == ("t1", "cot", 2)
    shown = run("show", "t1", home=home)
    assert "answer" in shown.stdout and "tokens 0-2" in shown.stdout
    assert run("show", "t1", "--json", home=home).stdout == small_trace().to_json() + "\n"


def test_export_and_import_round_trip(home: Path) -> None:
    target = home / "out" / "t1.json"
    assert run("export", "t1", "--out", str(target), home=home).returncode == 0
    assert target.read_text() == small_trace().to_json()
    again = run("import", str(target), home=home)
    assert again.returncode != 0 and "t1" in again.stderr
    copied = run("import", str(target), "--on-conflict", "new_id", home=home)
    assert copied.returncode == 0
    assert run("show", copied.stdout.strip(), home=home).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "cot", " "], "the question is empty"),
        (["run", "cott", "q"], "cott"),
        (["run", "react", "q", "--tools", "serch", "--engine", "local"], "did you mean 'search'"),
        (["run", "react", "q", "--docs", "/nowhere"], "/nowhere"),
        (["run", "cot", "q", "--model", "demmo"], "unknown model 'demmo'"),
        (["run", "cot", "q", "--model", "./nothing"], "no folder or file"),
        (["run", "cot", "q", "--engine", "locl"], "unknown engine 'locl'"),
        (["run", "cot", "q", "--prompt", "/nowhere.toml"], "cannot read prompt file"),
        (["run", "cot-sc", "q", "-n", "-2"], "at least 1"),
        (["run", "tot", "q", "--search", "best"], "unknown search 'best'"),
        (["show", "zzz"], "zzz"),
        (["import", "/nowhere.json"], "cannot read"),
        (["models", "path", "org/absent-model"], "tracer models fetch"),
        (["nonsense"], "nonsense"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(arguments: list[str], message: str, home: Path) -> None:
    done = run(*arguments, home=home, HF_HUB_OFFLINE="1")
    assert done.returncode in ((1, 2) if arguments[0] == "models" else (2,)), done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_dead_server_is_one_line_and_exit_code_1(home: Path) -> None:
    done = run("run", "cot", "q", "--engine", "http://127.0.0.1:9", home=home)
    assert done.returncode == 1
    assert "127.0.0.1:9" in done.stderr and "Traceback" not in done.stderr


def test_a_store_that_is_none_and_one_from_the_future(home: Path, tmp_path: Path) -> None:
    import sqlite3

    broken = tmp_path / "broken.db"
    broken.write_text("this is not a database" * 100)
    done = run("list", "--store", str(broken), home=home)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "broken.db" in done.stderr
    assert broken.read_text() == "this is not a database" * 100
    with sqlite3.connect(home / "runs.db") as connection:
        connection.execute("UPDATE meta SET value = '99' WHERE key = 'version'")
    connection.close()
    newer = run("list", home=home)
    assert newer.returncode == 1 and "has version 99" in newer.stderr


def test_malformed_and_newer_traces_are_refused_and_nothing_is_stored(home: Path, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(small_trace().model_copy(update={"id": "t2"}).to_json())
    bad.write_text(small_trace().to_json().replace('"1.0"', '"7.0"'))
    done = run("import", str(good), str(bad), home=home)
    assert done.returncode == 2 and "schema version 7.0" in done.stderr
    with Store(home / "runs.db") as store:
        assert store.count() == 1


def test_doctor_says_what_is_there(home: Path) -> None:
    done = run("doctor", home=home)
    assert done.returncode == 0, done.stdout
    for part in ("machine", "packages", "gpu", "vllm", "server", "demo model", "store: 1 runs"):
        assert part in done.stdout


def test_a_trace_cannot_write_to_the_terminal(home: Path) -> None:
    trace = small_trace()
    trace.id = "evil[/x]\x1b[31m"
    trace.name = "\x1b]0;owned\x07 [bold]x[/bold]"
    trace.steps[1].text = "\x1b[2J\x1b[31mred[/]"
    with Store(home / "runs.db") as store:
        store.import_trace(trace)
    trace.save(home / "evil.json")
    again = ["import", str(home / "evil.json"), "--on-conflict", "replace"]
    for command in (["show", "evil"], ["list"], again):
        done = run(*command, home=home)
        assert done.returncode == 0
        assert "\x1b" not in done.stdout and "\x07" not in done.stdout
    assert "[bold]x[/bold]" in run("list", home=home).stdout
