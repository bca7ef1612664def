"""Truth probes as tables for charts, and what their numbers prove in sentences. Draws nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import pandas as pd

from tracer.errors import TraceFormatError
from tracer.trace.layer_map import LayerMap
from tracer.trace.probe_report import (
    Estimate,
    Evaluation,
    FirstErrorTask,
    Measured,
    MethodResult,
    ProbeReport,
    ProbeSummary,
    Reliability,
    StepWorth,
    Transfer,
)
from tracer.trace.probes import ProbeScore, probe_scores
from tracer.trace.trace import Trace
from ui import palette
from ui.payload import one_line

CHANCE = 0.5
FAR = 3.0
"""Spreads of the training scores beyond which hardly any training statement lies."""
PROBE, BASELINE, CONTROL = "probe", "baseline", "control (nothing to learn)"
NAME_CHARACTERS = 44
SCORE_COLUMNS = ("step", "kind", "text", "probability", "low", "high", "logprob", "p_true", "token", "doubts")


class Verdict(NamedTuple):
    """Whether something is shown to be better than all that it is compared with."""

    better: bool
    rival: str | None
    """The best of what it is not shown to be better than."""


def models_of(trace: Trace) -> set[str]:
    """Hashes of the weights that a trace was explained or scored with: what its probes must have been made for."""
    identities = [document.get("replica") for document in (*trace.explanations, *trace.probes)]
    hashes = [identity.get("weights_sha256") for identity in identities if isinstance(identity, dict)]
    return {found for found in hashes if isinstance(found, str)}


def report_for(trace: Trace, reports: Sequence[ProbeReport]) -> ProbeReport | None:
    """The newest report on the model of a run: by its weights where they are known, else by its name."""
    weights = models_of(trace)
    own = [report for report in reports if report.model.get("weights_sha256") in weights]
    own += [report for report in reports if not weights and report.model.get("name") == trace.model.name]
    return own[0] if own else None


def report_name(report: ProbeReport) -> str:
    """A model's name, and what tells it from another of the same name."""
    weights = str(report.model.get("weights_sha256") or "")[:8]
    return one_line(f"{report.model.get('name')} ({weights})", limit=80)


def held_out_table(probe: ProbeSummary) -> pd.DataFrame:
    """AUROC of a saved probe on what it has not seen, beside baselines and controls, as bars are drawn from."""
    held = probe.held_out
    return _bars([(PROBE, [held.overall]), (BASELINE, held.baselines), (CONTROL, held.controls)])


def parts_table(probe: ProbeSummary) -> pd.DataFrame:
    """The same by part: affirmative and negated statements, each topic or each kind of step."""
    return _bars([(PROBE, probe.held_out.parts)])


def steps_worth_table(worth: StepWorth) -> pd.DataFrame:
    """AUROC of a probe on reasoning steps beside every baseline, and all baselines together with and without it."""
    return _bars([(PROBE, [worth.probe, worth.with_probe]), (BASELINE, [*worth.baselines, worth.stack])])


def methods_table(found: Evaluation) -> pd.DataFrame:
    """AUROC of kinds of probes on topics that they have not seen, beside controls."""
    return _bars([(PROBE, found.methods), (CONTROL, found.controls)])


def transfer_table(found: Transfer) -> pd.DataFrame:
    """AUROC of probes and baselines on the same reasoning steps."""
    return _bars([(PROBE, [worth.probe for worth in found.probes]), (BASELINE, found.baselines)])


def layers_table(found: Evaluation) -> pd.DataFrame:
    """Accuracy by layer with its interval, as lines are drawn from."""
    rows = [
        (item.method, item.layer, item.accuracy.value, item.accuracy.low, item.accuracy.high) for item in found.by_layer
    ]
    return pd.DataFrame(rows, columns=["series", "x", "y", "low", "high"])


def topics_table(found: Evaluation) -> pd.DataFrame:
    """Accuracy of each method on each topic that was left out, as a matrix is drawn from."""
    rows = [
        (one_line(topic.topic, limit=NAME_CHARACTERS), one_line(result.name, limit=NAME_CHARACTERS), topic.accuracy)
        for result in (*found.methods, *found.controls)
        for topic in result.topics
    ]
    return pd.DataFrame(rows, columns=["row", "column", "value"])


def projection_table(found: Evaluation) -> pd.DataFrame:
    """Statements on the truth direction and on the one that turns round with negation, as points are drawn from."""
    points = found.projection
    if points is None:
        return pd.DataFrame(columns=["x", "y", "what", "kind"])
    return pd.DataFrame(
        {
            "x": points.truth,
            "y": points.polarity_sensitive,
            "what": ["true" if label else "false" for label in points.label],
            "kind": ["negated" if negated else "affirmative" for negated in points.negated],
        }
    )


def reliability_table(found: Reliability) -> pd.DataFrame:
    """Bins of a reliability curve."""
    rows = [(item.predicted, item.share, item.low, item.high, item.count) for item in found.bins]
    return pd.DataFrame(rows, columns=["predicted", "share", "low", "high", "count"])


