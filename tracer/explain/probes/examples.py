"""Labelled hidden states: what probes are fitted on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from tracer.errors import InputError
from tracer.explain.probes.statements import Indices, Statement, partners

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Normalisation = Literal["none", "rms"]
NORMALISATIONS: tuple[Normalisation, ...] = get_args(Normalisation)
"""``rms`` divides every hidden state by its root mean square, so that attention sinks are as long as all others."""


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Hidden states behind one layer, and what is known of each.

    Args:
        values: ``(rows, width)``.
        labels: Whether the statement is true, ``(rows,)``.
        negated: Whether it denies something, ``(rows,)``.
        topics: Number of its topic, ``(rows,)``.
        partners: Row of its negation, or of what it negates, -1 where that is not among the rows, ``(rows,)``.
    """

    values: NDArray[np.float32]
    labels: Flags
    negated: Flags
    topics: Indices
    partners: Indices

    @classmethod
    def of(cls, statements: Sequence[Statement], values: NDArray[np.float32]) -> Examples:
        """Examples of statements, in their order; topics are numbered as `topics_of` has them.

        Raises:
            InputError: There are not as many rows as statements.
        """
        if len(statements) != len(values):
            raise InputError(f"{len(values)} hidden states cannot belong to {len(statements)} statements")
        names = topics_of(statements)
        return cls(
            values,
            np.array([item.label for item in statements], dtype=np.bool_),
            np.array([item.negated for item in statements], dtype=np.bool_),
            np.array([names.index(item.topic) for item in statements], dtype=np.int64),
            partners(statements),
        )

    def take(self, rows: Indices) -> Examples:
        """Some of the rows, each at most once, in the order given."""
        places = np.full(len(self.labels) + 1, -1, dtype=np.int64)
        places[rows] = np.arange(len(rows))
        # The last place stands for row -1, which is none.
        return Examples(
            self.values[rows],
            self.labels[rows],
            self.negated[rows],
            self.topics[rows],
            places[self.partners[rows]],
        )

    def with_values(self, values: NDArray[np.float32]) -> Examples:
        """The same statements behind another layer, or normalised."""
        return Examples(values, self.labels, self.negated, self.topics, self.partners)

    def with_labels(self, labels: Flags) -> Examples:
        """The same hidden states with other labels."""
        return Examples(self.values, labels, self.negated, self.topics, self.partners)

    @property
    def sets(self) -> Indices:
        """Number of the data set of each row, topic and polarity together, ``(rows,)``."""
        found: Indices = 2 * self.topics + self.negated
        return found


def topics_of(statements: Sequence[Statement]) -> tuple[str, ...]:
    """The topics of statements, sorted."""
    return tuple(sorted({item.topic for item in statements}))


def normalise(values: NDArray[np.float32], how: Normalisation) -> NDArray[np.float32]:
    """Hidden states ``(..., width)`` on the scale that a probe reads them on.

    Raises:
        InputError: There is no such way.
    """
    if how == "none":
        return values
    if how != "rms":
        raise InputError(f"unknown normalisation {how!r}; use one of {', '.join(NORMALISATIONS)}")
    scale = np.sqrt(np.mean(np.square(values, dtype=np.float64), axis=-1, keepdims=True))
    found: NDArray[np.float32] = (values / np.maximum(scale, np.finfo(np.float32).tiny)).astype(np.float32)
    return found


def centred(values: Floats, sets: Indices) -> Floats:
    """Rows less the mean of their own data set, ``(rows, width)``."""
    found = np.empty_like(values)
    for number in np.unique(sets):
        own = sets == number
        found[own] = values[own] - values[own].mean(0)
    return found


def signs(flags: Flags) -> Floats:
    """+1 for true and -1 for false."""
    return np.where(flags, 1.0, -1.0)


@lru_cache(maxsize=1)
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


@contextmanager
def one_thread() -> Iterator[None]:
    """One BLAS thread: several only wait for each other on matrices as small as these."""
    with _controller().limit(limits=1, user_api="blas"):
        yield
