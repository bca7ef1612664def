"""Probes that have a formula or a convex fit: TTPD, mass-mean, logistic regression, the first principal component."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tracer.errors import InputError
from tracer.explain.probes.examples import Examples, Floats, centred, signs
from tracer.explain.probes.logistic import fit_logistic, fit_logistic_briefly
from tracer.explain.probes.probe import Probe

_L2 = 0.01
"""Inverse penalty of the regularised logistic regression."""
_CUTOFF = 1e-3
"""Directions in which classes vary less than so much of the most are left out of the inverse covariance."""


class TruthDirections(NamedTuple):
    """How truth shows in hidden states.

    Args:
        general: Towards true, in affirmative and negated statements alike, ``(width,)``.
        polarity_sensitive: Towards true in affirmative statements, towards false in negated ones, ``(width,)``.
    """

    general: Floats
    polarity_sensitive: Floats


def truth_directions(examples: Examples) -> TruthDirections:
    """General and polarity-sensitive truth direction (Bürger et al. 2024, arXiv:2407.12831, equations 3 to 5).

    Least squares of hidden states, less the mean of their data set, on truth t and t p, with polarity p = 1 for
    affirmative and -1 for negated statements.
    """
    truth = signs(examples.labels)
    design = np.stack([truth, truth * signs(~examples.negated)], axis=1)
    rows = centred(examples.values.astype(np.float64), examples.sets)
    solution = np.linalg.lstsq(design, rows, rcond=None)[0]
    return TruthDirections(solution[0], solution[1])


def fit_ttpd(examples: Examples, *, seed: int = 0) -> Probe:
    """Training of Truth and Polarity Direction (Bürger et al. 2024, arXiv:2407.12831, section 5).

    Logistic regression, without penalty, of truth on the projections on the general truth direction and on a polarity
    direction, which is itself a logistic regression of polarity. Nothing is centred at test.

    Raises:
        InputError: There are no affirmative or no negated statements.
    """
    if examples.negated.all() or not examples.negated.any():
        raise InputError("TTPD needs affirmative and negated statements; use mass_mean or logistic for one of them")
    values = examples.values.astype(np.float64)
    found = truth_directions(examples)
    polarity = fit_logistic_briefly(values, ~examples.negated)
    axes = np.stack([_unit(found.general), _unit(polarity.weights)])
    final = fit_logistic(values @ axes.T, examples.labels)
    directions = {
        "truth": found.general,
        "polarity_sensitive_truth": found.polarity_sensitive,
        "polarity": polarity.weights,
    }
    return Probe("ttpd", final.weights @ axes, final.bias, directions, {"converged": final.converged})


def fit_mass_mean(examples: Examples, *, seed: int = 0) -> Probe:
    """Mean of true less mean of false statements (Marks & Tegmark 2024, arXiv:2310.06824, section 4.1)."""
    return along("mass_mean", examples, _mean_difference(examples))


def fit_mass_mean_iid(examples: Examples, *, seed: int = 0) -> Probe:
    """Mass-mean through the inverse covariance within the classes, for statements like those of the training set.

    Marks & Tegmark 2024, arXiv:2310.06824, section 4.1 (the in-distribution form).
    """
    values = examples.values.astype(np.float64)
    within = centred(values, examples.labels.astype(np.int64))
    covariance = within.T @ within / len(within)
    inverse = np.linalg.pinv(covariance, rcond=_CUTOFF, hermitian=True)
    return along("mass_mean_iid", examples, inverse @ _mean_difference(examples))


def fit_first_component(examples: Examples, *, seed: int = 0) -> Probe:
    """The direction in which hidden states vary most; labels only set its sign and threshold."""
    components = principal_components(examples.values.astype(np.float64), 1)
    return along("first_component", examples, components[0])


def fit_logistic_plain(examples: Examples, *, seed: int = 0) -> Probe:
    """Logistic regression without penalty, as Bürger et al. 2024 compare with."""
    found = fit_logistic_briefly(examples.values.astype(np.float64), examples.labels)
    return Probe("logistic", found.weights, found.bias, {"truth": found.weights}, {"converged": found.converged})


def fit_logistic_l2(examples: Examples, *, seed: int = 0) -> Probe:
    """Logistic regression on standardised hidden states with an L2 penalty, C = 0.01."""
    found = fit_logistic(examples.values.astype(np.float64), examples.labels, c=_L2)
    return Probe("logistic_l2", found.weights, found.bias, {"truth": found.weights}, {"converged": found.converged})


def principal_components(values: Floats, count: int) -> Floats:
    """Directions in which rows vary most, of length one, each with its largest part positive.

    Args:
        values: ``(rows, width)``.
        count: How many.

    Returns:
        ``(count, width)``.
    """
    rows = values - values.mean(0)
    components: Floats = np.linalg.svd(rows, full_matrices=False)[2][:count]
    largest = np.abs(components).argmax(1)
    flipped: Floats = components * np.sign(components[np.arange(len(components)), largest])[:, None]
    return flipped


def along(kind: str, examples: Examples, direction: Floats) -> Probe:
    """A probe along a direction ``(width,)``, with scale and threshold by logistic regression on the projection.

    Raises:
        InputError: All labels are the same.
    """
    axis = _unit(direction)
    final = fit_logistic((examples.values.astype(np.float64) @ axis)[:, None], examples.labels)
    return Probe(kind, final.weights[0] * axis, final.bias, {"truth": direction}, {"converged": final.converged})


def _mean_difference(examples: Examples) -> Floats:
    if examples.labels.all() or not examples.labels.any():
        raise InputError("a probe needs examples of both kinds; all of these have the same label")
    values = examples.values.astype(np.float64)
    found: Floats = values[examples.labels].mean(0) - values[~examples.labels].mean(0)
    return found


def _unit(direction: Floats) -> Floats:
    length = float(np.linalg.norm(direction))
    return direction / length if length > 0.0 else direction
