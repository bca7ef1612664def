"""Text to tokens and back, without losing which token shows what.

A prompt is built from labelled pieces of text, rendered once with the model's own chat template and tokenised
once; `Rendered.segments` then says for every token which piece it shows. What the model wrote is never tokenised
again: a continuation appends ids to ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from tracer.errors import InputError
from tracer.trace.trace import Segment, SegmentKind

Role = Literal["system", "user", "assistant", "tool"]

_PRIVATE_USE = range(0xF0000, 0xFFFFD)
"""Code points without meaning, used to find pieces in rendered text."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids with the character range ``[start, end)`` that each one covers."""

    token_ids: list[int]
    offsets: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Decoded:
    """Text with, for every token, the position in it where the token ends.

    Token ``i`` covers ``text[ends[i - 1]:ends[i]]``. A token that holds only a part of a character, or a special
    token, covers nothing.
    """

    text: str
    ends: list[int]


class Tokenizer(Protocol):
    """What tracer needs from a tokenizer."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a completion."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        ...

    @property
    def start_token_ids(self) -> tuple[int, ...]:
        """What stands before a text of its own, such as a beginning-of-sequence token; often nothing."""
        ...

    def encode(self, text: str, *, trusted: Sequence[tuple[int, int]] | None = None) -> Encoded:
        """Tokenise, adding nothing.

        Args:
            text: The text.
            trusted: Character ranges in which control tokens such as ``<|im_end|>`` mean what they say; anywhere
                else they are plain text. ``None`` trusts nothing.
        """
        ...

    def decode(self, token_ids: Sequence[int]) -> Decoded:
        """Text of ids, special tokens left out."""
        ...

    def render_chat(
        self,
        messages: Sequence[dict[str, object]],
        *,
        tools: Sequence[dict[str, object]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The chat template applied to messages.

        Raises:
            InputError: The model has no chat template, or it refuses these messages.
        """
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """Text with a label."""

    text: str
    kind: SegmentKind
    step_id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, built from pieces."""

    role: Role
    pieces: Sequence[Piece]


@dataclass(slots=True)
class Rendered:
    """Prompt ids and the segments that partition them."""

    token_ids: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)

    def copy(self) -> Rendered:
        """An independent copy that can grow on its own."""
        return Rendered(list(self.token_ids), list(self.segments))

    def append(self, token_ids: Sequence[int], kind: SegmentKind, step_id: str | None = None) -> None:
        """Add ids under one label."""
        if not token_ids:
            return
        start = len(self.token_ids)
        self.token_ids.extend(token_ids)
        last = self.segments[-1] if self.segments else None
        if last is not None and (last.kind, last.step_id) == (kind, step_id):
            self.segments[-1] = Segment(start=last.start, end=len(self.token_ids), kind=kind, step_id=step_id)
        else:
            self.segments.append(Segment(start=start, end=len(self.token_ids), kind=kind, step_id=step_id))

    def extend(self, other: Rendered) -> None:
        """Add everything that ``other`` holds."""
        for segment in other.segments:
            self.append(other.token_ids[segment.start : segment.end], segment.kind, segment.step_id)


def render_text(pieces: Sequence[Piece], tokenizer: Tokenizer) -> Rendered:
    """Tokenise pieces as one text, without a chat template.

    Control tokens count only in pieces labelled ``template``; in all others they are plain text.
    """
    return _tokenise(list(pieces), tokenizer)


def render_chat(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    tools: Sequence[dict[str, object]] | None = None,
    add_generation_prompt: bool = True,
) -> Rendered:
    """Render messages with the chat template and tokenise the result once.

    Tokens of the template itself are labelled ``template``. Control tokens inside a piece are plain text, so that
    no document or tool result can open a turn of its own.

    Raises:
        InputError: The template cannot be applied to these messages, or it changes what the pieces say.
    """
    return _tokenise(
        chat_pieces(messages, tokenizer, tools=tools, add_generation_prompt=add_generation_prompt), tokenizer
    )


def chat_pieces(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    tools: Sequence[dict[str, object]] | None = None,
    add_generation_prompt: bool = True,
) -> list[Piece]:
    """The rendered conversation cut into the given pieces and, between them, the template's own text.

    Raises:
        InputError: The template cannot be applied, or it changes what the pieces say.
    """
    plain = tokenizer.render_chat(
        [{"role": message.role, "content": "".join(piece.text for piece in message.pieces)} for message in messages],
        tools=tools,
        add_generation_prompt=add_generation_prompt,
    )
    # Some templates strip their messages, which marks around the pieces would prevent: then strip them here.
    for candidate in (list(messages), [_stripped(message) for message in messages]):
        found = _locate(candidate, tokenizer, tools, add_generation_prompt)
        if "".join(piece.text for piece in found) == plain:
            return found
    raise InputError(
        "the model's chat template rewrites its messages, so tokens cannot be traced back to what they show; "
        "use another template or a plain text prompt"
    )


def _locate(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    tools: Sequence[dict[str, object]] | None,
    add_generation_prompt: bool,
) -> list[Piece]:
    pieces = [piece for message in messages for piece in message.pieces]
    opening, closing = _unused_characters("".join(piece.text for piece in pieces), 2)
    marked = tokenizer.render_chat(
        [
            {
                "role": message.role,
                "content": "".join(f"{opening}{piece.text}{closing}" for piece in message.pieces),
            }
            for message in messages
        ],
        tools=tools,
        add_generation_prompt=add_generation_prompt,
    )
    found: list[Piece] = []
    glue, *rest = marked.split(opening)
    found.append(Piece(glue, "template"))
    if len(rest) != len(pieces):
        return []
    for piece, part in zip(pieces, rest, strict=True):
        text, _, glue = part.partition(closing)
        found.append(Piece(text, piece.kind, piece.step_id))
        found.append(Piece(glue, "template"))
    return [piece for piece in found if piece.text]


def _stripped(message: Message) -> Message:
    pieces = list(message.pieces)
    while pieces and not pieces[0].text.strip():
        pieces.pop(0)
    while pieces and not pieces[-1].text.strip():
        pieces.pop()
    if pieces:
        first = pieces[0]
        pieces[0] = Piece(first.text.lstrip(), first.kind, first.step_id)
        last = pieces[-1]
        pieces[-1] = Piece(last.text.rstrip(), last.kind, last.step_id)
    return Message(message.role, pieces)


def _unused_characters(text: str, count: int) -> list[str]:
    present = set(text)
    free = (chr(code) for code in _PRIVATE_USE if chr(code) not in present)
    return [next(free) for _ in range(count)]


def _tokenise(pieces: Sequence[Piece], tokenizer: Tokenizer) -> Rendered:
    bounds: list[tuple[int, int]] = []
    position = 0
    for piece in pieces:
        bounds.append((position, position + len(piece.text)))
        position += len(piece.text)
    trusted = [bound for bound, piece in zip(bounds, pieces, strict=True) if piece.kind == "template"]
    encoded = tokenizer.encode("".join(piece.text for piece in pieces), trusted=trusted)
    rendered = Rendered()
    for index, token_id in zip(assign(encoded.offsets, bounds), encoded.token_ids, strict=True):
        piece = pieces[index]
        rendered.append([token_id], piece.kind, piece.step_id)
    return rendered


def assign(offsets: Sequence[tuple[int, int]], bounds: Sequence[tuple[int, int]]) -> list[int]:
    """For every token, the index of the range that most of its characters lie in.

    A token that straddles two ranges goes to the one with more of its characters (``" Paris"`` goes to the word, not to
    the label before it); a token without characters follows the one before it. The result never decreases.

    Args:
        offsets: Character range of each token, in order.
        bounds: Consecutive character ranges, in order.
    """
    result: list[int] = []
    index = 0
    for start, end in offsets:
        while index + 1 < len(bounds) and bounds[index][1] <= start and end > start:
            index += 1
        best, most = index, -1
        probe = index
        while probe < len(bounds) and (probe == index or bounds[probe][0] < end):
            shared = min(end, bounds[probe][1]) - max(start, bounds[probe][0])
            if shared > most:
                best, most = probe, shared
            probe += 1
        index = best
        result.append(index)
    return result
