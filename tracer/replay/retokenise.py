"""A stand-in for a trace without token ids: its texts in order, as the replica's tokenizer would have read them.

The system that recorded such a trace kept texts only, so neither the prompt's exact form nor the tokens that the model
wrote are known. What comes out is one growing conversation: the question and documents as the user's turn, then the
steps, each under its name. Explanations of it are guesses about another prompt than the model saw, and are marked so.
"""

from __future__ import annotations

from collections.abc import Sequence

from tracer.errors import InputError
from tracer.replay.model import Replica
from tracer.replay.recorded import WRITTEN, Recorded, has_token_ids
from tracer.trace.segments import Message, Piece, Rendered, Tokenizer, render_chat, render_text
from tracer.trace.trace import Call, Completion, Sampling, SegmentKind, Step, Trace

CALL = "retokenised"
"""Beginning of the ids of the calls that are made up."""
_GIVEN = ("question", "document")


def recorded_of(trace: Trace, replica: Replica, chunk_tokens: int | None = None) -> Recorded:
    """A trace as it was recorded, or where it holds no ids, tokenised again.

    Raises:
        InputError: The replica has no tokenizer, or the trace cannot be tokenised.
    """
    if has_token_ids(trace):
        return Recorded(trace, chunk_tokens=chunk_tokens)
    if replica.tokenizer is None:
        raise InputError("the trace holds no token ids and the replica no tokenizer; name the model with replica")
    return retokenise(trace, replica.tokenizer, chunk_tokens=chunk_tokens)


def retokenise(trace: Trace, tokenizer: Tokenizer, *, chunk_tokens: int | None = None) -> Recorded:
    """Lay out a trace by its texts.

    Steps of one branch do not see those of another; steps of no branch see all before them.

    Args:
        trace: A trace without token ids.
        tokenizer: The replica's.
        chunk_tokens: As for `tracer.replay.recorded.Recorded`.

    Raises:
        InputError: No step holds a text that a model could have written.
    """
    steps = {step.id: step.model_copy(update=_NOWHERE) for step in trace.steps}
    calls: list[Call] = []
    for shown, branch in transcripts(trace):
        transcript = _render(trace, shown, tokenizer)
        for steps_in_a_row in _runs(shown, branch):
            places = {step.id: _extent(transcript, step.id) for step in steps_in_a_row}
            run = [step for step in steps_in_a_row if places[step.id][1] > 0]
            if not run:
                continue
            begin, end = places[run[0].id][0], places[run[-1].id][1]
            calls.append(_call(trace, transcript, run, begin, end, number=len(calls) + 1))
            for step in run:
                own = [place - begin for place in places[step.id]]
                where = {"call_id": calls[-1].id, "completion": 0, "start": own[0], "end": own[1]}
                steps[step.id] = step.model_copy(update=where)
    if not calls:
        raise InputError(f"trace {trace.id} has no step that a model wrote, so there is nothing to explain")
    return Recorded(trace.model_copy(update={"calls": calls, "steps": list(steps.values())}), chunk_tokens=chunk_tokens)


_NOWHERE = dict.fromkeys(("call_id", "completion", "start", "end"))


def transcripts(trace: Trace) -> list[tuple[list[Step], str | None]]:
    """What was there to read for each branch, in order, and for the steps of none."""
    branches = dict.fromkeys(step.branch for step in trace.steps if step.branch is not None)
    found: list[tuple[list[Step], str | None]] = [(list(trace.steps), None)]
    for branch in branches:
        shown = [step for step in trace.steps if step.branch in (None, branch)]
        last = max(number for number, step in enumerate(shown) if step.branch == branch)
        found.append((shown[: last + 1], branch))
    return found


def _render(trace: Trace, steps: Sequence[Step], tokenizer: Tokenizer) -> Rendered:
    given = [step for step in steps if step.kind in _GIVEN]
    pieces = [Piece(f"{step.text}\n", step.kind, step.id) for step in given if step.text]
    if not any(step.kind == "document" for step in given):
        pieces = [Piece(f"{item.title}\n{item.text}\n", "document") for item in trace.task.documents] + pieces
    if not any(step.kind == "question" for step in given):
        pieces.append(Piece(trace.task.question, "question"))
    try:
        rendered = render_chat([Message("user", pieces)], tokenizer)
    except InputError:
        # A base model has no template.
        rendered = render_text(pieces, tokenizer)
    for step in steps:
        if step.kind not in _GIVEN and step.text:
            parts = [Piece(_label(step.kind), "instruction"), Piece(f" {step.text}", step.kind, step.id)]
            rendered.extend(render_text([*parts, Piece("\n", "instruction")], tokenizer))
    return rendered


def _label(kind: SegmentKind) -> str:
    return f"{kind.capitalize()}:"


def _runs(steps: Sequence[Step], branch: str | None) -> list[list[Step]]:
    """Consecutive steps that the model wrote; only those that end in the given branch."""
    runs: list[list[Step]] = []
    going = False
    for step in steps:
        if step.kind in _GIVEN or not step.text:
            continue
        mine = step.kind in WRITTEN and step.branch == branch
        if mine and not going:
            runs.append([])
        if mine:
            runs[-1].append(step)
        going = mine
    return runs


def _call(trace: Trace, transcript: Rendered, run: Sequence[Step], begin: int, end: int, *, number: int) -> Call:
    prompt = [part for part in transcript.segments if part.start < begin]
    segments = [part.model_copy(update={"end": min(part.end, begin)}) for part in prompt]
    return Call(
        id=f"{CALL}-{number}",
        prompt_token_ids=transcript.token_ids[:begin],
        segments=segments,
        sampling=Sampling(),
        completions=[
            Completion(
                token_ids=transcript.token_ids[begin:end],
                logprobs=[],
                text="\n".join(step.text for step in run),
                finish_reason="stop",
            )
        ],
        started_at=trace.created_at,
    )


def _extent(transcript: Rendered, step_id: str) -> tuple[int, int]:
    """The tokens of a step; none where its text was too short for a token of its own."""
    own = [part for part in transcript.segments if part.step_id == step_id]
    return (own[0].start, own[-1].end) if own else (0, 0)
