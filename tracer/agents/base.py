"""What all agents share: starting a run, talking to the engine, recording every call."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from pydantic import JsonValue

from tracer.engines.base import Engine, OnTokens
from tracer.errors import BudgetExceededError, CancelledError, InputError, PromptTooLongError, TracerError
from tracer.trace.answers import is_correct
from tracer.trace.events import Event
from tracer.trace.recorder import Recorder, Sink, describe
from tracer.trace.segments import Decoded, Piece, Rendered, Tokenizer
from tracer.trace.steps import split_tokens
from tracer.trace.trace import (
    AgentInfo,
    AgentKind,
    Completion,
    Document,
    Sampling,
    Step,
    StepKind,
    Task,
    Trace,
)

Grader = Callable[[str | None], bool | None]
"""Says whether an answer is right; ``None`` where nobody can tell."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How much a run may use up.

    Args:
        steps: Rounds of thought and action (ReAct), or ``None`` for the agent's default.
        tokens: Tokens that the model may write in the whole run; ``None`` for no limit.
    """

    steps: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"the budget of {name} is {value}; it must be at least 1")


@dataclass
class Reply:
    """One completion of a recorded call."""

    call_id: str
    index: int
    completion: Completion
    tokenizer: Tokenizer

    @cached_property
    def decoded(self) -> Decoded:
        """Its text with the end of every token."""
        return self.tokenizer.decode(self.completion.token_ids)

    @property
    def text(self) -> str:
        """Its text."""
        return self.decoded.text

    @property
    def stop_position(self) -> int:
        """Where the stop string begins that ended it, or the end of its text."""
        stop = self.completion.stop_reason
        found = -1 if stop is None else self.text.rfind(stop)
        return found if found >= 0 else len(self.text)

    @property
    def body_ids(self) -> list[int]:
        """Its ids without a final end-of-sequence token: what a continuation is appended to."""
        ids = self.completion.token_ids
        return ids[:-1] if ids and ids[-1] in self.tokenizer.eos_token_ids else list(ids)


@dataclass
class Run:
    """A run under way: the engine, the recorder, and what limits them."""

    engine: Engine
    recorder: Recorder
    budget: Budget
    grade: Grader
    cancel: threading.Event
    on_tokens: OnTokens | None = None
    generated: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    """Things worth knowing about the run: parse failures, truncated completions, invalid actions."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The engine's tokenizer."""
        return self.engine.tokenizer

    def count(self, what: str, by: int = 1) -> None:
        """Count an occurrence; counts end up in the outcome's details."""
        self.counts[what] = self.counts.get(what, 0) + by

    def complete(self, prompts: Sequence[Rendered], sampling: Sampling) -> list[list[Reply]]:
        """Send all prompts together and record one call for each.

        ``max_tokens`` is lowered to what the context and the token budget leave, and recorded as sent.

        Returns:
            For each prompt, its ``sampling.n`` replies.

        Raises:
            PromptTooLongError: A prompt leaves no room for a completion.
            BudgetExceededError: The run has used up its tokens.
            CancelledError: Somebody stopped the run.
            EngineError: The engine failed; the calls are recorded as failed.
        """
        if not prompts:
            return []
        if self.cancel.is_set():
            raise CancelledError("the run was stopped")
        fitted = sampling.model_copy(update={"max_tokens": self._room(prompts, sampling)})
        calls = [self.recorder.call(prompt, fitted) for prompt in prompts]
        try:
            results = self.engine.generate(
                [prompt.token_ids for prompt in prompts], fitted, on_tokens=self.on_tokens, cancel=self.cancel
            )
        except BaseException as error:
            message = describe(error)
            for call in calls:
                call.fail(message)
            raise
        replies: list[list[Reply]] = []
        for call, completions in zip(calls, results, strict=True):
            call.finish(completions)
            self.generated += sum(len(completion.token_ids) for completion in completions)
            self.count("truncated", sum(completion.finish_reason == "length" for completion in completions))
            replies.append(
                [Reply(call.id, index, completion, self.tokenizer) for index, completion in enumerate(completions)]
            )
        return replies

    def _room(self, prompts: Sequence[Rendered], sampling: Sampling) -> int:
        longest = max(len(prompt.token_ids) for prompt in prompts)
        room = min(sampling.max_tokens, self.engine.context_length - longest)
        if room < 1:
            raise PromptTooLongError(longest, sampling.max_tokens, self.engine.context_length)
        if self.budget.tokens is None:
            return room
        left = (self.budget.tokens - self.generated) // (len(prompts) * sampling.n)
        if left < 1:
            raise BudgetExceededError(
                f"the run has used {self.generated} of the {self.budget.tokens} tokens it may write; "
                "raise the token budget to let it go on"
            )
        return min(room, left)

    def think(
        self,
        reply: Reply,
        parents: Iterable[Step],
        *,
        kind: StepKind = "thought",
        branch: str | None = None,
        answer: tuple[int, int] | None = None,
    ) -> list[Step]:
        """Record a completion as a chain of steps, each with its tokens; a stop string is no part of them.

        Args:
            reply: The completion.
            parents: What the first step follows.
            kind: Kind of the steps.
            branch: Branch of the steps.
            answer: Characters of the final answer; the step that holds their end is recorded as ``answer``.
        """
        ends = reply.decoded.ends
        limit = reply.stop_position
        starts = [0, *ends[:-1]]
        inside = len(ends) if limit == len(reply.text) else sum(start < limit for start in starts)
        spans = split_tokens(Decoded(reply.text, ends[:inside]))
        marked = None
        if answer is not None:
            marked = next((i for i, span in enumerate(spans) if ends[span.end - 1] >= answer[1]), None)
        steps: list[Step] = []
        previous = list(parents)
        for index, span in enumerate(spans):
            step = self.recorder.step(
                "answer" if index == marked else kind,
                span.text,
                parents=previous,
                edge="next" if steps or branch is None else "branch",
                branch=branch,
                call=reply.call_id,
                completion=reply.index,
                start=span.start,
                end=span.end,
            )
            steps.append(step)
            previous = [step]
        return steps

    def finish(self, answer: str | None, **details: JsonValue) -> None:
        """Set the outcome: the answer, whether it is right, and the counts of the run."""
        known: dict[str, JsonValue] = {name: count for name, count in self.counts.items() if count}
        self.recorder.finish(
            answer,
            correct=self.grade(answer),
            details={**known, "generated_tokens": self.generated, **details},
        )


