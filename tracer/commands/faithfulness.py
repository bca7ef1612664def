"""The command ``faithfulness``: how far each method can be trusted, over many runs."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from tracer.commands.shared import StoreOption, names_of, open_store, open_trace, parameters_of
from tracer.errors import InputError

if TYPE_CHECKING:
    from tracer.explain.leaderboard import Estimate, Standing


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
    seed: Annotated[int, typer.Option(help="For everything drawn at random.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON and nothing else.")] = False,
    store: StoreOption = None,
) -> None:
    """Compare methods by how well their scores foretell what taking sources away does.

    Each method runs on each run; then sources are removed, by its ranking and at random, and the model is asked what
    that changes. Means come with 95 % intervals over runs. What was computed before is not computed again; Ctrl-C keeps
    what is finished.
    """
    from tracer.console import stages, stop_on_signal
    from tracer.explain.leaderboard import DEFAULT_FIELD, leaderboard

    if targets not in ("answer", "all"):
        raise InputError(f"--targets is {targets!r}; several runs have only answer and all in common")
    with open_store(store) as kept:
        opened = [open_trace(name, kept, None, quiet=as_json) for name in dict.fromkeys(runs)]
        with stop_on_signal() as cancel, stages() as progress:
            board = leaderboard(
                [trace for trace, _, _ in opened],
                methods=DEFAULT_FIELD if methods is None else names_of(methods),
                parameters=parameters_of(param or []),
                targets=targets,
                replica=model,
                dtype=dtype,
                seed=seed,
                store=kept,
                progress=None if as_json else progress,
                cancel=cancel,
            )
    if as_json:
        sys.stdout.write(json.dumps([item.to_document() for item in board.standings]) + "\n")
    else:
        print_board(board.standings)


def print_board(standings: list[Standing]) -> None:
    """The table of methods, best for its cost first, and what it does not show."""
    from rich.table import Table
    from rich.text import Text

    from tracer.console import one_line, out

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("method", "LDS", "top-k drop", "deletion", "insertion", "z", "agrees", "passes", "s", "LDS/pass"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for item in standings:
        style = "" if item.better_than_random else "yellow"
        cells = [_cell(item.lds), _cell(item.top_k_drop), _cell(item.deletion), _cell(item.insertion), f"{item.z:.1f}"]
        cells += [_cell(item.agreement), f"{item.passes:.1f}", f"{item.seconds:.1f}"]
        per_pass = item.lds_per_pass
        cells.append("-" if per_pass is None else f"{per_pass:.2f}")
        table.add_row(*(Text(cell, style=style) for cell in [item.method, *cells]))
    out.print(table)
    out.print(
        Text(
            "LDS: rank correlation of predicted and measured effects of random removals. Drop, deletion, insertion: "
            "nats, the last two against random orders. z: curves above random, all targets. Passes: time of a target "
            "in plain forward passes.",
            style="dim",
        )
    )
    if weak := [item.method for item in standings if not item.better_than_random and item.targets]:
        out.print(Text(f"not shown to be better than random on these runs: {', '.join(weak)}", style="yellow"))
    for item in standings:
        for reason in dict.fromkeys(item.problems.values()):
            refused = [one_line(trace, 40) for trace, why in item.problems.items() if why == reason]
            where = ", ".join(refused[:3]) + (f" and {len(refused) - 3} more" if len(refused) > 3 else "")
            out.print(f"{item.method} could not explain {where}: {reason}", markup=False, soft_wrap=True)


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    return f"{estimate.mean:+.2f} [{estimate.low:+.2f}, {estimate.high:+.2f}]"
