"""What an answer with citations is: its parts, its references, and the rule that chose them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from pydantic import JsonValue

from tracer.errors import InputError, UnknownNameError
from tracer.explain.faithfulness import Faithfulness

RuleName = Literal["top", "range"]
DEFAULT_SHARES: dict[RuleName, float] = {"top": 0.5, "range": 0.05}
_BRACKETS = ("[]", "⟦⟧", "⁅⁆")


@dataclass(frozen=True, slots=True)
class Rule:
    """Which of several contributions are large enough to be cited; one that is not above zero never is.

    Args:
        name: ``top`` takes those of at least ``share`` of the largest; ``range`` those of at least the largest less
            ``share`` of the range from the smallest to it (Qi et al. 2024, arXiv:2406.13663, step 2).
        share: From 0 to 1; ``None`` takes `DEFAULT_SHARES`.

    Raises:
        UnknownNameError: There is no such rule.
        InputError: The share is out of its range.
    """

    name: RuleName = "range"
    share: float | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(RuleName):
            raise UnknownNameError("citation rule", self.name, get_args(RuleName))
        if self.share is not None and not 0 <= self.share <= 1:
            raise InputError(f"the share of the citation rule is {self.share:g}; it must be from 0 to 1")

    def chosen(self, values: Sequence[float]) -> tuple[int, ...]:
        """Places of the contributions to cite, in order."""
        if not values:
            return ()
        share = DEFAULT_SHARES[self.name] if self.share is None else self.share
        most = max(values)
        least = share * most if self.name == "top" else most - share * (most - min(values))
        return tuple(place for place, value in enumerate(values) if value > 0 and value >= least)


@dataclass(frozen=True, slots=True)
class Citation:
    """A part of the answer and what it goes back to.

    Args:
        start: First character in the answer's text.
        end: One past the last; a marker stands here.
        numbers: Numbers of the references, ascending; none where the part depends on the context but on nothing in it
            by enough.
        values: What each reference contributed, aligned with ``numbers``, in the method's unit.
    """

    start: int
    end: int
    numbers: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Reference:
    """A document or observation that the answer could be cited from.

    Args:
        number: Its place among them in the prompt, from 1.
        kind: ``document``, ``observation`` or another kind of source.
        step_id: The step that it shows, if it shows one.
        title: Its title or first line; untrusted text.
        value: What it contributed to the whole answer, in the method's unit; zero where that is below.
        share: Its share of all contributions, 0 to 1.
        cited: Whether a part of the answer cites it.
    """

    number: int
    kind: str
    step_id: str | None
    title: str
    value: float
    share: float
    cited: bool


@dataclass(frozen=True, slots=True)
class Trust:
    """What is known of how far the scores behind citations can be trusted.

    Args:
        measured: Measures of the scores of this answer; ``None`` where nobody took them.
        z: How far all measured targets of the explanation are from random orders, in standard deviations.
        better_than_random: Whether that is more than chance; ``None`` where nothing was measured.
        forced: Whether the replica did not reproduce the recorded log-probabilities and somebody insisted.
        retokenised: Whether the ids are not those that the model saw.
    """

    measured: Faithfulness | None
    z: float | None
    better_than_random: bool | None
    forced: bool
    retokenised: bool


@dataclass(frozen=True, slots=True)
class CitedAnswer:
    """An answer with its citations.

    Args:
        step_id: The step.
        method: The method behind the citations.
        text: What the model wrote; untrusted text.
        tokens: Each token that depends on the context, with what it alone would cite.
        citations: The parts of the text that cite something, in order; they do not overlap.
        references: All that could be cited, by number.
        changed: The most that the context changed the distribution of one of its tokens, KL divergence in nats: where
            that is little, citations say little.
        trust: What is known of the scores.
    """

    step_id: str
    method: str
    text: str
    tokens: tuple[Citation, ...]
    citations: tuple[Citation, ...]
    references: tuple[Reference, ...]
    changed: float
    trust: Trust

    def parts(self) -> list[tuple[str, tuple[int, ...]]]:
        """The text in pieces, each with the numbers to put behind it; the pieces join to the text."""
        found: list[tuple[str, tuple[int, ...]]] = []
        position = 0
        for citation in self.citations:
            found.append((self.text[position : citation.end], citation.numbers))
            position = citation.end
        if position < len(self.text):
            found.append((self.text[position:], ()))
        return found

    def brackets(self) -> str:
        """Two signs to set numbers in: square brackets, unless the model wrote such numbers itself."""
        free = (pair for pair in _BRACKETS if not re.search(rf"\{pair[0]}\d+\{pair[1]}", self.text))
        return next(free, _BRACKETS[-1])

    def marked(self) -> str:
        """The text with its markers, such as ``Rome[2][5]``."""
        pair = self.brackets()
        return "".join(
            text + "".join(f"{pair[0]}{number}{pair[1]}" for number in numbers) for text, numbers in self.parts()
        )

    def to_document(self) -> dict[str, JsonValue]:
        """Plain data, with the marked text."""
        return {**asdict(self), "marked": self.marked()}
