"""A probe of reasoning steps: fitted on right and wrong steps, since probes of statements transfer poorly to these."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import numpy as np
from numpy.typing import NDArray

from tracer.errors import InputError
from tracer.explain.probes.calibration import fit_calibration
from tracer.explain.probes.examples import Examples, Flags, Floats, Normalisation, normalise
from tracer.explain.probes.fit import fit
from tracer.explain.probes.metrics import auroc, measure
from tracer.explain.probes.places import POSITIONS, Position
from tracer.explain.probes.probe import Probe
from tracer.explain.probes.saved import STEPS, ProbeRecord, SavedProbe, Training, mark
from tracer.explain.probes.statements import Indices
from tracer.explain.probes.step_chains import OPERATIONS, Chain, StepExample, chains, fingerprint, perturbed
from tracer.explain.probes.step_features import LOGPROBS, StepFeatures, on_policy, step_features
from tracer.explain.probes.transfer import Reader, measure_baselines, read_steps
from tracer.explain.probes.unseen_steps import Progress, UnseenSteps, read_unseen, staged, with_worth
from tracer.replay.forward import check_cancel
from tracer.replay.model import Replica, identity_of
from tracer.trace.probe_report import HeldOut

KIND = "logistic_l2"
PROBLEMS = 48
"""Problems to learn from, three to five steps each; three quarters of a minute of work for the demo model."""
TEST_PROBLEMS = 40
"""Problems to judge by when a probe is made."""
NORMALISATION: Normalisation = "rms"
_FOLDS = 3


@dataclass(frozen=True, slots=True)
class _Choice:
    """Where a probe reads best, and what it says there about problems that it did not learn from."""

    position: Position
    layer: int
    scores: Floats


def train_step_probe(
    replica: Replica,
    *,
    problems: int = PROBLEMS,
    test_problems: int = TEST_PROBLEMS,
    seed: int = 0,
    ask: bool = False,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> tuple[SavedProbe, UnseenSteps]:
    """Fit a probe on right and wrong steps, and judge it on other problems.

    Every step comes as it should be and with a wrong result: the model's own where it errs, else a made-up one. Layer
    and token are chosen, and the calibration is fitted, by leaving out groups of the problems that it learns from.

    Args:
        replica: The model, with its tokenizer.
        problems: Problems to learn from.
        test_problems: Problems to judge by.
        seed: For everything drawn at random.
        ask: Whether to ask the model too whether each of the steps is true that the probe is judged by.
        progress: Told how far the work is.
        cancel: Ends the work between two passes or fits.

    Returns:
        The probe, and the steps that it was judged by, for other probes to be judged by as well.

    Raises:
        InputError: The replica has no tokenizer, there are too few problems, or the model makes no mistake in them.
        CancelledError: ``cancel`` was set.
        EngineUnavailableError: Memory ran out.
    """
    if progress is not None:
        progress("letting the model solve problems", 0, 0)
    learnt = _hard(replica, chains(problems, seed=seed), seed, cancel)
    report = staged("reading right and wrong steps", progress)
    features = step_features(replica, learnt, whole=False, progress=report, cancel=cancel)
    choice = _choose(features, seed, progress, cancel)
    examples = _examples(features, choice.position, choice.layer)
    probe = fit(KIND, examples, seed=seed).rescaled(examples.values)
    controls = _controls(features, choice, seed)
    texts = tuple(sorted({mark(example.step.text) for example in learnt}))
    unseen = read_unseen(
        replica,
        problems=test_problems,
        seed=seed,
        learnt=frozenset(texts),
        ask=ask,
        progress=progress,
        cancel=cancel,
    )
    record = ProbeRecord(
        name=STEPS,
        kind=KIND,
        model=identity_of(replica),
        layer=choice.layer,
        position=choice.position,
        normalisation=NORMALISATION,
        training=Training(
            sha256=fingerprint(features.examples),
            rows=len(features.labels),
            topics=OPERATIONS,
            source="tracer's own chains of arithmetic and logic",
            texts=texts,
        ),
        seed=seed,
        held_out=_held_out(probe, controls, unseen.made_up, choice, seed),
        median_norm=median_norm(features.hidden[choice.position][:, features.layers.index(choice.layer)]),
        calibration=fit_calibration(choice.scores, features.labels, features.problems, seed=seed),
        notes={**dict(probe.notes), "likelier_than_right": _likelier(features)},
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return with_worth([SavedProbe(record, probe)], unseen.own, seed=seed)[0], unseen


def median_norm(values: NDArray[np.float32]) -> float:
    """Usual length of hidden states ``(rows, width)``."""
    return float(np.median(np.linalg.norm(values, axis=-1)))


def _hard(replica: Replica, learnt: Sequence[Chain], seed: int, cancel: threading.Event | None) -> list[StepExample]:
    """Right and wrong versions of every step; a wrong one is the model's own where it errs."""
    own = {(item.problem, item.position): item for item in on_policy(replica, learnt, cancel=cancel) if not item.label}
    made_up = perturbed(learnt, seed=seed)
    return [item if item.label else own.get((item.problem, item.position), item) for item in made_up]


