"""The Python tool runs code and bounds what it can do."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tracer.agents.tools import python_tool
from tracer.agents.tools.python import MAX_OUTPUT_BYTES, run_code
from tracer.errors import InputError, ToolError

linux = pytest.mark.skipif(sys.platform != "linux", reason="kernel features of Linux")


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every run removes its folder and its processes."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(psutil.Process().children(recursive=True))
    yield
    assert list(tmp_path.glob("tracer-python-*")) == []
    assert set(psutil.Process().children(recursive=True)) <= before


def test_output_and_the_last_value_are_returned() -> None:
    assert run_code("x = 6\nprint('six')\nx * 7") == "six\n42"


def test_the_tool_takes_code() -> None:
    assert python_tool().invoke({"code": "import statistics; print(statistics.mean([1, 2, 6]))"}) == "3"


def test_an_exception_comes_back_as_its_traceback_after_the_output() -> None:
    text = run_code("print('before')\ndef f():\n    return 1 / 0\nf()")
    assert text.startswith("before\nTraceback")
    assert text.endswith("ZeroDivisionError: division by zero")
    assert "confine" not in text


def test_a_syntax_error_shows_only_the_code() -> None:
    text = run_code("def f(:\n  pass")
    assert "SyntaxError" in text
    assert "confine" not in text


def test_no_output_says_so() -> None:
    assert "no output" in run_code("x = 1")


def test_unicode_goes_both_ways() -> None:
    assert run_code("print('żółw 🐢')") == "żółw 🐢"


def test_an_infinite_loop_is_stopped() -> None:
    with pytest.raises(ToolError, match="longer than 1 s.*the end of its output: started"):
        run_code("print('started')\nwhile True: pass", timeout=1)


def test_a_program_that_sleeps_and_ignores_signals_is_stopped() -> None:
    code = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nos = time.sleep(60)"
    with pytest.raises(ToolError, match="longer than 1 s"):
        run_code(code, timeout=1)


def test_a_program_that_closes_its_output_is_still_stopped() -> None:
    with pytest.raises(ToolError, match="killed|longer"):
        run_code("import os\nos.close(1); os.close(2)\nwhile True: pass", timeout=1)


@linux
def test_memory_is_bounded() -> None:
    assert "MemoryError" in run_code("x = bytearray(2_000_000_000)", memory_mb=256)


@linux
def test_a_slow_memory_hog_is_bounded() -> None:
    assert "MemoryError" in run_code("x = []\nwhile True: x.append(bytearray(1_000_000))", memory_mb=256)


@linux
def test_a_fork_bomb_starts_nothing() -> None:
    code = """
        import os
        refused = 0
        for _ in range(200):
            try:
                if os.fork() == 0:
                    while True: pass
            except OSError:
                refused += 1
        print(refused)
    """
    assert run_code("\n".join(line[8:] for line in code.splitlines())) == "200"


@linux
@pytest.mark.parametrize(
    "code",
    [
        "import subprocess; subprocess.run(['true'])",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import threading; threading.Thread(target=print).start()",
        "import socket; socket.socket()",
        "import socket; socket.create_connection(('127.0.0.1', 1))",
        "import os; os.kill(os.getppid(), 0)",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "open('/etc/passwd').read()",
        "import os; os.listdir('/')",
        "import os; open(f'/proc/{os.getppid()}/environ').read()",
        "open('../escaped', 'w')",
        "import os; os.symlink('/etc/passwd', 'link'); open('link').read()",
        "open('/tmp/tracer-escaped', 'w')",
    ],
)
def test_what_leads_outside_is_refused(code: str) -> None:
    text = run_code(code)
    assert "PermissionError" in text or "can't start new thread" in text or "not allowed" in text


def test_the_environment_holds_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEMO_API_KEY", "very-secret-value")
    monkeypatch.setenv("PYTHONPATH", "/very-secret-value")
    text = run_code("import os, sys\nprint(dict(os.environ), sys.path, sys.argv)")
    assert "very-secret" not in text
    assert "'PATH': ''" in text


def test_only_the_standard_library_can_be_imported() -> None:
    assert "ModuleNotFoundError" in run_code("import numpy")
    assert "ModuleNotFoundError" in run_code("import calculator")


def test_standard_input_is_empty() -> None:
    assert run_code("import sys; sys.stdin.read()") == "''"


def test_the_working_directory_is_empty_and_writable() -> None:
    assert run_code("import os\nprint(os.listdir())\nopen('a', 'w').write('b')\nopen('a').read()") == "[]\n'b'"


def test_a_locked_directory_is_removed_all_the_same() -> None:
    run_code("import os\nos.mkdir('d'); open('d/f', 'w').close(); os.chmod('d', 0)")


def test_a_written_file_has_a_bounded_size() -> None:
    assert "File too large" in run_code("open('big', 'wb').write(bytes(20_000_000))")


def test_a_flood_of_output_is_cut() -> None:
    text = run_code("while True: print('x' * 1000)")
    assert text.endswith(f"[stopped: more than {MAX_OUTPUT_BYTES} bytes of output]")
    assert len(text) < MAX_OUTPUT_BYTES + 100


def test_code_is_bounded_and_not_empty() -> None:
    with pytest.raises(ToolError, match="at most 100000"):
        run_code("#" * 100_001)
    with pytest.raises(ToolError, match="no code"):
        run_code(" \n")


def test_an_abrupt_end_is_reported() -> None:
    with pytest.raises(ToolError, match="SIGSEGV"):
        run_code("import ctypes\nctypes.string_at(0)")


@pytest.mark.parametrize(("timeout", "memory_mb"), [(0, 512), (601, 512), (float("nan"), 512), (5, 1)])
def test_limits_out_of_range_are_refused(timeout: float, memory_mb: int) -> None:
    with pytest.raises(InputError, match="Python tool"):
        python_tool(timeout, memory_mb)


@linux
@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="needs root to become somebody else")
def test_it_confines_an_ordinary_user_too() -> None:
    confine = Path(__file__).parents[2] / "tracer" / "agents" / "tools" / "confine.py"
    interpreter = "/usr/bin/python3"
    if not os.access(interpreter, os.X_OK):
        pytest.skip("no system Python")
    # The package may lie in a folder that only root can read, so the script travels as text.
    script = f"exec(compile({confine.read_text()!r}, 'confine', 'exec'), {{'__name__': '__main__', '__file__': 'x'}})"
    result = subprocess.run(
        [interpreter, "-I", "-S", "-c", script, '{"seconds": 5, "memory": 500000000, "file_size": 1000}'],
        input="import os\ntry:\n    os.fork()\nexcept OSError as e:\n    print(e)\nopen('/etc/passwd')",
        capture_output=True,
        text=True,
        user=65534,
        group=65534,
        extra_groups=[],
        cwd="/usr/share",
        env={},
        timeout=60,
    )
    assert "Operation not permitted" in result.stdout or "temporarily unavailable" in result.stdout
    assert "PermissionError" in result.stderr
