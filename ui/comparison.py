"""Two runs as one table: what is equal, what differs, step by step. Draws nothing."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from tracer.store import TraceSummary
from tracer.trace.probes import ProbeScore, of_steps, probe_scores
from tracer.trace.trace import Call, Step, Trace
from ui import palette
from ui.alignment import Pair
from ui.payload import one_line

TEXT_CHARACTERS = 90
CHANGES = {"same": "= same", "changed": "≠ text", "left": "← only first", "right": "→ only second"}
COLUMNS = (
    "difference",
    "first",
    "second",
    "kind",
    "branch",
    "first_text",
    "second_text",
    "first_logprob",
    "second_logprob",
    "first_truth",
    "second_truth",
)


def facts_table(first: Trace, second: Trace, summaries: tuple[TraceSummary, TraceSummary]) -> pd.DataFrame:
    """What is said of each run as a whole, and whether it is equal."""
    sides = [
        {
            "question": one_line(trace.task.question),
            "answer": one_line(trace.outcome.answer) or "none",
            "answer was": palette.correct_name(trace.outcome.correct),
            "status": palette.status_name(trace.status),
            "agent": palette.agent_name(trace.agent.kind),
            "model": one_line(f"{trace.model.name} on {trace.model.engine}", limit=120),
            "steps": f"{len(trace.steps):,d}",
            "tokens": f"{summary.prompt_tokens + summary.completion_tokens:,d}",
            "seconds": "unknown" if summary.seconds is None else f"{summary.seconds:.1f}",
            **_parameters(trace),
        }
        for trace, summary in zip((first, second), summaries, strict=True)
    ]
    names = list(dict.fromkeys([*sides[0], *sides[1]]))
    rows = [
        (name, sides[0].get(name, ""), sides[1].get(name, ""), sides[0].get(name) == sides[1].get(name))
        for name in names
    ]
    # A parameter is only worth a row where it differs.
    kept = [(a, b, c, "=" if same else "≠") for a, b, c, same in rows if not (a.startswith("parameter ") and same)]
    return pd.DataFrame(kept, columns=["what", "first", "second", "equal"])


def _parameters(trace: Trace) -> dict[str, str]:
    return {
        f"parameter {one_line(name, limit=60)}": one_line(str(value), limit=120)
        for name, value in trace.agent.parameters.items()
    }


class Side:
    """One run, with what is known of each of its steps.

    Args:
        trace: The run.
        probe: Name of the probe whose probabilities are shown.
    """

    def __init__(self, trace: Trace, probe: str | None) -> None:
        self.trace = trace
        self._calls = {call.id: call for call in trace.calls}
        self._truth: dict[str, ProbeScore] = {}
        if probe is not None:
            self._truth = of_steps(probe_scores(trace, name=probe), name=probe)

    def cells(self, place: int | None) -> tuple[int | None, str, float | None, float | None]:
        """Number, text, mean log-probability in nats and probability of being true of a step; blank for none."""
        if place is None:
            return None, "", None, None
        step = self.trace.steps[place]
        score = self._truth.get(step.id)
        return (
            place + 1,
            one_line(step.text, limit=TEXT_CHARACTERS),
            mean_logprob(step, self._calls.get(step.call_id or "")),
            None if score is None else score.probability,
        )


def mean_logprob(step: Step, call: Call | None) -> float | None:
    """Mean log-probability of a step's tokens, nats; ``None`` where none were recorded."""
    if call is None or step.completion is None or step.start is None or step.end is None:
        return None
    values = call.completions[step.completion].logprobs[step.start : step.end]
    return sum(values) / len(values) if values else None


def common_probe(first: Trace, second: Trace) -> str | None:
    """A probe that scored both runs, or else one of them."""
    own, other = ([score.name for score in probe_scores(trace)] for trace in (first, second))
    return next((name for name in own if name in other), (own or other or [None])[0])


def steps_table(pairs: Sequence[Pair], first: Side, second: Side) -> pd.DataFrame:
    """One row a pair, with the columns ``COLUMNS``."""
    rows = []
    for pair in pairs:
        place = pair.left if pair.left is not None else pair.right
        side = first if pair.left is not None else second
        assert place is not None
        step = side.trace.steps[place]
        left, right = first.cells(pair.left), second.cells(pair.right)
        rows.append(
            (
                CHANGES[pair.change],
                left[0],
                right[0],
                palette.kind_name(step.kind),
                one_line(step.branch, limit=30),
                left[1],
                right[1],
                left[2],
                right[2],
                left[3],
                right[3],
            )
        )
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    numbers = {name: "Int64" for name in ("first", "second")} | {name: "float64" for name in COLUMNS[7:]}
    return frame.astype(numbers)


def used_columns(frame: pd.DataFrame) -> list[str]:
    """Columns that say anything."""
    silent = {"branch"} if not frame["branch"].any() else set()
    silent |= {name for name in COLUMNS[7:] if frame[name].isna().all()}
    return [name for name in COLUMNS if name not in silent]
