"""Probe scores on the terminal: each beside its baselines, and what the probe itself is worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from rich.text import Text

from tracer.console import KIND_STYLES, err, one_line, out
from tracer.trace.probes import SENTENCES, ProbeBaselines, ProbeScore

if TYPE_CHECKING:
    from tracer.explain.report import Report
    from tracer.trace.trace import Step

_BAR = 16
_MARKS = "abcdefgh"


def print_probes(report: Report) -> None:
    """What each probe says about the steps of a trace, or how to make one."""
    if report.probe_hint is not None:
        out.print(Text(one_line(report.probe_hint, 300), style="dim"))
    steps = {step.id: step for step in report.trace.steps}
    for name in dict.fromkeys(score.name for score in report.probes):
        _print_probe([score for score in report.probes if score.name == name], steps)


def print_live(scores: Sequence[ProbeScore]) -> None:
    """What probes of the served model say about steps that were just written, below these."""
    for score in scores:
        line = Text("     ", style="dim").append(_probability(score), style="default not dim")
        line.append(f"  {one_line(score.name, 20)} {score.step_id}  {_beside(score.baselines)} ")
        err.print(line.append(one_line(score.text, 72), style="default"))


def print_live_worth(scores: Sequence[ProbeScore]) -> None:
    """What the probes are worth that scored a run while it was written, and why their scores are to be doubted."""
    for name in dict.fromkeys(score.name for score in scores):
        own = [score for score in scores if score.name == name]
        err.print(Text(f"probe {one_line(name, 40)}:", style="dim"))
        err.print(_worth(own[0]))
        for flag in sorted(set.intersection(*(set(score.flags) for score in own))):
            err.print(Text(f"    {_sentence(flag)}", style="yellow"))


def _print_probe(scores: Sequence[ProbeScore], steps: dict[str, Step]) -> None:
    first = scores[0]
    out.print(
        Text(
            f"truth by the probe {one_line(first.name, 40)} ({one_line(str(first.held_out.get('kind')), 20)}, layer "
            f"{first.layer}, {one_line(first.position, 20)} token): probability that the model takes it for true [95%]",
            style="bold",
        )
    )
    everywhere = set.intersection(*(set(score.flags) for score in scores))
    noted = list(dict.fromkeys(flag for score in scores for flag in score.flags if flag not in everywhere))
    for score in scores:
        line = Text("    " if score.sentence is not None else f"{one_line(score.step_id, 40):>5} ", style="dim")
        if score.sentence is None and score.step_id in steps:
            kind = steps[score.step_id].kind
            line.append(f"{kind:12}", style=KIND_STYLES.get(kind, "default"))
        else:
            line.append(" " * 14)
        line.append(_probability(score), style="default not dim")
        line.append(f"  {_beside(score.baselines)}", style="default")
        marks = "".join(_MARKS[noted.index(flag) % len(_MARKS)] for flag in score.flags if flag in noted)
        line.append(f" {marks:3} ", style="yellow")
        out.print(line.append(one_line(score.text, 72), style="default not dim"))
    for flag in noted:
        out.print(Text(f"    {_MARKS[noted.index(flag) % len(_MARKS)]}: {_sentence(flag)}", style="yellow"))
    for flag in sorted(everywhere):
        out.print(Text(f"    {_sentence(flag)}", style="yellow"))
    out.print(_worth(first))


def _probability(score: ProbeScore) -> str:
    if score.probability is None or score.low is None or score.high is None:
        return " not scored".ljust(18 + _BAR)
    bar = ("█" * round(score.probability * _BAR)).ljust(_BAR, "·")
    return f"{score.probability:4.2f} [{score.low:4.2f} {score.high:4.2f}] {bar} "


def _beside(baselines: ProbeBaselines) -> str:
    parts = [
        _part("log p", baselines.mean_logprob, "5.2f"),
        _part("min", baselines.min_logprob, "6.2f"),
        _part("entropy", baselines.entropy, "4.2f"),
        _part("agree", baselines.agreement, "4.2f"),
        _part("P(True)", baselines.p_true, "4.2f"),
    ]
    return " ".join(part for part in parts if part)


def _part(name: str, value: float | None, form: str) -> str:
    return "" if value is None else f"{name} {value:{form}}"


def _sentence(flag: str) -> str:
    return SENTENCES.get(flag, one_line(flag, 60))


def _worth(score: ProbeScore) -> Text:
    """What the probe is worth where it was tested."""
    held = score.held_out
    line = f"    held-out accuracy {_interval(held.get('accuracy'))}, AUROC {_interval(held.get('auroc'))}"
    steps = held.get("steps")
    if isinstance(steps, dict):
        line += (
            f"; on {one_line(str(steps.get('steps')), 10)} held-out steps AUROC {_interval(steps.get('auroc'))}, "
            f"{one_line(str(steps.get('best_baseline')), 30)} alone {_interval(steps.get('best_baseline_auroc'))}"
        )
    return Text(line, style="dim")


def _interval(value: object) -> str:
    if not isinstance(value, list) or len(value) != 3 or not all(isinstance(item, int | float) for item in value):
        return "-"
    middle, low, high = cast("list[float]", value)
    return f"{middle:.2f} [{low:.2f} {high:.2f}]"
