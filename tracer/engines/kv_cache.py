"""Key-value caches: one that grows in place, batches of rows of different lengths, and prefixes kept between calls.

Rows of a batch are aligned at their right end, so that all of them write their next token into the same column; the
columns before a row's first token are zeros that an attention mask hides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import Cache, DynamicLayer

_ROOM = 256
"""Columns that a full buffer grows by, at least."""
_MAX_PREFIXES = 64
"""Prefixes that are kept; every look-up compares with each of them."""


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values as views of larger buffers, so that a new token costs no copy of the old ones.

    Args:
        room: Columns to leave free behind the first ones.
    """

    def __init__(self, *, room: int = _ROOM) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._buffers: list[torch.Tensor] = []
        self._room = room
        self.columns = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the buffers once shapes and types are known."""
        self.dtype, self.device = key_states.dtype, key_states.device
        columns = key_states.shape[-2] + self._room
        self._buffers = [_empty(states, columns) for states in (key_states, value_states)]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add columns; returns all keys and all values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.columns, self.columns + key_states.shape[-2]
        if end > self._buffers[0].shape[-2]:
            grown = end + max(_ROOM, end // 4)
            for index, old in enumerate(self._buffers):
                buffer = _empty(old, grown)
                buffer[:, :, :start] = old[:, :, :start]
                self._buffers[index] = buffer
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        return self._show(end)

    def fill(self, pieces: Sequence[tuple[torch.Tensor, torch.Tensor] | None], columns: int) -> None:
        """Start with rows that have keys and values already, aligned at the right.

        Args:
            pieces: For each row ``(1, heads, columns or fewer, width)`` twice, or ``None`` for nothing.
            columns: Columns of the longest.
        """
        like = next(piece for piece in pieces if piece is not None)
        self.dtype, self.device = like[0].dtype, like[0].device
        self._buffers = [_empty(part, columns + self._room, rows=len(pieces)) for part in like]
        for index, buffer in enumerate(self._buffers):
            for row, piece in enumerate(pieces):
                start = columns if piece is None else columns - piece[index].shape[-2]
                # Hidden columns must hold numbers: a mask turns them into zero weight, and 0 x NaN is NaN.
                buffer[row, :, :start] = 0
                if piece is not None:
                    buffer[row, :, start:columns] = piece[index][0]
        self.is_initialized = True
        self._show(columns)

    def keep(self, rows: torch.Tensor, first_column: int) -> None:
        """Drop all rows but these, and the columns before ``first_column``."""
        columns = self.columns - first_column
        for index, old in enumerate(self._buffers):
            buffer = _empty(old, columns + _ROOM, rows=len(rows))
            buffer[:, :, :columns] = old[rows, :, first_column : self.columns]
            self._buffers[index] = buffer
        self._show(columns)

    def _show(self, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.columns = columns
        keys, values = (buffer[:, :, :columns] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values


def _empty(like: torch.Tensor, columns: int, *, rows: int | None = None) -> torch.Tensor:
    return like.new_empty((like.shape[0] if rows is None else rows, like.shape[1], columns, like.shape[3]))


@dataclass(frozen=True, slots=True)
class Prefix:
    """Keys and values of one sequence of tokens, never written to.

    ``layers`` holds a pair ``(keys, values)`` for each layer, both ``(1, heads, len(token_ids), width)``.
    """

    token_ids: NDArray[np.int64]
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    size: int = field(init=False)
    """Bytes of keys and values."""

    def __post_init__(self) -> None:
        size = sum(part.element_size() * part.nelement() for layer in self.layers for part in layer)
        object.__setattr__(self, "size", size)

    def cut(self, length: int) -> Prefix:
        """The first ``length`` tokens, without a copy."""
        if length == len(self.token_ids):
            return self
        layers = tuple((keys[:, :, :length], values[:, :, :length]) for keys, values in self.layers)
        return Prefix(self.token_ids[:length], layers)


class PrefixStore:
    """The prefixes of recent calls, least recently used out first.

    Args:
        max_bytes: How much to keep; the newest prefix stays even where it alone is larger.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: list[Prefix] = []

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, token_ids: NDArray[np.int64]) -> Prefix | None:
        """The longest kept beginning of ``token_ids``."""
        lengths = [common_length(entry.token_ids, token_ids) for entry in self._entries]
        longest = max(lengths, default=0)
        if longest == 0:
            return None
        # The newest of equally good ones: older ones may age out.
        index = len(lengths) - 1 - lengths[::-1].index(longest)
        entry = self._entries.pop(index)
        self._entries.append(entry)
        return entry.cut(longest)

    def add(self, prefix: Prefix) -> None:
        """Keep a prefix instead of those that it continues."""
        if self._max_bytes <= 0 or not len(prefix.token_ids):
            return
        self._entries = [
            entry for entry in self._entries if common_length(entry.token_ids, prefix.token_ids) < len(entry.token_ids)
        ]
        self._entries.append(prefix)
        total = sum(entry.size for entry in self._entries)
        while len(self._entries) > 1 and (total > self._max_bytes or len(self._entries) > _MAX_PREFIXES):
            total -= self._entries.pop(0).size

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()


