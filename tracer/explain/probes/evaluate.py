"""What truth probes are worth on a model: accuracy on topics that they have not seen, beside controls and baselines.

The protocol is that of Bürger et al. 2024 (arXiv:2407.12831): one topic is left out, affirmative and negated statements
together; a probe learns from equally many rows of each other set, the negated ones being negations of the affirmative
ones; rows are drawn twenty times. Nothing is centred, scaled or chosen by the topic that is left out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from tracer.errors import InputError, UnknownNameError
from tracer.explain.probes.calibration import fit_calibration
from tracer.explain.probes.controls import TEXT, control_scores, text_scores, trainer
from tracer.explain.probes.directions import truth_directions
from tracer.explain.probes.examples import Floats, one_thread
from tracer.explain.probes.fit import KINDS
from tracer.explain.probes.held_out import (
    CHOICE,
    REPEATS,
    Material,
    Watch,
    by_what,
    choice_fits,
    choose_layers,
    equal_rows,
    left_out,
    topic_folds,
)
from tracer.explain.probes.metrics import accuracy, auroc, density, estimate, mean_draws, roc
from tracer.trace.probe_report import Evaluation, LayerResult, MethodResult, Picture, Projection, TopicResult

METHODS = ("ttpd", "logistic", "logistic_l2", "mass_mean", "ccs")
"""Kinds of probes that are compared by default."""
SWEPT = ("ttpd", "logistic_l2", "mass_mean")
"""Those that are fitted at every layer."""
SLOW_REPEATS = 5
"""Most draws of training rows for CCS, each of which takes seconds."""
LAYER_REPEATS = 2
"""Draws of training rows at every layer; the layer that was chosen gets all."""
LAYER_DRAWS = 200
"""Bootstrap samples for the interval at every layer."""
_POINTS = 2000
"""Most points of a scatter that is kept for a picture."""
_NEEDS_NEGATIONS = frozenset({"ttpd", "ccs"})
_SLOW = frozenset({"ccs"})


def evaluate(
    material: Material,
    *,
    model: str | None = None,
    source: str = "",
    methods: Sequence[str] = METHODS,
    layer: int | None = None,
    swept: Sequence[int] | None = None,
    repeats: int = REPEATS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    cancel: threading.Event | None = None,
) -> Evaluation:
    """Leave every topic out in turn; where there are fewer than three, groups of entities.

    Args:
        material: Statements with hidden states.
        model: Name of the model.
        source: Where the statements came from.
        methods: Kinds of probes.
        layer: The layer to judge at; chosen on training topics if not given.
        swept: Layers for the picture of accuracy by layer; all if not given.
        repeats: Draws of training rows.
        seed: For everything drawn at random.
        progress: Told fits done and their total.
        cancel: Ends the work between two fits.

    Raises:
        InputError: There are too few topics and entities, one topic has only one label, or no method fits them.
        UnknownNameError: There is no such method or layer.
        CancelledError: ``cancel`` was set.
    """
    if repeats < 1:
        raise InputError(f"repeats must be 1 or more, found {repeats}")
    material, left_out_name = by_what(material, seed=seed)
    own, notes = _usable(methods, material)
    count = len(material.topics)
    swept = material.layers if swept is None else tuple(swept)
    sweeping = [name for name in own if name in SWEPT]
    draws = {name: min(repeats, SLOW_REPEATS) if name in _SLOW else repeats for name in own}
    fits = count * (sum(draws.values()) + 3 * repeats + len(swept) * len(sweeping) * min(LAYER_REPEATS, repeats))
    if layer is None:
        fits += choice_fits(material, topic_folds(count, seed=seed))
    watch = Watch(progress, cancel, fits)
    chosen, layers = _layers(material, layer, seed, watch)
    run = partial(left_out, material, repeats=repeats, seed=seed, watch=watch)
    scores = {
        name: left_out(material, trainer(name), layers, repeats=draws[name], seed=seed, watch=watch) for name in own
    }
    notes = (*notes, *(f"{name} with {number} repeats" for name, number in draws.items() if number < repeats))
    controls = control_scores(CHOICE if CHOICE in own else own[0], material, layers, run)
    text = text_scores(material, repeats=repeats, seed=seed)
    return Evaluation(
        model=model,
        source=source,
        statements=len(material.statements),
        left_out=left_out_name,
        topics=material.topics,
        normalisation=material.normalisation,
        repeats=repeats,
        seed=seed,
        layers=material.layers,
        chosen_layer=chosen,
        layer_choice="given" if layer is not None else f"by the AUROC of {CHOICE} on training topics only",
        methods=tuple(_result(name, found, material, layers, seed) for name, found in scores.items()),
        controls=(
            *(_result(name, item.scores, material, item.layers, seed) for name, item in controls.items()),
            _result(TEXT, text, material, None, seed),
        ),
        by_layer=tuple(_by_layer(material, sweeping, swept, min(LAYER_REPEATS, repeats), seed, watch)),
        pictures=tuple(_picture(name, found, material, seed) for name, found in scores.items()),
        projection=_projection(material, layers, seed),
        sinks=int(material.activations.sink[:, material.layers.index(chosen)].sum()),
        notes=notes,
    )


def _usable(methods: Sequence[str], material: Material) -> tuple[list[str], tuple[str, ...]]:
    """Methods that these statements allow, and why others are missing."""
    for name in methods:
        if name not in KINDS:
            raise UnknownNameError("kind of probe", name, KINDS)
    examples = material.examples
    lacking = [
        name
        for number, name in enumerate(material.topics)
        if not (examples.partners[examples.topics == number] >= 0).any()
    ]
    own = [name for name in dict.fromkeys(methods) if not (lacking and name in _NEEDS_NEGATIONS)]
    if not own:
        raise InputError(f"{', '.join(methods)} need statements with their negations; {lacking[0]!r} has none")
    left = [name for name in methods if name not in own]
    return own, (f"left out, as {lacking[0]!r} has no negations: {', '.join(left)}",) if left else ()


def _layers(material: Material, layer: int | None, seed: int, watch: Watch) -> tuple[int, dict[int, int]]:
    """The best layer, and one for each topic that was chosen without it."""
    count = len(material.topics)
    if layer is not None:
        if layer not in material.layers:
            raise UnknownNameError("layer of these activations", str(layer), map(str, material.layers))
        return layer, dict.fromkeys(range(count), layer)
    folds = topic_folds(count, seed=seed)
    best, chosen = choose_layers(material, folds, seed=seed, watch=watch)
    return best, {int(topic): own for fold, own in zip(folds, chosen, strict=True) for topic in fold}


def _result(name: str, scores: Floats, material: Material, layers: Mapping[int, int] | None, seed: int) -> MethodResult:
    """Scores ``(repeats, rows)`` as means over topics, with the spread over repeats and intervals over entities."""
    examples = material.examples
    topics: list[TopicResult] = []
    accuracies, areas, sides = [], [], []
    for number, topic in enumerate(material.topics):
        rows = np.flatnonzero(examples.topics == number)
        own, labels, negated = scores[:, rows], examples.labels[rows], examples.negated[rows]
        right = np.array([accuracy(line, labels) for line in own])
        area = np.array([auroc(line, labels) for line in own], dtype=np.float64)
        affirmative, denied = (
            float(np.mean([accuracy(line[side], labels[side]) for line in own])) if side.any() else None
            for side in (~negated, negated)
        )
        topics.append(
            TopicResult(
                topic=topic,
                layer=None if layers is None else layers[number],
                accuracy=float(right.mean()),
                accuracy_sd=_spread(right),
                auroc=float(area.mean()),
                affirmative=affirmative,
                negated=denied,
            )
        )
        accuracies.append(right)
        areas.append(area)
        sides.append((affirmative, denied))
    mean_right, mean_area = np.stack(accuracies).mean(0), np.stack(areas).mean(0)
    entities = [(item.topic, item.entity) for item in material.statements]
    drawn_accuracy, drawn_area = mean_draws(scores, examples.labels, examples.topics, entities, seed=seed)
    affirmative, denied = (_mean([side[place] for side in sides]) for place in (0, 1))
    return MethodResult(
        name=name,
        rows=len(material.statements),
        accuracy=estimate(float(mean_right.mean()), drawn_accuracy),
        auroc=estimate(float(mean_area.mean()), drawn_area),
        accuracy_sd=_spread(mean_right),
        auroc_sd=_spread(mean_area),
        affirmative=affirmative,
        negated=denied,
        topics=tuple(topics),
    )


def _by_layer(
    material: Material, methods: Sequence[str], layers: Sequence[int], repeats: int, seed: int, watch: Watch
) -> list[LayerResult]:
    found: list[LayerResult] = []
    examples = material.examples
    entities = [(item.topic, item.entity) for item in material.statements]
    members = [np.flatnonzero(examples.topics == number) for number in range(len(material.topics))]
    for layer in layers:
        where = dict.fromkeys(range(len(material.topics)), layer)
        for method in methods:
            scores = left_out(material, trainer(method), where, repeats=repeats, seed=seed, watch=watch)
            right = np.array(
                [np.mean([accuracy(line[rows], examples.labels[rows]) for rows in members]) for line in scores]
            )
            area = np.array(
                [[auroc(line[rows], examples.labels[rows]) for rows in members] for line in scores], dtype=np.float64
            )
            drawn = mean_draws(scores, examples.labels, examples.topics, entities, seed=seed, draws=LAYER_DRAWS)
            found.append(
                LayerResult(
                    method=method,
                    layer=layer,
                    accuracy=estimate(float(right.mean()), drawn[0]),
                    accuracy_sd=_spread(right),
                    auroc=estimate(float(area.mean()), drawn[1]),
                )
            )
    return found


def _picture(name: str, scores: Floats, material: Material, seed: int) -> Picture:
    labels = material.labels
    mean = scores.mean(0)
    calibration = fit_calibration(mean, labels, [item.topic for item in material.statements], seed=seed)
    return Picture(
        method=name,
        roc=roc(mean, labels),
        reliability=calibration.reliability,
        density=density(mean, labels),
    )


def _projection(material: Material, layers: Mapping[int, int], seed: int) -> Projection | None:
    """Every topic on the truth directions of the others; nothing without negated statements."""
    first = material.examples
    if not first.negated.any() or first.negated.all():
        return None
    count = len(material.statements)
    places = np.zeros((count, 2))
    rng = np.random.default_rng(seed)
    for topic, layer in layers.items():
        examples = material.at(layer)
        rows = equal_rows(examples, [other for other in layers if other != topic], rng)
        with one_thread():
            directions = np.stack(truth_directions(examples.take(rows)))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        test = examples.topics == topic
        places[test] = examples.values[test].astype(np.float64) @ directions.T
    shown = np.sort(rng.permutation(count)[:_POINTS])
    return Projection(
        truth=tuple(places[shown, 0].tolist()),
        polarity_sensitive=tuple(places[shown, 1].tolist()),
        label=tuple(first.labels[shown].tolist()),
        negated=tuple(first.negated[shown].tolist()),
        topic=tuple(material.statements[row].topic for row in shown),
    )


def _spread(values: Floats) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
