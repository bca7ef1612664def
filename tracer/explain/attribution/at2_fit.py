"""Fitting AT2's weights of attention heads on ablations (Cohen-Wang et al. 2025, arXiv:2504.13752, section 3).

The weights are those whose summed scores of the kept sources correlate best with what was measured: they minimise minus
Pearson's r, averaged over the targets. Their scale does not matter to a correlation; it is set so that their absolute
values add up to one.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tracer.errors import InputError
from tracer.explain.attribution.at2_examples import Example, choose, measure
from tracer.explain.attribution.head_weights import FitDocument, Interval, Validation
from tracer.explain.base import Context
from tracer.explain.estimate import estimate
from tracer.explain.report import Stage
from tracer.replay.model import Replica, identity_of
from tracer.replay.parity import check_identity, measure_parity, refuse
from tracer.replay.recorded import Recorded
from tracer.trace.trace import Trace

ITERATIONS = 300
RATE = 0.1
"""In units of an equal share. Both are small on purpose: with hundreds of heads and dozens of targets the fit is to
stay near raw attention, from which it starts."""
_FOLDS = 5
_RANDOM = 20


def pearson(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Pearson's r of rows, ``(rows, columns)`` each, giving ``(rows,)``; zero where a side does not vary."""
    first, second = (side - side.mean(-1, keepdim=True) for side in (left, right))
    lengths = first.norm(dim=-1) * second.norm(dim=-1)
    correlation: torch.Tensor = (first * second).sum(-1) / lengths.clamp_min(1e-12)
    return correlation


