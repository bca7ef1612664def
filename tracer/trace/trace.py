"""The trace: one run of one agent on one task, as pydantic models and versioned JSON.

The keys are a contract with other programs (see ``schema-1.json`` beside this file). A file of a newer minor
version loads and keeps the fields that this version does not know; an unknown major version is refused.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AllowInfNan,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from tracer.errors import TraceFormatError
from tracer.files import write_atomic

if TYPE_CHECKING:
    import networkx as nx

SCHEMA_VERSION = "1.0"
MAX_FILE_BYTES = 1 << 30


def _lenient(value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
    """Let a newer minor version add names to a closed list."""
    if info.context and info.context.get("newer_minor") and isinstance(value, str):
        return value
    return handler(value)


_Open = WrapValidator(_lenient)
StepKind = Annotated[
    Literal[
        "question",
        "document",
        "thought",
        "action",
        "observation",
        "evaluation",
        "vote",
        "answer",
        "error",
    ],
    _Open,
]
SegmentKind = Annotated[
    Literal[
        "template",
        "system",
        "instruction",
        "exemplar",
        "tools",
        "question",
        "document",
        "thought",
        "action",
        "observation",
        "evaluation",
        "vote",
        "answer",
        "error",
    ],
    _Open,
]
EdgeKind = Annotated[Literal["next", "branch", "observes", "evaluates", "votes_for", "selects"], _Open]
Status = Annotated[Literal["running", "completed", "failed", "cancelled", "interrupted"], _Open]
AgentKind = Annotated[Literal["cot", "cot_sc", "tot", "react", "external"], _Open]
FinishReason = Annotated[Literal["stop", "length", "cancelled", "error"], _Open]
Finite = Annotated[float, AllowInfNan(False)]


class Record(BaseModel):
    """Base of everything stored in a trace: unknown fields of newer versions are kept."""

    model_config = ConfigDict(extra="allow", validate_assignment=False)


class AgentInfo(Record):
    """Which agent ran, with all parameters needed to run it again."""

    kind: AgentKind
    parameters: dict[str, JsonValue] = Field(default_factory=dict)


class ModelInfo(Record):
    """Identity of the model that produced the tokens."""

    name: str
    dtype: str | None = None
    tokenizer_sha256: str | None = None
    """SHA-256 of the tokenizer's canonical JSON; ``None`` where the recording system did not know it."""
    chat_template_sha256: str | None = None
    engine: str = "external"
    engine_version: str | None = None


class Document(Record):
    """A text that the task gives to the agent."""

    id: str
    title: str
    text: str


class Task(Record):
    """What the agent was asked, and the reference answer if there is one."""

    question: str
    reference: str | None = None
    documents: list[Document] = Field(default_factory=list)


class Segment(Record):
    """A half-open token range ``[start, end)`` of a call's prompt and what it shows."""

    start: int = Field(ge=0)
    end: int = Field(ge=0)
    kind: SegmentKind
    step_id: str | None = None


class StructuredOutput(Record):
    """A constraint on the completion: a JSON schema, a regular expression or a list of choices."""

    kind: Literal["json_schema", "regex", "choice"]
    value: JsonValue


class Sampling(Record):
    """How completions are drawn; everything is sent explicitly, so no server default applies.

    ``temperature=0`` is greedy. ``top_k=0`` and ``top_p=1`` switch those filters off. A completion ends at an
    end-of-sequence token, after the token that completes one of ``stop``, or after ``max_tokens``.
    """

    max_tokens: int = Field(default=512, ge=1)
    temperature: Finite = Field(default=0.0, ge=0.0)
    top_p: Finite = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    n: int = Field(default=1, ge=1)
    seed: int | None = None
    stop: list[str] = Field(default_factory=list)
    structured: StructuredOutput | None = None


class Completion(Record):
    """One sampled continuation of a prompt."""

    token_ids: list[int]
    """Every token the model produced, a final end-of-sequence token and stop-string tokens included."""
    logprobs: list[Finite]
    """Natural-log probabilities of ``token_ids``, before temperature; empty where the engine gives none."""
    text: str
    """The decoded ids without special tokens; a stop string that ended the completion is still in it."""
    finish_reason: FinishReason
    stop_reason: str | None = None
    """The stop string that ended it, if one did."""


class Call(Record):
    """One request to the model."""

    id: str
    prompt_token_ids: list[int]
    segments: list[Segment]
    """A partition of the prompt: every token belongs to exactly one segment."""
    sampling: Sampling
    completions: list[Completion] = Field(default_factory=list)
    started_at: datetime
    seconds: Finite | None = None
    """Wall time in seconds; ``None`` while the call is under way or where it never came back."""
    error: str | None = None


