"""What AT2 learned about a model: one weight for each attention head, kept beside the model's own files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from tracer.engines.weights.cache import cache_dir
from tracer.errors import InputError, StoreError
from tracer.explain.checked import read_checked, write_checked
from tracer.replay.model import Replica, identity_of

_ARRAY = "heads"
_SHIPPED = Path(__file__).with_name("fitted")
"""Weights that come with the package, by the model that they were fitted for."""


class Interval(BaseModel):
    """A mean with its 95 % interval, of a bootstrap over questions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float
    low: float
    high: float


class Validation(BaseModel):
    """How well weights predict what ablation does to targets that they were not fitted on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lds: Interval
    """Mean linear datamodelling score of the fitted weights over the targets."""
    uniform: Interval
    """The same of equal weights: raw attention."""
    random: Interval
    """The same of random scores."""
    targets: int
    """Held-out targets."""
    folds: int
    """Fits, each of which was scored on targets that it did not see; the kept weights are fitted on all."""
    held_out: Literal["questions", "targets"]
    """What was kept apart: runs on one question together, or single targets where all runs had the same one."""


class FitDocument(BaseModel):
    """What is known about fitted weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["tracer-at2-1"] = "tracer-at2-1"
    model: str | None
    """Name of the model."""
    weights_sha256: str
    """Its weights; those of another model are refused."""
    training_sha256: str
    """Over the targets that were fitted on, their masks and what was measured."""
    examples: int
    """Targets fitted on."""
    masks: int
    """Masks of each."""
    seed: int
    iterations: int
    """Steps of gradient descent."""
    validation: Validation
    created_at: str


@dataclass(frozen=True, slots=True, eq=False)
class HeadWeights:
    """Fitted weights.

    Args:
        values: ``(layers, heads)``; their absolute values add up to one.
        about: What is known about them.
        sha256: Their file's.
    """

    values: NDArray[np.float32]
    about: FitDocument
    sha256: str

    def details(self) -> dict[str, JsonValue]:
        """What every finding says about the weights that it was made with."""
        validation: JsonValue = self.about.validation.model_dump(mode="json")
        return {"fit": self.sha256, "fitted_on": self.about.examples, "validation": validation}


def default_path(replica: Replica) -> Path:
    """Where the weights of a model are kept."""
    return fits_dir() / f"{identity_of(replica)['weights_sha256']}.safetensors"


def fits_dir() -> Path:
    """The folder of fitted weights and of what was measured for them, below the model cache."""
    return cache_dir() / "at2"


def save_weights(path: Path, values: NDArray[np.floating], about: FitDocument) -> HeadWeights:
    """Write weights in place of those that are there.

    Raises:
        StoreError: They cannot be written.
    """
    whole = np.asarray(values, dtype=np.float32)
    return HeadWeights(whole, about, write_checked(path, {_ARRAY: whole}, about.model_dump(mode="json")))


def load_weights(path: Path | None, replica: Replica) -> HeadWeights:
    """The weights in a file, or those that were fitted for a model and kept.

    Args:
        path: The file; ``None`` takes the place where ``tracer at2 fit`` puts them, else those that the package brings.
        replica: The model that they shall be for.

    Raises:
        InputError: There are none, they are damaged, or they belong to another model.
    """
    chosen = path or _kept(replica)
    if not chosen.is_file():
        where = "no weights are fitted for this model" if path is None else f"there is no file {path}"
        raise InputError(f"at2: {where}; run `tracer at2 fit RUN...`")
    try:
        found = read_checked(chosen)
        about = FitDocument.model_validate(found.about)
    except StoreError as error:
        raise InputError(f"at2: {error}; run `tracer at2 fit RUN...`") from None
    except ValidationError:
        raise InputError(f"at2: {chosen} holds no weights of AT2; run `tracer at2 fit RUN...`") from None
    own = identity_of(replica)
    values = found.arrays.get(_ARRAY)
    shape = (len(replica.layers), replica.heads)
    if about.weights_sha256 != own["weights_sha256"] or values is None or values.shape != shape:
        raise InputError(
            f"at2: {chosen} was fitted for another model ({about.model or 'without a name'}) than "
            f"{own['name'] or 'this one'}; run `tracer at2 fit RUN...` with runs of this one"
        )
    return HeadWeights(np.asarray(values, dtype=np.float32), about, found.sha256)


def _kept(replica: Replica) -> Path:
    """A person's own fit, or the one that comes with the package."""
    own = default_path(replica)
    shipped = _SHIPPED / own.name
    return shipped if shipped.is_file() and not own.is_file() else own
