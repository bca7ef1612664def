"""Recording a run as it happens.

Agents of this project use the recorder, and so can any other Python code::

    with tracer.record("Which river ...?", model="my-model") as run:
        question = run.step("question", "Which river ...?")
        call = run.call(prompt, sampling)
        call.finish([completion], seconds=0.8)
        run.step("answer", "The Sorv", parents=[question], call=call.id, completion=0, start=0, end=4)
        run.finish(answer="The Sorv")

Every method emits one event to the sinks (a store, a live view) before it returns, so nothing that was recorded
depends on the process staying alive.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Protocol, Self

from pydantic import JsonValue

from tracer.errors import CancelledError, InputError, StoreError, TracerError
from tracer.trace.events import (
    CallFailed,
    CallFinished,
    CallStarted,
    EdgeAdded,
    Event,
    RunFinished,
    RunStarted,
    StepAdded,
    StepUpdated,
    TraceBuilder,
)
from tracer.trace.segments import Rendered
from tracer.trace.trace import (
    AgentInfo,
    AgentKind,
    Call,
    Completion,
    Document,
    Edge,
    EdgeKind,
    ModelInfo,
    Outcome,
    Sampling,
    Segment,
    Status,
    Step,
    StepKind,
    Task,
    Trace,
)

NAME_LENGTH = 80


class Sink(Protocol):
    """Where events go; `tracer.store.Store` is one."""

    def append(self, trace_id: str, event: Event) -> object:
        """Keep one event; returns once it is safe.

        Raises:
            StoreError: It could not be kept.
        """
        ...


class OpenCall:
    """A request under way; ends with `finish` or `fail`."""

    def __init__(self, recorder: Recorder, call: Call) -> None:
        self.id = call.id
        self._recorder = recorder
        self._began = time.perf_counter()

    def finish(self, completions: Sequence[Completion], *, seconds: float | None = None) -> None:
        """Record what came back; ``seconds`` defaults to the wall time since the call was opened."""
        elapsed = time.perf_counter() - self._began if seconds is None else seconds
        self._recorder.emit(CallFinished(call_id=self.id, completions=list(completions), seconds=elapsed))

    def fail(self, error: str) -> None:
        """Record that nothing will come back, and why."""
        self._recorder.emit(CallFailed(call_id=self.id, error=error, seconds=time.perf_counter() - self._began))


class Recorder:
    """Records one run; use it as a context manager.

    Leaving the block ends the run: ``completed``, ``cancelled`` after `CancelledError` or ``KeyboardInterrupt``,
    ``failed`` after any other exception. The exception goes on to the caller.

    Args:
        agent: Which agent runs.
        model: Which model it runs on.
        task: What it was asked.
        name: A title for lists; the question by default.
        sinks: Where events are kept.
        listeners: Called with every event after it was kept; what they raise is not caught.
        trace_id: Chosen if not given.
    """

    def __init__(
        self,
        agent: AgentInfo,
        model: ModelInfo,
        *,
        task: Task,
        name: str | None = None,
        sinks: Iterable[Sink] = (),
        listeners: Iterable[Callable[[Event], None]] = (),
        trace_id: str | None = None,
    ) -> None:
        self._lock = threading.RLock()
        self._sinks = list(sinks)
        self._listeners = list(listeners)
        self._steps = 0
        self._calls = 0
        self._outcome = Outcome()
        self._closed = False
        title = name or " ".join(task.question.split()) or "unnamed"
        started = RunStarted(
            trace_id=trace_id or new_trace_id(),
            name=title if len(title) <= NAME_LENGTH else title[: NAME_LENGTH - 1] + "…",
            at=_now(),
            agent=agent,
            model=model,
            task=task,
        )
        self._builder = TraceBuilder(started)
        self._keep(started)

    @property
    def trace(self) -> Trace:
        """The run so far."""
        return self._builder.trace

    @property
    def trace_id(self) -> str:
        """The run's id."""
        return self._builder.trace.id

    def step(
        self,
        kind: StepKind,
        text: str,
        *,
        parents: Iterable[Step | str] = (),
        edge: EdgeKind = "next",
        branch: str | None = None,
        score: float | None = None,
        pruned: bool = False,
        call: str | None = None,
        completion: int | None = None,
        start: int | None = None,
        end: int | None = None,
        error: str | None = None,
        data: Mapping[str, JsonValue] | None = None,
    ) -> Step:
        """Record a step that is complete, and an edge of kind ``edge`` from each parent.

        Args:
            kind: What sort of step it is.
            text: What a person reads.
            parents: The steps that it follows.
            edge: How it follows them.
            branch: The sampled chain or path it belongs to.
            score: The agent's own score of it, if it has one.
            pruned: Whether the agent has already given it up.
            call: Id of the call whose completion holds its tokens.
            completion: Index of that completion.
            start: First token in the completion's ``token_ids``.
            end: One past the last token.
            error: What went wrong in this step.
            data: Details, such as a tool's name and input.
        """
        with self._lock:
            parent_ids = [parent if isinstance(parent, str) else parent.id for parent in parents]
            self._steps += 1
            step = Step(
                id=f"s{self._steps}",
                kind=kind,
                text=text,
                parents=parent_ids,
                branch=branch,
                pruned=pruned,
                score=score,
                call_id=call,
                completion=completion,
                start=start,
                end=end,
                error=error,
                data=dict(data or {}),
            )
            edges = [Edge(source=parent, target=step.id, kind=edge) for parent in parent_ids]
            self.emit(StepAdded(step=step, edges=edges))
            return step

    def update(
        self,
        step: Step | str,
        *,
        pruned: bool | None = None,
        score: float | None = None,
        data: Mapping[str, JsonValue] | None = None,
    ) -> None:
        """Record a later decision about a step."""
        step_id = step if isinstance(step, str) else step.id
        self.emit(StepUpdated(step_id=step_id, pruned=pruned, score=score, data=dict(data) if data else None))

    def edge(self, source: Step | str, target: Step | str, kind: EdgeKind) -> None:
        """Record a relation between two steps."""
        ends = [end if isinstance(end, str) else end.id for end in (source, target)]
        self.emit(EdgeAdded(edge=Edge(source=ends[0], target=ends[1], kind=kind)))

    def call(self, prompt: Rendered | Sequence[int], sampling: Sampling) -> OpenCall:
        """Record that a request is sent to the model.

        Args:
            prompt: Ids with their segments, or bare ids, which are then one segment of kind ``instruction``.
            sampling: The request's parameters.
        """
        if isinstance(prompt, Rendered):
            token_ids, segments = list(prompt.token_ids), list(prompt.segments)
        else:
            token_ids = list(prompt)
            segments = [Segment(start=0, end=len(token_ids), kind="instruction")] if token_ids else []
        with self._lock:
            self._calls += 1
            call = Call(
                id=f"c{self._calls}",
                prompt_token_ids=token_ids,
                segments=segments,
                sampling=sampling,
                started_at=_now(),
            )
            self.emit(CallStarted(call=call))
        return OpenCall(self, call)

    def finish(
        self,
        answer: str | None = None,
        *,
        correct: bool | None = None,
        details: Mapping[str, JsonValue] | None = None,
    ) -> None:
        """Set the outcome that is recorded when the run ends."""
        self._outcome = Outcome(answer=answer, correct=correct, details=dict(details or {}))

    def close(self, status: Status = "completed", *, error: str | None = None) -> Trace:
        """End the run; a second call changes nothing."""
        with self._lock:
            if not self._closed:
                self.emit(RunFinished(at=_now(), status=status, outcome=self._outcome, error=error))
                self._closed = True
            return self.trace

    def emit(self, event: Event) -> None:
        """Apply an event and keep it in every sink.

        Raises:
            InputError: The run has ended already.
            TraceFormatError: The event refers to something that is not there.
            StoreError: A sink could not keep it; the trace in memory has it all the same.
        """
        with self._lock:
            if self._closed:
                raise InputError(f"run {self.trace_id} has ended; start a new one to record more")
            self._builder.apply(event)
            self._keep(event)

    def _keep(self, event: Event) -> None:
        for sink in self._sinks:
            sink.append(self.trace_id, event)
        for listener in self._listeners:
            listener(event)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._closed:
            return
        if error is None:
            self.close("completed")
            return
        cancelled = isinstance(error, (CancelledError, KeyboardInterrupt, GeneratorExit))
        message = describe(error)
        try:
            if not cancelled:
                last = [self.trace.steps[-1]] if self.trace.steps else []
                self.step("error", message, parents=last, error=message)
            self.close("cancelled" if cancelled else "failed", error=message)
        except StoreError:
            # The store is what failed, or fails as well; the first error is the one that the caller needs.
            self._builder.trace.status = "cancelled" if cancelled else "failed"
            self._builder.trace.error = message


