"""Truth by layer and token, as a trace carries it: where in a step, and how deep in the model, it is taken for true.

It is kept among a trace's probe documents; readers of probe scores pass over it, for it is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, JsonValue, ValidationError, model_validator

from tracer.errors import TraceFormatError
from tracer.trace.trace import Finite, Record, Trace

LAYER_MAP: Literal["layer_map"] = "layer_map"


class LayerMap(Record):
    """What probes of every layer say about every token of one step that the model wrote."""

    document: Literal["layer_map"] = LAYER_MAP
    step_id: str
    call_id: str
    """The call that holds the tokens."""
    completion: int
    """Which completion of it."""
    start: int
    """First token of the step in that completion."""
    kind: str
    """How each layer's probe was fitted."""
    layers: list[int]
    """Decoder layers whose output was read, counted from 0, rising."""
    values: list[list[Finite]]
    """A row for each layer, a column for each token: above zero means true, in units of the spread of the layer's
    scores on its training statements."""
    held_out: list[Finite]
    """AUROC of each layer's probe on statements of topics that had no part in it; 0.5 is chance."""
    protocol: str
    """How that was measured, in a sentence."""
    replica: dict[str, JsonValue] = Field(default_factory=dict)
    """Identity of the model whose hidden states were read."""
    parity: dict[str, JsonValue] | None = None
    """How far its log-probabilities are from the recorded ones."""
    created_at: str = ""

    @model_validator(mode="after")
    def _rectangular(self) -> Self:
        rows = len(self.layers)
        if len(self.values) != rows or len(self.held_out) != rows or len({len(row) for row in self.values}) > 1:
            raise ValueError("values must have a row for each layer and a column for each token")
        return self

    @classmethod
    def read(cls, document: Mapping[str, JsonValue]) -> LayerMap:
        """The typed view of a trace's layer map.

        Raises:
            TraceFormatError: It is not of this form.
        """
        try:
            return cls.model_validate(dict(document))
        except ValidationError as error:
            raise TraceFormatError(f"a layer map cannot be read: {error.errors()[0]['msg']}") from None


def layer_maps(trace: Trace) -> dict[str, LayerMap]:
    """The newest layer map of each step of a trace, those that cannot be read left out."""
    steps = {step.id for step in trace.steps}
    found: dict[str, LayerMap] = {}
    for document in trace.probes:
        if document.get("document") != LAYER_MAP:
            continue
        try:
            own = LayerMap.read(document)
        except TraceFormatError:
            continue
        if own.step_id in steps:
            found[own.step_id] = own
    return found
