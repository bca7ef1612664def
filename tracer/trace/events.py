"""What happens during a run, as an append-only stream that folds into a trace.

The recorder emits events, the store appends them as they happen, and `fold` turns any prefix of the stream into
a trace: a run whose process was killed loads up to its last event.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Annotated, Literal, assert_never

from pydantic import Field, JsonValue, TypeAdapter, ValidationError

from tracer.errors import TraceFormatError
from tracer.trace.trace import (
    SCHEMA_VERSION,
    AgentInfo,
    Call,
    Completion,
    Edge,
    Finite,
    ModelInfo,
    Outcome,
    Record,
    Status,
    Step,
    Task,
    Trace,
)


class RunStarted(Record):
    """The first event of every run."""

    event: Literal["run_started"] = "run_started"
    schema_version: str = SCHEMA_VERSION
    trace_id: str
    name: str
    at: datetime
    agent: AgentInfo
    model: ModelInfo
    task: Task
    fork_of: dict[str, JsonValue] | None = None
    extra: dict[str, JsonValue] = Field(default_factory=dict)
    """Fields of the trace that only a newer minor version knows."""


class CallStarted(Record):
    """A request was sent to the model."""

    event: Literal["call_started"] = "call_started"
    call: Call


class CallFinished(Record):
    """Its completions came back."""

    event: Literal["call_finished"] = "call_finished"
    call_id: str
    completions: list[Completion]
    seconds: Finite


class CallFailed(Record):
    """It never will."""

    event: Literal["call_failed"] = "call_failed"
    call_id: str
    error: str
    seconds: Finite


class StepAdded(Record):
    """A step is complete; ``edges`` are those that lead to it."""

    event: Literal["step_added"] = "step_added"
    step: Step
    edges: list[Edge] = Field(default_factory=list)


class StepUpdated(Record):
    """A later decision about an earlier step; ``None`` leaves a field as it is."""

    event: Literal["step_updated"] = "step_updated"
    step_id: str
    pruned: bool | None = None
    score: Finite | None = None
    data: dict[str, JsonValue] | None = None
    """Merged into the step's data."""


class EdgeAdded(Record):
    """A relation between two steps that are both there already."""

    event: Literal["edge_added"] = "edge_added"
    edge: Edge


class RunFinished(Record):
    """The last event of every run that ended in an orderly way."""

    event: Literal["run_finished"] = "run_finished"
    at: datetime
    status: Status
    outcome: Outcome
    error: str | None = None


Event = Annotated[
    RunStarted | CallStarted | CallFinished | CallFailed | StepAdded | StepUpdated | EdgeAdded | RunFinished,
    Field(discriminator="event"),
]
_adapter: TypeAdapter[Event] = TypeAdapter(Event)


def event_to_json(event: Event) -> str:
    """Serialise one event, without a line break in it."""
    return event.model_dump_json()


def event_from_json(text: str | bytes, *, newer_minor: bool = False) -> Event:
    """Read one event.

    Args:
        text: One JSON object.
        newer_minor: Whether names that only a newer minor version knows are kept, as in an imported trace.

    Raises:
        TraceFormatError: The text is no event that this version knows.
    """
    try:
        return _adapter.validate_json(text, context={"newer_minor": newer_minor})
    except ValidationError as error:
        raise TraceFormatError(f"not a trace event: {error.errors()[0]['msg']}") from None


class TraceBuilder:
    """Folds events into a trace, one at a time and in constant time each.

    Args:
        started: The run's first event.
    """

    def __init__(self, started: RunStarted) -> None:
        self.trace = Trace(
            schema_version=started.schema_version,
            id=started.trace_id,
            name=started.name,
            created_at=started.at,
            status="running",
            agent=started.agent,
            model=started.model,
            task=started.task,
            fork_of=started.fork_of,
            **started.extra,
        )
        self._calls: dict[str, Call] = {}
        self._steps: dict[str, Step] = {}

    def apply(self, event: Event) -> None:
        """Apply the next event.

        Raises:
            TraceFormatError: It refers to a call or step that was never recorded.
        """
        match event:
            case RunStarted():
                raise TraceFormatError(f"run {self.trace.id} was started twice")
            case CallStarted(call=call):
                call = call.model_copy()
                self._calls[call.id] = call
                self.trace.calls.append(call)
            case CallFinished():
                call = self._call(event.call_id)
                call.completions = event.completions
                call.seconds = event.seconds
            case CallFailed():
                call = self._call(event.call_id)
                call.error = event.error
                call.seconds = event.seconds
            case StepAdded():
                step = event.step.model_copy()
                self._steps[step.id] = step
                self.trace.steps.append(step)
                self.trace.edges.extend(event.edges)
            case StepUpdated():
                self._update(event)
            case EdgeAdded():
                self.trace.edges.append(event.edge)
            case RunFinished():
                self.trace.status = event.status
                self.trace.outcome = event.outcome
                self.trace.error = event.error
            case _:
                assert_never(event)

    def _update(self, event: StepUpdated) -> None:
        step = self._steps.get(event.step_id)
        if step is None:
            raise TraceFormatError(f"run {self.trace.id} has no step {event.step_id!r}")
        if event.pruned is not None:
            step.pruned = event.pruned
        if event.score is not None:
            step.score = event.score
        if event.data is not None:
            step.data = {**step.data, **event.data}

    def _call(self, call_id: str) -> Call:
        if call_id not in self._calls:
            raise TraceFormatError(f"run {self.trace.id} has no call {call_id!r}")
        return self._calls[call_id]


def fold(events: Iterable[Event]) -> Trace:
    """Turn a stream of events, or any prefix of one, into a trace.

    Raises:
        TraceFormatError: The stream is empty or does not begin with ``run_started``.
    """
    stream = iter(events)
    first = next(stream, None)
    if not isinstance(first, RunStarted):
        raise TraceFormatError("a run's events must begin with run_started")
    builder = TraceBuilder(first)
    for event in stream:
        builder.apply(event)
    return builder.trace


def unfold(trace: Trace) -> list[Event]:
    """The shortest stream of events that folds into ``trace``, for storing an imported file.

    Explanations and probes are not part of a run's events; the store keeps them on their own.
    """
    events: list[Event] = [
        RunStarted(
            schema_version=trace.schema_version,
            trace_id=trace.id,
            name=trace.name,
            at=trace.created_at,
            agent=trace.agent,
            model=trace.model,
            task=trace.task,
            fork_of=trace.fork_of,
            extra=dict(trace.model_extra or {}),
        )
    ]
    for call in trace.calls:
        events.append(CallStarted(call=call))
    for step in trace.steps:
        events.append(StepAdded(step=step))
    events.extend(EdgeAdded(edge=edge) for edge in trace.edges)
    if trace.status != "running" or trace.error is not None or trace.outcome != Outcome():
        end = {"at": trace.created_at, "status": trace.status, "outcome": trace.outcome, "error": trace.error}
        events.append(RunFinished.model_validate(end, context={"newer_minor": True}))
    return events