def fit(examples: Sequence[Example], *, iterations: int = ITERATIONS, rate: float = RATE) -> NDArray[np.float64]:
    """Weights whose predictions correlate best with what was measured.

    Nothing is drawn at random: gradients are those of all examples, and the weights start out equal.

    Args:
        examples: Targets with the same number of masks.
        iterations: Steps of Adam (Kingma & Ba 2015, arXiv:1412.6980).
        rate: Its first learning rate, in shares of equal weights; it falls to zero along half a cosine.

    Returns:
        ``(layers, heads)``; absolute values add up to one.

    Raises:
        InputError: No example was changed by any mask.
    """
    useful = [example for example in examples if example.varies]
    if not useful:
        raise InputError("taking sources away changed nothing in any target; fit on other runs")
    predictors = torch.as_tensor(np.stack([example.predictors() for example in useful]))
    outcomes = torch.as_tensor(np.stack([example.outcomes for example in useful]))
    weights = torch.ones(predictors.shape[-1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([weights], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=iterations)
    for _ in range(iterations):
        optimiser.zero_grad()
        loss = -pearson(predictors @ weights, outcomes).mean()
        torch.autograd.backward(loss)
        optimiser.step()
        schedule.step()
    found = weights.detach().numpy()
    return np.asarray((found / np.abs(found).sum()).reshape(useful[0].features.shape[:2]))


def validate(examples: Sequence[Example], *, seed: int, iterations: int = ITERATIONS) -> Validation:
    """Fit on a part of the questions and score on the rest, until every target was held out once.

    Args:
        examples: Targets with the same number of masks.
        seed: Which questions go together, the random scores, and the intervals.
        iterations: Steps of each fit.

    Returns:
        Mean scores with the intervals of a bootstrap over questions.

    Raises:
        InputError: There are fewer than two targets that any mask changed.
    """
    useful = [example for example in examples if example.varies]
    if len(useful) < 2:
        raise InputError(
            f"{len(useful)} targets can be learned from; at least two are needed, one of them to validate on: "
            "name more runs, or raise --steps"
        )
    generator = np.random.default_rng(seed)
    names = [example.question for example in useful]
    together = len(set(names)) > 1
    groups = names if together else [example.key for example in useful]
    shuffled = generator.permutation(sorted(set(groups))).tolist()
    folds = min(_FOLDS, len(shuffled))
    fold_of = {name: number % folds for number, name in enumerate(shuffled)}
    scores: dict[str, dict[str, list[float]]] = {name: {} for name in ("fitted", "equal", "random")}
    for fold in range(folds):
        inside = [example for example, group in zip(useful, groups, strict=True) if fold_of[group] != fold]
        weights = fit(inside, iterations=iterations)
        for example, group in zip(useful, groups, strict=True):
            if fold_of[group] == fold:
                drawn = generator.normal(size=(_RANDOM, example.masks.shape[1]))
                found = {
                    "fitted": example.lds(np.tensordot(weights, example.features, axes=2)) or 0.0,
                    "equal": example.lds(example.features.mean((0, 1))) or 0.0,
                    "random": float(np.mean([example.lds(values) or 0.0 for values in drawn])),
                }
                for name, value in found.items():
                    scores[name].setdefault(group, []).append(value)
    return Validation(
        lds=_interval(scores["fitted"], seed),
        uniform=_interval(scores["equal"], seed),
        random=_interval(scores["random"], seed),
        targets=len(useful),
        folds=folds,
        held_out="questions" if together else "targets",
    )


def fit_runs(
    traces: Sequence[Trace],
    replica: Replica,
    *,
    masks: int = 32,
    steps: int = 8,
    seed: int = 0,
    iterations: int = ITERATIONS,
    folder: Path | None = None,
    progress: Callable[[Stage], None] | None = None,
    cancel: threading.Event | None = None,
) -> tuple[NDArray[np.float64], FitDocument]:
    """Fit a model's weights on its recorded runs, and validate them.

    Args:
        traces: Runs of the model.
        replica: The model.
        masks: Random masks for each target.
        steps: Most targets of each run.
        seed: Which targets, which masks, and what is held out.
        iterations: Steps of gradient descent.
        folder: Keeps what was measured, so that an interrupted fit goes on.
        progress: Told how far it is.
        cancel: Ends the work between two targets.

    Returns:
        Weights ``(layers, heads)``, and what is known about them.

    Raises:
        InputError: A run was written by another model, or there is too little to learn from.
        ModelError: The replica does not behave like the model that wrote a run.
        CancelledError: ``cancel`` was set; what was measured is kept in ``folder``.
        EngineUnavailableError: Memory ran out.
        StoreError: ``folder`` cannot be written.
    """
    runs = [Recorded(trace) for trace in traces]
    chosen = [choose(recorded, steps, seed=seed) for recorded in runs]
    total, done = sum(map(len, chosen)), 0

    def advance() -> None:
        nonlocal done
        done += 1
        report()

    def report() -> None:
        if progress is not None:
            progress(Stage("taking sources away", done, total, "targets"))

    examples: list[Example] = []
    for recorded, targets in zip(runs, chosen, strict=True):
        report()
        if targets:
            check_identity(recorded, replica)
            refuse(measure_parity(recorded, replica, cancel=cancel), recorded, replica)
            context = Context(replica, recorded, seed=seed, cancel=cancel)
            examples += measure(context, targets, masks=masks, folder=folder, done=advance)
    if progress is not None:
        progress(Stage("fitting", 0, 0))
    validation = validate(examples, seed=seed, iterations=iterations)
    own = identity_of(replica)
    about = FitDocument(
        model=replica.identity["name"],
        weights_sha256=str(own["weights_sha256"]),
        training_sha256=_training_sha256(examples),
        examples=validation.targets,
        masks=masks,
        seed=seed,
        iterations=iterations,
        validation=validation,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return fit(examples, iterations=iterations), about


def _interval(by_group: Mapping[str, Sequence[float]], seed: int) -> Interval:
    found = estimate(list(by_group.values()), seed)
    if found is None:
        raise AssertionError("nothing was held out")
    return Interval(mean=found.mean, low=found.low, high=found.high)


def _training_sha256(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in sorted(examples, key=lambda item: item.key):
        digest.update(example.key.encode() + example.outcomes.astype("<f8").tobytes())
    return digest.hexdigest()
