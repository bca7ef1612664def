"""Do probes tell right from wrong steps of reasoning, and do they say more than what can be had without them?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tracer.errors import InputError
from tracer.explain.probes.controls import TEXT, text_scorer
from tracer.explain.probes.examples import Flags, Floats, one_thread
from tracer.explain.probes.logistic import fit_logistic
from tracer.explain.probes.metrics import DRAWS, auroc, auroc_difference, measure, roc
from tracer.explain.probes.places import Position, read_position
from tracer.explain.probes.saved import SavedProbe
from tracer.explain.probes.step_features import LOGPROBS, StepFeatures
from tracer.trace.probe_report import Estimate, Measured, StepCurve, StepWorth, Transfer

_FOLDS = 5
_PENALTY = 100.0
"""Inverse weight of the penalty of stacks: just enough for kinds of steps that are always right to be fitted."""


@dataclass(frozen=True, slots=True)
class Reader:
    """Something that scores steps by one of their hidden states: a saved probe, or one that was just fitted.

    Args:
        name: Its name.
        layer: The layer that it reads.
        position: The token that it reads.
        score: Scores hidden states ``(rows, width)``; above zero for right.
    """

    name: str
    layer: int
    position: Position
    score: Callable[[NDArray[np.float32]], Floats]

    @classmethod
    def of(cls, probe: SavedProbe) -> Reader:
        """A saved probe.

        Raises:
            InputError: It reads a token that this tracer does not know.
        """
        return cls(probe.record.name, probe.record.layer, read_position(probe.record.position), probe.score)


def transfer(
    features: StepFeatures, probes: Sequence[Reader], *, steps: str, seed: int = 0, draws: int = DRAWS
) -> Transfer:
    """Judge probes on steps that had no part in them, against every baseline.

    Args:
        features: The steps, with the layers that the probes read.
        probes: The probes.
        steps: What steps these are, in a few words.
        seed: For everything drawn at random.
        draws: Bootstrap samples.

    Raises:
        InputError: All steps are right, or all are wrong; there are too few problems, or a layer is missing.
    """
    baselines = measure_baselines(features, seed=seed, draws=draws)
    worths = tuple(
        step_worth(
            features,
            read_steps(features, probe),
            name=probe.name,
            steps=steps,
            baselines=baselines,
            seed=seed,
            draws=draws,
        )
        for probe in probes
    )
    scored = {probe.name: read_steps(features, probe) for probe in probes} | dict(features.baselines)
    counts: dict[str, tuple[int, int]] = {}
    for example in features.examples:
        count, wrong = counts.get(example.step.operation, (0, 0))
        counts[example.step.operation] = (count + 1, wrong + (not example.label))
    return Transfer(
        steps=steps,
        rows=len(features.labels),
        wrong=int((~features.labels).sum()),
        by_operation=dict(sorted(counts.items())),
        probes=worths,
        baselines=baselines,
        curves=tuple(StepCurve(name=name, roc=roc(values, features.labels)) for name, values in scored.items()),
    )


def read_steps(features: StepFeatures, probe: Reader) -> Floats:
    """A probe's scores of steps, ``(steps,)``.

    Raises:
        InputError: The layer that it reads is missing.
    """
    if probe.layer not in features.layers:
        raise InputError(f"the probe reads layer {probe.layer}, which was not extracted of the steps")
    return probe.score(features.hidden[probe.position][:, features.layers.index(probe.layer)])


def step_worth(
    features: StepFeatures,
    scores: Floats,
    *,
    name: str,
    steps: str,
    baselines: tuple[Measured, ...] | None = None,
    seed: int = 0,
    draws: int = DRAWS,
) -> StepWorth:
    """What scores of steps are worth beside the baselines.

    Args:
        features: The steps.
        scores: Above zero for right, ``(steps,)``.
        name: What gave them.
        steps: What steps these are, in a few words.
        baselines: What `measure_baselines` found of these steps, if it was asked already.
        seed: For everything drawn at random.
        draws: Bootstrap samples.

    Raises:
        InputError: All steps are right, or all are wrong, or there are too few problems.
    """
    labels, problems = features.labels, features.problems
    baselines = baselines or measure_baselines(features, seed=seed, draws=draws)
    best = max(LOGPROBS, key=lambda own: auroc(features.baselines[own], labels) or 0.0)
    columns = stack_columns(features)
    alone = cross_validated(columns, labels, problems, seed=seed)
    joined = cross_validated(np.column_stack([columns, scores]), labels, problems, seed=seed)
    return StepWorth(
        protocol=(
            f"{steps}; interval over problems; stack of {', '.join(features.baselines)} and the operation, "
            f"cross-validated over problems; best log-probability baseline: {best}"
        ),
        rows=len(labels),
        wrong=int((~labels).sum()),
        probe=measure(name, scores, labels, problems, seed=seed, draws=draws),
        baselines=baselines,
        over_logprob=_known(
            auroc_difference(scores, features.baselines[best], labels, problems, seed=seed, draws=draws)
        ),
        stack=measure("stack", alone, labels, problems, seed=seed, draws=draws),
        with_probe=measure(f"stack with {name}", joined, labels, problems, seed=seed, draws=draws),
        adds=_known(auroc_difference(joined, alone, labels, problems, seed=seed, draws=draws)),
    )


def measure_baselines(features: StepFeatures, *, seed: int = 0, draws: int = DRAWS) -> tuple[Measured, ...]:
    """Every baseline on its own: AUROC as it is, accuracy at a threshold from other problems.

    Raises:
        InputError: All steps are right, or all are wrong, or there are too few problems.
    """
    found: list[Measured] = []
    singles: dict[str, NDArray[np.float64]] = {
        **{name: values[:, None] for name, values in features.baselines.items()},
        "operation": features.operations,
    }
    for name, columns in singles.items():
        fitted = cross_validated(columns, features.labels, features.problems, seed=seed)
        raw = columns[:, 0] if columns.shape[1] == 1 else fitted
        at_threshold = measure(name, fitted, features.labels, features.problems, seed=seed, draws=draws)
        as_it_is = measure(name, raw, features.labels, features.problems, seed=seed, draws=draws)
        found.append(at_threshold.model_copy(update={"auroc": as_it_is.auroc}))
    text = measure(TEXT, text_baseline(features, seed=seed), features.labels, features.problems, seed=seed, draws=draws)
    return (*found, text)


def text_baseline(features: StepFeatures, *, seed: int = 0) -> Floats:
    """Log-odds by the words of steps alone, from other problems, ``(steps,)``.

    Raises:
        InputError: There are not enough problems with both labels.
    """
    texts = np.array([example.step.text for example in features.examples], dtype=object)
    labels = features.labels

    def learn(rows: Flags) -> Callable[[Flags], Floats]:
        scorer = text_scorer(texts[rows], labels[rows])
        return lambda others: scorer(texts[others])

    return _from_others(learn, labels, features.problems, seed)


def stack_columns(features: StepFeatures) -> Floats:
    """All that is known without a probe, ``(steps, columns)``."""
    return np.column_stack([*features.baselines.values(), features.operations])


def cross_validated(columns: Floats, labels: Flags, clusters: Sequence[object], *, seed: int = 0) -> Floats:
    """Log-odds by logistic regressions that learnt from other clusters, ``(rows,)``.

    Args:
        columns: ``(rows, columns)``.
        labels: ``(rows,)``.
        clusters: What belongs together, ``(rows,)``.
        seed: Decides the folds.

    Raises:
        InputError: There are not enough clusters with both labels.
    """

    def learn(rows: Flags) -> Callable[[Flags], Floats]:
        linear = fit_logistic(columns[rows], labels[rows], c=_PENALTY)
        return lambda others: columns[others] @ linear.weights + linear.bias

    return _from_others(learn, labels, clusters, seed)


def _from_others(
    learn: Callable[[Flags], Callable[[Flags], Floats]], labels: Flags, clusters: Sequence[object], seed: int
) -> Floats:
    """Log-odds of rows by what learns from the rows of other clusters."""
    names: dict[object, int] = {}
    own = np.array([names.setdefault(cluster, len(names)) for cluster in clusters], dtype=np.int64)
    folds = np.random.default_rng(seed).permutation(len(names)) % _FOLDS
    found = np.full(len(labels), np.nan)
    with one_thread():
        for fold in range(_FOLDS):
            test = folds[own] == fold
            if not test.any():
                continue
            if labels[~test].all() or not labels[~test].any():
                raise InputError("there are too few right or too few wrong steps to judge anything by; take more")
            # Labels left out shift the others' base rate the other way, which alone would rank below chance.
            found[test] = learn(~test)(test) - _log_odds(labels[~test])
    return found + _log_odds(labels)


def _log_odds(labels: Flags) -> float:
    return float(np.log(labels.sum()) - np.log((~labels).sum()))


def _known(difference: Estimate | None) -> Estimate:
    if difference is None:
        raise InputError("all steps are right, or all are wrong: nothing can be told apart; take more steps")
    return difference