def common_length(left: NDArray[np.int64], right: NDArray[np.int64]) -> int:
    """How many tokens two sequences have in common at their start."""
    size = min(len(left), len(right))
    different = np.flatnonzero(left[:size] != right[:size])
    return int(different[0]) if len(different) else size


class Batch:
    """Rows that are extended together.

    Args:
        prefixes: What each row has seen; the same prefix may occur many times.
        layers: How many layers the model has.
        room: Columns to leave free.
    """

    def __init__(self, prefixes: Sequence[Prefix], *, layers: int, room: int = _ROOM) -> None:
        lengths = [len(prefix.token_ids) for prefix in prefixes]
        self._starts = [max(lengths) - length for length in lengths]
        self._layers = [GrowingLayer(room=room) for _ in range(layers)]
        if max(lengths):
            for index, layer in enumerate(self._layers):
                layer.fill([prefix.layers[index] if prefix.layers else None for prefix in prefixes], max(lengths))
        self.cache = Cache(layers=list(self._layers))

    @property
    def columns(self) -> int:
        """How many columns are filled."""
        return self._layers[0].columns

    def inputs(self, new: int, device: torch.device) -> dict[str, torch.Tensor | Cache | None]:
        """What the model needs beside the ids to extend every row by ``new`` tokens.

        Returns:
            The cache, ``position_ids`` ``(rows, new)``, and ``attention_mask`` ``(rows, columns + new)`` or ``None``
            where no row has padding, which the model can use for a faster path.
        """
        total = self.columns + new
        starts = torch.tensor(self._starts, device=device)
        positions = torch.arange(self.columns, total, device=device)[None] - starts[:, None]
        mask = None
        if any(self._starts):
            mask = (torch.arange(total, device=device)[None] >= starts[:, None]).long()
        return {"past_key_values": self.cache, "position_ids": positions, "attention_mask": mask}

    def keep(self, rows: Sequence[int], device: torch.device) -> None:
        """Drop all rows but these, so that the others cost nothing any more."""
        first_column = min(self._starts[row] for row in rows)
        selected = torch.tensor(list(rows), device=device)
        for layer in self._layers:
            layer.keep(selected, first_column)
        self._starts = [self._starts[row] - first_column for row in rows]

    def prefix(self, row: int, token_ids: Sequence[int] | NDArray[np.int64]) -> Prefix:
        """What a row has seen: its last ``len(token_ids)`` columns.

        The tensors of an only row are shared, not copied: do not extend the batch after that.
        """
        start = self._starts[row]
        alone = len(self._starts) == 1
        layers = []
        for layer in self._layers:
            keys, values = layer.keys, layer.values
            assert keys is not None and values is not None  # noqa: S101 - filled since the first forward pass
            pair = keys[row : row + 1, :, start:], values[row : row + 1, :, start:]
            layers.append(pair if alone else (pair[0].clone(), pair[1].clone()))
        return Prefix(np.asarray(token_ids, dtype=np.int64), tuple(layers))
