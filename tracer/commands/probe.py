"""The commands ``probe train`` and ``probe evaluate``."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from tracer.commands.shared import names_of
from tracer.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from tracer.console import StageProgress
    from tracer.explain.probes.tables import Table
    from tracer.explain.probes.workbench import Workbench

Name = TypeVar("Name", bound=str)

probe_app = typer.Typer(no_args_is_help=True, help="Truth probes: making one for a model, and what they are worth.")

ModelOption = Annotated[str, typer.Option(help="demo, a local folder, a GGUF file or a hub id.", metavar="NAME")]
DataOption = Annotated[
    Path | None,
    typer.Option(
        help="Statements of your own: a CSV file statement,label[,topic,polarity], or a folder of them.",
        metavar="FILE|FOLDER",
    ),
]
PrecisionOption = Annotated[
    str | None, typer.Option(help="Precision of the model; what is fast on this machine if not given.")
]
PrefixOption = Annotated[
    str | None,
    typer.Option(help="Stands before every statement; without one, short statements end in attention sinks."),
]
NormalisationOption = Annotated[str, typer.Option(metavar="rms|none", help="What is done to hidden states first.")]
SeedOption = Annotated[int, typer.Option(help="For everything drawn at random.")]


@probe_app.command("train")
def train(
    model: ModelOption = "demo",
    data: DataOption = None,
    only: Annotated[
        str | None, typer.Option(metavar="statements|steps", help="Make this probe alone; default: both.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="Of statements: ttpd, mass_mean, logistic, logistic_l2 (default), ccs and others."),
    ] = None,
    per_topic: Annotated[
        int | None, typer.Option(help="Facts of each topic, four statements each; more take longer.", min=4)
    ] = None,
    problems: Annotated[int | None, typer.Option(help="Problems that the probe of steps learns from.", min=10)] = None,
    test_problems: Annotated[
        int | None, typer.Option(help="Problems by which probes are judged on the model's own steps.", min=10)
    ] = None,
    out_file: Annotated[
        Path | None,
        typer.Option("--out", help="With --only: write the probe here; default: where `tracer explain` finds it."),
    ] = None,
    prefix: PrefixOption = None,
    normalisation: NormalisationOption = "rms",
    dtype: PrecisionOption = None,
    seed: SeedOption = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what is known of each probe as JSON, one a line.")
    ] = False,
) -> None:
    """Make the truth probes of a model, once; `tracer explain` uses them from then on.

    One learns from true and false statements, one from right and wrong steps of reasoning: what is learnt from the
    first says little about the second.
    """
    from tracer.console import err, stages, stop_on_signal
    from tracer.explain.probes.step_probe import PROBLEMS, TEST_PROBLEMS
    from tracer.explain.probes.tables import probe_tables
    from tracer.explain.probes.train import FACTS_PER_TOPIC, KIND
    from tracer.explain.probes.workbench import PROBES, keep_probes

    names = _chosen(only, PROBES, "probe")
    if out_file is not None and len(names) > 1:
        raise InputError("--out holds one probe; add --only statements or --only steps")
    _check_kinds([kind or KIND])
    with stop_on_signal() as cancel, stages() as bar:
        bench = _workbench(model, data, dtype, prefix, normalisation, seed, None if as_json else bar, cancel)
        if "statements" in names:
            # Before weights are loaded: what cannot be read shall fail at once.
            bench.statements(per_topic or FACTS_PER_TOPIC)
        probes = bench.train(
            names,
            kind=kind or KIND,
            per_topic=per_topic or FACTS_PER_TOPIC,
            problems=problems or PROBLEMS,
            test_problems=test_problems or TEST_PROBLEMS,
        )
        identity = bench.identity
    if out_file is None:
        paths = keep_probes(probes, identity)
    else:
        paths = [out_file]
        probes[0].save(out_file)
    for probe, path in zip(probes, paths, strict=True):
        if as_json:
            sys.stdout.write(json.dumps({**probe.record.model_dump(mode="json"), "file": str(path)}) + "\n")
            continue
        _print_tables(probe_tables(probe.record))
        err.print(f"wrote {path}", markup=False)


@probe_app.command("evaluate")
def evaluate(
    model: ModelOption = "demo",
    data: DataOption = None,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="statements: topics left out in turn; steps: transfer to reasoning; mistakes: the first wrong step of "
            "chains. Default: all that there is data for.",
        ),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(metavar="A,B", help="Kinds of probes; default: all that have a paper.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Judge at this layer; default: chosen on training topics.")] = None,
    repeats: Annotated[int, typer.Option(help="Draws of training rows.", min=1)] = 20,
    per_topic: Annotated[
        int | None, typer.Option(help="Facts of each topic where no data are given, four statements each.", min=4)
    ] = None,
    problems: Annotated[int | None, typer.Option(help="Problems whose steps are judged.", min=10)] = None,
    mistakes: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Chains with known mistakes, a file TASK.jsonl for each task.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Chains of each task.", min=4)] = None,
    ask: Annotated[bool, typer.Option(help="Ask the model too whether each step is true: P(True).")] = True,
    prefix: PrefixOption = None,
    normalisation: NormalisationOption = "rms",
    dtype: PrecisionOption = None,
    seed: SeedOption = 0,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep what is found here; default: beside the model's probes, for the app."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON, what pictures are drawn from included.")
    ] = False,
) -> None:
    """Say what truth probes are worth on a model: on what they have not seen, beside baselines and controls.

    Ctrl-C keeps the hidden states that were extracted. Sections that are evaluated alone are put into the same report.
    """
    from tracer.console import err, stages, stop_on_signal
    from tracer.explain.probes.first_error import LIMIT, MISTAKES
    from tracer.explain.probes.tables import report_tables
    from tracer.explain.probes.unseen_steps import PROBLEMS
    from tracer.explain.probes.workbench import EVALUATED_PER_TOPIC, SECTIONS, Sizes, keep_report
    from tracer.store.probe_reports import report_path

    chosen = None if methods is None else [name.strip() for name in methods.split(",") if name.strip()]
    _check_kinds(chosen)
    sections = _chosen(only, SECTIONS, "section")
    lacking = only is None and mistakes is None and not MISTAKES.is_dir()
    if lacking:
        sections = [name for name in sections if name != "mistakes"]
    sizes = Sizes(
        per_topic=per_topic or EVALUATED_PER_TOPIC,
        repeats=repeats,
        problems=problems or PROBLEMS,
        chains=limit or LIMIT,
    )
    with stop_on_signal() as cancel, stages() as bar:
        bench = _workbench(model, data, dtype, prefix, normalisation, seed, None if as_json else bar, cancel)
        bench.statements(sizes.per_topic)
        # Behind what checks the input: bad input is answered by one line.
        if lacking and not as_json:
            err.print(
                f"no chains with known mistakes in {MISTAKES}: that section is left out; --mistakes names a folder"
            )
        found = bench.evaluate(
            sections, methods=chosen, layer=layer, sizes=sizes, mistakes=mistakes or MISTAKES, ask=ask
        )
        path = report or report_path(bench.identity)
    keep_report(path, found)
    if as_json:
        sys.stdout.write(found.model_dump_json() + "\n")
    else:
        _print_tables(report_tables(found))
        err.print(f"wrote {path}", markup=False)


def _chosen(text: str | None, names: Sequence[Name], what: str) -> list[Name]:
    """Those of the names that are asked for, all of them if none is."""
    if text is None:
        return list(names)
    wanted = names_of(text)
    for name in wanted:
        if name not in names:
            raise UnknownNameError(what, name, names)
    return [name for name in names if name in wanted]


def _workbench(
    model: str,
    data: Path | None,
    dtype: str | None,
    prefix: str | None,
    normalisation: str,
    seed: int,
    bar: StageProgress | None,
    cancel: threading.Event,
) -> Workbench:
    from tracer.explain.probes.examples import NORMALISATIONS
    from tracer.explain.probes.train import PREFIX
    from tracer.explain.probes.workbench import Workbench

    known = [name for name in NORMALISATIONS if name == normalisation]
    if not known:
        raise InputError(f"unknown normalisation {normalisation!r}; use one of {', '.join(NORMALISATIONS)}")
    return Workbench(
        model,
        data=data,
        dtype=dtype,
        prefix=PREFIX if prefix is None else prefix,
        normalisation=known[0],
        seed=seed,
        progress=bar,
        cancel=cancel,
    )


def _check_kinds(names: Sequence[str] | None) -> None:
    """Refuse kinds that there are not before anything is loaded."""
    from tracer.explain.probes.fit import KINDS

    if names is not None and not names:
        raise InputError("an empty list of methods; separate names by commas")
    for name in names or ():
        if name not in KINDS:
            raise UnknownNameError("kind of probe", name, KINDS)


def _print_tables(tables: Sequence[Table]) -> None:
    from rich.table import Table as Grid
    from rich.text import Text

    from tracer.console import one_line, out

    for number, table in enumerate(tables):
        if number:
            out.print()
        out.print(Text(table.title, style="bold"))
        grid = Grid(box=None, pad_edge=False, header_style="bold")
        for place, name in enumerate(table.columns):
            grid.add_column(name, justify="left" if place == 0 else "right", no_wrap=True)
        for row in table.rows:
            grid.add_row(*(Text(one_line(cell, 120)) for cell in row))
        out.print(grid)
        for note in table.notes:
            out.print(Text(one_line(note, 400), style="dim"))
