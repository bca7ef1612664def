"""Contrast-consistent search (Burns et al. 2023, arXiv:2212.03827): a truth direction without labels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from tracer.errors import InputError
from tracer.explain.probes.examples import Examples, Floats, centred
from tracer.explain.probes.probe import Probe

if TYPE_CHECKING:
    import torch

_TRIES, _EPOCHS = 10, 1000
_RATE, _DECAY = 1e-3, 1e-2
SIGN_LABELS = 16
"""Labelled statements that settle which of its two ends is true."""


def fit_ccs(examples: Examples, *, seed: int = 0) -> Probe:
    """Contrast-consistent search over statements and their negations (Burns et al. 2023, equations 1 to 3).

    The probability of a statement and that of its negation shall add up to one, and one of them shall be sure:
    the mean of (p+ - (1 - p-))^2 + min(p+, p-)^2, over hidden states less the mean of their data set, by AdamW from
    several starts, of which the one with the lowest loss is kept. Which end is true cannot be known without labels: it
    is settled by those of `SIGN_LABELS` statements.

    Args:
        examples: Their labels are not used but for the sign.
        seed: Decides the starts and the statements that settle the sign.

    Raises:
        InputError: There is no statement with its negation.
    """
    affirmative = np.flatnonzero(~examples.negated & (examples.partners >= 0))
    if not len(affirmative):
        raise InputError("CCS needs statements with their negations; none of these has one")
    values = examples.values.astype(np.float64)
    shifted = centred(values, examples.sets)
    rng = np.random.default_rng(seed)
    first = starts(rng, values.shape[1])
    weights, bias, loss = _descend(shifted[affirmative], shifted[examples.partners[affirmative]], first)
    means = {
        "mean_affirmative": values[~examples.negated].mean(0),
        "mean_negated": values[examples.negated].mean(0),
    }
    chosen = rng.permutation(affirmative)[:SIGN_LABELS]
    own = shifted[chosen] @ weights - shifted[examples.partners[chosen]] @ weights
    agree = float(np.mean((own > 0) == examples.labels[chosen]))
    sign = 1.0 if agree >= 0.5 else -1.0
    notes: dict[str, JsonValue] = {
        "loss": loss,
        "sign": f"CCS does not know which end is true; the labels of {len(chosen)} training statements settled it",
        "sign_labels": len(chosen),
    }
    # Without its polarity a statement is seen from half-way between the two means.
    middle = (means["mean_affirmative"] + means["mean_negated"]) / 2
    weights, bias = sign * weights, sign * bias
    return Probe("ccs", weights, bias - float(weights @ middle), {"truth": weights, **means}, notes)


def score_pairs(probe: Probe, affirmative: NDArray[np.float32], negated: NDArray[np.float32]) -> Floats:
    """How much a statement and its negation together speak for the statement, as log-odds of (p+ + 1 - p-) / 2.

    Args:
        probe: One that `fit_ccs` made.
        affirmative: Hidden states of statements, ``(pairs, width)``.
        negated: Those of their negations, ``(pairs, width)``.

    Returns:
        ``(pairs,)``.
    """
    half = probe.weights @ (probe.directions["mean_affirmative"] - probe.directions["mean_negated"]) / 2
    plus = _sigmoid(probe.score(affirmative) - half)
    minus = _sigmoid(probe.score(negated) + half)
    probability = np.clip((plus + 1.0 - minus) / 2.0, 1e-12, 1.0 - 1e-12)
    found: Floats = np.log(probability) - np.log1p(-probability)
    return found


def starts(rng: np.random.Generator, width: int) -> Floats:
    """Weights, and behind them the bias, that the search begins with, ``(tries, width + 1)``; as `torch.nn.Linear`."""
    bound = 1.0 / np.sqrt(width)
    return rng.uniform(-bound, bound, (_TRIES, width + 1))


def _descend(plus: Floats, minus: Floats, first: Floats) -> tuple[Floats, float, float]:
    """Weights, bias and loss of the best try; the tries run side by side and do not touch each other."""
    import torch

    ones = np.ones((len(plus), 1))
    pairs = [torch.tensor(np.hstack([rows, ones]), dtype=torch.float32) for rows in (plus, minus)]

    def losses(parameters: torch.Tensor) -> torch.Tensor:
        one, other = (torch.sigmoid(rows @ parameters.T) for rows in pairs)
        return ((one + other - 1.0) ** 2 + torch.minimum(one, other) ** 2).mean(0)

    with _one_thread(), torch.enable_grad():
        parameters = torch.tensor(first, dtype=torch.float32, requires_grad=True)
        optimiser = torch.optim.AdamW([parameters], lr=_RATE, weight_decay=_DECAY)
        for _ in range(_EPOCHS):
            optimiser.zero_grad()
            torch.autograd.backward(losses(parameters).sum())
            optimiser.step()
    ended = losses(parameters.detach())
    best = int(ended.argmin())
    found = parameters.detach()[best].double().numpy()
    return found[:-1], float(found[-1]), float(ended[best])


@contextmanager
def _one_thread() -> Iterator[None]:
    """Several threads only wait for each other on matrices as small as these."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _sigmoid(values: Floats) -> Floats:
    found: Floats = 0.5 * (1.0 + np.tanh(values / 2.0))
    return found
