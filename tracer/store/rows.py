"""How events become rows: their stored form, and what each adds to the summary of its run."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from pydantic import JsonValue
from pydantic_core import PydanticSerializationError, to_json

from tracer.errors import InputError, StoreError, TraceFormatError
from tracer.trace.events import (
    CallFailed,
    CallFinished,
    CallStarted,
    Event,
    RunFinished,
    RunStarted,
    StepAdded,
    event_from_json,
    event_to_json,
    unfold,
)
from tracer.trace.trace import Completion, Trace

PACK_BYTES = 1 << 16
"""Longer payloads are stored compressed."""
_NAME_CHARACTERS = 200


def encode(text: str) -> dict[str, str | bytes | None]:
    """The payload columns that hold a JSON text."""
    if len(text) <= PACK_BYTES:
        return {"payload": text, "packed": None}
    return {"payload": None, "packed": zlib.compress(text.encode(), 1)}


def decode(payload: str | None, packed: bytes | None) -> str:
    """The JSON text in the payload columns.

    Raises:
        StoreError: They hold none.
    """
    if payload is not None:
        return payload
    try:
        return zlib.decompress(packed or b"").decode()
    except (zlib.error, UnicodeDecodeError) as error:
        raise StoreError(f"a stored text cannot be unpacked ({error}); the store is damaged") from None


def decode_event(trace_id: str, seq: int, columns: tuple[str | None, bytes | None]) -> Event:
    """The event in the payload columns.

    Raises:
        StoreError: They hold none.
    """
    try:
        # Whatever was stored was valid when it was stored, perhaps by a newer minor version of the format.
        return event_from_json(decode(*columns), newer_minor=True)
    except TraceFormatError as error:
        raise StoreError(f"event {seq} of trace {trace_id} cannot be read: {error}") from None


def timestamp(moment: datetime) -> float:
    """Seconds since the epoch; a time without a zone is taken as UTC."""
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


@dataclass(slots=True)
class Delta:
    """What a batch of events adds to its run's summary."""

    events: int = 0
    steps: int = 0
    calls: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    ended: float | None = None
    """The latest time at which something in the batch is known to have ended."""
    finished: RunFinished | None = None
    texts: list[tuple[int, str]] = field(default_factory=list)
    """Step texts with the position of their event in the batch."""

    def add(self, event: Event) -> None:
        """Count one event."""
        match event:
            case RunStarted():
                pass
            case CallStarted(call=call):
                self.calls += 1
                self.prompt_tokens += len(call.prompt_token_ids)
                self.completion_tokens += _tokens(call.completions)
                self.errors += call.error is not None
                if call.seconds is not None:
                    self._reach(timestamp(call.started_at) + call.seconds)
            case CallFinished():
                self.completion_tokens += _tokens(event.completions)
            case CallFailed():
                self.errors += 1
            case StepAdded(step=step):
                self.steps += 1
                self.errors += step.kind == "error" or step.error is not None
                if step.text:
                    self.texts.append((self.events, step.text))
            case RunFinished():
                self.finished = event
                self._reach(timestamp(event.at))
            case _:
                pass
        self.events += 1

    def _reach(self, moment: float) -> None:
        self.ended = moment if self.ended is None else max(self.ended, moment)


@dataclass(frozen=True, slots=True)
class Batch:
    """Events made ready to be stored, before a transaction is begun for them."""

    started: RunStarted | None
    """The first event, if it begins a run."""
    rows: list[dict[str, str | bytes | None]]
    delta: Delta

    @classmethod
    def of(cls, events: Sequence[Event]) -> Batch:
        """Serialise and count events."""
        delta = Delta()
        for event in events:
            delta.add(event)
        first = events[0] if events and isinstance(events[0], RunStarted) else None
        return cls(started=first, rows=[encode(event_to_json(event)) for event in events], delta=delta)

    @classmethod
    def of_trace(cls, trace: Trace) -> Batch:
        """The events of a complete trace."""
        return cls.of(unfold(trace))


def document_to_json(document: dict[str, JsonValue]) -> str:
    """The stored form of an attached document.

    Raises:
        InputError: It is not plain JSON data.
    """
    try:
        # As in a trace file, where an infinite number becomes null.
        return to_json(document, inf_nan_mode="null").decode()
    except PydanticSerializationError as error:
        raise InputError(f"an attached document must be plain JSON data: {error}") from None


def document_row(document: dict[str, JsonValue]) -> dict[str, str | bytes | float | None]:
    """The columns of an attached document, with what a listing shows of it.

    Raises:
        InputError: It is not plain JSON data.
    """
    return {**encode(document_to_json(document)), **listed(document)}


def listed(document: Mapping[str, JsonValue]) -> dict[str, str | float | None]:
    """What a listing shows of an attached document: a method's or a probe's name, and seconds of work."""
    names = [name for name in (document.get("method"), document.get("name")) if isinstance(name, str)]
    cost = document.get("cost")
    seconds = cost.get("seconds") if isinstance(cost, dict) else None
    return {
        # A NUL ends a text in some databases.
        "name": names[0].replace("\0", "")[:_NAME_CHARACTERS] if names else None,
        "seconds": float(seconds) if isinstance(seconds, int | float) and math.isfinite(seconds) else None,
    }


def _tokens(completions: Sequence[Completion]) -> int:
    return sum(len(completion.token_ids) for completion in completions)
