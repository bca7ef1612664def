"""The command ``faithfulness``: how far each method can be trusted, over many runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from tracer.commands.shared import StoreOption, is_stored, keeping, names_of, open_store, open_traces, parameters_of
from tracer.errors import InputError, TracerError

if TYPE_CHECKING:
    from tracer.explain.estimate import Estimate
    from tracer.explain.leaderboard import Board, Standing


def faithfulness(
    runs: Annotated[list[str], typer.Argument(metavar="RUNS...", help="Ids of stored runs, or trace files.")],
    methods: Annotated[
        str | None, typer.Option(metavar="A,B", help="Which methods; default: those of at most some dozens of passes.")
    ] = None,
    targets: Annotated[str, typer.Option(metavar="answer|all", help="Which steps of each run.")] = "answer",
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="REPLICA", help="Weights to replay with, if not those that the runs name."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Precision of the replica: float32, bfloat16 or float16.")] = "float32",
    param: Annotated[
        list[str] | None,
        typer.Option(metavar="METHOD.NAME=VALUE", help="A method's parameter; may be given more than once."),
    ] = None,
    seed: Annotated[int, typer.Option(help="For everything drawn at random.", min=0)] = 0,
    low_memory: Annotated[bool, typer.Option("--low-memory", help="Recompute instead of keeping.")] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Go on where a replica differs from what was recorded; the result is marked."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON and nothing else.")] = False,
    store: StoreOption = None,
) -> None:
    """Compare methods by how well their scores foretell what taking sources away does.

    Each method runs on each run; then sources are removed, by its ranking and at random, and the model is asked what
    that changes. Means come with 95 % intervals over runs. Expect a minute or more for each run. What was computed
    before is not computed again; Ctrl-C shows what is known by then, and keeps it for runs that are stored.
    """
    from tracer.console import stages, stop_on_signal
    from tracer.explain.leaderboard import DEFAULT_FIELD, leaderboard

    if targets not in ("answer", "all"):
        raise InputError(f"--targets is {targets!r}; several runs have only answer and all in common")
    with open_store(store) as kept:
        traces = open_traces(runs, kept, quiet=as_json)
        so_far: list[Board] = []
        stored = any(is_stored(trace, kept) for trace in traces)
        with (
            keeping(None, stored=stored),
            stop_on_signal() as cancel,
            stages() as progress,
            _shown_if_it_fails(so_far, len(traces), quiet=as_json),
        ):
            board = leaderboard(
                traces,
                methods=DEFAULT_FIELD if methods is None else names_of(methods),
                parameters=parameters_of(param or []),
                targets=targets,
                replica=model,
                dtype=dtype,
                seed=seed,
                force=force,
                low_memory=low_memory,
                store=kept,
                progress=None if as_json else progress,
                interim=so_far.append,
                cancel=cancel,
            )
    if as_json:
        sys.stdout.write(json.dumps([item.to_document() for item in board.standings]) + "\n")
    else:
        print_board(board.standings)


@contextmanager
def _shown_if_it_fails(so_far: list[Board], total: int, *, quiet: bool) -> Iterator[None]:
    """Print the table of the runs that were finished before the work was stopped or failed."""
    from tracer.console import out

    try:
        yield
    except TracerError:
        if so_far and not quiet:
            out.print(f"the first {len(so_far[-1].traces)} of {total} runs:")
            print_board(so_far[-1].standings)
        raise


def print_board(standings: list[Standing]) -> None:
    """The table of methods, best for its cost first, and what it does not show."""
    from rich.table import Table
    from rich.text import Text

    from tracer.console import one_line, out

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for name in ("method", "LDS", "top-k drop", "deletion", "insertion", "z", "agrees", "passes", "s", "LDS/pass"):
        # A narrow terminal breaks between a mean and its interval; nothing is cut off.
        table.add_column(name, justify="left" if name == "method" else "right", overflow="fold")
    for item in standings:
        style = "" if item.better_than_random else "yellow"
        cells = [_cell(item.lds, 2)]
        cells += [_cell(nats, 1) for nats in (item.top_k_drop, item.deletion, item.insertion)]
        cells += [f"{item.z:.1f}", _cell(item.agreement, 2), f"{item.passes:.1f}", f"{item.seconds:.1f}"]
        per_pass = item.lds_per_pass
        cells.append("-" if per_pass is None else f"{per_pass:.2f}")
        table.add_row(*(Text(cell, style=style) for cell in [item.method, *cells]))
    out.print(table)
    out.print(
        Text(
            "LDS: rank correlation of predicted and measured effects of random removals. Drop, deletion, insertion: "
            "nats, the last two against random orders. z: curves above random, all targets. Passes: time of a target "
            "in plain forward passes. In brackets: 95 % intervals over runs.",
            style="dim",
        )
    )
    if weak := [item.method for item in standings if not item.better_than_random and item.targets]:
        out.print(Text(f"not shown to be better than random on these runs: {', '.join(weak)}", style="yellow"))
    for item in standings:
        for reason in dict.fromkeys(item.problems.values()):
            refused = [one_line(trace, 40) for trace, why in item.problems.items() if why == reason]
            where = ", ".join(refused[:3]) + (f" and {len(refused) - 3} more" if len(refused) > 3 else "")
            out.print(Text(f"{item.method} could not explain {where}: {one_line(reason, 500)}"), soft_wrap=True)


def _cell(estimate: Estimate | None, digits: int) -> str:
    if estimate is None:
        return "-"
    mean = f"{estimate.mean:.{digits}f}"
    if estimate.low is None or estimate.high is None:
        return mean
    return f"{mean} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"
