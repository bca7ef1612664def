"""Token-level scores beside the database: safetensors files, found by trace and key, checked by their SHA-256."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tracer.errors import InputError, StoreError
from tracer.files import write_atomic
from tracer.trace.explanation import ArrayFile

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SUFFIX = ".arrays"
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", re.ASCII)
_KEY = re.compile(r"[0-9a-f]{64}", re.ASCII)
_RESERVED = "__metadata__"
"""A name that the file format keeps for itself."""


class Arrays:
    """A folder of array files, one for each trace and key; nothing is created before the first write.

    Args:
        root: The folder. What a trace says is never taken for a path below it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def beside(cls, file: Path) -> Arrays:
        """The arrays that belong to a database or trace file: in ``FILE.arrays``."""
        return cls(file.with_name(file.name + SUFFIX))

    def path(self, trace_id: str, key: str) -> Path:
        """Where the arrays of a key are.

        Raises:
            StoreError: The key is none of ours.
        """
        if not _KEY.fullmatch(key):
            raise StoreError(f"{key!r} is not the key of an explanation")
        return self.root / _folder(trace_id) / f"{key}.safetensors"

    def write(self, trace_id: str, key: str, arrays: Mapping[str, NDArray[np.float32]]) -> ArrayFile:
        """Write arrays in place of those of the same key; the file appears whole or not at all.

        Args:
            trace_id: The trace.
            key: Key of the explanation, 64 hexadecimal digits.
            arrays: One for each target, ``(tokens before the target's end,)``, by step id.

        Returns:
            What `read` needs to know the file again.

        Raises:
            InputError: A step has the name that the format keeps for itself.
            StoreError: They cannot be written.
        """
        import numpy as np
        from safetensors.numpy import save

        if _RESERVED in arrays:
            raise InputError(f"no step can be called {_RESERVED}; rename it in the trace")
        content = save({name: np.ascontiguousarray(array, dtype=np.float32) for name, array in arrays.items()})
        path = self.path(trace_id, key)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomic(path, content)
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error.strerror or error}") from None
        return ArrayFile(
            file=f"{path.parent.name}/{path.name}", sha256=hashlib.sha256(content).hexdigest(), bytes=len(content)
        )

    def read(self, trace_id: str, key: str, expected: ArrayFile) -> dict[str, NDArray[np.float32]]:
        """The arrays of a key by step id.

        Raises:
            StoreError: They are missing, or not those that were written.
        """
        from safetensors.numpy import load

        path = self.path(trace_id, key)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise StoreError(
                f"the token scores in {path} cannot be read: {error.strerror or error}; explain the trace again"
            ) from None
        if hashlib.sha256(content).hexdigest() != expected.sha256:
            raise StoreError(f"the token scores in {path} were changed since they were written; explain again")
        found: dict[str, NDArray[np.float32]] = load(content)
        return found

    def adopt(self, other: Arrays, trace_id: str) -> None:
        """Copy a trace's arrays from another place, if there are any and none are here yet.

        Raises:
            StoreError: They cannot be copied.
        """
        source, target = other.root / _folder(trace_id), self.root / _folder(trace_id)
        try:
            if source.is_dir() and not target.exists():
                shutil.copytree(source, target)
        except (OSError, shutil.Error) as error:
            raise StoreError(f"cannot copy {source} to {target}: {error}") from None

    def delete(self, trace_id: str) -> None:
        """Remove all arrays of a trace.

        Raises:
            StoreError: They cannot be removed.
        """
        folder = self.root / _folder(trace_id)
        try:
            if folder.exists():
                shutil.rmtree(folder)
        except OSError as error:
            raise StoreError(f"cannot remove {folder}: {error.strerror or error}") from None


def _folder(trace_id: str) -> str:
    """A name for a trace's folder: its id where that is a plain name, else a hash that no plain name can equal."""
    return (
        trace_id
        if _PLAIN.fullmatch(trace_id)
        else "_" + hashlib.sha256(trace_id.encode("utf-8", "surrogatepass")).hexdigest()
    )
