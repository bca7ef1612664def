"""Finding the answer in what a model wrote, and comparing it with a reference."""

from __future__ import annotations

import re
import string
import unicodedata
from fractions import Fraction
from typing import Literal, NamedTuple

from tracer.trace.steps import split_text

Found = Literal["phrase", "boxed", "last_number"]
AnswerClass = Literal["answered", "no_answer", "truncated"]

_NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*\.\d+|\d+)(?:\s*/\s*\d+(?:\.\d+)?)?"
_NUMBER_PATTERN = re.compile(rf"(?<![\w.]){_NUMBER}(?![\d])")
_PHRASE = re.compile(r"\banswer\s*(?:is|:|=)[\s:]*", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\s*\{")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{(-?[\d.,]+)\}\s*\{(-?[\d.,]+)\}")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


class Answer(NamedTuple):
    """An answer and where it stands in the text."""

    value: str
    start: int
    end: int
    found: Found


def extract_answer(text: str, *, numeric: bool = False) -> Answer | None:
    r"""The final answer in a chain of thought.

    Looked for in this order, the last occurrence of each: ``\boxed{...}``, "the answer is ...", and for numeric
    questions the last number. Truncated chains are the caller's to tell (`answer_class`).

    Args:
        text: What the model wrote.
        numeric: Whether a number is asked for.

    Returns:
        The answer, or ``None`` where there is none.
    """
    return _boxed(text, numeric) or _phrase(text, numeric) or (_last_number(text) if numeric else None)


def answer_class(answer: Answer | None, *, cut: bool) -> AnswerClass:
    """Whether a chain answered, gave no answer, or was cut off by the token limit before it had one."""
    if cut and (answer is None or answer.found == "last_number"):
        return "truncated"
    return "no_answer" if answer is None else "answered"


def normalise(answer: str) -> str:
    """A canonical form in which equal answers are equal strings.

    Numbers become exact decimals or fractions without thousands separators, currency and units; other text is
    lower-cased without articles, punctuation and surplus white space.
    """
    number = parse_number(answer)
    if number is not None:
        return str(number)
    text = unicodedata.normalize("NFKC", answer).casefold()
    if not any(map(str.isalpha, text)):
        # An expression: its signs and brackets are what it says.
        return "".join(text.split()).strip(".,;!?")
    text = "".join(" " if character in string.punctuation else character for character in text)
    return " ".join(_ARTICLES.sub(" ", text).split())


def parse_number(text: str) -> Fraction | None:
    r"""The number that a short answer states, exactly; ``None`` where it states none or several.

    Handles ``1,000``, ``$5``, ``12 apples``, ``3/4``, ``\frac{3}{4}``, ``2.50`` and ``x = 4``.
    """
    text = _FRACTION.sub(r"\1/\2", unicodedata.normalize("NFKC", text).replace("−", "-").replace("⁄", "/"))  # noqa: RUF001
    text = text.rsplit("=", 1)[-1].replace("\\$", "$").replace("$", "")
    found = _NUMBER_PATTERN.findall(text)
    words = re.findall(r"[^\W\d_]+", text)
    if len(found) != 1 or len(words) > 3:
        return None
    try:
        parts = [Fraction(part.strip().replace(",", "")) for part in found[0].split("/")]
        return parts[0] / parts[1] if len(parts) == 2 else parts[0]
    except (ValueError, ZeroDivisionError):
        return None


def is_correct(answer: str | None, reference: str | None) -> bool | None:
    """Whether two answers are the same after `normalise`; ``None`` without a reference."""
    if reference is None:
        return None
    return answer is not None and normalise(answer) == normalise(reference)


def _boxed(text: str, numeric: bool) -> Answer | None:
    matches = list(_BOXED.finditer(text))
    for match in reversed(matches):
        depth, position = 1, match.end()
        while position < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            position += 1
        inner = text[match.end() : position - 1] if depth == 0 else ""
        if inner.strip() and (not numeric or parse_number(inner) is not None):
            return Answer(inner.strip(), match.end(), position - 1, "boxed")
    return None


def _phrase(text: str, numeric: bool) -> Answer | None:
    """What the last "the answer is" is followed by, up to the end of its sentence."""
    for match in reversed(list(_PHRASE.finditer(text))):
        start = match.end()
        line = text[start:].split("\n", 1)[0]
        sentences = split_text(line)
        sentence = line[: sentences[0].end] if sentences else ""
        if numeric:
            # In "the answer is 3 + 4 = 7" the result counts.
            skip = sentence.rfind("=") + 1
            found = _NUMBER_PATTERN.search(sentence, skip)
            if found:
                return Answer(found.group(), start + found.start(), start + found.end(), "phrase")
            continue
        cleaned = sentence.strip().removesuffix(".").strip(" *\"'`:")
        if cleaned:
            begin = start + sentence.find(cleaned)
            return Answer(cleaned, begin, begin + len(cleaned), "phrase")
    return None


def _last_number(text: str) -> Answer | None:
    numbers = list(_NUMBER_PATTERN.finditer(text))
    if not numbers:
        return None
    last = numbers[-1]
    return Answer(last.group(), last.start(), last.end(), "last_number")
