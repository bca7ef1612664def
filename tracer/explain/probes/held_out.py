"""Leaving topics out: what probes say about statements whose topic had no part in them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from tracer.errors import CancelledError, InputError
from tracer.explain.probes.examples import Examples, Flags, Floats, Normalisation, normalise, topics_of
from tracer.explain.probes.fit import fit, score
from tracer.explain.probes.metrics import auroc
from tracer.explain.probes.probe import Probe
from tracer.explain.probes.statements import Indices, Statement

if TYPE_CHECKING:
    from tracer.explain.probes.activations import Activations

REPEATS = 20
"""Draws of training rows (Bürger et al. 2024)."""
CHOICE = "logistic_l2"
"""The kind of probe by which a layer is chosen; it is fast, and the best across topics that was measured."""
_FOLDS = 4
"""Groups of topics between which a layer is chosen."""
_FEWEST = 3
"""Topics without which none can be left out: one to judge by, one to choose a layer by, one to learn from."""

Trainer = Callable[[Examples, int], Probe]
"""Fits a probe to examples, with a seed."""


@dataclass(slots=True)
class Watch:
    """Tells how far a long evaluation is, and stops it where somebody asks.

    Args:
        progress: Told fits done and their total.
        cancel: Ends the work between two fits.
        total: Fits that are to be made.
    """

    progress: Callable[[int, int], None] | None = None
    cancel: threading.Event | None = None
    total: int = 0
    _done: int = field(default=0, init=False)

    def step(self) -> None:
        """One more fit.

        Raises:
            CancelledError: ``cancel`` is set.
        """
        if self.cancel is not None and self.cancel.is_set():
            raise CancelledError("stopped; hidden states that were extracted are kept")
        self._done += 1
        if self.progress is not None:
            self.progress(self._done, max(self.total, self._done))


@dataclass(frozen=True, eq=False)
class Material:
    """Statements with their hidden states, as probes read them.

    Args:
        statements: ``rows`` of them.
        activations: Their hidden states ``(rows, layers, width)``.
        normalisation: What is done to the hidden states first.
    """

    statements: Sequence[Statement]
    activations: Activations
    normalisation: Normalisation = "rms"

    @cached_property
    def topics(self) -> tuple[str, ...]:
        """Names of the topics, in the order of their numbers."""
        return topics_of(self.statements)

    @cached_property
    def examples(self) -> Examples:
        """The examples behind the first layer, as they came: for what does not depend on the layer."""
        return Examples.of(self.statements, self.activations.values[:, 0])

    @property
    def labels(self) -> Flags:
        """Whether each statement is true, ``(rows,)``."""
        return self.examples.labels

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that there are hidden states of."""
        return self.activations.layers

    def at(self, layer: int) -> Examples:
        """The examples behind one layer.

        Raises:
            UnknownNameError: It was not extracted.
        """
        return self.examples.with_values(normalise(self.activations.at(layer), self.normalisation))


def by_what(material: Material, *, seed: int = 0) -> tuple[Material, str]:
    """Material whose topics can be left out in turn, and what is left out.

    With fewer than three topics groups of entities take their place: what is left out is then not another kind of
    statement, only another thing that it is about.

    Raises:
        InputError: There are too few entities, or a topic or group has only one label.
    """
    left_out = "topic"
    if len(material.topics) < _FEWEST:
        left_out = "group of entities"
        entities = sorted({(item.topic, item.entity) for item in material.statements})
        if len(entities) < 2 * _FOLDS:
            raise InputError(
                f"{len(material.topics)} topics with {len(entities)} entities are too few to hold any out; give three "
                f"topics or more, or statements about {2 * _FOLDS} entities or more"
            )
        order = np.random.default_rng(seed).permutation(len(entities))
        group = {entities[place]: f"group {number % _FOLDS + 1}" for number, place in enumerate(order)}
        statements = [replace(item, topic=group[item.topic, item.entity]) for item in material.statements]
        material = Material(statements, material.activations, material.normalisation)
    for name in material.topics:
        labels = {item.label for item in material.statements if item.topic == name}
        if len(labels) == 1:
            raise InputError(f"all statements of the {left_out} {name!r} have the same label; add some of the other")
    return material, left_out


def topic_folds(count: int, *, seed: int = 0, folds: int = _FOLDS) -> list[Indices]:
    """Numbers of topics in at most so many groups of about equal size."""
    order = np.random.default_rng(seed).permutation(count)
    return [np.sort(order[number::folds]) for number in range(min(folds, count))]


