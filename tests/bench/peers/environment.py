"""Environments of peers, made on first use in the user's cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from platformdirs import user_cache_dir

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