def record(
    question: str,
    *,
    model: str | ModelInfo = "unknown",
    kind: AgentKind = "external",
    parameters: Mapping[str, JsonValue] | None = None,
    reference: str | None = None,
    documents: Iterable[Document] = (),
    name: str | None = None,
    sinks: Iterable[Sink] = (),
    listeners: Iterable[Callable[[Event], None]] = (),
) -> Recorder:
    """Record a run of any agent.

    Args:
        question: What the agent was asked.
        model: The model's name or full identity.
        kind: The kind of agent.
        parameters: What is needed to run it again.
        reference: The right answer, if known.
        documents: Texts that the agent is given.
        name: A title for lists.
        sinks: Where events are kept, such as a `tracer.store.Store`.
        listeners: Called with every event.

    Returns:
        A recorder, to be used in a ``with`` block.

    Raises:
        InputError: The question is empty.
    """
    if not question.strip():
        raise InputError("the question is empty; say what the agent was asked")
    return Recorder(
        AgentInfo(kind=kind, parameters=dict(parameters or {})),
        ModelInfo(name=model) if isinstance(model, str) else model,
        task=Task(question=question, reference=reference, documents=list(documents)),
        name=name,
        sinks=sinks,
        listeners=listeners,
    )


def new_trace_id() -> str:
    """An id that sorts by time and that a person can type a prefix of."""
    return f"{_now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def describe(error: BaseException) -> str:
    """One line about an exception, without a traceback."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped by the user"
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    if isinstance(error, TracerError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _now() -> datetime:
    return datetime.now(UTC)
