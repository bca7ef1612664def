"""What is known of a step without any probe; every probe score is shown beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tracer.explain.probes.places import Place
from tracer.replay.recorded import Recorded
from tracer.trace.answers import extract_answer, normalise
from tracer.trace.probes import ProbeBaselines
from tracer.trace.trace import Step, Trace

TokenValues = Sequence[NDArray[np.float64]]
"""For each sequence of a trace a value for each token of its completion, ``(tokens,)``."""


def token_baselines(
    recorded: Recorded, place: Place, logprobs: TokenValues, entropy: TokenValues | None
) -> ProbeBaselines:
    """Log-probability and entropy of the tokens of a text that the model wrote; nothing for one that it read.

    Args:
        recorded: The trace.
        place: The text.
        logprobs: Of every completion token, nats.
        entropy: Of the distributions that they were drawn from, nats, where it is known.
    """
    if not place.written:
        return ProbeBaselines()
    prompt = recorded.sequences[place.sequence].prompt
    rows = slice(place.start - prompt, place.end - prompt)
    own = logprobs[place.sequence][rows]
    spread = None if entropy is None else entropy[place.sequence][rows]
    if not np.isfinite(own).all():
        # Recorded without log-probabilities.
        return ProbeBaselines()
    return ProbeBaselines(
        mean_logprob=float(own.mean()),
        min_logprob=float(own.min()),
        entropy=None if spread is None else float(spread.mean()),
    )


def agreement(trace: Trace) -> dict[str, float]:
    """For each branch that gave an answer, the share of such branches that gave the same one (Wang et al. 2023).

    Returns:
        By branch; nothing where fewer than two branches answered.
    """
    answers = _answers(trace)
    if len(answers) < 2:
        return {}
    counts = Counter(answers.values())
    return {branch: counts[answer] / len(answers) for branch, answer in answers.items()}


def branch_agreement(step: Step, shares: Mapping[str, float]) -> float | None:
    """The share of a step's own branch, or ``None`` where it has none."""
    return None if step.branch is None else shares.get(step.branch)


def _answers(trace: Trace) -> dict[str, str]:
    """The last answer of every branch, in the form in which equal answers are equal."""
    found: dict[str, str] = {}
    for step in trace.steps:
        if step.kind == "answer" and step.branch is not None:
            value = step.data.get("value")
            if not isinstance(value, str):
                stated = extract_answer(step.text)
                value = step.text if stated is None else stated.value
            if value.strip():
                found[step.branch] = normalise(value)
    return found