class Agent(ABC):
    """An agent: parameters, and a way to work on a task.

    Args:
        engine: What runs the model.
        budget: Limits of one run.
    """

    kind: AgentKind

    def __init__(self, engine: Engine, *, budget: Budget | None = None) -> None:
        self.engine = engine
        self.budget = budget or Budget()

    @abstractmethod
    def parameters(self) -> dict[str, JsonValue]:
        """Everything needed to run it again."""

    @abstractmethod
    def solve(self, run: Run, task: Task) -> None:
        """Work on a task, recording steps and calling `Run.finish`."""

    def grader(self, task: Task) -> Grader:
        """How an answer is judged when the caller does not say: by comparison with the reference."""
        return lambda answer: is_correct(answer, task.reference)

    def run(
        self,
        question: str,
        *,
        documents: Iterable[Document] = (),
        reference: str | None = None,
        grade: Grader | None = None,
        name: str | None = None,
        store: Sink | None = None,
        on_event: Callable[[Event], None] | None = None,
        on_tokens: OnTokens | None = None,
        cancel: threading.Event | None = None,
    ) -> Trace:
        """Run the agent on one question and record everything.

        Args:
            question: What to answer.
            documents: Texts to answer it from.
            reference: The right answer, if known.
            grade: Judges the answer; see `grader` for the default.
            name: A title for lists.
            store: Where events are kept as they happen.
            on_event: Called with every event.
            on_tokens: Called with tokens as they arrive.
            cancel: Once set, the run stops as soon as it can.

        Returns:
            The finished trace.

        Raises:
            InputError: The question is empty, or does not fit in the model's context.
            EngineError: The engine failed.
            CancelledError: The run was stopped.
            TracerError: Anything else that is expected to go wrong. Whatever was recorded by then is in ``store``
                and on the exception, as ``error.trace``.
        """
        if not question.strip():
            raise InputError("the question is empty; say what the agent shall answer")
        task = Task(question=question, reference=reference, documents=list(documents))
        recorder = Recorder(
            AgentInfo(kind=self.kind, parameters=self.parameters()),
            self.engine.info,
            task=task,
            name=name,
            sinks=[store] if store is not None else [],
            listeners=[on_event] if on_event is not None else [],
        )
        run = Run(
            engine=self.engine,
            recorder=recorder,
            budget=self.budget,
            grade=grade or self.grader(task),
            cancel=cancel or threading.Event(),
            on_tokens=on_tokens,
        )
        try:
            with recorder:
                self.solve(run, task)
        except KeyboardInterrupt:
            stopped = CancelledError("stopped by the user")
            stopped.trace = recorder.trace
            raise stopped from None
        except TracerError as error:
            error.trace = recorder.trace
            raise
        return recorder.trace


def ask(run: Run, task: Task) -> tuple[Step, list[Step]]:
    """Record the question and its documents as the first steps of a run."""
    documents = [
        run.recorder.step("document", document.text, data={"title": document.title, "document_id": document.id})
        for document in task.documents
    ]
    question = run.recorder.step("question", task.question, parents=documents)
    return question, documents


def document_pieces(documents: Sequence[Step]) -> list[Piece]:
    """Documents as they stand in a prompt: title and text, each labelled with its step."""
    pieces: list[Piece] = []
    for number, step in enumerate(documents, start=1):
        title = str(step.data.get("title", "")) or f"Document {number}"
        pieces.append(Piece(f"[{number}] {title}\n{step.text.strip()}\n\n", "document", step.id))
    return pieces


def append_steps(prompt: Rendered, reply: Reply, steps: Sequence[Step]) -> None:
    """Append what the model wrote to a growing prompt, by ids, each labelled with the step it belongs to."""
    body = reply.body_ids
    position = 0
    for step in steps:
        if step.start is None or step.end is None:
            continue
        prompt.append(body[position : step.start], "template")
        prompt.append(body[step.start : step.end], step.kind, step.id)
        position = step.end
    prompt.append(body[position:], "template")
