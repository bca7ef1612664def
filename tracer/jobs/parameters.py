"""What each kind of job takes. It may come from a browser, so it is checked before anything is started."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from tracer.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from tracer.agents.build import AgentOptions

Dtype = Literal["float32", "bfloat16", "float16"]
AgentName = Literal["cot", "cot-sc", "tot", "react"]
Trusted = Literal["answer", "all", "none"]
ProbeName = Literal["truth", "statements", "steps"]
"""Probes by what they are; a file is named on the command line only."""
Positive = Field(default=None, ge=1, le=100_000)


class Parameters(BaseModel):
    """Parameters of one job, with the defaults of the command line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    heavy: ClassVar[bool] = False
    """Whether it loads a model of its own, so that it waits until no other such job of the folder is at work."""

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            InputError: Something cannot.
        """


class RunParameters(Parameters):
    """One run of an agent; see `tracer.agents.build.AgentOptions`."""

    kind: AgentName
    question: str = Field(max_length=200_000)
    reference: str | None = None
    docs: Path | None = None
    """Folder of documents: ReAct searches it, the others are given all of it."""
    engine: str = "auto"
    model: str | None = None
    dtype: Dtype | None = None
    name: str | None = None
    tools: list[str] | None = None
    n: int | None = Positive
    style: Literal["text", "native"] = "text"
    shots: Literal["zero", "few"] | None = None
    vote: Literal["majority", "weighted", "unnormalised"] = "majority"
    search: Literal["bfs", "dfs"] = "bfs"
    generate: Literal["propose", "sample"] = "propose"
    evaluate: Literal["value", "vote"] = "value"
    depth: int | None = Positive
    nodes: int = Field(default=100, ge=1, le=100_000)
    problem: str | None = None
    prompt: str | None = None
    temperature: float | None = Field(default=None, ge=0, le=100)
    seed: int = 0
    max_tokens: int | None = Positive
    max_steps: int | None = Positive
    token_budget: int | None = Field(default=None, ge=1)

    def check(self) -> None:
        """Build the agent on an engine without weights.

        Raises:
            InputError: The question is empty, or options contradict each other.
            UnknownNameError: A tool, prompt or problem does not exist.
        """
        from tracer.agents.build import check_options

        if not self.question.strip():
            raise InputError("the question is empty; say what the agent shall answer")
        if "@" in urlsplit(self.engine).netloc:
            raise InputError("an engine's address holds no user or password; its key is read from TRACER_API_KEY")
        check_options(self.options())

    def options(self) -> AgentOptions:
        """What an agent is built from."""
        from tracer.agents.base import Budget
        from tracer.agents.build import AgentOptions

        return AgentOptions(
            kind=self.kind,
            n=self.n,
            tools=self.tools,
            style=self.style,
            shots=self.shots,
            vote=self.vote,
            search=self.search,
            generate=self.generate,
            evaluate=self.evaluate,
            depth=self.depth,
            nodes=self.nodes,
            problem=self.problem,
            prompt=self.prompt,
            temperature=self.temperature,
            seed=self.seed,
            max_tokens=self.max_tokens,
            docs=self.docs,
            budget=Budget(steps=self.max_steps, tokens=self.token_budget),
        )


class _Replayed(Parameters):
    """What every job takes that replays runs through a copy of the weights."""

    heavy: ClassVar[bool] = True

    replica: str | None = None
    """Name of the weights, if not those that the trace names."""
    dtype: Dtype = "float32"
    parameters: dict[str, dict[str, JsonValue]] = {}
    """By method, those that differ from its defaults."""
    seed: int = 0


class ExplainParameters(_Replayed):
    """Explanations of one stored run; see `tracer.explain`."""

    trace: str
    methods: list[str] | None = None
    """``None`` takes the default methods; an empty list none."""
    probes: list[ProbeName] | None = None
    """``None`` takes those that the model has; an empty list none."""
    ask: bool = False
    targets: Literal["answer", "all"] | list[str] = "all"
    target_function: Literal["logprob", "logit", "contrast"] = "logprob"
    foil: str | int | None = None
    chunk_tokens: int | None = Positive
    faithfulness: Trusted = "answer"
    force: bool = False
    low_memory: bool = False

    def check(self) -> None:
        """Look the methods and their parameters up.

        Raises:
            UnknownNameError: There is no such method.
            InputError: A parameter is unknown, or no target is named.
        """
        _check_methods(self.methods, self.parameters)
        if not self.targets:
            raise InputError("no target is named; give ids of steps, answer or all")


class CiteParameters(_Replayed):
    """An answer with numbered citations; see `tracer.explain.citations`."""

    trace: str
    targets: Literal["answer", "all"] | list[str] = "answer"
    rule: Literal["range", "top"] = "range"
    share: float | None = Field(default=None, gt=0, le=1)
    by: Literal["sentence", "word"] = "sentence"
    faithfulness: Trusted = "answer"
    force: bool = False
    low_memory: bool = False


class FaithfulnessParameters(_Replayed):
    """How far methods can be trusted over several stored runs; see `tracer.explain.leaderboard`."""

    runs: list[str] = Field(min_length=1, max_length=1000)
    methods: list[str] | None = None
    targets: Literal["answer", "all"] = "answer"

    def check(self) -> None:
        """Look the methods and their parameters up.

        Raises:
            UnknownNameError: There is no such method.
            InputError: A parameter is unknown.
        """
        _check_methods(self.methods, self.parameters)


class ProbeTrainParameters(Parameters):
    """The truth probe of a model; see `tracer.explain.probes.train`."""

    heavy: ClassVar[bool] = True

    model: str = "demo"
    kind: str | None = None
    """``None`` takes the default kind."""
    per_topic: int | None = Field(default=None, ge=4, le=1000)
    dtype: Dtype | None = None
    """``None`` takes what is fast on this machine."""
    seed: int = 0


class ServeStartParameters(Parameters):
    """A vLLM that stays until it is stopped, or one that runs already."""

    model: str = "demo"
    dtype: Dtype | None = None
    max_model_len: int = Field(default=4096, ge=16, le=10_000_000)
    idle_minutes: float = Field(default=0, ge=0, le=100_000)
    """Without a request, after which it ends; 0 for never."""


class ServeStopParameters(Parameters):
    """Ending servers that tracer started."""

    server: str | None = None
    """Id of one; ``None`` for all."""


class FetchModelParameters(Parameters):
    """Weights to fetch and convert."""

    name: str = Field(min_length=1, max_length=4096)
    verify: bool = False
    """Whether to check every byte of what is here already."""


KINDS: Mapping[str, type[Parameters]] = MappingProxyType(
    {
        "run": RunParameters,
        "explain": ExplainParameters,
        "cite": CiteParameters,
        "faithfulness": FaithfulnessParameters,
        "probe_train": ProbeTrainParameters,
        "serve_start": ServeStartParameters,
        "serve_stop": ServeStopParameters,
        "fetch_model": FetchModelParameters,
    }
)
"""Kinds of jobs, and what each takes."""


def parse(kind: str, parameters: Mapping[str, object]) -> Parameters:
    """The parameters of a job, complete and checked for what can be known without a model.

    Raises:
        UnknownNameError: There is no such kind, or one of the parameters names nothing.
        InputError: A parameter is missing, unknown or out of range.
    """
    if kind not in KINDS:
        raise UnknownNameError("kind of job", kind, KINDS)
    try:
        found = KINDS[kind].model_validate(dict(parameters))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "parameters"
        raise InputError(f"{where} of the job {kind} cannot be used: {first['msg']}") from None
    found.check()
    return found


def _check_methods(names: list[str] | None, parameters: Mapping[str, Mapping[str, JsonValue]]) -> None:
    from tracer.explain import methods

    for name in names or ():
        methods.request(name, parameters.get(name))
    for name in parameters:
        methods.find(name)
