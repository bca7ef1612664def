"""Consistency of a trace: ids, token ranges and references."""

from __future__ import annotations

from collections.abc import Iterable

from tracer.errors import TraceFormatError
from tracer.trace.trace import Call, Step, Trace


def check_trace(trace: Trace) -> None:
    """Check that everything a trace refers to is there.

    Raises:
        TraceFormatError: Names the first thing that is wrong.
    """
    _unique("step", (step.id for step in trace.steps))
    _unique("call", (call.id for call in trace.calls))
    steps = {step.id for step in trace.steps}
    calls = {call.id: call for call in trace.calls}
    for call in trace.calls:
        check_call(call, steps)
    seen: set[str] = set()
    for step in trace.steps:
        check_step(step, calls)
        for parent in step.parents:
            # Steps are in the order in which they were recorded, so this also rules out cycles.
            if parent not in seen:
                raise TraceFormatError(f"step {step.id}: its parent {parent!r} is not an earlier step")
        seen.add(step.id)
    for edge in trace.edges:
        for end in (edge.source, edge.target):
            if end not in steps:
                raise TraceFormatError(f"edge {edge.source} -> {edge.target}: there is no step {end!r}")


def check_call(call: Call, steps: set[str]) -> None:
    """Check that a call's segments partition its prompt and its log-probabilities fit its tokens.

    Raises:
        TraceFormatError: They do not.
    """
    position = 0
    for segment in call.segments:
        if segment.start != position or segment.end <= segment.start:
            raise TraceFormatError(
                f"call {call.id}: segments must follow each other without gaps; "
                f"expected one from token {position}, found [{segment.start}, {segment.end})"
            )
        if segment.step_id is not None and segment.step_id not in steps:
            raise TraceFormatError(f"call {call.id}: a segment shows step {segment.step_id!r}, which is not there")
        position = segment.end
    if position != len(call.prompt_token_ids):
        raise TraceFormatError(
            f"call {call.id}: segments cover {position} tokens, the prompt has {len(call.prompt_token_ids)}"
        )
    for index, completion in enumerate(call.completions):
        if completion.logprobs and len(completion.logprobs) != len(completion.token_ids):
            raise TraceFormatError(
                f"call {call.id}, completion {index}: {len(completion.logprobs)} log-probabilities "
                f"for {len(completion.token_ids)} tokens"
            )


def check_step(step: Step, calls: dict[str, Call]) -> None:
    """Check that a step's token range lies in its completion.

    Raises:
        TraceFormatError: It does not.
    """
    where = (step.call_id, step.completion, step.start, step.end)
    if all(part is None for part in where):
        return
    if step.call_id not in calls:
        raise TraceFormatError(f"step {step.id}: there is no call {step.call_id!r}")
    completions = calls[step.call_id].completions
    if step.completion is None:
        return
    if not 0 <= step.completion < len(completions):
        raise TraceFormatError(
            f"step {step.id}: call {step.call_id} has {len(completions)} completions, none of index {step.completion}"
        )
    length = len(completions[step.completion].token_ids)
    if step.start is None or step.end is None or not 0 <= step.start <= step.end <= length:
        raise TraceFormatError(
            f"step {step.id}: tokens [{step.start}, {step.end}) are not within the completion's {length}"
        )


def _unique(what: str, ids: Iterable[str]) -> None:
    seen: set[str] = set()
    for identifier in ids:
        if identifier in seen:
            raise TraceFormatError(f"two {what}s have the id {identifier!r}")
        seen.add(identifier)
