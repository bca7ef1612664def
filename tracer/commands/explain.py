"""The commands ``explain`` and ``methods``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from tracer.commands.shared import StoreOption, open_store, save
from tracer.errors import InputError, TraceNotFoundError, TracerError

if TYPE_CHECKING:
    from pydantic import JsonValue

    from tracer.explain.base import TargetFunction
    from tracer.explain.service import Trusted
    from tracer.store import Arrays, Store
    from tracer.trace.trace import Trace

_ID = "id:"


def explain(
    trace_name: Annotated[str, typer.Argument(metavar="TRACE", help="Id of a stored run, or a trace file.")],
    methods: Annotated[
        str | None, typer.Option(metavar="A,B", help="Which methods; `tracer methods` lists them.")
    ] = None,
    targets: Annotated[
        str,
        typer.Option(
            metavar="STEP,...|answer|all", help="Which steps; ID#N is token N of one, ID#* each of its tokens."
        ),
    ] = "all",
    target_function: Annotated[
        str, typer.Option(metavar="logprob|logit|contrast", help="What is explained of a step's tokens.")
    ] = "logprob",
    foil: Annotated[
        str | None,
        typer.Option(metavar="TEXT|id:N", help="contrast: the token that might have been; default: the runner-up."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="REPLICA", help="Weights to replay with, if not those that the trace names."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Precision of the replica: float32, bfloat16 or float16.")] = "float32",
    param: Annotated[
        list[str] | None,
        typer.Option(metavar="METHOD.NAME=VALUE", help="A method's parameter; may be given more than once."),
    ] = None,
    chunk: Annotated[
        int | None, typer.Option(metavar="N", help="Cut documents and observations into chunks of N tokens at most.")
    ] = None,
    seed: Annotated[int, typer.Option(help="For everything drawn at random.")] = 0,
    faithfulness: Annotated[
        str,
        typer.Option(
            metavar="answer|all|none",
            help="For which targets to measure, by taking sources away, what scores are worth.",
        ),
    ] = "answer",
    low_memory: Annotated[bool, typer.Option("--low-memory", help="Recompute instead of keeping.")] = False,
    top: Annotated[int, typer.Option(help="Sources shown for each step and method.", min=1)] = 5,
    out_file: Annotated[Path | None, typer.Option("--out", help="Write the explained trace here.")] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Go on where the replica differs from what was recorded; the result is marked."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the explained trace as JSON and nothing else.")
    ] = False,
    store: StoreOption = None,
) -> None:
    """Say which parts of its input each step was conditioned on.

    The recorded tokens are replayed through a copy of the weights, which must reproduce the recorded
    log-probabilities. What was computed before is not computed again; Ctrl-C keeps what is finished.

    Explanations of a stored run are stored with it. Those of a trace file go where --out says, which may be the file
    itself.
    """
    from tracer.commands.report import print_report
    from tracer.console import err, stages, stop_on_signal
    from tracer.explain.service import explain as explain_trace

    parameters = _parameters(param or [])
    with open_store(store) as runs:
        trace, kept, arrays = _open(trace_name, runs, out_file, quiet=as_json)
        try:
            with stop_on_signal() as cancel, stages() as progress:
                report = explain_trace(
                    trace,
                    methods=None if methods is None else _names(methods),
                    targets=targets if targets in ("all", "answer") else _names(targets),
                    target_function=cast("TargetFunction", target_function),
                    foil=_foil(foil),
                    replica=model,
                    dtype=dtype,
                    parameters=parameters,
                    chunk_tokens=chunk,
                    seed=seed,
                    store=kept,
                    arrays=arrays,
                    faithfulness=cast("Trusted", faithfulness),
                    force=force,
                    low_memory=low_memory,
                    progress=None if as_json else progress,
                    cancel=cancel,
                )
        except TracerError as error:
            if error.trace is not None and out_file is not None:
                save(error.trace, out_file)
            raise
    if out_file is not None:
        save(report.trace, out_file)
    if as_json:
        sys.stdout.write(report.trace.to_json() + "\n")
    else:
        print_report(report, top=top)
        if out_file is not None:
            err.print(f"wrote {out_file}", markup=False)


def list_methods(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list.")] = False,
) -> None:
    """List explanation methods: what they cost, what their values are, where they come from, their parameters."""
    from dataclasses import asdict

    from tracer.commands.report import print_methods
    from tracer.explain.methods import METHODS

    if as_json:
        sys.stdout.write(json.dumps([asdict(method) for method in METHODS.values()]) + "\n")
    else:
        print_methods(METHODS.values())


def _open(name: str, runs: Store, out_file: Path | None, *, quiet: bool) -> tuple[Trace, Store | None, Arrays | None]:
    """The trace, and where its explanations and token scores go."""
    from tracer.console import err
    from tracer.store import Arrays
    from tracer.trace.trace import Trace

    if out_file is not None and out_file.is_dir():
        raise InputError(f"cannot write {out_file}: it is a folder")
    file = Path(name)
    if not (file.is_file() or file.suffix == ".json" or len(file.parts) > 1):
        return runs.load(name), runs, None
    trace = Trace.load(file)
    if out_file is None:
        if not quiet and not _is_stored(trace, runs):
            err.print("this run is not in the store: what is found is shown and not kept; --out FILE keeps it")
        return trace, runs, None
    arrays = Arrays.beside(out_file)
    arrays.adopt(Arrays.beside(file), trace.id)
    return trace, None, arrays


def _is_stored(trace: Trace, runs: Store) -> bool:
    try:
        return runs.resolve(trace.id) == trace.id
    except TraceNotFoundError:
        return False


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError("an empty list of names; separate names by commas")
    return names


def _foil(text: str | None) -> str | int | None:
    if text is None or not text.startswith(_ID):
        return text
    number = text.removeprefix(_ID)
    if not number.isdecimal():
        raise InputError(f"--foil {text} names no token; give id:NUMBER, or the token's text")
    return int(number)


def _parameters(texts: list[str]) -> dict[str, dict[str, JsonValue]]:
    """Parse ``METHOD.NAME=VALUE``; a value that is no JSON is a text."""
    found: dict[str, dict[str, JsonValue]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        method, dot, parameter = name.partition(".")
        if not (equals and dot and method and parameter):
            raise InputError(
                f"--param takes METHOD.NAME=VALUE, found {text!r}; try --param integrated_gradients.points=32"
            )
        try:
            parsed: JsonValue = json.loads(value)
        except ValueError:
            parsed = value
        found.setdefault(method, {})[parameter] = parsed
    return found
