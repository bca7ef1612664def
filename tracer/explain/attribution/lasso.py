"""L1-penalised least squares on standardised columns, by coordinate descent."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_SWEEPS = 20_000
_TOLERANCE = 1e-12


def fit_lasso(
    features: NDArray[np.float64], outcomes: NDArray[np.float64], *, penalty: float
) -> tuple[NDArray[np.float64], float]:
    """Minimise ``|y - Xs w|^2 / (2 n) + penalty |w|_1`` over standardised features Xs.

    The weights are put back into the units of the features as given.

    Args:
        features: ``(rows, columns)``; a column that never changes gets no weight.
        outcomes: ``(rows,)``.
        penalty: Weight of the L1 norm.

    Returns:
        Coefficients ``(columns,)`` and the intercept, for the features as given.
    """
    rows, columns = features.shape
    centre, scale = features.mean(0), features.std(0)
    moving = scale > 0
    standard = np.where(moving, (features - centre) / np.where(moving, scale, 1.0), 0.0)
    gram, pull = standard.T @ standard / rows, standard.T @ (outcomes - outcomes.mean()) / rows
    weights = np.zeros(columns)
    for _ in range(_SWEEPS):
        largest = 0.0
        for column in np.flatnonzero(moving):
            # The diagonal of the Gram matrix is one.
            partial = pull[column] - gram[column] @ weights + weights[column]
            updated = np.sign(partial) * max(abs(partial) - penalty, 0.0)
            largest = max(largest, abs(updated - weights[column]))
            weights[column] = updated
        if largest <= _TOLERANCE * max(1.0, float(np.abs(weights).max())):
            break
    coefficients = np.where(moving, weights / np.where(moving, scale, 1.0), 0.0)
    return coefficients, float(outcomes.mean() - centre @ coefficients)