def mistakes_table(found: FirstErrorTask) -> pd.DataFrame:
    """How often each method finds the first wrong step of a task's chains, as bars are drawn from."""
    rows = [
        (one_line(item.name, limit=NAME_CHARACTERS), item.overall.value, item.overall.low, item.overall.high, "method")
        for item in found.methods
    ]
    return pd.DataFrame(rows, columns=["name", "value", "low", "high", "group"])


def verdict(own: Measured, others: Iterable[Measured]) -> Verdict:
    """Whether a probe's AUROC is above chance and above every other one, beyond its interval."""
    if own.auroc is None:
        return Verdict(False, "chance")
    rivals = [(item.auroc.value, item.name) for item in others if item.auroc is not None]
    best = max([*rivals, (CHANCE, "chance")])
    return Verdict(own.auroc.low > best[0], None if own.auroc.low > best[0] else best[1])


def in_numbers(own: Measured) -> str:
    """Accuracy and AUROC with their 95% intervals, and on how many examples."""
    found = f"accuracy {_interval(own.accuracy)}"
    if own.auroc is not None:
        found += f", AUROC {_interval(own.auroc)}"
    return f"{found}; {own.rows:,d} examples"


def _interval(item: Estimate) -> str:
    return f"{item.value:.3f} [{item.low:.3f}, {item.high:.3f}]"


def best_method(found: Evaluation) -> MethodResult:
    """The kind of probe with the largest AUROC."""
    return max(found.methods, key=lambda item: item.auroc.value if item.auroc is not None else 0.0)


def probe_names(trace: Trace) -> list[str]:
    """Probes that scored a trace."""
    return list(dict.fromkeys(score.name for score in probe_scores(trace)))


def scores_table(trace: Trace, name: str) -> pd.DataFrame:
    """What a probe says of each step of a trace, with the columns ``SCORE_COLUMNS``."""
    steps = {step.id: (number, step) for number, step in enumerate(trace.steps, 1)}
    rows = []
    for score in probe_scores(trace, name=name):
        if score.step_id not in steps or score.sentence is not None:
            continue
        number, step = steps[score.step_id]
        rows.append((number, palette.kind_name(step.kind), one_line(step.text, limit=120), *_numbers(score)))
    rows.sort(key=lambda row: row[0])
    numbers = dict.fromkeys(SCORE_COLUMNS[3:8], "float64") | {"token": "Int64"}
    return pd.DataFrame(rows, columns=list(SCORE_COLUMNS)).astype(numbers)


def layer_map_table(found: LayerMap, texts: Sequence[str]) -> pd.DataFrame:
    """A layer map, as it is drawn; tokens are numbered, for the same text can come twice."""
    names = [f"{number} {text}" for number, text in enumerate(texts)]
    rows = [
        (layer, name, value)
        for layer, row in zip(found.layers, found.values, strict=True)
        for name, value in zip(names, row, strict=True)
    ]
    return pd.DataFrame(rows, columns=["layer", "token", "value"])


def map_width(found: LayerMap) -> float:
    """Absolute value from which on a map's colours are full: all but its largest twentieth can be told apart."""
    sizes = sorted(abs(value) for row in found.values for value in row)
    return max(FAR, sizes[int(0.95 * (len(sizes) - 1))]) if sizes else FAR


def share_far(found: LayerMap) -> float:
    """Share of a map's values that are further from the boundary than statements are."""
    sizes = [abs(value) for row in found.values for value in row]
    return sum(size > FAR for size in sizes) / len(sizes) if sizes else 0.0


def layer_worth_table(found: LayerMap) -> pd.DataFrame:
    """What each layer's probe is worth on topics that it has not seen, as a line is drawn from."""
    rows = [("held-out AUROC", layer, area) for layer, area in zip(found.layers, found.held_out, strict=True)]
    return pd.DataFrame(rows, columns=["series", "x", "y"])


def token_ids(trace: Trace, found: LayerMap) -> tuple[list[int], int]:
    """Prompt and completion up to the end of a map's tokens, and how many come before them.

    Raises:
        TraceFormatError: The map names tokens that the trace does not have.
    """
    call = trace.call(found.call_id)
    count = len(found.values[0]) if found.values else 0
    known = 0 <= found.completion < len(call.completions) and found.start >= 0
    written = call.completions[found.completion].token_ids[: found.start + count] if known else []
    if not known or len(written) != found.start + count:
        raise TraceFormatError(f"the layer map of step {found.step_id} names tokens that this run does not have")
    return call.prompt_token_ids + written, len(call.prompt_token_ids) + found.start


def _numbers(
    score: ProbeScore,
) -> tuple[float | None, float | None, float | None, float | None, float | None, int | None, int]:
    known = score.baselines
    return (
        score.probability,
        score.low,
        score.high,
        known.mean_logprob,
        known.p_true,
        score.token,
        len(score.flags),
    )


def _bars(groups: Sequence[tuple[str, Sequence[Measured]]]) -> pd.DataFrame:
    rows = [
        (one_line(item.name, limit=NAME_CHARACTERS), item.auroc.value, item.auroc.low, item.auroc.high, group)
        for group, items in groups
        for item in items
        if item.auroc is not None
    ]
    return pd.DataFrame(rows, columns=["name", "value", "low", "high", "group"])