def choice_fits(material: Material, folds: Sequence[Indices]) -> int:
    """How many fits `choose_layers` makes."""
    return len(material.layers) * len(folds) * (len(folds) - 1) // 2


def equal_rows(examples: Examples, topics: Iterable[int], rng: np.random.Generator) -> Indices:
    """Rows to learn from: from each topic equally many affirmative statements, and their negations.

    Where a negation is missing another negated statement takes its place.
    """
    rows: list[Indices] = []
    wanted = list(topics)
    sizes = {negated: _sizes(examples, wanted, negated) for negated in (False, True)}
    for topic in wanted:
        own = examples.topics == topic
        chosen = rng.permutation(np.flatnonzero(own & ~examples.negated))[: sizes[False]]
        twins = examples.partners[chosen]
        denied = rng.permutation(np.flatnonzero(own & examples.negated))
        # Twins come first, whatever else there is comes behind them.
        first = np.isin(denied, twins)
        rows += [chosen, np.concatenate([denied[first], denied[~first]])[: sizes[True]]]
    return np.concatenate(rows)


def _sizes(examples: Examples, topics: Sequence[int], negated: bool) -> int:
    counts = [int(((examples.topics == topic) & (examples.negated == negated)).sum()) for topic in topics]
    return min((count for count in counts if count), default=0)


def choose_layers(
    material: Material, folds: Sequence[Indices], *, seed: int = 0, watch: Watch | None = None
) -> tuple[int, tuple[int, ...]]:
    """A layer for a probe of all topics, and for each fold one that its topics had no part in choosing.

    For every two folds a probe learns from all others and is judged, by AUROC, on each of the two. What it says about
    one counts for the choice on behalf of the other. With three folds or fewer a fold is judged by one other.

    Returns:
        The layer with the best mean over all folds, and the layer for each fold.
    """
    watch = watch or Watch()
    # found[layer, judged, left out as well]
    found = np.full((len(material.layers), len(folds), len(folds)), np.nan)
    for place, layer in enumerate(material.layers):
        examples = material.at(layer)
        for one in range(len(folds)):
            for other in range(one):
                held = np.concatenate([folds[one], folds[other]])
                learnt = [topic for topic in range(len(material.topics)) if topic not in held]
                watch.step()
                rows = equal_rows(examples, learnt, np.random.default_rng(seed))
                probe = fit(CHOICE, examples.take(rows), seed=seed)
                found[place, one, other] = _mean_auroc(probe, examples, folds[one])
                found[place, other, one] = _mean_auroc(probe, examples, folds[other])
    best = np.nanmean(found, axis=(1, 2)).argmax()
    chosen = tuple(material.layers[int(np.nanmean(found[:, :, fold], axis=1).argmax())] for fold in range(len(folds)))
    return material.layers[int(best)], chosen


def _mean_auroc(probe: Probe, examples: Examples, topics: Indices) -> float:
    areas = []
    for topic in topics:
        rows = np.flatnonzero(examples.topics == topic)
        areas.append(auroc(probe.score(examples.values[rows]), examples.labels[rows]))
    return float(np.mean([area for area in areas if area is not None]))


def left_out(
    material: Material,
    train: Trainer,
    layers: Mapping[int, int],
    *,
    repeats: int = REPEATS,
    seed: int = 0,
    watch: Watch | None = None,
) -> Floats:
    """Scores of every statement by probes that learnt from other topics only.

    Args:
        material: The statements.
        train: Fits a probe.
        layers: The layer for each topic, by its number, chosen without it.
        repeats: How often training rows are drawn.
        seed: Decides the draws.
        watch: Told of every fit.

    Returns:
        ``(repeats, rows)``, in units of the spread of the scores of the training rows.
    """
    watch = watch or Watch()
    scores = np.full((repeats, len(material.statements)), np.nan)
    for layer in sorted(set(layers.values())):
        examples = material.at(layer)
        for topic in (number for number, own in layers.items() if own == layer):
            test = np.flatnonzero(examples.topics == topic)
            others = [number for number in range(len(material.topics)) if number != topic]
            for repeat in range(repeats):
                watch.step()
                # The same rows for every method: their differences are theirs.
                rows = equal_rows(examples, others, np.random.default_rng([seed, repeat, topic]))
                learnt = examples.take(rows)
                probe = train(learnt, seed + repeat).rescaled(learnt.values)
                scores[repeat, test] = score(probe, examples.take(test))
    return scores
