"""Commands about stored runs: ``list``, ``show``, ``export``, ``import``."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tracer.commands.shared import StoreOption, open_store, save


class OnConflict(StrEnum):
    """What `tracer import` does with a trace whose id is taken."""

    ERROR = "error"
    NEW_ID = "new_id"
    REPLACE = "replace"
    SKIP = "skip"


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

    from tracer.console import cell, err, out, verdict
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
        table.add_row(
            cell(row.id, 60),
            cell(row.agent, 20),
            cell(row.name, 60),
            cell(row.answer or "-", 28),
            verdict(row.correct),
            str(row.steps),
            str(row.completion_tokens),
            cell(row.status, 20),
        )
    out.print(table)
    if total > len(found):
        err.print(f"{len(found)} of {total}; --limit shows more")


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
        err.print(f"wrote {out_file}", markup=False)


def import_runs(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Trace JSON files.")],
    on_conflict: Annotated[OnConflict, typer.Option(help="What to do with an id that is there.")] = OnConflict.ERROR,
    store: StoreOption = None,
) -> None:
    """Store traces from JSON files."""
    from tracer.console import cell, out
    from tracer.trace.trace import Trace

    traces = [Trace.load(file) for file in files]
    with open_store(store) as runs:
        for trace in traces:
            out.print(cell(runs.import_trace(trace, on_conflict=on_conflict.value), 200))
