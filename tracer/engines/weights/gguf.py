"""Read GGUF files: metadata, tensor directory and dequantised weights.

The ``gguf`` package wraps every vocabulary entry in its own array, which costs tens of seconds on a real
vocabulary, and its dequantisers make many full-size temporaries. This module parses the header itself and decodes
blocks in cache-sized chunks; types it has no decoder for go to ``gguf.quants.dequantize``.

Source: the GGUF specification, versions 2 and 3 (little-endian), and the block layouts of ``ggml-common.h``.
"""

from __future__ import annotations

import mmap
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from tracer.errors import ModelError

Bytes = NDArray[np.uint8]
Value = str | bool | int | float | list[str] | list[bool] | list[int] | list[float]

_SCALARS: Final[dict[int, np.dtype[Any]]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_STRING: Final = 8
_ARRAY: Final = 9
# About 1 MB of float32: a chunk's temporaries stay in the processor's second-level cache.
CHUNK_ELEMENTS: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a GGUF file; ``shape`` is row-major, outermost dimension first."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    n_bytes: int

    @property
    def n_elements(self) -> int:
        """Number of weights."""
        count = 1
        for size in self.shape:
            count *= size
        return count


class _Cursor:
    """A bounds-checked position in a buffer."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def _take(self, size: int) -> int:
        start = self.at
        if size < 0 or start + size > len(self.data):
            raise ModelError("it ends in the middle of its header")
        self.at = start + size
        return start

    def number(self, form: str) -> int:
        value: int = struct.unpack_from(form, self.data, self._take(struct.calcsize(form)))[0]
        return value

    def string(self) -> str:
        size = self.number("<Q")
        start = self._take(size)
        return self.data[start : start + size].decode("utf-8", errors="replace")

    def scalars(self, kind: int, count: int) -> list[int] | list[float] | list[bool]:
        dtype = _SCALARS.get(kind)
        if dtype is None:
            raise ModelError(f"its metadata holds the unknown value type {kind}")
        start = self._take(dtype.itemsize * count)
        values: list[int] | list[float] | list[bool]
        values = np.frombuffer(self.data, dtype, count, start).tolist()
        return values

    def value(self) -> Value:
        kind = self.number("<I")
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalars(kind, 1)[0]
        item, count = self.number("<I"), self.number("<Q")
        if item == _STRING:
            # Every string takes at least its 8-byte length: refuse counts that cannot be true.
            if count * 8 > len(self.data) - self.at:
                raise ModelError("it ends in the middle of its header")
            return [self.string() for _ in range(count)]
        return self.scalars(item, count)


class GgufFile:
    """An open GGUF file.

    Args:
        path: The file.

    Raises:
        ModelError: The file is not a GGUF file of version 2 or 3, is truncated, or is one part of a split model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Value] = {}
        self.tensors: list[GgufTensor] = []
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read {path}: {error}") from error
        try:
            self._parse()
        except (ModelError, struct.error, OverflowError, MemoryError) as error:
            self._map.close()
            raise ModelError(f"{path} is not a usable GGUF file: {error}; download it again") from error

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the mapping; blocks still in use keep it alive."""
        with suppress(BufferError):
            self._map.close()

    @property
    def architecture(self) -> str:
        """The value of ``general.architecture``, or an empty string."""
        return str(self.metadata.get("general.architecture", ""))

    def _parse(self) -> None:
        cursor = _Cursor(self._map)
        if self._map[:4] != b"GGUF":
            raise ModelError("it does not start with the letters GGUF")
        cursor.at = 4
        version = cursor.number("<I")
        if version not in (2, 3):
            raise ModelError(f"its version is {version}, only little-endian versions 2 and 3 are supported")
        n_tensors, n_values = cursor.number("<Q"), cursor.number("<Q")
        for _ in range(n_values):
            key = cursor.string()
            self.metadata[key] = cursor.value()
        if int(self.number("split.count", 1)) > 1:
            raise ModelError("it is one part of a split model; merge the parts first")
        raw = [self._tensor_entry(cursor) for _ in range(n_tensors)]
        if len({name for name, *_ in raw}) != n_tensors:
            raise ModelError("two of its tensors have the same name")
        alignment = int(self.number("general.alignment", 32))
        if alignment <= 0:
            raise ModelError(f"its alignment is {alignment}")
        start = -(-cursor.at // alignment) * alignment
        self.tensors = [self._placed(name, shape, kind, start + offset) for name, shape, kind, offset in raw]

    @staticmethod
    def _tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
        name = cursor.string()
        n_dims = cursor.number("<I")
        if n_dims > 8:
            raise ModelError(f"its tensor {name!r} has {n_dims} dimensions")
        shape = tuple(cursor.number("<Q") for _ in range(n_dims))[::-1]
        return name, shape, cursor.number("<I"), cursor.number("<Q")

    def _placed(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        try:
            quant = GGMLQuantizationType(kind)
        except ValueError:
            raise ModelError(f"its tensor {name!r} has the unknown type {kind}") from None
        per_block, block_bytes = GGML_QUANT_SIZES[quant]
        tensor = GgufTensor(name, shape, quant, offset, 0)
        if not shape or shape[-1] % per_block:
            raise ModelError(f"its tensor {name!r} has rows that are no multiple of {per_block}")
        n_bytes = tensor.n_elements // per_block * block_bytes
        if offset + n_bytes > len(self._map):
            raise ModelError(f"it is truncated: {len(self._map)} bytes, but tensor {name!r} ends at {offset + n_bytes}")
        return GgufTensor(name, shape, quant, offset, n_bytes)

    def number(self, key: str, default: float | None = None) -> float:
        """Return a numeric metadata value.

        Args:
            key: The metadata key.
            default: What to return when the key is missing.

        Raises:
            ModelError: The key is missing and there is no default, or its value is not a number.
        """
        value = self.metadata.get(key, default)
        if not isinstance(value, (int, float)):
            raise ModelError(f"{self.path}: the GGUF key {key!r} is missing or not a number")
        return value

    def blocks(self, tensor: GgufTensor, start: int, stop: int) -> Bytes:
        """Return blocks ``[start, stop)`` of a tensor, shape ``(stop - start, bytes per block)``."""
        size = GGML_QUANT_SIZES[tensor.kind][1]
        flat = np.frombuffer(self._map, np.uint8, (stop - start) * size, tensor.offset + start * size)
        return flat.reshape(-1, size)

    def chunks(self, tensor: GgufTensor) -> list[tuple[int, int]]:
        """Return block ranges that cover a tensor, each at most ``CHUNK_ELEMENTS`` weights."""
        per_block = GGML_QUANT_SIZES[tensor.kind][0]
        total, step = tensor.n_elements // per_block, CHUNK_ELEMENTS // per_block
        return [(at, min(at + step, total)) for at in range(0, total, step)]
