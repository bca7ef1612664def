"""The default truth probe of a model: made once, judged on topics that it did not see, kept for later traces."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial

import numpy as np
from pydantic import JsonValue

from tracer.explain.probes.calibration import fit_calibration
from tracer.explain.probes.controls import TEXT, control_scores, text_scores, trainer
from tracer.explain.probes.examples import Floats
from tracer.explain.probes.fit import fit
from tracer.explain.probes.held_out import (
    CHOICE,
    Material,
    Watch,
    by_what,
    choice_fits,
    choose_layers,
    left_out,
    topic_folds,
)
from tracer.explain.probes.metrics import measure
from tracer.explain.probes.places import Position
from tracer.explain.probes.saved import STATEMENTS, ProbeRecord, SavedProbe, Training, mark
from tracer.explain.probes.statements import Indices, fingerprint
from tracer.trace.probe_report import HeldOut, Measured

KIND = "logistic_l2"
"""The default kind: the best on topics that it had not seen, of those that were measured."""
PREFIX = "Here is a statement. "
"""Stands before every statement: the last token of a short text alone is often an attention sink."""
FACTS_PER_TOPIC = 12
"""Facts of each topic for the default probe, four statements each: about a minute of work for the demo model."""
POSITION: Position = "last"


def train(
    material: Material,
    *,
    identity: Mapping[str, JsonValue],
    kind: str = KIND,
    name: str = STATEMENTS,
    prefix: str = "",
    source: str = "tracer's own statements",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    cancel: threading.Event | None = None,
) -> SavedProbe:
    """Choose a layer, judge the probe on topics that had no part in it, calibrate it, and fit it on all statements.

    Args:
        material: Statements with hidden states.
        identity: Identity of the replica that the hidden states came from.
        kind: What kind of probe.
        name: Its name.
        prefix: What stood before each statement.
        source: Where the statements came from.
        seed: For everything drawn at random.
        progress: Told fits done and their total.
        cancel: Ends the work between two fits.

    Raises:
        InputError: There are too few topics and entities, one topic has only one label, or the kind does not fit.
        UnknownNameError: There is no such kind.
        CancelledError: ``cancel`` was set.
    """
    own = material.statements
    material, left = by_what(material, seed=seed)
    count = len(material.topics)
    folds = topic_folds(count, seed=seed)
    watch = Watch(progress, cancel, choice_fits(material, folds) + 4 * count)
    layer, chosen = choose_layers(material, folds, seed=seed, watch=watch)
    layers = {int(topic): number for fold, number in zip(folds, chosen, strict=True) for topic in fold}
    run = partial(left_out, material, repeats=1, seed=seed, watch=watch)
    scores = run(trainer(kind), layers)[0]
    topics = [item.topic for item in material.statements]
    calibration = fit_calibration(scores, material.labels, topics, seed=seed)
    examples = material.at(layer)
    probe = fit(kind, examples, seed=seed).rescaled(examples.values)
    protocol = (
        f"each {left} left out in turn, {count} of them; layer chosen by the AUROC of {CHOICE} on the others; "
        "intervals over entities"
    )
    record = ProbeRecord(
        name=name,
        kind=kind,
        model=dict(identity),
        layer=layer,
        position=POSITION,
        prefix=prefix,
        normalisation=material.normalisation,
        training=Training(
            sha256=fingerprint(own),
            rows=len(own),
            topics=tuple(sorted({item.topic for item in own})),
            source=source,
            texts=tuple(sorted({mark(item.text) for item in own})),
        ),
        seed=seed,
        held_out=HeldOut(
            protocol=protocol,
            overall=_measure(kind, scores, material, seed=seed),
            parts=tuple(_parts(scores, material, seed)),
            baselines=(_measure(TEXT, text_scores(material, repeats=1, seed=seed)[0], material, seed=seed),),
            controls=tuple(
                _measure(text, found.scores[0], material, seed=seed)
                for text, found in control_scores(kind, material, layers, run).items()
            ),
        ),
        median_norm=float(np.median(np.linalg.norm(material.activations.at(layer), axis=-1))),
        calibration=calibration,
        notes=dict(probe.notes),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return SavedProbe(record, probe)


def _parts(scores: Floats, material: Material, seed: int) -> Iterator[Measured]:
    """Affirmative and negated statements by themselves, then each topic."""
    examples = material.examples
    masks = {"affirmative": ~examples.negated, "negated": examples.negated}
    masks |= {name: examples.topics == number for number, name in enumerate(material.topics)}
    for name, mask in masks.items():
        if mask.any():
            yield _measure(name, scores, material, rows=np.flatnonzero(mask), seed=seed)


def _measure(name: str, scores: Floats, material: Material, *, rows: Indices | None = None, seed: int = 0) -> Measured:
    """What scores ``(rows,)`` are worth, on some of the statements or all."""
    rows = np.arange(len(scores)) if rows is None else rows
    entities = [(material.statements[row].topic, material.statements[row].entity) for row in rows]
    return measure(name, scores[rows], material.labels[rows], entities, seed=seed)
