"""Environments of peers, made on first use in the user's cache."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from platformdirs import user_cache_dir
from safetensors.numpy import load_file

_PINS = {
    "inseq": ("torch==2.13.0", "transformers==5.19.0", "inseq==0.7.1", "captum==0.9.0"),
}


def peer_python(name: str) -> Path:
    """The interpreter of a peer's environment; installs it if it is not there.

    Args:
        name: A key of the table above.
    """
    folder = Path(user_cache_dir("tracer-bench")) / "peers" / name
    python = folder / "bin" / "python"
    stamp = folder / "pins.txt"
    pins = "\n".join(_PINS[name])
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != pins:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *_PINS[name]], check=True)
        stamp.write_text(pins, encoding="utf-8")
    return python


def run_peer(
    name: str, script: str, model: Path, tasks: Sequence[dict[str, Any]], *, threads: int
) -> tuple[dict[str, float], dict[str, NDArray[Any]]]:
    """Run a script beside this module in a peer's environment.

    Args:
        name: The environment, a key of the table above.
        script: The script's file name.
        model: Folder of the weights.
        tasks: What it shall do; each has a ``name``.
        threads: Threads of PyTorch.

    Returns:
        Seconds and what was found, by task.

    Raises:
        RuntimeError: It failed.
    """
    content = json.dumps({"model": str(model), "threads": threads, "tasks": tasks})
    # An interrupted job goes on where it stopped, if its script can.
    folder = Path(user_cache_dir("tracer-bench")) / name / hashlib.sha256(content.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    job, out = folder / "job.json", folder / "out.safetensors"
    job.write_text(content, encoding="utf-8")
    command = [str(peer_python(name)), "-W", "ignore", str(Path(__file__).with_name(script)), str(job), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script} failed: {done.stderr[-2000:]}")
    found = load_file(out)
    shutil.rmtree(folder)
    return json.loads(done.stdout.splitlines()[-1]), found
