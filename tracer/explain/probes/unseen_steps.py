"""Steps of problems that no probe learnt from, read once for all probes that are judged by them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from tracer.errors import InputError
from tracer.explain.probes.saved import SavedProbe, mark
from tracer.explain.probes.step_chains import Chain, chains, perturbed
from tracer.explain.probes.step_features import StepFeatures, on_policy, step_features
from tracer.explain.probes.transfer import Reader, measure_baselines, read_steps, step_worth
from tracer.replay.model import Replica

PROBLEMS = 60
"""Problems to judge by."""
ON_POLICY = "the model's own results behind right steps of unseen problems"
MADE_UP = "right steps and the same with a made-up wrong result"
_FEWEST = 10
"""Problems with a right step, and with a wrong one, below which nothing is judged."""
_SEED = 1_000_003
"""Added to the seed for problems to judge by."""

Progress = Callable[[str, int, int], None]
"""Called with the stage, units done and their total."""


@dataclass(frozen=True, slots=True, eq=False)
class UnseenSteps:
    """What was read of them.

    Args:
        own: Steps with the model's own results; ``None`` where too few problems have a right one or a wrong one.
        made_up: Right steps and the same with a made-up wrong result.
    """

    own: StepFeatures | None
    made_up: StepFeatures


def unseen_chains(count: int, *, seed: int = 0, learnt: Collection[str] = ()) -> list[Chain]:
    """Problems to judge by, none with a step that a probe learnt from.

    Args:
        count: How many.
        seed: Decides them.
        learnt: `mark` of every step that was learnt from.

    Raises:
        InputError: There are not so many.
    """
    apart = [
        chain
        for chain in chains(2 * count, seed=seed + _SEED)
        if not any(mark(step.text) in learnt for step in chain.steps)
    ]
    if len(apart) < count:
        raise InputError(f"only {len(apart)} problems have no step that the probe learnt from; judge by fewer")
    return apart[:count]


def read_unseen(
    replica: Replica,
    *,
    layers: Sequence[int] | None = None,
    problems: int = PROBLEMS,
    seed: int = 0,
    learnt: Collection[str] = (),
    ask: bool = False,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> UnseenSteps:
    """Read right and wrong steps of unseen problems.

    Args:
        replica: The model, with its tokenizer.
        layers: Layers to read; all of them if not given.
        problems: How many problems.
        seed: Decides them.
        learnt: `mark` of every step that a probe learnt from.
        ask: Whether to ask the model too whether each step is true.
        progress: Told how far the work is.
        cancel: Ends the work between two passes.

    Raises:
        InputError: The replica has no tokenizer, or there are not so many problems.
        CancelledError: ``cancel`` was set.
        EngineUnavailableError: Memory ran out.
    """
    test = unseen_chains(problems, seed=seed, learnt=learnt)
    own = own_steps(replica, test, layers, learnt=learnt, ask=ask, progress=progress, cancel=cancel)
    examples = [item for item in perturbed(test, seed=seed) if mark(item.step.text) not in learnt]
    report = staged("reading made-up steps", progress)
    return UnseenSteps(own, step_features(replica, examples, layers=layers, ask=ask, progress=report, cancel=cancel))


def own_steps(
    replica: Replica,
    test: Sequence[Chain],
    layers: Sequence[int] | None = None,
    *,
    learnt: Collection[str] = (),
    ask: bool = False,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> StepFeatures | None:
    """Steps with the model's own results.

    Args:
        replica: The model.
        test: Verified chains.
        layers: Layers to read; all of them if not given.
        learnt: `mark` of every step that a probe learnt from.
        ask: Whether to ask the model too whether each step is true.
        progress: Told how far the work is.
        cancel: Ends the work between two passes.

    Returns:
        ``None`` where too few problems have a right step, or too few a wrong one.

    Raises:
        InputError: The replica has no tokenizer.
        CancelledError: ``cancel`` was set.
        EngineUnavailableError: Memory ran out.
    """
    if progress is not None:
        progress("letting the model solve unseen problems", 0, 0)
    own = [item for item in on_policy(replica, test, cancel=cancel) if mark(item.step.text) not in learnt]
    wrong = [example.problem for example in own if not example.label]
    right = [example.problem for example in own if example.label]
    if min(len(set(wrong)), len(set(right))) < _FEWEST:
        return None
    report = staged("reading the model's own steps", progress)
    return step_features(replica, own, layers=layers, ask=ask, progress=report, cancel=cancel)


def with_worth(probes: Sequence[SavedProbe], own: StepFeatures | None, *, seed: int = 0) -> list[SavedProbe]:
    """Probes that know what they are worth on steps that the model wrote itself.

    Args:
        probes: Probes of this model.
        own: The steps; ``None`` leaves the probes as they are.
        seed: For everything drawn at random.

    Raises:
        InputError: A layer that a probe reads is missing.
    """
    if own is None:
        return list(probes)
    baselines = measure_baselines(own, seed=seed)
    found: list[SavedProbe] = []
    for probe in probes:
        scores = read_steps(own, Reader.of(probe))
        worth = step_worth(own, scores, name=probe.record.name, steps=ON_POLICY, baselines=baselines, seed=seed)
        found.append(replace(probe, record=probe.record.model_copy(update={"on_steps": worth})))
    return found


def staged(stage: str, progress: Progress | None) -> Callable[[int, int], None] | None:
    """Tells how far a stage is."""
    return None if progress is None else lambda done, total: progress(stage, done, total)
