"""Logistic regression, by scikit-learn."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np

from tracer.errors import InputError
from tracer.explain.probes.examples import Flags, Floats

_STEPS = 2000
_TOLERANCE = 1e-5


class Linear(NamedTuple):
    """A linear function of features.

    Args:
        weights: ``(features,)``.
        bias: The intercept.
        converged: Whether the fit came to rest; it cannot where the classes can be told apart without error.
    """

    weights: Floats
    bias: float
    converged: bool


def fit_logistic(features: Floats, labels: Flags, *, c: float = np.inf, sample_weight: Floats | None = None) -> Linear:
    """Logistic regression of labels on standardised features, put back into the features' own units.

    Without a penalty standardising changes nothing but how fast the fit comes to rest.

    Args:
        features: ``(rows, features)``.
        labels: ``(rows,)``.
        c: Inverse weight of the L2 penalty on the weights of standardised features; infinite for none.
        sample_weight: ``(rows,)``; all alike if not given.

    Raises:
        InputError: All labels are the same.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if labels.all() or not labels.any():
        raise InputError("a probe needs examples of both kinds; all of these have the same label")
    centre, scale = features.mean(0), features.std(0)
    scale = np.where(scale > 0.0, scale, 1.0)
    model = LogisticRegression(C=c, tol=_TOLERANCE, max_iter=_STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit((features - centre) / scale, labels, sample_weight=sample_weight)
    weights = model.coef_[0] / scale
    return Linear(weights, float(model.intercept_[0] - weights @ centre), int(model.n_iter_[0]) < _STEPS)
