"""Agents from a flat set of options, as the command line and the app have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from tracer.agents.base import Agent, Budget
from tracer.agents.cot import ChainOfThought, Shots
from tracer.agents.react import ReAct, Style
from tracer.agents.scripted import ScriptedEngine
from tracer.agents.self_consistency import SelfConsistency, Vote
from tracer.agents.tools import bundled
from tracer.agents.tree_of_thoughts import Evaluate, Generate, Search, TreeOfThoughts, TreeSettings
from tracer.engines.base import Engine
from tracer.errors import InputError, UnknownNameError

MAX_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentOptions:
    """Options of all agents; each agent takes its own, ``None`` is the agent's default."""

    kind: str
    n: int | None = None
    tools: Sequence[str] | None = None
    style: str = "text"
    shots: str | None = None
    vote: str = "majority"
    search: str = "bfs"
    generate: str = "propose"
    evaluate: str = "value"
    depth: int | None = None
    nodes: int = 100
    problem: str | None = None
    prompt: str | None = None
    temperature: float | None = None
    seed: int = 0
    max_tokens: int | None = None
    docs: Path | None = None
    budget: Budget = field(default_factory=Budget)


def build_agent(engine: Engine, options: AgentOptions) -> Agent:
    """The agent that the options describe.

    Raises:
        UnknownNameError: There is no such agent, tool, prompt or way to search.
        InputError: The options contradict each other.
    """
    builders: dict[str, Callable[[Engine, AgentOptions], Agent]] = {
        "cot": _cot,
        "cot-sc": _self_consistency,
        "tot": _tree,
        "react": _react,
    }
    if options.kind not in builders:
        raise UnknownNameError("agent", options.kind, builders)
    if options.shots not in (None, "zero", "few"):
        raise UnknownNameError("number of shots", options.shots, ["zero", "few"])
    if options.n is not None and options.n < 1:
        raise InputError(f"-n is {options.n}; it must be at least 1")
    return builders[options.kind](engine, options)


def check_options(options: AgentOptions) -> None:
    """Raise what `build_agent` would raise, before an engine is at hand; starting one can take a minute."""
    build_agent(ScriptedEngine([]), options)


def _cot(engine: Engine, options: AgentOptions) -> Agent:
    return ChainOfThought(
        engine,
        shots=cast("Shots", options.shots or "zero"),
        prompt=options.prompt,
        max_tokens=options.max_tokens or MAX_TOKENS,
        budget=options.budget,
    )


def _self_consistency(engine: Engine, options: AgentOptions) -> Agent:
    return SelfConsistency(
        engine,
        vote=cast("Vote", options.vote),
        shots=cast("Shots", options.shots or "few"),
        seed=options.seed,
        prompt=options.prompt,
        max_tokens=options.max_tokens or MAX_TOKENS,
        budget=options.budget,
        **_given(n=options.n, temperature=options.temperature),
    )


def _tree(engine: Engine, options: AgentOptions) -> Agent:
    settings = TreeSettings(
        search=cast("Search", options.search),
        generate=cast("Generate", options.generate),
        evaluate=cast("Evaluate", options.evaluate),
        depth=options.depth,
        nodes=options.nodes,
        seed=options.seed,
        **_given(breadth=options.n, temperature=options.temperature, max_tokens=options.max_tokens),
    )
    return TreeOfThoughts(
        engine, problem=options.problem, settings=settings, prompt=options.prompt, budget=options.budget
    )


def _react(engine: Engine, options: AgentOptions) -> Agent:
    names = options.tools if options.tools is not None else ["search"] if options.docs else ["calculator"]
    return ReAct(
        engine,
        tools=bundled([name.strip() for name in names], options.docs),
        style=cast("Style", options.style),
        prompt=options.prompt,
        budget=options.budget,
        **_given(max_tokens=options.max_tokens),
    )


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
