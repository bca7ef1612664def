"""The command ``probe map``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tracer.commands.shared import DtypeOption, ModelOption, StoreOption, names_of, open_store, open_trace, save

if TYPE_CHECKING:
    from tracer.trace.layer_map import LayerMap
    from tracer.trace.trace import Trace


def map_truth(
    trace: Annotated[str, typer.Argument(help="Id of a stored run, or the beginning of one; or a trace file.")],
    steps: Annotated[str, typer.Option(metavar="answer|all|ID,ID", help="Steps that the model wrote.")] = "answer",
    model: ModelOption = None,
    dtype: DtypeOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Go on where the model does not reproduce the recorded log-probabilities.")
    ] = False,
    seed: Annotated[int, typer.Option(help="For everything drawn at random.", min=0)] = 0,
    out_file: Annotated[
        Path | None,
        typer.Option("--out", help="Write the trace with its maps here; a trace file itself stays as it is."),
    ] = None,
    store: StoreOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the maps as JSON, one a line.")] = False,
) -> None:
    """Truth by layer and token: read a probe of every layer at every token of some steps; the app draws it."""
    from tracer.console import stages, stop_on_signal
    from tracer.explain.probes.layer_map import map_trace
    from tracer.explain.probes.workbench import Workbench

    with open_store(store) as runs, stop_on_signal() as cancel, stages() as bar:
        chosen, kept, _ = open_trace(trace, runs, out_file, quiet=as_json)
        bench = Workbench(
            model or chosen.model.name, dtype=dtype, seed=seed, progress=None if as_json else bar, cancel=cancel
        )
        wanted = steps if steps in ("answer", "all") else names_of(steps)
        found = map_trace(chosen, bench, steps=wanted, store=kept, force=force)
    if out_file is not None:
        documents = [own.model_dump(mode="json") for own in found]
        save(chosen.model_copy(update={"probes": [*chosen.probes, *documents]}), out_file)
    if as_json:
        for own in found:
            sys.stdout.write(json.dumps(own.model_dump(mode="json")) + "\n")
        return
    _print_maps(chosen, found)


def _print_maps(trace: Trace, found: Sequence[LayerMap]) -> None:
    """For each step the layers, what their probes are worth, and what they say on average and at the last token."""
    from rich.table import Table as Grid
    from rich.text import Text

    from tracer.console import one_line, out

    for own in found:
        step = trace.step(own.step_id)
        out.print(Text(one_line(f"{step.id} {step.kind}  {step.text}", 110), style="bold"))
        grid = Grid(box=None, pad_edge=False, header_style="bold")
        for name in ("layer", "held-out AUROC", "mean", "last token"):
            grid.add_column(name, justify="right", no_wrap=True)
        for layer, area, row in zip(own.layers, own.held_out, own.values, strict=True):
            grid.add_row(
                str(layer), f"{area:.2f}", f"{sum(row) / max(len(row), 1):+.2f}", f"{row[-1]:+.2f}" if row else "-"
            )
        out.print(grid)
        out.print(Text(one_line(own.protocol, 300), style="dim"))
