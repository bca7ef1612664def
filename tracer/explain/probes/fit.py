"""The kinds of truth probes by name; all are fitted in the same way and give the same `Probe`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tracer.errors import UnknownNameError
from tracer.explain.probes import ccs, directions
from tracer.explain.probes.examples import Examples, Floats, one_thread
from tracer.explain.probes.probe import Probe


class Fit(Protocol):
    """Fits a probe to labelled hidden states behind one layer."""

    def __call__(self, examples: Examples, *, seed: int = 0) -> Probe:
        """The fitted probe; the same for the same seed."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What is known of a kind of probe before it is fitted.

    Args:
        name: Its name.
        summary: One line.
        paper: Where it comes from.
        fit: Fits one.
    """

    name: str
    summary: str
    paper: str
    fit: Fit


KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "ttpd",
            "general truth direction and polarity direction, weighed by logistic regression",
            "Bürger et al. 2024, arXiv:2407.12831, section 5",
            directions.fit_ttpd,
        ),
        Kind(
            "mass_mean",
            "mean of true less mean of false statements",
            "Marks & Tegmark 2024, arXiv:2310.06824, section 4.1",
            directions.fit_mass_mean,
        ),
        Kind(
            "mass_mean_iid",
            "mass-mean through the inverse covariance, for statements like those of the training set",
            "Marks & Tegmark 2024, arXiv:2310.06824, section 4.1",
            directions.fit_mass_mean_iid,
        ),
        Kind(
            "logistic",
            "logistic regression without penalty",
            "Bürger et al. 2024, arXiv:2407.12831, section 5 (baseline)",
            directions.fit_logistic_plain,
        ),
        Kind(
            "logistic_l2",
            "logistic regression on standardised hidden states with an L2 penalty",
            "Alain & Bengio 2016, arXiv:1610.01644 (linear probes)",
            directions.fit_logistic_l2,
        ),
        Kind(
            "ccs",
            "contrast-consistent search over statements and their negations; labels only settle its sign",
            "Burns et al. 2023, arXiv:2212.03827",
            ccs.fit_ccs,
        ),
        Kind(
            "first_component",
            "first principal component; labels only settle its sign and threshold",
            "Marks & Tegmark 2024, arXiv:2310.06824, section 3 (pictures)",
            directions.fit_first_component,
        ),
    )
}


def fit(kind: str, examples: Examples, *, seed: int = 0) -> Probe:
    """Fit a probe of a kind.

    Args:
        kind: A name of `KINDS`.
        examples: Normalised hidden states behind one layer, with labels.
        seed: For what is drawn at random.

    Raises:
        UnknownNameError: There is no such kind.
        InputError: The examples lack something that the kind needs, such as both labels or negations.
    """
    if kind not in KINDS:
        raise UnknownNameError("kind of probe", kind, KINDS)
    with one_thread():
        return KINDS[kind].fit(examples, seed=seed)


def score(probe: Probe, examples: Examples) -> Floats:
    """Scores of examples, ``(rows,)``; by CCS of a statement and its negation together, where both are there."""
    found = probe.score(examples.values)
    if probe.kind == "ccs":
        affirmative = np.flatnonzero(~examples.negated & (examples.partners >= 0))
        twins = examples.partners[affirmative]
        found[affirmative] = ccs.score_pairs(probe, examples.values[affirmative], examples.values[twins])
        found[twins] = -found[affirmative]
    return found
