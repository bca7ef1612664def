"""The commands ``explain`` and ``methods``."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from tracer.commands.shared import (
    StoreOption,
    is_stored,
    keeping,
    names_of,
    open_store,
    open_trace,
    parameters_of,
    save,
)
from tracer.errors import InputError

if TYPE_CHECKING:
    from tracer.explain.base import TargetFunction
    from tracer.explain.service import Trusted
    from tracer.store import Store
    from tracer.trace.trace import Trace

_ID = "id:"


def explain(
    trace_name: Annotated[str, typer.Argument(metavar="TRACE", help="Id of a stored run, or a trace file.")],
    methods: Annotated[
        str | None, typer.Option(metavar="A,B|none", help="Which methods; `tracer methods` lists them.")
    ] = None,
    probes: Annotated[
        str | None,
        typer.Option(
            metavar="truth|FILE|none", help="Which truth probes score the steps; those of the model if not given."
        ),
    ] = None,
    ask: Annotated[
        bool, typer.Option("--ask", help="Ask the model too whether what a probe scores is true: P(True).")
    ] = False,
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
    seed: Annotated[int, typer.Option(help="For everything drawn at random.", min=0)] = 0,
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
    """Say which parts of its input each step was conditioned on, and how true the model takes it to be.

    The recorded tokens are replayed through a copy of the weights, which must reproduce the recorded
    log-probabilities. What was computed before is not computed again; Ctrl-C keeps what is finished.

    Explanations of a stored run are stored with it. Those of a trace file go where --out says, which may be the file
    itself.
    """
    from tracer.commands.report import print_report
    from tracer.commands.truth import print_probes
    from tracer.console import err, stages, stop_on_signal
    from tracer.explain.service import explain as explain_trace

    parameters = parameters_of(param or [])
    with open_store(store) as runs:
        trace, kept, arrays = open_trace(trace_name, runs, out_file, quiet=as_json)
        stored = is_stored(trace, runs)
        with keeping(out_file, stored=stored), stop_on_signal() as cancel, stages() as progress:
            report = explain_trace(
                trace,
                methods=None if methods is None else _names(methods),
                probes=None if probes is None else _names(probes),
                ask=ask,
                targets=targets if targets in ("all", "answer") else names_of(targets),
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
    if out_file is not None:
        save(report.trace, out_file)
    if as_json:
        sys.stdout.write(report.trace.to_json() + "\n")
    else:
        print_report(report, top=top)
        print_probes(report)
        if out_file is not None:
            err.print(f"wrote {out_file}", markup=False)


def explain_new(trace: Trace, runs: Store, *, top: int = 5, answer_only: bool = False, quiet: bool = False) -> Trace:
    """Explain a run that was just stored, as `tracer explain` does by default, and show what was found.

    Args:
        trace: The run.
        runs: The store that holds it.
        top: Sources shown for each step and method.
        answer_only: Show what the answer read; what the other steps read is found out all the same.
        quiet: Show nothing.

    Returns:
        The explained trace.

    Raises:
        TracerError: It cannot be explained.
    """
    from tracer.commands.report import print_report
    from tracer.commands.truth import print_probes
    from tracer.console import stages, stop_on_signal
    from tracer.explain.service import explain as explain_trace

    with stop_on_signal() as cancel, stages() as progress:
        report = explain_trace(trace, store=runs, progress=None if quiet else progress, cancel=cancel)
    if quiet:
        return report.trace
    shown = {step.id for step in trace.steps if step.kind == "answer" or not answer_only}
    print_report(replace(report, targets=tuple(name for name in report.targets if name in shown)), top=top)
    if not answer_only:
        print_probes(report)
    return report.trace


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


def _names(text: str) -> list[str]:
    return [] if text == "none" else names_of(text)


def _foil(text: str | None) -> str | int | None:
    if text is None or not text.startswith(_ID):
        return text
    number = text.removeprefix(_ID)
    if not number.isdecimal():
        raise InputError(f"--foil {text} names no token; give id:NUMBER, or the token's text")
    return int(number)
