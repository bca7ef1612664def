"""The model cache under full disks, several processes and kill -9."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tracer.engines import models
from tracer.engines.models import resolve, verify
from tracer.engines.weights import cache
from tracer.engines.weights.cache import Progress
from tracer.errors import ModelError

Leftovers = Callable[[], set[str]]
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("own_cache")


def test_too_little_space_is_said_before_anything_is_written(
    tiny_gguf: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, leftovers: Leftovers
) -> None:
    monkeypatch.setenv("TRACER_CACHE", str(small_disk))
    with pytest.raises(ModelError, match=r"not enough disk space .* needed, .* available"):
        resolve(str(tiny_gguf))
    assert leftovers() <= {"gguf-hashes.json"}


def test_a_disk_that_fills_up_leaves_nothing_behind(
    tiny_gguf: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, leftovers: Leftovers
) -> None:
    monkeypatch.setenv("TRACER_CACHE", str(small_disk))
    # As if another program took the space after the check.
    monkeypatch.setattr(models, "require_space", lambda path, needed: None)
    with pytest.raises(ModelError, match="is full"):
        resolve(str(tiny_gguf))
    assert leftovers() <= {"gguf-hashes.json"}
    used = sum(path.stat().st_size for path in small_disk.rglob("*") if path.is_file())
    assert used < 10_000


def test_a_cache_that_cannot_be_made_is_one_clear_line(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TRACER_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match="TRACER_CACHE"):
        resolve(str(tiny_gguf))


def test_two_processes_at_once_build_it_once(tiny_gguf: Path, leftovers: Leftovers) -> None:
    code = (
        "import sys\nfrom tracer.engines.models import resolve\nstages = set()\n"
        "print('ready', flush=True)\nsys.stdin.readline()\n"
        "found = resolve(sys.argv[1], progress=lambda p: stages.add(p.stage), verify=True)\n"
        "print('convert' in stages, found.path)"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tiny_gguf)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(answer[0] for answer in answers) == ["False", "False", "True"]
    assert len({answer[1] for answer in answers}) == 1
    verify(str(tiny_gguf))
    assert len(leftovers()) == 2


def test_a_process_killed_in_mid_conversion_is_cleaned_up_after(tiny_gguf: Path, leftovers: Leftovers) -> None:
    code = (
        "import sys, time\nfrom tracer.engines.models import resolve\n"
        "def halt(p):\n"
        "    if p.stage == 'convert':\n"
        "        print('converting', flush=True)\n"
        "        time.sleep(600)\n"
        "resolve(sys.argv[1], progress=halt)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tiny_gguf)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "converting\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert any(name.startswith(".tmp-") for name in leftovers())
    made = resolve(str(tiny_gguf))
    assert not any(name.startswith(".tmp-") for name in leftovers())
    assert verify(str(tiny_gguf)) == made


def test_an_interrupt_leaves_nothing_behind(tiny_gguf: Path, leftovers: Leftovers) -> None:
    def interrupt(event: Progress) -> None:
        if event.stage == "convert":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve(str(tiny_gguf), progress=interrupt)
    assert not any(name.startswith(".tmp-") for name in leftovers())


def test_who_waits_for_another_process_is_told(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "models" / "x"
    code = (
        "import sys\nfrom pathlib import Path\nfrom tracer.engines.weights.cache import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.readline()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(target)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    assert holder.stdout.readline() == "held\n"
    stdin = holder.stdin
    seen: list[Progress] = []

    def on_progress(event: Progress) -> None:
        seen.append(event)
        stdin.write("go\n")
        stdin.flush()

    with cache.locked(target, progress=on_progress):
        assert [event.stage for event in seen] == ["waiting"]
    holder.communicate(timeout=60)
