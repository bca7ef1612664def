"""Making a probe from a model's name: loading it, reading its hidden states, fitting; the model is loaded once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pydantic import JsonValue

from tracer.engines.loading import fast_dtype
from tracer.engines.weights.cache import cache_dir
from tracer.explain.probes.activations import extract
from tracer.explain.probes.examples import Normalisation
from tracer.explain.probes.held_out import Material
from tracer.explain.probes.saved import SavedProbe
from tracer.explain.probes.statements import Statement
from tracer.explain.probes.train import train
from tracer.replay.model import Replica, identity_of


class Stage(NamedTuple):
    """How far a part of the work is, as progress bars take it."""

    stage: str
    done: int
    total: int


@dataclass(slots=True)
class Work:
    """What the parts of the work share; the model is loaded once, when it is first needed.

    Args:
        model: Name of the model.
        dtype: Precision; ``None`` takes what is fast here.
        prefix: Stands before every statement.
        normalisation: What is done to hidden states first.
        seed: For everything drawn at random.
        bar: Shown how far the work is, by whatever has ``stage``, ``done`` and ``total``.
        cancel: Ends it.
    """

    model: str
    dtype: str | None
    prefix: str
    normalisation: Normalisation
    seed: int
    bar: Callable[[object], None] | None
    cancel: threading.Event
    _replica: Replica | None = field(default=None, init=False)

    def replica(self) -> Replica:
        """The model."""
        if self._replica is None:
            self._replica = Replica.load(self.model, dtype=self.dtype or fast_dtype(), progress=self.bar)
        return self._replica

    def identity(self) -> Mapping[str, JsonValue]:
        """Identity of the model, by which its probes are found again."""
        return identity_of(self.replica())

    def progress(self, stage: str) -> Callable[[int, int], None] | None:
        """Shows how far a part of the work is."""
        bar = self.bar
        return None if bar is None else lambda done, total: bar(Stage(stage, done, total))

    def material(self, statements: Sequence[Statement]) -> Material:
        """Statements with their hidden states; what was extracted before is read from the cache."""
        activations = extract(
            self.replica(),
            [self.prefix + item.text for item in statements],
            folder=cache_dir() / "activations",
            progress=self.progress("hidden states of statements"),
            cancel=self.cancel,
        )
        return Material(statements, activations, self.normalisation)


def make_probe(work: Work, statements: Sequence[Statement], *, kind: str, source: str) -> SavedProbe:
    """A truth probe for a model, not saved yet.

    Args:
        work: The model, and how its hidden states are read.
        statements: What it learns from.
        kind: What kind of probe.
        source: Where the statements came from.

    Raises:
        InputError: The model cannot be used, or there are too few topics.
        UnknownNameError: There is no such kind.
        CancelledError: Somebody stopped it; hidden states that were extracted are kept.
    """
    material = work.material(statements)
    return train(
        material,
        identity=work.identity(),
        kind=kind,
        prefix=work.prefix,
        source=source,
        seed=work.seed,
        progress=work.progress("fitting probes"),
        cancel=work.cancel,
    )