def _choose(features: StepFeatures, seed: int, progress: Progress | None, cancel: threading.Event | None) -> _Choice:
    """Layer and token with the best mean AUROC on groups of problems that were left out."""
    folds = np.random.default_rng(seed).permutation(max(features.problems) + 1) % _FOLDS
    own = folds[np.array(features.problems)]
    best: tuple[float, _Choice] | None = None
    places = [(position, layer) for position in POSITIONS for layer in features.layers]
    for number, (position, layer) in enumerate(places):
        check_cancel(cancel)
        scores = _left_out(_examples(features, position, layer), own, seed)
        area = np.mean([auroc(scores[own == fold], features.labels[own == fold]) or 0.0 for fold in range(_FOLDS)])
        if best is None or area > best[0]:
            best = float(area), _Choice(position, layer, scores)
        if progress is not None:
            progress("choosing a layer", number + 1, len(places))
    if best is None:
        raise InputError("there is no layer to read; name at least one")
    return best[1]


def _left_out(examples: Examples, folds: Indices, seed: int) -> Floats:
    """Scores by probes that learnt from other problems, ``(steps,)``."""
    scores = np.full(len(examples.labels), np.nan)
    for fold in range(_FOLDS):
        test, rest = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        if not len(test):
            continue
        learnt = examples.take(rest)
        scores[test] = fit(KIND, learnt, seed=seed).rescaled(learnt.values).score(examples.values[test])
    return scores


def _examples(features: StepFeatures, position: Position, layer: int) -> Examples:
    values = normalise(features.hidden[position][:, features.layers.index(layer)], NORMALISATION)
    operations = [OPERATIONS.index(example.step.operation) for example in features.examples]
    rows = len(features.labels)
    no: Flags = np.zeros(rows, dtype=np.bool_)
    return Examples(values, features.labels, no, np.array(operations, dtype=np.int64), np.full(rows, -1))


def _controls(features: StepFeatures, choice: _Choice, seed: int) -> dict[str, Reader]:
    """The same probe where there is nothing to learn."""
    examples = _examples(features, choice.position, choice.layer)
    shuffled = examples.with_labels(np.random.default_rng(seed).permutation(examples.labels))
    first = features.layers[0]
    fitted = {
        "shuffled labels": (choice.layer, fit(KIND, shuffled, seed=seed)),
        f"layer {first}": (first, fit(KIND, _examples(features, choice.position, first), seed=seed)),
    }
    return {
        name: Reader(name, layer, choice.position, partial(_score, probe)) for name, (layer, probe) in fitted.items()
    }


def _score(probe: Probe, values: NDArray[np.float32]) -> Floats:
    return probe.score(normalise(values, NORMALISATION))


def _held_out(
    probe: Probe, controls: Mapping[str, Reader], features: StepFeatures, choice: _Choice, seed: int
) -> HeldOut:
    values = _examples(features, choice.position, choice.layer).values
    labels, problems = features.labels, features.problems
    judged = partial(measure, labels=labels, clusters=problems, seed=seed)
    scores = probe.score(values)
    random = values.astype(np.float64) @ np.random.default_rng(seed).standard_normal(values.shape[-1])
    kinds = np.array([example.step.operation for example in features.examples])
    return HeldOut(
        protocol=(
            f"{len(set(problems))} problems that had no part in it: every step as it should be and with a made-up "
            "wrong result; interval over problems"
        ),
        overall=judged(STEPS, scores),
        parts=tuple(
            measure(name, scores[own], labels[own], [problems[row] for row in np.flatnonzero(own)], seed=seed)
            for name in OPERATIONS
            if (own := kinds == name).any()
        ),
        baselines=measure_baselines(features, seed=seed),
        controls=(
            *(judged(name, read_steps(features, reader)) for name, reader in controls.items()),
            judged("random direction", random - np.median(random)),
        ),
    )


def _likelier(features: StepFeatures) -> float:
    """Share of wrong results to learn from that the model finds likelier than the right ones."""
    logprobs = features.baselines[LOGPROBS[0]]
    right = dict(zip(_places(features, True), logprobs[features.labels], strict=True))
    wrong = dict(zip(_places(features, False), logprobs[~features.labels], strict=True))
    return float(np.mean([wrong[place] > right[place] for place in wrong])) if wrong else 0.0


def _places(features: StepFeatures, label: bool) -> list[tuple[int, int]]:
    return [(item.problem, item.position) for item in features.examples if item.label == label]
