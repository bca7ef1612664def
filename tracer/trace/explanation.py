"""Explanations as a trace carries them: what one method says about its steps.

A trace keeps explanations as plain data, so that those of other programs and of newer versions survive; this is the
typed view of those that tracer writes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

from pydantic import Field, JsonValue, ValidationError, model_validator

from tracer.errors import TraceFormatError, UnknownNameError
from tracer.trace.trace import Finite, Record, Trace


class ExplanationSource(Record):
    """A run of tokens that steps could read and that shows one thing."""

    id: str
    kind: str = "template"
    """A segment kind, or ``sink`` for the first token of a sequence, on which attention rests."""
    step_id: str | None = None
    """The step that it shows."""
    call_id: str | None = None
    """The first call that holds it; an id of no call where the trace was tokenised again."""
    start: int | None = None
    """Its first token in that call's prompt and completion taken together."""
    end: int | None = None
    """One past its last."""
    completion: int | None = None
    """Which completion of the call, where it reaches beyond the prompt."""


class ArrayFile(Record):
    """Token-level scores in a safetensors file beside the trace: one float32 tensor for each target, by step id."""

    file: str
    """Its path below the folder of arrays."""
    sha256: str
    bytes: int


class Explanation(Record):
    """Scores of one method for one trace."""

    key: str | None = None
    """SHA-256 of all that the scores depend on; the same key is not computed twice."""
    trace_sha256: str | None = None
    """SHA-256 of the trace's ids, segments and steps, without its explanations."""
    method: str
    parameters: dict[str, JsonValue] = Field(default_factory=dict)
    target_function: str = "logprob"
    foil: int | None = None
    """Token id that a contrast is taken against; ``None`` stands for the runner-up at each position."""
    chunk_tokens: int | None = None
    """Longest chunk of a document or observation; ``None`` where they are whole."""
    unit: str = ""
    signed: bool = True
    targets: list[str]
    """Ids of the steps that are explained."""
    sources: list[ExplanationSource]
    values: list[list[Finite]]
    """A row for each target, a column for each source; a step's own tokens count as a source of it too."""
    faithfulness: dict[str, JsonValue] | None = None
    """How well the scores predict what the model does; ``None`` until it is measured."""
    parity: dict[str, JsonValue] | None = None
    """How far the replica's log-probabilities are from the recorded ones."""
    replica: dict[str, JsonValue] = Field(default_factory=dict)
    cost: dict[str, JsonValue] = Field(default_factory=dict)
    """Seconds, tokens forward and passes backward; methods of one family share them."""
    seed: int = 0
    arrays: ArrayFile | None = None
    details: dict[str, dict[str, JsonValue]] = Field(default_factory=dict)
    """What else a method found out about a target, by step id."""
    through: dict[str, dict[str, Finite]] = Field(default_factory=dict)
    """For the final answer's steps: the share of every source, by its id, counting all ways through earlier steps."""
    created_at: str | None = None

    @model_validator(mode="after")
    def _rectangular(self) -> Self:
        if len(self.values) != len(self.targets) or any(len(row) != len(self.sources) for row in self.values):
            raise ValueError("values must have a row for each target and a column for each source")
        return self

    @classmethod
    def read(cls, document: dict[str, Any]) -> Explanation:
        """The typed view of a trace's explanation.

        Raises:
            TraceFormatError: It is not of this form.
        """
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "top level"
            raise TraceFormatError(f"an explanation cannot be read: {where}: {first['msg']}") from None

    def row(self, step_id: str) -> list[float]:
        """The values of a target, one for each source.

        Raises:
            UnknownNameError: The step is no target of this explanation.
        """
        if step_id not in self.targets:
            raise UnknownNameError(f"target of {self.method}", step_id, self.targets)
        return self.values[self.targets.index(step_id)]


def find_explanation(trace: Trace, method: str) -> Explanation:
    """The explanation of a trace by a method that stands for it; see `choose_explanations`.

    Raises:
        UnknownNameError: It has none.
        TraceFormatError: None of them can be read.
    """
    found = [document for document in trace.explanations if document.get("method") == method]
    if not found:
        known = {str(document.get("method")) for document in trace.explanations}
        raise UnknownNameError("explanation of this trace", method, known)
    chosen, _ = choose_explanations(found)
    return chosen[method] if method in chosen else Explanation.read(found[-1])


def choose_explanations(documents: Iterable[dict[str, Any]]) -> tuple[dict[str, Explanation], int]:
    """Of several explanations by one method, with other parameters or of fewer steps, the one that stands for it.

    One that was forced stands behind one that was not, then one of another target function behind one of the
    log-probability, then one of fewer targets behind one of more; of those that are left the newest counts.

    Args:
        documents: A trace's explanations, oldest first.

    Returns:
        The explanations by method, and how many could not be read.
    """
    found: dict[str, Explanation] = {}
    unreadable = 0
    for document in documents:
        try:
            explanation = Explanation.read(document)
        except TraceFormatError:
            unreadable += 1
            continue
        known = found.get(explanation.method)
        if explanation.targets and (known is None or _standing(explanation) >= _standing(known)):
            found[explanation.method] = explanation
    return found, unreadable


def _standing(explanation: Explanation) -> tuple[bool, bool, int]:
    forced = bool((explanation.parity or {}).get("forced"))
    return not forced, explanation.target_function == "logprob", len(explanation.targets)
