"""Tables made of traces and summaries, short enough to send to a browser. Draws nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import datetime, tzinfo
from typing import NamedTuple

import pandas as pd

from tracer.store import TraceSummary
from tracer.trace.probes import ProbeScore
from tracer.trace.trace import Call, Completion, Step, Trace
from ui import palette

LINE_CHARACTERS = 240
TEXT_CHARACTERS = 20_000
RUN_COLUMNS = (
    "when",
    "agent",
    "model",
    "question",
    "status",
    "answer",
    "correct",
    "steps",
    "tokens",
    "seconds",
    "methods",
    "explained",
)
STEP_COLUMNS = ("step", "kind", "branch", "pruned", "score", "text", "error")


class Link(NamedTuple):
    """A relation of one step to another."""

    direction: str
    """``from`` an earlier step or ``to`` a later one."""
    kind: str
    step_id: str


def one_line(text: str | None, *, limit: int = LINE_CHARACTERS) -> str:
    """The text on one line, cut after ``limit`` characters."""
    if not text:
        return ""
    # Only a part is looked at, so that a tool result of many megabytes costs nothing.
    line = " ".join(text[: 4 * limit].split())
    return line if len(line) <= limit and len(text) <= 4 * limit else line[: limit - 1] + "…"


def shortened(text: str) -> tuple[str, int]:
    """The beginning of a long text, and how many characters are missing from it."""
    return text[:TEXT_CHARACTERS], max(0, len(text) - TEXT_CHARACTERS)


def local_time(moment: datetime, zone: tzinfo) -> str:
    """A time as people write it; sorts as text."""
    try:
        return f"{moment.astimezone(zone):%Y-%m-%d %H:%M:%S}"
    except (OverflowError, ValueError):
        return f"{moment:%Y-%m-%d %H:%M:%S}"


def runs_table(summaries: Iterable[TraceSummary], zone: tzinfo) -> pd.DataFrame:
    """One row a run, with the columns ``RUN_COLUMNS``; ``seconds`` of the run, ``explained`` of its explanations."""
    rows = [
        (
            local_time(run.created_at, zone),
            palette.agent_name(run.agent),
            one_line(run.model, limit=80),
            one_line(run.question),
            palette.status_name(run.status),
            one_line(run.answer),
            palette.correct_name(run.correct),
            run.steps,
            run.prompt_tokens + run.completion_tokens,
            run.seconds,
            found_out(run),
            run.explained_seconds,
        )
        for run in summaries
    ]
    return pd.DataFrame(rows, columns=list(RUN_COLUMNS)).astype({"seconds": "float64", "explained": "float64"})


def found_out(run: TraceSummary) -> str:
    """What was computed for a run: methods of explanation, then probes."""
    return one_line(", ".join([*run.methods, *(f"probe {name}" for name in run.probes)]))


def steps_table(numbered: Sequence[tuple[int, Step]]) -> pd.DataFrame:
    """One row a step, with the columns ``STEP_COLUMNS``; ``step`` is the step's number in the trace, from 1."""
    rows = [
        (
            number,
            palette.kind_name(step.kind),
            one_line(step.branch, limit=40),
            "pruned" if step.pruned else "",
            step.score,
            one_line(step.text),
            one_line(step.error),
        )
        for number, step in numbered
    ]
    return pd.DataFrame(rows, columns=list(STEP_COLUMNS)).astype({"score": "float64"})


def tokens_table(completion: Completion, *, start: int, end: int, texts: Sequence[str] | None = None) -> pd.DataFrame:
    """The tokens ``[start, end)`` of a completion: position, text, id, log-probability in nats, probability.

    A trace keeps ids; their texts are there where the model's tokenizer is.
    """
    logprobs = completion.logprobs[start:end] if completion.logprobs else [math.nan] * (end - start)
    ids = completion.token_ids[start:end]
    table = pd.DataFrame(
        {
            "position": range(start, start + len(ids)),
            "id": ids,
            "logprob": pd.Series(logprobs, dtype="float64"),
            "probability": pd.Series([math.exp(min(value, 0.0)) for value in logprobs], dtype="float64"),
        }
    )
    if texts is not None:
        table.insert(1, "token", [visible_token(text) for text in texts])
    return table


def visible_token(text: str) -> str:
    """A token's text with spaces and line breaks that can be seen."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def sentences_table(scores: Sequence[ProbeScore]) -> pd.DataFrame:
    """One row a sentence: its text, what a probe says of it, and its log-probability in nats."""
    rows = [
        (one_line(score.text), score.probability, score.low, score.high, score.baselines.mean_logprob)
        for score in scores
    ]
    columns = ["sentence", "true", "low", "high", "logprob"]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(columns[1:], "float64"))


def segments_table(call: Call) -> pd.DataFrame:
    """The segments of a call's prompt; the ids themselves are in the exported trace."""
    return pd.DataFrame(
        [
            (segment.kind, segment.step_id or "", segment.start, segment.end, segment.end - segment.start)
            for segment in call.segments
        ],
        columns=["kind", "step", "start", "end", "tokens"],
    )


def links(trace: Trace, step: Step) -> list[Link]:
    """The relations of a step, those that lead to it first."""
    into = [Link("from", edge.kind, edge.source) for edge in trace.edges if edge.target == step.id]
    known = {link.step_id for link in into}
    into += [Link("from", "parent", parent) for parent in step.parents if parent not in known]
    return into + [Link("to", edge.kind, edge.target) for edge in trace.edges if edge.source == step.id]


def links_table(found: Sequence[Link], steps: dict[str, tuple[int, Step]]) -> pd.DataFrame:
    """One row a relation, with the number, kind and text of the step at its other end."""
    rows = [
        (link.direction, link.kind, *_ends(steps[link.step_id]))
        for link in found
        # An unfinished run can name a step that was never recorded.
        if link.step_id in steps
    ]
    return pd.DataFrame(rows, columns=["direction", "relation", "step", "kind", "text"])


def count(number: int, noun: str) -> str:
    """A number of things, such as ``1 step`` or ``1,200 steps``."""
    return f"{number:,d} {noun}{'' if number == 1 else 's'}"


def size(trace: Trace) -> str:
    """How many steps, calls and tokens a trace has, in words."""
    tokens = count(sum(total_tokens(trace)), "token")
    return f"{count(len(trace.steps), 'step')}, {count(len(trace.calls), 'call')}, {tokens}"


def total_tokens(trace: Trace) -> tuple[int, int]:
    """Tokens of all prompts and of all completions."""
    prompts = sum(len(call.prompt_token_ids) for call in trace.calls)
    return prompts, sum(len(completion.token_ids) for call in trace.calls for completion in call.completions)


def _ends(numbered: tuple[int, Step]) -> tuple[int, str, str]:
    number, step = numbered
    return number, palette.kind_name(step.kind), one_line(step.text)
