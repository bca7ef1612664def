"""Hidden states of a served model, through the plugin vllm-lens: opt-in, on this machine, and no pickles either way.

`tracer serve --lens` starts such a server. The plugin would also run functions that a request brings along; the server
is started behind `lens_server/tracer_lens_guard.py`, which lets no such request through. What comes back are plain
arrays, zstd-compressed inside JSON.
"""

from __future__ import annotations

import base64
import binascii
import math
import subprocess
from collections.abc import Sequence
from typing import Final

import httpx
import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from tracer.engines.install import VllmInstall, find_vllm
from tracer.engines.weights.cache import ProgressCallback, report
from tracer.errors import EngineResponseError, EngineUnavailableError, InputError

PLUGIN: Final = "vllm-lens"
VERSION: Final = "1.3.0"
PACKAGES: Final = (f"{PLUGIN}=={VERSION}", "zstandard==0.25.0", "cloudpickle==3.1.2")
"""Installed without dependencies: the plugin names other versions of vLLM and Python than it works with."""
REQUEST: Final = "output_residual_stream"
_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
_TYPES: Final = {"float32": "<f4", "float16": "<f2", "int16": "<i2"}
_LARGEST: Final = 1 << 31
"""Bytes of one array."""
_MINUTES: Final = 10


def ensure_lens(install: VllmInstall, progress: ProgressCallback | None = None) -> VllmInstall:
    """Install the plugin beside a vLLM, unless it is there.

    Args:
        install: The vLLM.
        progress: Told that it is being installed.

    Raises:
        EngineUnavailableError: It cannot be installed.
    """
    if install.lens == VERSION:
        return install
    report(progress, f"installing {PLUGIN} {VERSION}", 0, 0)
    pip = [str(install.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    order = [*pip, "--no-deps", "--ignore-requires-python", *PACKAGES]
    by_hand = " ".join(order[1:])
    try:
        done = subprocess.run(order, capture_output=True, text=True, timeout=60 * _MINUTES, check=False)  # noqa: S603
    except (OSError, subprocess.SubprocessError) as error:
        raise EngineUnavailableError(f"{PLUGIN} cannot be installed: {error}; try python {by_hand}") from None
    found = find_vllm()
    if done.returncode or found is None or found.lens != VERSION:
        why = (done.stderr.strip().splitlines() or ["it is not there afterwards"])[-1][:300]
        raise EngineUnavailableError(f"{PLUGIN} {VERSION} cannot be installed: {why}; try python {by_hand}")
    return found


def check_loopback(url: str) -> None:
    """Refuse to read hidden states from another machine.

    Raises:
        InputError: The address is not one of this machine.
    """
    if httpx.URL(url).host not in _LOOPBACK:
        raise InputError(
            "hidden states are only read from a server on this machine, since its plugin also runs code that it is "
            "sent; start one with `tracer serve --lens`"
        )


def residual_stream(answer: dict[str, JsonValue], layers: Sequence[int], positions: int) -> NDArray[np.float32]:
    """The hidden states in an answer of the server.

    Args:
        answer: The answer to a request with ``vllm_xargs``.
        layers: The layers that were asked for, rising.
        positions: Tokens that were sent.

    Returns:
        Outputs of decoder layers before the final norm, ``(layers, positions, width)``.

    Raises:
        EngineResponseError: The answer holds none, or not what was asked for.
        EngineUnavailableError: This installation cannot decompress them.
    """
    activations = answer.get("activations")
    entry = activations.get("residual_stream") if isinstance(activations, dict) else None
    if entry is None:
        raise EngineResponseError(
            "the server gave no hidden states; it must be started with `tracer serve --lens`, which no other one is"
        )
    values = decode_array(entry)
    if values.ndim != 3 or values.shape[:2] != (len(layers), positions):
        raise EngineResponseError(
            f"the server gave hidden states of shape {values.shape} where {len(layers)} layers of {positions} tokens "
            "were asked for"
        )
    return values


def decode_array(entry: JsonValue) -> NDArray[np.float32]:
    """An array of the plugin's wire format: base64 of zstd of little-endian numbers, never a pickle.

    Raises:
        EngineResponseError: It is not of that form.
        EngineUnavailableError: This installation cannot decompress it.
    """
    try:
        import zstandard
    except ImportError:
        raise EngineUnavailableError("reading hidden states needs zstandard; pip install 'tracer[lens]'") from None
    try:
        if not isinstance(entry, dict) or entry.get("compression") != "zstd":
            raise ValueError("no zstd array")
        shape, kind = entry["shape"], str(entry["dtype"])
        if not isinstance(shape, list) or not all(isinstance(size, int) and size >= 0 for size in shape):
            raise ValueError("no shape")
        sizes = [int(str(size)) for size in shape]
        length = math.prod(sizes) * np.dtype(_TYPES[kind]).itemsize
        if length > _LARGEST:
            raise ValueError(f"{length} bytes are too many")
        packed = base64.b64decode(str(entry["data"]), validate=True)
        raw = zstandard.ZstdDecompressor().decompress(packed, max_output_size=max(length, 1))
        if len(raw) != length:
            raise ValueError(f"{len(raw)} bytes for {length}")
        values = np.frombuffer(raw, dtype=_TYPES[kind]).reshape(sizes)
    except (ValueError, KeyError, TypeError, binascii.Error, zstandard.ZstdError) as error:
        raise EngineResponseError(f"the server's hidden states cannot be read: {error}") from None
    if kind == "int16":
        if entry.get("original_dtype") != "torch.bfloat16":
            raise EngineResponseError("the server's hidden states cannot be read: integers that are no bfloat16")
        # bfloat16 is the upper half of a float32.
        return (values.astype(np.int32) << 16).view(np.float32)
    return values.astype(np.float32)
