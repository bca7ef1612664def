"""A run as the pages show it: what is known of it, and the texts of its tokens and prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from tracer.errors import StoreError
from tracer.token_texts import TokenTexts
from ui import payload, state
from ui.evidence import Evidence, Reading
from ui.token_scores import Target, Values, Written, peak, runs, targets, written, written_in

PASSAGE = 9
"""Tokens before and behind the middle of a passage."""


@dataclass(frozen=True)
class Shown:
    """A run as the page shows it.

    Args:
        evidence: What is known of it.
        texts: What turns its ids into text, where that is here.
        why_not: Why it is not.
        part_texts: What each part of the prompt says, or how many tokens it has.
    """

    evidence: Evidence
    texts: TokenTexts | None
    why_not: str
    part_texts: Sequence[str]

    @classmethod
    def of(cls, evidence: Evidence) -> Shown:
        """All that can be shown of a run."""
        texts, why = state.texts_of(evidence.trace)
        return cls(evidence, texts, why, part_texts(evidence, texts))

    def number(self, step_id: str) -> int:
        """Number of a step in the trace, from 1."""
        return self.evidence.numbers[step_id]

    @cached_property
    def written(self) -> list[Written]:
        """All completions of the run."""
        return written(self.evidence.trace)

    def text_of(self, reading: Reading) -> str:
        """What was read, from its beginning."""
        if reading.step_id is not None:
            return self.evidence.steps[reading.step_id].text
        return self.part_texts[reading.part - 1] if reading.part is not None else ""


def part_texts(evidence: Evidence, texts: TokenTexts | None) -> list[str]:
    """What each part of the prompts says, or how many tokens it has where its text cannot be had."""
    found: list[str] = []
    for part in evidence.parts:
        if texts is None:
            found.append(payload.count(part.end - part.start, "token"))
        else:
            found.append("".join(texts.texts(evidence.part_ids(part))[part.start :]))
    return found


def go(name: str | int) -> None:
    """Select a step by its id, or a part of the prompt by its number."""
    if isinstance(name, int):
        state.select_part(name)
    else:
        state.select_step(name)


def token_arrays(evidence: Evidence, method: str) -> tuple[Mapping[str, Values], str | None]:
    """Token scores of a method by target; where there are none, why."""
    explanation = evidence.explanation(method)
    if explanation.key is None or explanation.arrays is None:
        return {}, "No scores of tokens were kept with this explanation; explain the run again in this store."
    try:
        return state.token_arrays(evidence.trace.id, explanation.key, explanation.arrays), None
    except StoreError as error:
        return {}, str(error)


class Passages:
    """Which passage of a source a step read most, by the tokens' scores.

    Args:
        shown: The run.
        method: The method whose scores are shown.
        target: The step.
    """

    def __init__(self, shown: Shown, method: str, target: str) -> None:
        self._shown = shown
        self._target = target
        self.elsewhere = False
        """Whether another method's scores were used: some methods score whole sources only."""
        number = written_in(shown.written, shown.evidence.steps[target])
        self._item = None if number is None else shown.written[number]
        self._tokens = [] if self._item is None or shown.texts is None else shown.texts.texts(self._item.token_ids)
        self._found = [found for name in self._methods(method) if (found := self._of_method(name)) is not None]

    def _methods(self, first: str) -> list[str]:
        return [first, *(name for name in self._shown.evidence.methods if name != first)]

    def _of_method(self, method: str) -> Target | None:
        if self._item is None or not self._tokens:
            return None
        arrays, _ = token_arrays(self._shown.evidence, method)
        return next(iter(targets(self._shown.evidence, self._item, method, arrays, only=self._target)), None)

    def of(self, reading: Reading) -> str | None:
        """The passage, or ``None`` where no part of the source stands out."""
        if self._item is None:
            return None
        for number, found in enumerate(self._found):
            for run in runs(self._shown.evidence.trace, self._item):
                if self._shown.evidence.name_of(self._item.call.id, run.start, run.step_id) != _name(reading):
                    continue
                middle = peak(found.values, run.start, min(run.end, found.start))
                if middle is not None:
                    self.elsewhere = self.elsewhere or number > 0
                    return self._cut(run.start, min(run.end, found.start), middle)
        return None

    def _cut(self, start: int, end: int, middle: int) -> str:
        left, right = max(start, middle - PASSAGE), min(end, middle + PASSAGE)
        text = "".join(self._tokens[left:right]).strip()
        return f"{'…' if left > start else ''}{text}{'…' if right < end else ''}"


def _name(reading: Reading) -> str | int | None:
    return reading.step_id if reading.step_id is not None else reading.part
