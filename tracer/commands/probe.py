"""The commands ``probe train`` and ``probe evaluate``."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from tracer.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from pydantic import JsonValue

    from tracer.console import StageProgress
    from tracer.explain.probes.make import Work
    from tracer.explain.probes.saved import SavedProbe
    from tracer.explain.probes.statements import Statement
    from tracer.explain.probes.tables import Table

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


class Section(NamedTuple):
    """A part of an evaluation.

    Args:
        name: Its key in the JSON output.
        tables: What is printed.
        document: What is written as JSON.
    """

    name: str
    tables: list[Table]
    document: JsonValue


@probe_app.command("train")
def train(
    model: ModelOption = "demo",
    data: DataOption = None,
    kind: Annotated[
        str | None, typer.Option(help="ttpd, mass_mean, logistic, logistic_l2 (default), ccs and others.")
    ] = None,
    per_topic: Annotated[
        int | None, typer.Option(help="Facts of each topic, four statements each; more take longer.", min=4)
    ] = None,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="Write the probe here; default: where `tracer explain` finds it.")
    ] = None,
    prefix: PrefixOption = None,
    normalisation: NormalisationOption = "rms",
    dtype: PrecisionOption = None,
    steps: Annotated[
        bool,
        typer.Option("--steps", help="Make the probe of right and wrong reasoning steps too, or with --out alone."),
    ] = False,
    test_problems: Annotated[
        int, typer.Option(help="Problems by which a probe is judged on the model's own steps; 0 for none.", min=0)
    ] = 30,
    seed: SeedOption = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print what is known of the probe as JSON.")] = False,
) -> None:
    """Make the truth probe of a model, once; `tracer explain` uses it from then on."""
    from tracer.console import err, stages, stop_on_signal
    from tracer.explain.probes.make import make_probe
    from tracer.explain.probes.saved import probe_path
    from tracer.explain.probes.train import FACTS_PER_TOPIC, KIND, OWN_STATEMENTS

    _check_kinds([kind or KIND])
    statements = _statements(data, FACTS_PER_TOPIC if per_topic is None else per_topic, seed)
    with stop_on_signal() as cancel, stages() as bar:
        work = _work(model, dtype, prefix, normalisation, seed, None if as_json else bar, cancel)
        source = data.name if data is not None else OWN_STATEMENTS
        probe = make_probe(work, statements, kind=kind or KIND, source=source)
    path = out_file or probe_path(work.identity())
    probe.save(path)
    if as_json:
        sys.stdout.write(json.dumps({**probe.record.model_dump(mode="json"), "file": str(path)}) + "\n")
    else:
        _print_tables(_probe_tables(probe))
        err.print(f"wrote {path}", markup=False)


@probe_app.command("evaluate")
def evaluate(
    model: ModelOption = "demo",
    data: DataOption = None,
    methods: Annotated[
        str | None, typer.Option(metavar="A,B", help="Kinds of probes; default: all that have a paper.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Judge at this layer; default: chosen on training topics.")] = None,
    repeats: Annotated[int, typer.Option(help="Draws of training rows.", min=1)] = 20,
    per_topic: Annotated[
        int, typer.Option(help="Facts of each topic where no data are given, four statements each.", min=4)
    ] = 40,
    prefix: PrefixOption = None,
    normalisation: NormalisationOption = "rms",
    dtype: PrecisionOption = None,
    seed: SeedOption = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON, what pictures are drawn from included.")
    ] = False,
) -> None:
    """Say what truth probes are worth on a model: on topics that they have not seen, beside baselines and controls."""
    from tracer.console import stages, stop_on_signal

    chosen = None if methods is None else [name.strip() for name in methods.split(",") if name.strip()]
    _check_kinds(chosen)
    with stop_on_signal() as cancel, stages() as bar:
        work = _work(model, dtype, prefix, normalisation, seed, None if as_json else bar, cancel)
        sections = [
            statement_section(work, data, per_topic=per_topic, methods=chosen, layer=layer, repeats=repeats),
        ]
    if as_json:
        sys.stdout.write(json.dumps({section.name: section.document for section in sections}) + "\n")
    else:
        for section in sections:
            _print_tables(section.tables)


def statement_section(
    work: Work, data: Path | None, *, per_topic: int, methods: Sequence[str] | None, layer: int | None, repeats: int
) -> Section:
    """Probes on statements, one topic left out at a time."""
    from tracer.explain.probes.evaluate import METHODS
    from tracer.explain.probes.evaluate import evaluate as evaluate_probes
    from tracer.explain.probes.tables import evaluation_tables

    found = evaluate_probes(
        work.material(_statements(data, per_topic, work.seed)),
        model=work.model,
        methods=METHODS if methods is None else methods,
        layer=layer,
        repeats=repeats,
        seed=work.seed,
        progress=work.progress("fitting probes"),
        cancel=work.cancel,
    )
    return Section("statements", evaluation_tables(found), found.model_dump(mode="json"))


def _work(
    model: str,
    dtype: str | None,
    prefix: str | None,
    normalisation: str,
    seed: int,
    bar: StageProgress | None,
    cancel: threading.Event,
) -> Work:
    from tracer.explain.probes.examples import NORMALISATIONS
    from tracer.explain.probes.make import Work
    from tracer.explain.probes.train import PREFIX

    if normalisation not in NORMALISATIONS:
        raise InputError(f"unknown normalisation {normalisation!r}; use one of {', '.join(NORMALISATIONS)}")
    return Work(model, dtype, PREFIX if prefix is None else prefix, normalisation, seed, bar, cancel)


def _check_kinds(names: Sequence[str] | None) -> None:
    """Refuse kinds that there are not before anything is loaded."""
    from tracer.explain.probes.fit import KINDS

    if names is not None and not names:
        raise InputError("an empty list of methods; separate names by commas")
    for name in names or ():
        if name not in KINDS:
            raise UnknownNameError("kind of probe", name, KINDS)


def _statements(data: Path | None, per_topic: int, seed: int) -> tuple[Statement, ...]:
    from tracer.explain.probes.statement_files import read
    from tracer.explain.probes.statements import generate

    return generate(seed=seed, per_topic=per_topic) if data is None else read(data)


def _probe_tables(probe: SavedProbe) -> list[Table]:
    """What a new probe is worth, in one table."""
    from tracer.explain.probes.tables import Table, interval, percent

    record = probe.record
    held = record.held_out
    rows = (held.overall, *held.parts, *held.baselines, *held.controls)
    return [
        Table(
            f"Truth probe {record.kind} for {record.model.get('name')}: layer {record.layer}, {record.training.rows} "
            f"statements of {len(record.training.topics)} topics",
            ("on statements of", "accuracy % [95%]", "AUROC [95%]", "statements"),
            tuple(
                (item.name, interval(item.accuracy, shares=True), interval(item.auroc), str(item.rows)) for item in rows
            ),
            (
                held.protocol,
                f"expected calibration error {percent(record.calibration.reliability.ece)}%, on topics that the "
                "calibration has not seen",
                *(str(note) for name, note in record.notes.items() if name == "sign"),
            ),
        )
    ]


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
