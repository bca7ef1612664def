"""What probes are worth on reasoning: transfer to steps, and where chains first go wrong; with tables of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tracer.explain.probes.examples import Floats, normalise
from tracer.explain.probes.fit import fit
from tracer.explain.probes.held_out import CHOICE, Material
from tracer.explain.probes.places import Position
from tracer.explain.probes.probe import Probe
from tracer.explain.probes.transfer import Reader, transfer
from tracer.explain.probes.unseen_steps import MADE_UP, ON_POLICY, UnseenSteps
from tracer.trace.probe_report import StepEvaluation


def statement_readers(
    material: Material, kinds: Sequence[str], layer: int, *, position: Position = "last", seed: int = 0
) -> list[Reader]:
    """Probes of several kinds fitted on all statements behind one layer, and controls that know nothing.

    The controls are a random direction, labels shuffled, and the first layer.

    Raises:
        InputError: The statements lack something that a kind needs.
        UnknownNameError: There is no such kind or layer.
    """
    examples = material.at(layer)
    found: list[Reader] = []
    for kind in kinds:
        probe = fit(kind, examples, seed=seed).rescaled(examples.values)
        found.append(Reader(kind, layer, position, _scorer(probe, material)))
    shuffled = examples.with_labels(np.random.default_rng(seed).permutation(examples.labels))
    first = material.layers[0]
    for name, own, at in (
        ("shuffled labels", shuffled, layer),
        (f"layer {first}", material.at(first), first),
    ):
        probe = fit(CHOICE, own, seed=seed).rescaled(own.values)
        found.append(Reader(f"{CHOICE}, {name}", at, position, _scorer(probe, material)))
    direction = np.random.default_rng(seed).standard_normal((examples.values.shape[-1],))
    random = Probe("random", direction, 0.0)
    centre = float(np.median(random.score(examples.values)))
    return [*found, Reader("random direction", layer, position, _scorer(replace(random, bias=-centre), material))]


def evaluate_steps(unseen: UnseenSteps, readers: Sequence[Reader], *, seed: int = 0) -> StepEvaluation:
    """Judge probes on steps of problems that none of them learnt from.

    Args:
        unseen: The steps, with the layers that the probes read.
        readers: The probes.
        seed: For everything drawn at random.

    Raises:
        InputError: A layer is missing, or there are too few problems.
    """
    return StepEvaluation(
        own=None if unseen.own is None else transfer(unseen.own, readers, steps=ON_POLICY, seed=seed),
        made_up=transfer(unseen.made_up, readers, steps=MADE_UP, seed=seed),
    )


def _scorer(probe: Probe, material: Material) -> Callable[[NDArray[np.float32]], Floats]:
    """Scores hidden states as they come from a layer."""
    return lambda values: probe.score(normalise(values, material.normalisation))
