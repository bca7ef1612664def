"""A model whose truth direction is known, and probes that read it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import JsonValue

from tests.explain.tiny_runs import AUTO, VOCABULARY, write_replica
from tracer.explain.probes.calibration import fit_calibration
from tracer.explain.probes.probe import Probe
from tracer.explain.probes.saved import ProbeRecord, SavedProbe, Training
from tracer.trace.probe_report import Estimate, HeldOut, Measured, StepWorth

WIDTH = 32
TRUE, FALSE = "!", "."
"""Statements of this model are true where they end with an exclamation mark."""
DIRECTION = np.eye(WIDTH)[0]
STRENGTH = 25.0


def write_truthful(folder: Path) -> Path:
    """A random Llama that adds a truth direction to the embeddings of the two characters."""
    write_replica(folder)
    model: Any = AUTO.from_pretrained(str(folder))
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        for text, sign in ((TRUE, 1.0), (FALSE, -1.0)):
            embedding[_byte(text)] *= 0.1
            embedding[_byte(text), 0] = sign * STRENGTH
    model.save_pretrained(str(folder))
    return folder


def _byte(text: str) -> int:
    """Id of a character in the test's byte-level tokenizer."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert len(letters) < VOCABULARY
    return letters.index(text)


def measured(name: str, value: float) -> Measured:
    """A result that was never measured."""
    estimate = Estimate(value=value, low=value - 0.05, high=value + 0.05)
    return Measured(name=name, rows=40, accuracy=estimate, auroc=estimate)


def worth(*, beats: bool) -> StepWorth:
    """A probe that is better than the log-probability on steps, or one that is not."""
    return StepWorth(
        protocol="a test",
        rows=40,
        wrong=20,
        probe=measured("probe", 0.8),
        baselines=(measured("mean_logprob", 0.7), measured("length", 0.5)),
        over_logprob=Estimate(value=0.1, low=0.02 if beats else -0.02, high=0.2),
        stack=measured("stack", 0.7),
        with_probe=measured("with probe", 0.7),
        adds=Estimate(value=0.0, low=-0.01, high=0.01),
    )


def truth_probe(
    identity: Mapping[str, JsonValue],
    *,
    name: str = "statements",
    layer: int = 1,
    position: str = "last",
    texts: tuple[str, ...] = (),
    on_steps: StepWorth | None = None,
    median_norm: float | None = None,
) -> SavedProbe:
    """A probe that reads the planted direction."""
    rng = np.random.default_rng(0)
    labels = rng.random(80) < 0.5
    scores = np.where(labels, STRENGTH, -STRENGTH) + rng.normal(0, STRENGTH, 80)
    record = ProbeRecord(
        name=name,
        kind="logistic",
        model=dict(identity),
        layer=layer,
        position=position,
        training=Training(sha256="0" * 64, rows=80, topics=("planted",), source="a test", texts=texts),
        seed=0,
        held_out=HeldOut(protocol="a test", overall=measured("probe", 0.9)),
        on_steps=on_steps,
        median_norm=median_norm,
        calibration=fit_calibration(scores, labels, list(range(80))),
        created_at=datetime(2026, 1, 1, tzinfo=UTC).isoformat(),
    )
    return SavedProbe(record, Probe("logistic", DIRECTION, 0.0))


def direction_probe(
    identity: Mapping[str, JsonValue], width: int, *, name: str, layer: int, position: str
) -> SavedProbe:
    """A probe of any model that reads a direction of length one, drawn at random."""
    direction = np.random.default_rng(layer).standard_normal(width)
    known = truth_probe(identity, name=name, layer=layer, position=position)
    return SavedProbe(known.record, Probe("logistic", direction / np.linalg.norm(direction), 0.0))
