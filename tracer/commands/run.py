"""The command ``run``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tracer.commands.explain import explain_new
from tracer.commands.live import LiveScoring
from tracer.commands.shared import (
    DtypeOption,
    EngineOption,
    ModelOption,
    StoreOption,
    connected,
    names_of,
    open_store,
    save,
)
from tracer.errors import InputError, TracerError

if TYPE_CHECKING:
    from tracer.agents.base import Agent
    from tracer.trace.trace import Document, Trace


class AgentName(StrEnum):
    """Agents that `tracer run` knows."""

    COT = "cot"
    COT_SC = "cot-sc"
    TOT = "tot"
    REACT = "react"


def run(
    agent: Annotated[AgentName, typer.Argument(help="Which agent.")],
    question: Annotated[str, typer.Argument(help="What to answer.")],
    docs: Annotated[
        Path | None,
        typer.Option(help="Folder of text and markdown files: ReAct searches it, the others are given all of it."),
    ] = None,
    engine: EngineOption = "auto",
    model: ModelOption = None,
    dtype: DtypeOption = None,
    n: Annotated[int, typer.Option("-n", help="Chains of cot-sc; thoughts kept a level (breadth) of tot.")] = 0,
    reference: Annotated[str | None, typer.Option(help="The right answer, to judge the run by.")] = None,
    tools: Annotated[
        str | None, typer.Option(help="Tools of react: calculator, search, python. Default: what the task needs.")
    ] = None,
    style: Annotated[str, typer.Option(help="react: text (the paper's form) or native tool calls.")] = "text",
    shots: Annotated[str | None, typer.Option(help="cot, cot-sc: zero or few.")] = None,
    vote: Annotated[str, typer.Option(help="cot-sc: majority, weighted or unnormalised.")] = "majority",
    search: Annotated[str, typer.Option(help="tot: bfs or dfs.")] = "bfs",
    generate: Annotated[str, typer.Option(help="tot: propose or sample.")] = "propose",
    evaluate: Annotated[str, typer.Option(help="tot: value or vote.")] = "value",
    depth: Annotated[int | None, typer.Option(help="tot: thoughts on a path.")] = None,
    nodes: Annotated[int, typer.Option(help="tot: states after which the search stops.")] = 100,
    problem: Annotated[str | None, typer.Option(help="tot: game24 or text; recognised if not given.")] = None,
    prompt: Annotated[str | None, typer.Option(help="A prompt of your own, as a TOML file.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the samples of cot-sc and tot.")] = None,
    seed: Annotated[int, typer.Option(help="Makes samples reproducible.")] = 0,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of one reply.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="react: rounds of thought and action.")] = None,
    token_budget: Annotated[int | None, typer.Option(help="Tokens that the whole run may write.")] = None,
    probes: Annotated[
        str | None,
        typer.Option(
            metavar="truth|FILE",
            help="Score the steps while the agent runs, from the served model's own hidden states; needs a server that "
            "was started with `tracer serve --lens`.",
        ),
    ] = None,
    explained: Annotated[
        bool, typer.Option("--explain", help="Explain the run at its end, as `tracer explain` does by default.")
    ] = False,
    out_file: Annotated[Path | None, typer.Option("--out", help="Write the trace here as well.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the trace as JSON and nothing else.")] = False,
    store: StoreOption = None,
) -> None:
    """Run an agent on a question and record it.

    The run is kept in the store as it happens: Ctrl-C, a dead server or a killed process lose nothing recorded.
    """
    from tracer.agents.base import Budget
    from tracer.agents.build import AgentOptions, build_agent, check_options
    from tracer.console import RunView, print_trace, stop_on_signal

    options = AgentOptions(
        kind=agent.value,
        n=n or None,
        tools=tools.split(",") if tools else None,
        style=style,
        shots=shots,
        vote=vote,
        search=search,
        generate=generate,
        evaluate=evaluate,
        depth=depth,
        nodes=nodes,
        problem=problem,
        prompt=prompt,
        temperature=temperature,
        seed=seed,
        max_tokens=max_tokens,
        docs=docs,
        budget=Budget(steps=max_steps, tokens=token_budget),
    )
    if not question.strip():
        raise InputError("the question is empty; say what the agent shall answer")
    check_options(options)
    documents = _documents(docs) if docs is not None and agent is not AgentName.REACT else []
    with open_store(store) as runs:
        with connected(engine, model, dtype, quiet=as_json) as runner:
            solver: Agent = build_agent(runner, options)
            view = RunView(quiet=as_json)
            scoring = None if probes is None else LiveScoring(runner, names_of(probes), quiet=as_json)
            with stop_on_signal() as cancel, view:

                def work() -> Trace:
                    return solver.run(
                        question,
                        documents=documents,
                        reference=reference,
                        store=runs,
                        on_event=view.on_event if scoring is None else scoring.after(view.on_event),
                        on_tokens=view.on_tokens if view.wants_tokens else None,
                        cancel=cancel,
                    )

                trace = _run_agent(work if scoring is None else lambda: scoring.around(work, runs), out_file)
        if not as_json:
            print_trace(trace)
        if explained:
            # The engine is closed by now: one that ran in this process has left its memory to the replica.
            trace = explain_new(trace, runs, quiet=as_json)
            if out_file is not None:
                save(trace, out_file)
    if as_json:
        sys.stdout.write(trace.to_json() + "\n")


def _run_agent(work: Callable[[], Trace], out_file: Path | None) -> Trace:
    """Run an agent; write the file even when the run fails."""
    try:
        trace = work()
    except TracerError as error:
        if error.trace is not None:
            if out_file is not None:
                save(error.trace, out_file)
            error.args = (f"{error} (what was recorded: tracer show {error.trace.id})",)
        raise
    if out_file is not None:
        save(trace, out_file)
    return trace


def _documents(folder: Path) -> list[Document]:
    from tracer.agents.tools import load_documents

    return load_documents(folder)
