"""The command ``cite``: an answer with numbered citations."""

from __future__ import annotations

import json
import sys
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
    from tracer.explain.citations import Unit
    from tracer.explain.cited import CitedAnswer, Reference, RuleName
    from tracer.explain.service import Trusted
    from tracer.trace.explanation import Explanation
    from tracer.trace.trace import Trace

_METHOD = "mirage"


def cite(
    trace_name: Annotated[str, typer.Argument(metavar="TRACE", help="Id of a stored run, or a trace file.")],
    rule: Annotated[
        str,
        typer.Option(
            metavar="range|top", help="Cite what is within a share of the range below the largest, or a share of it."
        ),
    ] = "range",
    share: Annotated[
        float | None, typer.Option(help="The rule's share, 0 to 1; default: 0.05 for range, 0.5 for top.")
    ] = None,
    by: Annotated[str, typer.Option(metavar="sentence|word", help="What carries citations.")] = "sentence",
    targets: Annotated[
        str, typer.Option(metavar="answer|all|STEP,...", help="Which steps; all cites the reasoning too.")
    ] = "answer",
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="REPLICA", help="Weights to replay with, if not those that the trace names."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Precision of the replica: float32, bfloat16 or float16.")] = "float32",
    param: Annotated[
        list[str] | None,
        typer.Option(metavar="mirage.NAME=VALUE", help="A parameter of the method; may be given more than once."),
    ] = None,
    faithfulness: Annotated[
        str, typer.Option(metavar="answer|all|none", help="For which steps to measure what the scores are worth.")
    ] = "answer",
    low_memory: Annotated[bool, typer.Option("--low-memory", help="Recompute instead of keeping.")] = False,
    out_file: Annotated[Path | None, typer.Option("--out", help="Write the explained trace here.")] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Go on where the replica differs from what was recorded; the result is marked."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the citations as JSON and nothing else.")] = False,
    store: StoreOption = None,
) -> None:
    """Show an answer with numbered citations of the documents and observations behind it.

    Citations come from the model, not from likeness of words: tokens that the documents changed (MIRAGE), and for each
    the documents that its gradient points to. How faithful the scores are is measured and printed with them. What was
    computed before, here or by `tracer explain --methods mirage`, is not computed again.
    """
    from tracer.console import stages, stop_on_signal
    from tracer.explain.citations import cited_answers, joint_references
    from tracer.explain.cited import Rule
    from tracer.explain.methods import request
    from tracer.explain.service import explain

    chosen = Rule(cast("RuleName", rule), share)
    if by not in ("sentence", "word"):
        raise InputError(f"--by is {by!r}; use sentence or word")
    parameters = parameters_of(param or [])
    kinds = request(_METHOD, parameters.get(_METHOD)).parameters["kinds"]
    with open_store(store) as runs:
        trace, kept, arrays = open_trace(trace_name, runs, out_file, quiet=as_json)
        _check_context(trace, kinds)
        stored = is_stored(trace, runs)
        with keeping(out_file, stored=stored), stop_on_signal() as cancel, stages() as progress:
            report = explain(
                trace,
                methods=[_METHOD],
                probes=[],
                targets=targets if targets in ("all", "answer") else names_of(targets),
                replica=model,
                dtype=dtype,
                parameters=parameters,
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
    explanation = report.explanation(_METHOD)
    answers = cited_answers(report.trace, explanation, report.targets, rule=chosen, unit=cast("Unit", by))
    if as_json:
        sys.stdout.write(json.dumps([answer.to_document() for answer in answers]) + "\n")
        return
    for answer in answers:
        _print_answer(answer, named=len(answers) > 1)
    _print_references(joint_references(answers))
    _print_worth(answers, explanation)


def _check_context(trace: Trace, kinds: object) -> None:
    """Refuse a trace without anything to cite, before weights are loaded."""
    there = {step.kind for step in trace.steps} | {part.kind for call in trace.calls for part in call.segments}
    names = kinds.split("+") if isinstance(kinds, str) else kinds if isinstance(kinds, list) else None
    if names is not None and not there & set(names):
        raise InputError(
            f"trace {trace.id} holds no {' or '.join(map(str, names))} that could be cited; "
            "give an agent a folder of documents with `tracer run --docs`"
        )


def _print_answer(answer: CitedAnswer, *, named: bool) -> None:
    from rich.text import Text

    from tracer.console import one_line, out, safe_text

    line = Text(f"{one_line(answer.step_id, 40):>5}  " if named else "", style="dim")
    pair = answer.brackets()
    parts = answer.parts()
    for place, (text, numbers) in enumerate(parts):
        shown = safe_text(text)
        shown = shown.lstrip() if place == 0 else shown
        line.append(shown.rstrip() if place == len(parts) - 1 else shown, style="default")
        line.append("".join(f"{pair[0]}{number}{pair[1]}" for number in numbers), style="bold cyan")
    out.print(line)
    if pair != "[]":
        out.print(
            Text(f"       numbers in square brackets are the model's own words; citations are in {pair}", "yellow")
        )


def _print_references(references: tuple[Reference, ...]) -> None:
    """What could be cited, each with its share in all that was contributed."""
    from rich.text import Text

    from tracer.console import one_line, out

    out.print()
    for reference in references:
        line = Text(f"{f'[{reference.number}]':>5} {reference.share:6.1%}  {one_line(reference.title, 100) or '-'}")
        line.append(f"  ({one_line(reference.kind, 20)} {one_line(reference.step_id or '', 20)})", style="dim")
        line.stylize("bold" if reference.cited else "dim")
        out.print(line)


def _print_worth(answers: list[CitedAnswer], explanation: Explanation) -> None:
    from rich.text import Text

    from tracer.commands.report import print_trust
    from tracer.console import one_line, out

    out.print()
    changes = (f"{one_line(answer.step_id, 40)} by {answer.changed:.2g} nats" for answer in answers)
    out.print(Text(f"changed at most by what can be cited (KL of one token): {', '.join(changes)}"))
    unmeasured = [one_line(answer.step_id, 40) for answer in answers if answer.trust.measured is None]
    if unmeasured:
        out.print(Text(f"faithfulness not measured: {', '.join(unmeasured)} (see --faithfulness)", style="yellow"))
    if any(answer.trust.retokenised for answer in answers):
        out.print(Text("RETOKENISED: these are not the tokens that the model saw", style="red"))
    if any(answer.trust.forced for answer in answers):
        out.print(Text("FORCED: these may be the wrong weights", style="red"))
    print_trust(explanation, [answer.step_id for answer in answers])
