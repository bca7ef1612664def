"""A probe as a file: its directions as safetensors, and beside them all that decides whether it may be believed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from tracer.errors import InputError, StoreError, StoreVersionError
from tracer.explain.probes.calibration import Band, Calibration
from tracer.explain.probes.examples import Floats, Normalisation, normalise
from tracer.explain.probes.probe import Probe
from tracer.files import write_atomic
from tracer.store.probe_reports import model_mark, probes_folder
from tracer.trace.probe_report import HeldOut, StepWorth
from tracer.trace.trace import Finite

FORMAT, VERSION = "tracer-probe", 1
STATEMENTS = "statements"
"""Name of the default truth probe, which was trained on statements."""
STEPS = "steps"
"""Name of the probe that was trained on right and wrong steps of reasoning."""
_WEIGHTS = "weights"
_IDENTITY = ("weights_sha256", "tokenizer_sha256")


class Training(BaseModel):
    """What a probe learnt from."""

    model_config = ConfigDict(frozen=True)

    sha256: str
    """Fingerprint of the statements and their labels."""
    rows: int
    topics: tuple[str, ...]
    source: str
    """Where they came from."""
    texts: tuple[str, ...] = ()
    """`mark` of each statement, so that one that turns up in a trace is not scored by what learnt from it."""


class ProbeRecord(BaseModel):
    """All that is known of a probe but its directions."""

    model_config = ConfigDict(frozen=True)

    name: str
    kind: str
    model: dict[str, JsonValue]
    """Identity of the replica whose hidden states it reads."""
    layer: int
    """Decoder layer whose output it reads, counted from 0, before the final norm."""
    position: str
    """Which token of a text it reads."""
    prefix: str = ""
    """What stood before each statement."""
    normalisation: Normalisation = "none"
    training: Training
    seed: int
    held_out: HeldOut
    on_steps: StepWorth | None = None
    """What it is worth on steps of reasoning; ``None`` where that was not measured."""
    median_norm: Finite | None = None
    """Usual norm of the hidden states that it was trained on, by which attention sinks are told."""
    calibration: Calibration
    notes: dict[str, JsonValue] = Field(default_factory=dict)
    created_at: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class SavedProbe:
    """A probe that can be kept and used on another day.

    Args:
        record: What is known of it.
        probe: Its directions.
    """

    record: ProbeRecord
    probe: Probe

    def score(self, values: ArrayLike) -> Floats:
        """Scores of hidden states as they come from the layer, ``(..., width)``; above zero means true.

        Raises:
            InputError: They are not as wide as the probe.
        """
        return self.probe.score(normalise(np.asarray(values, dtype=np.float32), self.record.normalisation))

    def probability(self, values: ArrayLike) -> Band:
        """Calibrated probabilities of hidden states ``(rows, width)``, with a band.

        Raises:
            InputError: They are not as wide as the probe.
        """
        return self.record.calibration.band(self.score(values))

    def save(self, path: Path) -> None:
        """Write the probe to a file, which appears whole or not at all.

        Raises:
            StoreError: It cannot be written.
        """
        from safetensors.numpy import save

        tensors = {_WEIGHTS: np.append(self.probe.weights, self.probe.bias)}
        tensors |= {f"direction.{name}": value for name, value in self.probe.directions.items()}
        tensors = {name: np.ascontiguousarray(value, dtype=np.float64) for name, value in tensors.items()}
        # The dump is what is hashed: floats of a record read back print as they did.
        record = json.dumps(self.record.model_dump(mode="json"), ensure_ascii=False, sort_keys=True)
        notes = json.dumps(dict(self.probe.notes), ensure_ascii=False, sort_keys=True)
        metadata = {"format": FORMAT, "version": str(VERSION), "record": record, "notes": notes}
        metadata["sha256"] = _sha256(tensors, metadata)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, save(tensors, metadata=metadata))
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error.strerror or error}") from None

    @classmethod
    def load(cls, path: Path, *, identity: Mapping[str, JsonValue] | None = None) -> Self:
        """Read a probe.

        Args:
            path: The file.
            identity: Identity of the replica that it shall be used on; it must be the one that it was trained on.

        Raises:
            InputError: The file is missing or holds no probe, or the probe belongs to another model.
            StoreError: The file is damaged.
            StoreVersionError: A newer tracer wrote it.
        """
        tensors, metadata = _read(path)
        if metadata.get("format") != FORMAT:
            raise InputError(f"{path} holds no probe of tracer; `tracer probe train` makes one")
        if metadata.get("version") != str(VERSION):
            raise StoreVersionError(
                f"{path} has version {metadata.get('version')!r} and this tracer reads {VERSION}; update tracer, or "
                "train the probe again"
            )
        if metadata.get("sha256") != _sha256(tensors, metadata):
            raise _damaged(path)
        try:
            record = ProbeRecord.model_validate_json(metadata["record"])
            notes = json.loads(metadata["notes"])
            weights = tensors.pop(_WEIGHTS)
        except (KeyError, ValueError, ValidationError):
            raise _damaged(path) from None
        if identity is not None:
            _check_identity(path, record.model, identity)
        directions = {name.removeprefix("direction."): value for name, value in tensors.items()}
        return cls(record, Probe(record.kind, weights[:-1], float(weights[-1]), directions, notes))


def mark(text: str) -> str:
    """A short fingerprint of a statement: 12 hexadecimal digits of the SHA-256 of its words."""
    return hashlib.sha256(" ".join(text.split()).encode("utf-8", "surrogatepass")).hexdigest()[:12]


def probe_path(identity: Mapping[str, JsonValue], name: str = STATEMENTS) -> Path:
    """Where the probe of that name for a model is kept: in ``$TRACER_PROBES``, or the user's data folder.

    Raises:
        InputError: The model has no hash of its weights.
    """
    return probes_folder() / f"{model_mark(identity)}-{name}.safetensors"


def _read(path: Path) -> tuple[dict[str, Floats], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"there is no probe at {path}; `tracer probe train` makes one")
    try:
        with safe_open(path, framework="np") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        raise _damaged(path) from None
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror or error}") from None
    return tensors, metadata


def _check_identity(path: Path, own: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    for key in _IDENTITY:
        if own.get(key) != identity.get(key):
            raise InputError(
                f"the probe in {path} was trained on the model {own.get('name')!r} and cannot read "
                f"{identity.get('name')!r}: their {key.removesuffix('_sha256')} differ; train one for it with "
                "`tracer probe train --model NAME`"
            )


def _sha256(tensors: Mapping[str, Floats], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for name in sorted(set(metadata) - {"sha256"}):
        digest.update(f"{name}={len(metadata[name].encode())}:{metadata[name]}\n".encode())
    for name in sorted(tensors):
        digest.update(f"{name}{tensors[name].shape}{tensors[name].dtype}".encode())
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()


def _damaged(path: Path) -> StoreError:
    return StoreError(f"{path} is damaged; train the probe again with `tracer probe train`")
