"""Array files that say what they hold and notice when they were changed.

A safetensors file whose header carries a JSON document and a SHA-256 over document and arrays. Fitted weights are kept
this way, and whatever a long fit measures, so that an interrupted one goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from tracer.errors import StoreError
from tracer.files import write_atomic

_ABOUT, _SHA256 = "about", "sha256"


@dataclass(frozen=True, slots=True, eq=False)
class Checked:
    """What such a file holds.

    Args:
        arrays: By name.
        about: The document.
        sha256: Over both.
    """

    arrays: Mapping[str, NDArray[np.generic]]
    about: Mapping[str, JsonValue]
    sha256: str


def write_checked(path: Path, arrays: Mapping[str, NDArray[np.generic]], about: Mapping[str, JsonValue]) -> str:
    """Write a file in one step; its folder is made.

    Returns:
        Its SHA-256, over arrays and document.

    Raises:
        StoreError: It cannot be written.
    """
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    text = json.dumps(about, sort_keys=True)
    digest = _digest(whole, text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save(whole, metadata={_ABOUT: text, _SHA256: digest}))
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from None
    return digest


def read_checked(path: Path) -> Checked:
    """What `write_checked` wrote.

    Raises:
        StoreError: The file is missing, damaged, or none of ours.
    """
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            arrays: dict[str, NDArray[np.generic]] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise StoreError(f"{path} is no safetensors file, or a damaged one: {error}") from None
    text = metadata.get(_ABOUT, "")
    if metadata.get(_SHA256) != _digest(arrays, text):
        raise StoreError(f"{path} was changed since it was written, or was not written by tracer")
    return Checked(arrays, json.loads(text), metadata[_SHA256])


def _digest(arrays: Mapping[str, NDArray[np.generic]], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
