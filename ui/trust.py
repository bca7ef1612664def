"""How far explanations of one run can be trusted, as tables for the compare page. Draws nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import pandas as pd
from pydantic import JsonValue

from tracer.trace.explanation import Explanation
from tracer.trace.faithfulness import MethodFaithfulness, RemovalCurves, faithfulness_of
from tracer.trace.trace import Trace
from ui import palette

CHANCE = "random"
"""The method that knows nothing, where it was run beside the others."""
METHOD_COLUMNS = (
    "method",
    "verdict",
    "targets",
    "lds",
    "top_k_drop",
    "deletion",
    "insertion",
    "z",
    "seconds",
    "forward",
    "backward",
)
BETTER, NOT_BETTER, UNMEASURED, BASELINE = "✓ better than random", "✗ not shown to be", "not measured", "baseline"


@dataclass(frozen=True, slots=True)
class Judged:
    """What is known of the explanations of one run.

    Args:
        explanations: The newest by each method, best first.
        faithfulness: Of those methods that were measured.
    """

    explanations: Mapping[str, Explanation]
    faithfulness: Mapping[str, MethodFaithfulness]

    @classmethod
    def of(cls, explanations: Mapping[str, Explanation]) -> Judged:
        """Read what was measured."""
        known = {name: faithfulness_of(explanation) for name, explanation in explanations.items()}
        return cls(explanations, {name: found for name, found in known.items() if found is not None})

    @property
    def unmeasured(self) -> list[str]:
        """Methods whose scores nothing vouches for."""
        return [name for name in self.explanations if name not in self.faithfulness]

    @property
    def not_better(self) -> list[str]:
        """Methods that were measured and are not shown to be better than random."""
        return [
            name for name, found in self.faithfulness.items() if found.better_than_random is not True and name != CHANCE
        ]

    @property
    def targets(self) -> list[str]:
        """Targets that at least one method was measured on."""
        return list(dict.fromkeys(target for found in self.faithfulness.values() for target in found.targets))

    def curves(self, target: str) -> dict[str, RemovalCurves]:
        """The curves that were kept for a target, by method."""
        found = {name: own.targets[target].curves for name, own in self.faithfulness.items() if target in own.targets}
        return {name: curves for name, curves in found.items() if curves is not None}


def doubts(explanation: Explanation) -> list[str]:
    """Why all scores of an explanation may be of something else than what ran: ``forced``, ``retokenised``."""
    parity = explanation.parity or {}
    return [name for name in ("forced", "retokenised") if parity.get(name)]


def function_name(explanation: Explanation) -> str:
    """What was explained, where that is not the log-probability of what was written."""
    if explanation.target_function != "contrast":
        return "" if explanation.target_function == "logprob" else explanation.target_function
    return f"contrast with {'the runner-up' if explanation.foil is None else f'token {explanation.foil}'}"


def method_table(judged: Judged) -> pd.DataFrame:
    """One row a method, with the columns ``METHOD_COLUMNS``: means over its measured targets, and its cost."""
    rows = []
    for name, explanation in judged.explanations.items():
        known = judged.faithfulness.get(name)
        measured = list(known.targets.values()) if known is not None else []
        cost = explanation.cost
        rows.append(
            (
                name,
                _verdict(name, known),
                len(measured),
                _mean([item.lds for item in measured]),
                _mean([item.top_k_drop for item in measured]),
                _mean([item.deletion for item in measured]),
                _mean([item.insertion for item in measured]),
                known.z if known is not None else None,
                _number(cost.get("seconds")),
                _number(cost.get("forward_tokens")),
                _number(cost.get("backward_passes")),
            )
        )
    numbers = dict.fromkeys(METHOD_COLUMNS[3:], "float64")
    return pd.DataFrame(rows, columns=list(METHOD_COLUMNS)).astype(numbers)


def lds_table(judged: Judged, trace: Trace) -> pd.DataFrame:
    """LDS of every method on every measured target, as ``row``, ``column`` and ``value``."""
    names = target_names(trace, judged.targets)
    return pd.DataFrame(
        [
            (name, names[target], measured.lds)
            for name, found in judged.faithfulness.items()
            for target, measured in found.targets.items()
        ],
        columns=["row", "column", "value"],
    ).astype({"value": "float64"})


def agreement_table(judged: Judged) -> pd.DataFrame:
    """Spearman correlation between methods, the mean over targets that both explain, as a long table."""
    names = [name for name in judged.explanations if name in judged.faithfulness]
    rows: list[tuple[str, str, float | None]] = []
    for name in names:
        for other in names:
            values = [row.get(other) for row in judged.faithfulness[name].agreement.values()]
            rows.append((name, other, 1.0 if name == other else _mean(values)))
    return pd.DataFrame(rows, columns=["row", "column", "value"]).astype({"value": "float64"})


def curve_table(curves: RemovalCurves, kind: str) -> pd.DataFrame:
    """A deletion or insertion curve beside the mean over random orders, as ``series``, ``x`` and ``y``."""
    own, chance = (
        (curves.deletion, curves.random_deletion) if kind == "deletion" else (curves.insertion, curves.random_insertion)
    )
    rows = [
        (series, x, y)
        for series, values in (("this method", own), ("random orders", chance))
        for x, y in zip(curves.shares, values, strict=False)
    ]
    return pd.DataFrame(rows, columns=["series", "x", "y"])


def area_table(judged: Judged, target: str) -> pd.DataFrame:
    """Deletion and insertion against random orders for one target, for bars where curves were not kept."""
    rows = [
        (name, value, value, value, group)
        for name, found in judged.faithfulness.items()
        if target in found.targets
        for group, value in (
            ("deletion", found.targets[target].deletion),
            ("insertion", found.targets[target].insertion),
        )
    ]
    return pd.DataFrame(rows, columns=["name", "value", "low", "high", "group"])


def target_names(trace: Trace, targets: Sequence[str]) -> dict[str, str]:
    """Targets as people count them: ``6 answer``, ``6 answer, token 2``."""
    steps = {step.id: (number, step) for number, step in enumerate(trace.steps, 1)}
    found: dict[str, str] = {}
    for target in targets:
        step_id, _, token = (target, "", "") if target in steps else target.rpartition("#")
        if step_id in steps:
            number, step = steps[step_id]
            found[target] = f"{number} {palette.kind_label(step.kind)}" + (f", token {token}" if token else "")
        else:
            found[target] = target
    return found


def _verdict(name: str, known: MethodFaithfulness | None) -> str:
    if name == CHANCE:
        return BASELINE
    if known is None:
        return UNMEASURED
    return BETTER if known.better_than_random is True else NOT_BETTER


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _number(value: JsonValue) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
