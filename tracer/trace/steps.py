"""Long chains of thought cut into steps: sentences, equations, list items and whole code blocks.

The cut is made on the decoded text and then moved to token boundaries, so that a step's text is exactly what its
tokens decode to and the steps of a completion partition its tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from tracer.trace.segments import Decoded, assign

_FENCE = re.compile(r"^[ \t]*(```+|~~~+)")
_LIST_ITEM = re.compile(
    r"^[ \t]*(?:[-*+•]|\(?\d{1,3}[.)]|\(?[a-z][.)]|\(?[A-Z]\)|(?:[Ss]tep|[Tt]hought)[ \t]+\d+[ \t]*[:.)])[ \t]+"
)
_HEADING = re.compile(r"^[ \t]*#{1,6}[ \t]")
_DISPLAY_MATH = re.compile(r"^[ \t]*(\\\[|\$\$|\\begin\{)")
_DISPLAY_MATH_END = {"\\[": "\\]", "$$": "$$", "\\begin{": "\\end{"}
_EQUATION = re.compile(r"[=≈≤≥<>]")
_SENTENCE_END = re.compile(r"""[.!?。！？]+["'”’)\]]*(?=\s|$)|[。！？]""")  # noqa: RUF001
_ABBREVIATIONS = frozenset(
    {"mr", "mrs", "ms", "dr", "prof", "st", "vs", "etc", "e.g", "i.e", "cf", "fig", "eq", "approx", "dept"}
    | {"est", "inc", "ltd", "co", "jr", "sr", "a.m", "p.m", "u.s", "u.k", "al"}
)
_CONTINUES = re.compile(r"\s*[a-z]")


class Span(NamedTuple):
    """A half-open range."""

    start: int
    end: int


class StepSpan(NamedTuple):
    """One step of a completion: its tokens ``[start, end)`` and their text without surrounding white space."""

    start: int
    end: int
    text: str


def split_text(text: str) -> list[Span]:
    """Cut a text into steps.

    A list item, a heading or a line that holds an equation is one step; a fenced code block and a displayed formula
    stay whole; other lines are cut into sentences. Decimal points, abbreviations and initials do not end a sentence.

    Returns:
        Consecutive character ranges that cover the text; white space belongs to the step before it.
    """
    cuts = [0]
    for start, end, whole in _blocks(text):
        cuts.append(start)
        if not whole:
            cuts.extend(_sentence_starts(text, start, end))
    bounds = sorted({cut for cut in cuts if cut < len(text)})
    spans = [Span(left, right) for left, right in pairwise([*bounds, len(text)])]
    return _absorb_blanks(text, spans)


def split_tokens(decoded: Decoded) -> list[StepSpan]:
    """Cut a decoded completion into steps with exact token ranges.

    A token belongs to the step in which most of its characters lie. Tokens without text (end of sequence) stay with
    the last step.

    Returns:
        Consecutive token ranges that cover all tokens; empty for an empty completion.
    """
    if not decoded.ends:
        return []
    starts = [0, *decoded.ends[:-1]]
    offsets = list(zip(starts, decoded.ends, strict=True))
    owners = assign(
        offsets, [(span.start, span.end) for span in split_text(decoded.text[: decoded.ends[-1]])] or [(0, 0)]
    )
    steps: list[StepSpan] = []
    first = 0
    for index in range(1, len(owners) + 1):
        if index == len(owners) or owners[index] != owners[first]:
            text = decoded.text[starts[first] : decoded.ends[index - 1]].strip()
            steps.append(StepSpan(first, index, text))
            first = index
    return _merge_empty(steps)


def token_range(decoded: Decoded, start: int, end: int) -> Span:
    """The tokens that most of the characters ``[start, end)`` lie in.

    Returns:
        A token range; empty where the characters are.
    """
    starts = [0, *decoded.ends[:-1]]
    bounds = [(0, start), (start, end), (end, len(decoded.text))]
    owners = assign(list(zip(starts, decoded.ends, strict=True)), bounds)
    inside = [index for index, owner in enumerate(owners) if owner == 1]
    return Span(inside[0], inside[-1] + 1) if inside else Span(len(owners), len(owners))


def _blocks(text: str) -> list[tuple[int, int, bool]]:
    """Ranges of lines, each with whether it is one step as a whole."""
    blocks: list[tuple[int, int, bool]] = []
    closing: str | None = None
    prose = -1
    position = 0
    for line in text.splitlines(keepends=True):
        start, position = position, position + len(line)
        if closing is not None:
            blocks[-1] = (blocks[-1][0], position, True)
            if closing in line:
                closing = None
            continue
        opened = _opened_block(line)
        if opened is not None or _stands_alone(line):
            if prose >= 0:
                blocks.append((prose, start, False))
                prose = -1
            blocks.append((start, position, True))
            closing = opened
        elif not line.strip():
            if prose >= 0:
                blocks.append((prose, position, False))
                prose = -1
        elif prose < 0:
            prose = start
    if prose >= 0:
        blocks.append((prose, position, False))
    return blocks


def _opened_block(line: str) -> str | None:
    """What will close the block that this line opens, if it opens one."""
    fence = _FENCE.match(line)
    if fence:
        return fence.group(1)[:3]
    math = _DISPLAY_MATH.match(line)
    if math and _DISPLAY_MATH_END[math.group(1)] not in line[math.end() :]:
        return _DISPLAY_MATH_END[math.group(1)]
    return None


def _stands_alone(line: str) -> bool:
    if _LIST_ITEM.match(line) or _HEADING.match(line) or _DISPLAY_MATH.match(line):
        return True
    return bool(_EQUATION.search(line)) and len(_SENTENCE_END.findall(line.strip())) <= 1


def _sentence_starts(text: str, start: int, end: int) -> list[int]:
    """Where sentences begin inside a block of prose, its first one left out."""
    starts: list[int] = []
    for match in _SENTENCE_END.finditer(text, start, end):
        if match.group()[0] == "." and not _ends_sentence(text, start, match.start(), match.end()):
            continue
        following = match.end()
        while following < end and text[following].isspace():
            following += 1
        if following < end:
            starts.append(following)
    return starts


def _ends_sentence(text: str, start: int, dot: int, after: int) -> bool:
    head = text[max(start, dot - 12) : dot]
    word = re.split(r"[\s(\[\"']", head)[-1]
    if word.lower() in _ABBREVIATIONS:
        return False
    if len(word) == 1 and word.isupper():  # an initial
        return False
    return not _CONTINUES.match(text, after)


def _absorb_blanks(text: str, spans: Sequence[Span]) -> list[Span]:
    """Join ranges of nothing but white space to the one before, or the first one to the next."""
    result: list[Span] = []
    for span in spans:
        blank = not text[span.start : span.end].strip()
        if result and (blank or not text[result[-1].start : result[-1].end].strip()):
            result[-1] = Span(result[-1].start, span.end)
        else:
            result.append(span)
    return result


def _merge_empty(steps: Sequence[StepSpan]) -> list[StepSpan]:
    result: list[StepSpan] = []
    for step in steps:
        if result and (not step.text or not result[-1].text):
            before = result.pop()
            result.append(StepSpan(before.start, step.end, before.text or step.text))
        else:
            result.append(step)
    return result
