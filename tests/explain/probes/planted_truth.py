"""Hidden states in which truth was planted, so that what a probe finds can be compared with what is there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tracer.explain.probes.activations import Activations
from tracer.explain.probes.examples import Floats
from tracer.explain.probes.held_out import Material
from tracer.explain.probes.statements import Statement

WIDTH = 24


@dataclass(frozen=True)
class Planted:
    """Statements with hidden states, and the directions that were put into them."""

    material: Material
    truth: Floats
    sensitive: Floats
    polarity: Floats


def planted(
    *,
    topics: int = 5,
    entities: int = 30,
    layers: int = 3,
    strength: float = 1.5,
    polarity: float = 2.0,
    sinks: float = 0.0,
    normalisation: str = "none",
    seed: int = 0,
) -> Planted:
    """Four statements for each entity; truth shows at the middle layer only.

    Args:
        topics: How many.
        entities: Of each topic.
        layers: How many.
        strength: Length of the truth direction, in standard deviations of what is random.
        polarity: Length of the polarity direction.
        sinks: Share of hidden states that are replaced by one long vector.
        normalisation: What `Material` does to them.
        seed: For everything drawn at random.
    """
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.standard_normal((WIDTH, 3)))[0].T
    truth, sensitive, denial = strength * axes[0], 0.7 * strength * axes[1], polarity * axes[2]
    statements: list[Statement] = []
    rows: list[NDArray[np.float64]] = []
    for topic in range(topics):
        offset = 1.5 * rng.standard_normal(WIDTH)
        offset -= axes.T @ (axes @ offset)
        for entity in range(entities):
            for negated in (False, True):
                for value in (True, False):
                    label = value != negated
                    words = f"it{'' if value else 'em'} {'is not' if negated else 'is'} x{topic}y{entity}"
                    statements.append(Statement(words, label, f"topic {topic}", negated, f"x{topic}y{entity}"))
                    t, p = (1.0 if label else -1.0), (-1.0 if negated else 1.0)
                    noisy = rng.standard_normal((layers, WIDTH)) + offset + p * denial
                    noisy[layers // 2] += t * truth + t * p * sensitive
                    rows.append(noisy)
    values = np.stack(rows).astype(np.float32)
    lost = rng.random(len(values)) < sinks
    values[lost] = 40.0 * rng.standard_normal(WIDTH).astype(np.float32) / np.sqrt(WIDTH)
    values[lost, :, 0] += 100.0
    sink = np.repeat(lost[:, None], layers, axis=1)
    activations = Activations(values, tuple(range(layers)), sink)
    return Planted(
        Material(tuple(statements), activations, "rms" if normalisation == "rms" else "none"),
        truth,
        sensitive,
        denial,
    )


def cosine(left: Floats, right: Floats) -> float:
    """Cosine between two directions."""
    return float(left @ right / (np.linalg.norm(left) * np.linalg.norm(right)))
