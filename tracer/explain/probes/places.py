"""Which tokens of a trace a probe reads: the ends of its statement-like steps and of their sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from tracer.errors import InputError
from tracer.replay.recorded import Recorded
from tracer.trace.answers import extract_answer
from tracer.trace.segments import Decoded, Tokenizer
from tracer.trace.steps import split_tokens
from tracer.trace.trace import Step

Position = Literal["last", "answer"]
"""``last`` is the last token that shows something, such as a full stop; ``answer`` the last one of what the text comes
to: its result or its answer, or as ``last`` where it has none."""
POSITIONS: tuple[Position, ...] = get_args(Position)
STATEMENT_LIKE = ("thought", "observation", "answer")
"""Kinds of steps that say that something is so. An action or an evaluation does not, and a vote has no tokens."""

_RESULT = re.compile(
    r"(?:=|\bis\b|\bequals\b|\bgives\b|\bso\b)\s*\$?(-?\d+(?:,\d{3})*(?:\.\d+)?)(?![\d.,]*\s*[-+*/×÷=(])"
)  # noqa: RUF001
_WORDS = re.compile(r"[^\W\d_]+|\d+")
_NO_STATEMENT = ("```", "{", "[", "<", "|")
_FEWEST_WORDS = 3


@dataclass(frozen=True, slots=True)
class Place:
    """A text in a trace and the tokens of it that are read.

    Args:
        step_id: The step.
        sentence: Its number in the step; ``None`` for the whole step.
        text: What its tokens say.
        sequence: Number of the sequence that it is in.
        start: Position of its first token in that sequence.
        end: One past its last.
        tokens: Position of the token to read, by `Position`.
        written: Whether the model wrote it.
    """

    step_id: str
    sentence: int | None
    text: str
    sequence: int
    start: int
    end: int
    tokens: dict[Position, int]
    written: bool

    @property
    def is_statement(self) -> bool:
        """Whether it reads like a sentence that says that something is so."""
        text = self.text.strip()
        if text.startswith(_NO_STATEMENT) or len(_WORDS.findall(text)) < _FEWEST_WORDS:
            return False
        return text.rstrip("\"'”’)]*_").endswith((".", "!"))


def find_places(recorded: Recorded, tokenizer: Tokenizer | None) -> tuple[Place, ...]:
    """Every statement-like step of a trace that some sequence holds, and its sentences where there are several.

    Args:
        recorded: The trace.
        tokenizer: The model's; without one a step is not cut into sentences.

    Returns:
        In the order of the trace, each step before its sentences.
    """
    return tuple(
        place
        for step in recorded.trace.steps
        if step.kind in STATEMENT_LIKE
        for place in _of_step(recorded, step, tokenizer)
    )


def read_position(name: str) -> Position:
    """The position of that name.

    Raises:
        InputError: There is none, so a newer tracer made the probe.
    """
    for position in POSITIONS:
        if position == name:
            return position
    raise InputError(f"the probe reads the token {name!r}, which this tracer does not know; update tracer")


def _of_step(recorded: Recorded, step: Step, tokenizer: Tokenizer | None) -> Iterator[Place]:
    found = _extent(recorded, step)
    if found is None:
        return
    sequence, start, end, written = found
    ids = recorded.sequences[sequence].token_ids[start:end].tolist()
    if tokenizer is None:
        last: dict[Position, int] = {"last": end - 1, "answer": end - 1}
        yield Place(step.id, None, step.text, sequence, start, end, last, written)
        return
    decoded = tokenizer.decode(ids)
    if not decoded.text.strip():
        return
    whole = decoded.text.strip()
    yield Place(step.id, None, whole, sequence, start, end, _tokens(decoded, 0, len(ids), start), written)
    spans = [span for span in split_tokens(decoded) if any(map(str.isalnum, span.text))]
    if len(spans) < 2:
        return
    for number, span in enumerate(spans):
        tokens = _tokens(decoded, span.start, span.end, start)
        yield Place(step.id, number, span.text, sequence, start + span.start, start + span.end, tokens, written)


def _extent(recorded: Recorded, step: Step) -> tuple[int, int, int, bool] | None:
    """Sequence, first and one past the last position of a step, and whether the model wrote it."""
    own = recorded.find_target(step)
    if own is not None:
        return own.sequence, own.start, own.end, True
    for number, sequence in enumerate(recorded.sequences):
        parts = [part for part in sequence.call.segments if part.step_id == step.id and part.kind == step.kind]
        if parts:
            # The first sequence that shows it: the hidden states of later ones are the same.
            return number, parts[0].start, parts[-1].end, False
    return None


def _tokens(decoded: Decoded, start: int, end: int, offset: int) -> dict[Position, int]:
    starts = [0, *decoded.ends[:-1]]
    begin, stop = starts[start], decoded.ends[end - 1]
    last = _token_of(decoded, begin + len(decoded.text[begin:stop].rstrip()) - 1)
    answer = answer_end(decoded.text[begin:stop])
    at = last if answer is None else _token_of(decoded, begin + answer - 1)
    return {"last": offset + last, "answer": offset + at}


def _token_of(decoded: Decoded, character: int) -> int:
    """The token that shows a character."""
    return next(number for number, end in enumerate(decoded.ends) if end > character)


def answer_end(text: str) -> int | None:
    """Where the result of a step of reasoning ends: the last number that it comes to, or its stated answer.

    Returns:
        One past the last character, or ``None`` where there is none.
    """
    stated = extract_answer(text)
    if stated is not None:
        return stated.end
    results = list(_RESULT.finditer(text))
    return results[-1].end(1) if results else None