class Step(Record):
    """A unit that a person would talk about."""

    id: str
    kind: StepKind
    text: str
    parents: list[str] = Field(default_factory=list)
    branch: str | None = None
    pruned: bool = False
    score: Finite | None = None
    call_id: str | None = None
    completion: int | None = None
    start: int | None = None
    """First token of the step in its completion's ``token_ids``."""
    end: int | None = None
    """One past its last token."""
    error: str | None = None
    data: dict[str, JsonValue] = Field(default_factory=dict)
    """Details that belong to the kind of step, such as a tool's name and input."""


class Edge(Record):
    """A relation between two steps."""

    source: str
    target: str
    kind: EdgeKind


class Outcome(Record):
    """The final answer; ``correct`` is ``None`` where there is no reference."""

    answer: str | None = None
    correct: bool | None = None
    details: dict[str, JsonValue] = Field(default_factory=dict)
    """Vote counts, margin, parse failures, truncated completions and the like."""


class Trace(Record):
    """One run of one agent on one task."""

    schema_version: str = SCHEMA_VERSION
    id: str
    name: str
    created_at: datetime
    status: Status
    agent: AgentInfo
    model: ModelInfo
    task: Task
    calls: list[Call] = Field(default_factory=list)
    steps: list[Step] = Field(default_factory=list)
    edges: list[Edge] = Field(default_factory=list)
    outcome: Outcome = Field(default_factory=Outcome)
    explanations: list[dict[str, JsonValue]] = Field(default_factory=list)
    """Those that tracer writes follow the definition ``Explanation``; see `tracer.trace.explanation`."""
    probes: list[dict[str, JsonValue]] = Field(default_factory=list)
    """Those that tracer writes follow the definitions ``ProbeScore`` and ``LayerMap``; see `tracer.trace.probes`."""
    fork_of: dict[str, JsonValue] | None = None
    error: str | None = None
    """Why the run failed, in one line."""

    def to_json(self) -> str:
        """Serialise; loading the result and serialising again gives the same bytes."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes) -> Trace:
        """Read a trace.

        Raises:
            TraceFormatError: The text is no JSON, no trace, inconsistent, or of an unknown major version.
        """
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise TraceFormatError(f"this is not a trace: invalid JSON ({error}); export the trace again") from None
        if not isinstance(raw, dict):
            raise TraceFormatError("this is not a trace: expected a JSON object with a schema_version")
        newer = _check_version(raw.get("schema_version"))
        try:
            trace = cls.model_validate(raw, context={"newer_minor": newer})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "top level"
            raise TraceFormatError(
                f"this is not a valid trace: {where}: {first['msg']} ({error.error_count()} problems in all)"
            ) from None
        trace.check()
        return trace

    def check(self) -> None:
        """Check that ids, token ranges and references agree with each other.

        Raises:
            TraceFormatError: Something points to a step, call or token that is not there.
        """
        from tracer.trace.check import check_trace

        check_trace(self)

    def save(self, path: str | Path) -> Path:
        """Write the trace as JSON; the file appears whole or not at all."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, self.to_json())
        return target

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a trace file.

        Raises:
            TraceFormatError: The file cannot be read or is no trace.
        """
        source = Path(path)
        try:
            if source.stat().st_size > MAX_FILE_BYTES:
                raise TraceFormatError(f"{source} is larger than {MAX_FILE_BYTES >> 20} MiB; it is not a trace")
            text = source.read_text(encoding="utf-8")
        except OSError as error:
            raise TraceFormatError(f"cannot read {source}: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise TraceFormatError(f"{source} is not UTF-8 text; it is not a trace") from None
        try:
            return cls.from_json(text)
        except TraceFormatError as error:
            raise TraceFormatError(f"{source}: {error}") from None

    def step(self, step_id: str) -> Step:
        """The step with that id.

        Raises:
            TraceFormatError: There is none.
        """
        for step in self.steps:
            if step.id == step_id:
                return step
        raise TraceFormatError(f"trace {self.id} has no step {step_id!r}")

    def call(self, call_id: str) -> Call:
        """The call with that id.

        Raises:
            TraceFormatError: There is none.
        """
        for call in self.calls:
            if call.id == call_id:
                return call
        raise TraceFormatError(f"trace {self.id} has no call {call_id!r}")

    def graph(self, *, influence: str | None = None) -> nx.MultiDiGraph[str]:
        """The steps as a ``networkx.MultiDiGraph``; see `tracer.trace.graph.build_graph`."""
        from tracer.trace.graph import build_graph

        return build_graph(self, influence=influence)


def _check_version(version: object) -> bool:
    """Return whether the file is of a newer minor version than this code."""
    try:
        major, minor = (int(part) for part in str(version).split("."))
    except ValueError:
        raise TraceFormatError(
            f"schema_version {version!r} is not of the form MAJOR.MINOR; this tracer reads {SCHEMA_VERSION}"
        ) from None
    own_major, own_minor = (int(part) for part in SCHEMA_VERSION.split("."))
    if major != own_major:
        raise TraceFormatError(
            f"the trace has schema version {version}, this tracer reads {own_major}.x; upgrade tracer to read it"
        )
    return minor > own_minor
