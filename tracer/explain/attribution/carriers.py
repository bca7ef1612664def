"""Carrying the targets' shares down through the layers, from the top one to the input, for all targets at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from pydantic import JsonValue

from tracer.explain.attribution.tree_attention import Block

TINY = 1e-30
"""Shares below this are dropped: denormal numbers slow products down and say nothing."""


class Carrier(ABC):
    """Carries the targets' shares down through the layers by one method."""

    @abstractmethod
    def needed(self, layer: int) -> torch.Tensor:
        """Tokens whose rows of a layer are read, ``(tokens,)`` of bool."""

    @abstractmethod
    def cross(self, layer: int, block: Block) -> None:
        """Read a block of a layer's matrix."""

    def descend(self) -> None:
        """All blocks of a layer have been read."""
        return

    @abstractmethod
    def shares(self) -> torch.Tensor:
        """The result, ``(tokens, targets)``."""

    def details(self, number: int) -> Mapping[str, JsonValue]:
        """What else is known of a target."""
        return {}


class Product(Carrier):
    """e times the product over layers, the top one first, of (1 - passing) A + passing I.

    Half passes by in rollout (Abnar & Zuidema 2020, section 3.1), nothing in the cumulative product.
    """

    def __init__(self, starts: torch.Tensor, *, passing: float) -> None:
        self._state = starts.clone()
        self._received = torch.zeros_like(starts)
        self._passing = passing

    def needed(self, layer: int) -> torch.Tensor:
        """Tokens that hold a share, ``(tokens,)`` of bool."""
        return self._state.any(1)

    def cross(self, layer: int, block: Block) -> None:
        """Hand the shares of a block's rows to its columns."""
        self._received.index_add_(0, block.columns, block.weights.T @ self._state[block.rows])

    def descend(self) -> None:
        """Go on with what was handed down, and what passed by."""
        moved = self._received.mul_(1 - self._passing).add_(self._state, alpha=self._passing)
        self._received = self._state.zero_()
        self._state = moved.masked_fill_(moved.abs() < TINY, 0)

    def shares(self) -> torch.Tensor:
        """What has come down so far, ``(tokens, targets)``."""
        return self._state
