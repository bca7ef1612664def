"""What an evaluation of truth probes found, as plain data that tables, JSON and pictures are made from."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from tracer.explain.probes.calibration import Reliability
from tracer.explain.probes.examples import Normalisation
from tracer.explain.probes.metrics import Curve, Measured
from tracer.trace.trace import Finite


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class TopicResult(_Frozen):
    """One topic, judged by probes of the others."""

    topic: str
    layer: int | None
    accuracy: Finite
    accuracy_sd: Finite
    """Over draws of training rows."""
    auroc: Finite | None
    affirmative: Finite | None
    """Accuracy on its affirmative statements; ``None`` if there are none."""
    negated: Finite | None


class MethodResult(Measured):
    """One method over all topics: means of the topics' accuracy and AUROC."""

    accuracy_sd: Finite
    """Over draws of training rows."""
    auroc_sd: Finite
    affirmative: Finite | None
    negated: Finite | None
    topics: tuple[TopicResult, ...]


class LayerResult(_Frozen):
    """One method at one layer."""

    method: str
    layer: int
    accuracy: Finite
    accuracy_sd: Finite
    auroc: Finite


class Projection(_Frozen):
    """Statements on the two truth directions of the other topics, for a scatter plot; all lists are equally long."""

    truth: tuple[Finite, ...]
    """Projection on the general truth direction."""
    polarity_sensitive: tuple[Finite, ...]
    """Projection on the polarity-sensitive truth direction."""
    label: tuple[bool, ...]
    negated: tuple[bool, ...]
    topic: tuple[str, ...]


class Picture(_Frozen):
    """What one method's curves are drawn from."""

    method: str
    roc: Curve
    """Over statements of all topics, by scores in units of each probe's own spread."""
    reliability: Reliability


class Evaluation(_Frozen):
    """What truth probes are worth on a model."""

    model: str | None
    statements: int
    left_out: str
    """What was left out in turn: a topic, or a group of entities where there are fewer than three topics."""
    topics: tuple[str, ...]
    normalisation: Normalisation
    repeats: int
    seed: int
    layers: tuple[int, ...]
    """Layers that there were hidden states of."""
    chosen_layer: int
    """The best layer over all topics; each topic is judged at the one that was chosen without it."""
    layer_choice: str
    methods: tuple[MethodResult, ...]
    controls: tuple[MethodResult, ...]
    by_layer: tuple[LayerResult, ...]
    pictures: tuple[Picture, ...]
    projection: Projection | None
    sinks: int
    """Hidden states at the chosen layer that are attention sinks."""
    notes: tuple[str, ...]
