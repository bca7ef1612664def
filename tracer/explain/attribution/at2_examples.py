"""What AT2 learns from: targets, the attention that their sources got, and what happened without some of those.

For each target random halves of its sources are taken away, and the logit of the target's probability is measured: that
of the joint probability of all of its tokens, as in ContextCite. That is what takes time; it is kept target by target.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from tracer.errors import StoreError
from tracer.explain.attribution.ablation import random_masks
from tracer.explain.attribution.at2 import features
from tracer.explain.base import Context
from tracer.explain.checked import read_checked, write_checked
from tracer.explain.document import content_sha256
from tracer.explain.faithfulness import spearman
from tracer.explain.removal import Masks, Removal, logit, removable
from tracer.replay.model import identity_of
from tracer.replay.recorded import Recorded, Target

FEWEST_SOURCES = 3
"""Targets with fewer are left out: any scores correlate with two points."""
_FORMAT = "tracer-at2-measured-2"
_DECIMALS = 4
"""Differences that are rounding of float32 are no effect."""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """What is known about one target.

    Args:
        key: SHA-256 of everything that was measured depends on.
        question: What its run was asked; runs on one question are never on both sides of a validation.
        features: Attention of each head to each source, ``(layers, heads, sources)``.
        masks: Which sources were kept, ``(masks, sources)``.
        outcomes: Logit of the target's probability under each mask, ``(masks,)``.
    """

    key: str
    question: str
    features: NDArray[np.float32]
    masks: Masks
    outcomes: NDArray[np.float64]

    @property
    def varies(self) -> bool:
        """Whether the masks make a difference to the target."""
        return bool(np.ptp(self.outcomes.round(_DECIMALS)) > 0)

    def predictors(self) -> NDArray[np.float64]:
        """Attention of each head to the kept sources, ``(masks, layers * heads)``."""
        flat = self.features.reshape(-1, self.masks.shape[1]).astype(np.float64)
        return np.asarray(self.masks.astype(np.float64) @ flat.T)

    def lds(self, scores: NDArray[np.floating]) -> float | None:
        """Spearman correlation of summed scores ``(sources,)`` of kept sources with what was measured."""
        return spearman(self.masks @ scores, self.outcomes.round(_DECIMALS))


def choose(recorded: Recorded, most: int, *, seed: int) -> tuple[Target, ...]:
    """Steps of a run that can be learned from: those that read enough sources, a random few of them.

    Args:
        recorded: The run.
        most: How many, at most.
        seed: Which ones.
    """
    able = [item for item in recorded.targets if len(removable(recorded, item, None)) >= FEWEST_SOURCES]
    drawn = np.random.default_rng(seed).permutation(len(able))[:most]
    return tuple(able[number] for number in sorted(drawn.tolist()))


def measure(
    context: Context,
    targets: Sequence[Target],
    *,
    masks: int,
    folder: Path | None = None,
    done: Callable[[], None] = lambda: None,
) -> list[Example]:
    """Take sources away from targets and see what happens to them.

    Args:
        context: Model, run, seed and cancellation.
        targets: Steps with at least `FEWEST_SOURCES` sources.
        masks: Random masks for each, by the context's seed.
        folder: Keeps what was measured for each target, so that nothing is measured twice; files that were changed
            since are measured again.
        done: Called after each target.

    Raises:
        CancelledError: The context's ``cancel`` was set; finished targets are kept.
        EngineUnavailableError: Memory ran out.
        StoreError: ``folder`` cannot be written.
    """
    keys = [_key(context, target, masks) for target in targets]
    files = [None if folder is None else folder / f"{key}.safetensors" for key in keys]
    known = [_read(file, key) for file, key in zip(files, keys, strict=True)]
    missing = [target for target, example in zip(targets, known, strict=True) if example is None]
    attended = dict(zip(missing, features(context, missing), strict=True)) if missing else {}
    found: list[Example] = []
    for target, key, file, example in zip(targets, keys, files, known, strict=True):
        context.check_cancel()
        if example is None:
            removal = Removal(context, target)
            drawn = random_masks(masks, len(removal.units), seed=context.seed)
            own = attended[target][..., list(removal.units)]
            question = context.recorded.trace.task.question
            example = Example(key, question, own, drawn, logit(removal.values(drawn)))
            _write(file, example)
        found.append(example)
        done()
    return found


def _key(context: Context, target: Target, masks: int) -> str:
    """SHA-256 of what the measurement of a target depends on."""
    own = identity_of(context.replica)
    about = [
        _FORMAT,
        content_sha256(context.recorded.trace),
        [own["weights_sha256"], own["dtype"]],
        [source.start for source in context.recorded.sources],
        [target.step_id, target.sequence, target.start, target.end],
        [masks, context.seed],
    ]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _read(file: Path | None, key: str) -> Example | None:
    if file is None or not file.is_file():
        return None
    try:
        found = read_checked(file)
    except StoreError:
        return None
    if found.about.get("key") != key:
        return None
    arrays = found.arrays
    return Example(
        key,
        str(found.about["question"]),
        np.asarray(arrays["features"], dtype=np.float32),
        np.asarray(arrays["masks"], dtype=np.bool_),
        np.asarray(arrays["outcomes"], dtype=np.float64),
    )


def _write(file: Path | None, example: Example) -> None:
    if file is not None:
        about: dict[str, JsonValue] = {"format": _FORMAT, "key": example.key, "question": example.question}
        arrays = {"features": example.features, "masks": example.masks, "outcomes": example.outcomes}
        write_checked(file, arrays, about)
