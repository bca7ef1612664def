"""Explanations and methods on the terminal. Texts of a trace are shown on one line, without control characters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.text import Text

from tracer.console import KIND_STYLES, one_line, out
from tracer.explain.faithfulness import measures_of
from tracer.explain.influence import influences
from tracer.trace.explanation import Explanation, ExplanationSource
from tracer.trace.faithfulness import against_random
from tracer.trace.trace import Step

if TYPE_CHECKING:
    from tracer.explain.base import Method
    from tracer.explain.report import Report
    from tracer.replay.parity import Parity

_NAMED = 6
"""Targets that are named where there are many."""
_BAR = 16
_LABEL = 64


def print_report(report: Report, *, top: int) -> None:
    """What each step read, method by method, then what the numbers are worth.

    Args:
        report: What was found out.
        top: Sources shown for each step and method.
    """
    steps = {step.id: step for step in report.trace.steps}
    for target in report.targets if report.explanations else ():
        step = steps[target.partition("#")[0]]
        head = Text(f"{one_line(target, 40):>5} ", style="dim")
        head.append(step.kind, style=KIND_STYLES.get(step.kind, "default"))
        out.print(head.append(f"  {one_line(step.text, 100)}"))
        for explanation in report.explanations:
            _print_row(report, explanation, target, steps, top)
    for explanation in report.explanations:
        for target in explanation.through:
            if target in report.targets:
                _print_through(explanation, target, steps, top)
    out.print(_parity_line(report.parity))
    for explanation in report.explanations:
        print_trust(explanation, report.targets)
    _print_unmeasured(report)
    for method, reason in report.left_out.items():
        out.print(Text(f"{method} was left out: {one_line(reason, 500)}", style="yellow"))


def _print_unmeasured(report: Report) -> None:
    """Whose scores nothing vouches for; methods that lack the same targets in one line."""
    lacking: dict[tuple[str, ...], list[str]] = {}
    for explanation in report.explanations:
        known = measures_of(explanation)
        missing = tuple(target for target in report.targets if target not in known)
        if missing:
            lacking.setdefault(missing, []).append(explanation.method)
    for missing, methods in lacking.items():
        names = ", ".join(one_line(target, 40) for target in missing[:_NAMED])
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        out.print(
            Text(
                f"faithfulness not measured: {', '.join(methods)} on {names}{more}; nothing shows that these scores "
                "say what the model relied on (--faithfulness all measures every step that read two things or more)",
                style="yellow",
            )
        )


def _print_row(report: Report, explanation: Explanation, target: str, steps: dict[str, Step], top: int) -> None:
    found = report.sources(target, explanation.method)
    out.print(Text(f"      {explanation.method} ({explanation.unit})", style="dim"))
    largest = abs(found[0][1]) if found else 1.0
    for source, value in found[:top]:
        line = Text(f"        {value:+9.3g} " if explanation.signed else f"        {value:9.3g} ")
        line.append(_bar(abs(value) / largest), style="red" if value < 0 else "green")
        out.print(line.append(f" {_label(source, steps)}"))
    if not found:
        out.print(Text("        nothing", style="dim"))


def _print_through(explanation: Explanation, target: str, steps: dict[str, Step], top: int) -> None:
    out.print(Text(f"{one_line(target, 40):>5} by {explanation.method}, through all steps (directly)", style="bold"))
    for item in influences(explanation, target)[:top]:
        line = Text(f"        {item.through:6.1%} ({item.direct:6.1%}) ")
        line.append(_bar(item.through), style="green" if item.root else "dim")
        out.print(line.append(f" {_label(item.source, steps)}"))


def print_trust(explanation: Explanation, targets: Iterable[str]) -> None:
    """How far the scores can be trusted: a line for each target that was measured, and what they prove together."""
    measured = measures_of(explanation)
    if not measured:
        return
    # Removals move the log-probability, whatever was explained.
    of = "" if explanation.target_function == "logprob" else "; of its log-probability, which is not what was explained"
    for target in targets:
        if target not in measured:
            continue
        found = measured[target]
        lds = "-" if found.lds is None else f"{found.lds:+.2f}"
        out.print(
            f"{one_line(target, 40):>5} {explanation.method}: LDS {lds}; without the {found.k} of {found.sources} "
            f"sources most in its favour the target loses {found.top_k_drop:.2f} nats; deletion {found.deletion:+.2f} "
            f"and insertion {found.insertion:+.2f} nats against random orders{of}",
            markup=False,
            highlight=False,
        )
    pooled = against_random(measured.values())
    if not pooled.better:
        out.print(
            Text(
                f"      {explanation.method} is not shown to be better than random on this trace (z = {pooled.z:.1f} "
                f"over {len(measured)} measured targets)",
                style="yellow",
            )
        )


def _bar(share: float) -> str:
    return ("█" * round(min(share, 1.0) * _BAR)).ljust(_BAR)


def _label(source: ExplanationSource, steps: dict[str, Step]) -> str:
    """What a source is, for a person."""
    where = one_line(f"{source.call_id}[{source.start}-{source.end}]", 40)
    step = steps.get(source.step_id or "")
    if step is None:
        return f"{one_line(source.kind, 20)}  {where}"
    return f"{one_line(source.kind, 20)} {one_line(step.id, 20)}  {where}  {one_line(step.text, _LABEL)}"


def _parity_line(parity: Parity) -> Text:
    if parity.mean_abs is None:
        line = Text("parity: not checked, no log-probability was recorded")
    else:
        line = Text(
            f"parity: log-probabilities differ by {parity.mean_abs:.1e} on average, {parity.max_abs:.1e} at most, over "
            f"{parity.tokens} tokens (allowed {parity.tolerance_mean:g} and {parity.tolerance_max:g})"
        )
    if parity.retokenised:
        line.append("; RETOKENISED: these are not the tokens that the model saw", style="red")
    if parity.forced:
        line.append("; FORCED: these may be the wrong weights", style="red")
    return line


def print_methods(methods: Iterable[Method]) -> None:
    """Methods, each with what it costs and what its values are."""
    for method in methods:
        sign = "signed" if method.signed else "not signed"
        line = Text(method.name, style="bold")
        follows = ", follows --target-function" if method.follows else ""
        out.print(line.append(f"  {method.cost}, {method.unit}, {sign}{follows}", style="default not bold"))
        out.print(Text(f"    {method.summary}"))
        out.print(Text(f"    {method.paper}", style="dim"))
        if method.parameters:
            values = ", ".join(f"{name}={value!r}" for name, value in method.parameters.items())
            out.print(Text(f"    parameters: {values}", style="dim"))
