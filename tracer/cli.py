"""The command line. Commands parse, call the library and print; nothing else happens here."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tracer.commands.at2 import at2_app
from tracer.commands.cite import cite
from tracer.commands.explain import explain, explain_new, list_methods
from tracer.commands.faithfulness import faithfulness
from tracer.commands.layer_map import map_truth
from tracer.commands.live import LiveScoring
from tracer.commands.probe import probe_app
from tracer.commands.serving import models_app, serve
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
from tracer.errors import CancelledError, InputError, TracerError

if TYPE_CHECKING:
    from tracer.agents.base import Agent
    from tracer.trace.trace import Document, Trace

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run reasoning agents, record every step token for token, and look at what happened.\n\n"
    "Start with `tracer demo`, or `tracer run cot 'What is 17 * 24?'`.",
)


class AgentName(StrEnum):
    """Agents that `tracer run` knows."""

    COT = "cot"
    COT_SC = "cot-sc"
    TOT = "tot"
    REACT = "react"


class OnConflict(StrEnum):
    """What `tracer import` does with a trace whose id is taken."""

    ERROR = "error"
    NEW_ID = "new_id"
    REPLACE = "replace"
    SKIP = "skip"


@app.command()
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


@app.command("list")
def list_runs(
    agent: Annotated[str | None, typer.Option(help="cot, cot_sc, tot, react or external.")] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model.")] = None,
    status: Annotated[str | None, typer.Option(help="running, completed, failed, cancelled or interrupted.")] = None,
    correct: Annotated[bool | None, typer.Option("--right/--wrong", help="Only right or only wrong answers.")] = None,
    text: Annotated[str | None, typer.Option(help="Words that one step contains.")] = None,
    limit: Annotated[int, typer.Option(help="How many, newest first.", min=1)] = 30,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    store: StoreOption = None,
) -> None:
    """List stored runs, newest first."""
    from dataclasses import asdict

    from rich.table import Table
    from rich.text import Text

    from tracer.console import err, one_line, out, verdict
    from tracer.store import TraceFilter

    kind = agent.replace("-", "_") if agent else None
    wanted = TraceFilter(agent=kind, model=model, status=status, correct=correct, text=text)
    with open_store(store) as runs:
        found = runs.list(wanted, limit=limit)
        total = runs.count(wanted)
    if as_json:
        for row in found:
            sys.stdout.write(json.dumps(asdict(row), default=str) + "\n")
        return
    if not found:
        err.print("no runs here yet; try `tracer run cot 'What is 17 * 24?'` or `tracer demo`")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("id", "agent", "question", "answer", "right", "steps", "tokens", "status"):
        table.add_column(name, no_wrap=name == "id", justify="right" if name in ("steps", "tokens") else "left")
    for row in found:
        cells = [one_line(row.name, 60), one_line(row.answer or "-", 28)]
        table.add_row(
            row.id,
            row.agent,
            *(Text(cell) for cell in cells),
            verdict(row.correct),
            str(row.steps),
            str(row.completion_tokens),
            row.status,
        )
    out.print(table)
    if total > len(found):
        err.print(f"{len(found)} of {total}; --limit shows more")


@app.command()
def show(
    trace_id: Annotated[str, typer.Argument(metavar="ID", help="Id of a stored run, or the beginning of one.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the trace as JSON.")] = False,
    store: StoreOption = None,
) -> None:
    """Show a run step by step."""
    from tracer.console import print_trace

    with open_store(store) as runs:
        trace = runs.load(trace_id)
    if as_json:
        sys.stdout.write(trace.to_json() + "\n")
    else:
        print_trace(trace)


@app.command()
def export(
    trace_id: Annotated[str, typer.Argument(metavar="ID", help="Id of a stored run, or the beginning of one.")],
    out_file: Annotated[Path | None, typer.Option("--out", help="Where to; standard output if not given.")] = None,
    store: StoreOption = None,
) -> None:
    """Write a run as trace JSON."""
    from tracer.console import err

    with open_store(store) as runs:
        trace = runs.load(trace_id)
    if out_file is None:
        sys.stdout.write(trace.to_json() + "\n")
    else:
        save(trace, out_file)
        err.print(f"wrote {out_file}")


@app.command("import")
def import_runs(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Trace JSON files.")],
    on_conflict: Annotated[OnConflict, typer.Option(help="What to do with an id that is there.")] = OnConflict.ERROR,
    store: StoreOption = None,
) -> None:
    """Store traces from JSON files."""
    from tracer.console import out
    from tracer.trace.trace import Trace

    traces = [Trace.load(file) for file in files]
    with open_store(store) as runs:
        for trace in traces:
            out.print(runs.import_trace(trace, on_conflict=on_conflict.value))


app.command()(explain)
app.command("methods")(list_methods)
app.command()(cite)
app.command()(faithfulness)
app.command()(serve)
app.add_typer(at2_app, name="at2")
app.add_typer(models_app, name="models")
probe_app.command("map")(map_truth)
app.add_typer(probe_app, name="probe")


@app.command()
def demo(
    engine: EngineOption = "auto",
    model: ModelOption = None,
    port: Annotated[int, typer.Option(help="Port of the app.")] = 8501,
    ui: Annotated[bool, typer.Option("--ui/--no-ui", help="Serve the app at the end.")] = True,
    every: Annotated[bool, typer.Option("--all", help="All bundled tasks, not just a few of each kind.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run again what is stored already.")] = False,
    explained: Annotated[
        bool, typer.Option("--explain/--no-explain", help="Explain the run whose answer was copied from its prompt.")
    ] = True,
    store: StoreOption = None,
) -> None:
    """Run all four agents on bundled tasks, store the traces, explain one, show a summary and serve the app."""
    from tracer.console import err, out, stop_on_signal, summary_table
    from tracer.demo import run_demo, story_of

    with open_store(store) as runs:
        with connected(engine, model, None) as runner, stop_on_signal() as cancel:
            traces = run_demo(runner, runs, every=every, fresh=fresh, cancel=cancel)
        out.print(summary_table(traces))
        story = story_of(traces) if explained else None
        if story is not None:
            out.print(f"\nWhat the answer of {story.id} was read from:", markup=False)
            try:
                explain_new(story, runs, top=3, answer_only=True)
            except CancelledError:
                raise
            except TracerError as error:
                # The runs are there and the app can be shown all the same.
                err.print(f"not explained: {error}", markup=False)
    if ui:
        err.print("starting the app; Ctrl-C ends it, the runs stay")
        raise typer.Exit(_serve_ui(port, store))


@app.command("ui")
def user_interface(
    port: Annotated[int, typer.Option(help="Port; the next free one if it is taken.")] = 8501,
    store: StoreOption = None,
) -> None:
    """Serve the app at localhost."""
    raise typer.Exit(_serve_ui(port, store))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list.")] = False,
    store: StoreOption = None,
) -> None:
    """Say what is installed, what works, and how to mend what does not."""
    from rich.text import Text

    from tracer.console import out
    from tracer.doctor import examine

    findings = examine(store)
    if as_json:
        sys.stdout.write(json.dumps([finding._asdict() for finding in findings]) + "\n")
    else:
        for finding in findings:
            line = Text(
                f"{finding.state:8}", style={"ok": "green", "missing": "yellow", "broken": "red"}[finding.state]
            )
            line.append(f"{finding.what}: {finding.detail}")
            out.print(line)
            if finding.remedy:
                out.print(Text(f"        -> {finding.remedy}"))
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(1)


def main() -> None:
    """Run the command line: exit code 0 for success, 1 for a run that failed, 2 for bad usage or input."""
    try:
        app()
    except TracerError as error:
        _complain(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _complain(CancelledError("stopped by the user"))
        sys.exit(CancelledError.exit_code)
    except BrokenPipeError:
        # The reader of our output is gone; that is its business. Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _complain(error: BaseException) -> None:
    from tracer.console import err, one_line

    err.print(f"tracer: {one_line(str(error), 1000)}", markup=False, soft_wrap=True)


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


def _serve_ui(port: int, store: str | None) -> int:
    from ui.serve import serve as serve_ui

    return serve_ui(port, store=store)
