"""What a tree of thoughts is searched for: how a problem shows its states and reads the model's replies."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from tracer.agents.prompts import Prompt, load_prompt
from tracer.errors import InputError, UnknownNameError
from tracer.tasks import check_game24
from tracer.trace.answers import extract_answer
from tracer.trace.segments import Piece
from tracer.trace.trace import SegmentKind, Step


@dataclass(frozen=True, slots=True)
class Candidate:
    """A thought that the model proposes, with its characters in the reply."""

    text: str
    start: int
    end: int
    error: str | None = None
    """Why it cannot be used."""
    corrected: str | None = None
    """What the search goes on with where the model got a derived part of it wrong."""


@dataclass(frozen=True, slots=True)
class State:
    """A partial solution: the question and the thoughts so far."""

    question: Step
    thoughts: tuple[Step, ...] = ()
    texts: tuple[str, ...] = ()

    def extend(self, step: Step, candidate: Candidate) -> State:
        """The state after one more thought."""
        return State(self.question, (*self.thoughts, step), (*self.texts, candidate.corrected or candidate.text))


class Problem:
    """Any question: thoughts are lines of text.

    Args:
        question: The question.
        prompt: The prompt file.
    """

    name: ClassVar[str] = "text"
    depth: int = 3
    labels: ClassVar[dict[str, float]] = {"sure": 20.0, "likely": 1.0, "impossible": 0.001}
    """Yao et al. 2023a, Game of 24; values of several judgements add up."""

    def __init__(self, question: str, prompt: Prompt) -> None:
        self.question = question
        self.prompt = prompt

    def root(self, question: Step) -> State:
        """The state before any thought."""
        return State(question)

    def fields(self, state: State) -> dict[str, Sequence[Piece] | str]:
        """Fields of the prompt templates."""
        return {
            "question": [Piece(state.question.text.strip(), "question", state.question.id)],
            "path": self.path(state),
        }

    def path(self, state: State) -> list[Piece]:
        """The thoughts so far, a line each."""
        return [Piece(f"{text}\n", "thought", step.id) for step, text in zip(state.thoughts, state.texts, strict=True)]

    def template(self, template: str, state: State) -> str:
        """Which template of the prompt file to use for a state."""
        return template

    def key(self, state: State) -> str:
        """Equal for states that are the same."""
        return " | ".join(" ".join(text.casefold().split()) for text in state.texts)

    def is_leaf(self, state: State) -> bool:
        """Whether nothing can follow."""
        return bool(state.texts) and state.texts[-1].casefold().startswith(("answer:", "the answer is"))

    def is_solved(self, state: State) -> bool:
        """Whether a depth-first search may stop here."""
        return self.is_leaf(state)

    def is_hopeless(self, value: float) -> bool:
        """Whether a depth-first search gives a state up; ``value`` is the mean of its judgements."""
        return value <= self.labels["impossible"]

    def parse_thoughts(self, state: State, text: str) -> list[Candidate]:
        """The thoughts in a reply, a line each; list markers are left out."""
        return [Candidate(line, start, end) for line, start, end in lines(text)]

    def parse_label(self, text: str) -> str | None:
        """The judgement in a reply: the last label that it names."""
        found = re.findall("|".join(self.labels), text.casefold())
        return found[-1] if found else None

    def parse_choice(self, text: str, count: int) -> int | None:
        """Index of the choice that a reply votes for."""
        found = re.findall(r"\d+", text)
        number = int(found[-1]) if found and len(found[-1]) < 6 else 0
        return number - 1 if 1 <= number <= count else None

    def parse_answer(self, text: str) -> str | None:
        """The answer in the final reply."""
        found = extract_answer(text)
        if found:
            return found.value
        last = text.strip().splitlines()
        return last[-1].strip() if last else None


class Game24(Problem):
    """The Game of 24: make 24 of four numbers; a thought is one operation and the numbers that are left."""

    name: ClassVar[str] = "game24"
    depth: int = 3

    _THOUGHT = re.compile(
        r"^\s*(?P<a>-?\d+(?:\.\d+)?(?:/\d+)?)\s*(?P<op>[-+*/x×÷])\s*(?P<b>-?\d+(?:\.\d+)?(?:/\d+)?)\s*=\s*"  # noqa: RUF001
        r"(?P<c>-?\d+(?:\.\d+)?(?:/\d+)?)\s*\(\s*left:\s*(?P<left>[-\d./\s,]+?)\s*\)\s*$",
        re.IGNORECASE,
    )

    def __init__(self, question: str, prompt: Prompt) -> None:
        super().__init__(question, prompt)
        self.numbers = game24_numbers(question)

    def fields(self, state: State) -> dict[str, Sequence[Piece] | str]:
        """The question's fields and the numbers that are left."""
        step = state.thoughts[-1] if state.thoughts else state.question
        kind: SegmentKind = "thought" if state.thoughts else "question"
        return {**super().fields(state), "left": [Piece(self.left(state), kind, step.id)]}

    def left(self, state: State) -> str:
        """The numbers that are left, as the last thought states them."""
        if not state.texts:
            return " ".join(self.numbers)
        match = self._THOUGHT.match(state.texts[-1])
        return " ".join(match.group("left").replace(",", " ").split()) if match else ""

    def template(self, template: str, state: State) -> str:
        """Judging the last number needs another prompt than judging three."""
        if template == "value" and self.is_leaf(state) and "value_last" in self.prompt.templates:
            return "value_last"
        return template

    def key(self, state: State) -> str:
        """States with the same numbers left are the same."""
        return " ".join(sorted(self.left(state).split()))

    def is_leaf(self, state: State) -> bool:
        """Whether one number is left."""
        return bool(state.texts) and len(self.left(state).split()) <= 1

    def is_solved(self, state: State) -> bool:
        """Whether that number is 24."""
        return self.is_leaf(state) and self.left(state) == "24"

    def parse_thoughts(self, state: State, text: str) -> list[Candidate]:
        """The operations in a reply.

        One that is malformed or does not add up is kept with its error. Where only the list of what is left is wrong,
        which follows from the operation, the search goes on with the right one.
        """
        available = self.left(state).split()
        return [self._candidate(line, start, end, available) for line, start, end in lines(text)]

    def _candidate(self, line: str, start: int, end: int, available: Sequence[str]) -> Candidate:
        match = self._THOUGHT.match(line)
        if match is None:
            return Candidate(line, start, end, "not of the form 'a + b = c (left: ...)'")
        numbers = list(available)
        operation, a, b, c = (match.group(name) for name in ("op", "a", "b", "c"))
        for used in (a, b):
            same = next((number for number in numbers if Fraction(number) == Fraction(used)), None)
            if same is None:
                return Candidate(line, start, end, f"uses {used}, which is not left")
            numbers.remove(same)
        try:
            result = _OPERATIONS[operation.casefold()](Fraction(a), Fraction(b))
            stated = sorted(map(Fraction, match.group("left").replace(",", " ").split()))
        except (ValueError, ZeroDivisionError):
            return Candidate(line, start, end, "not a possible operation")
        if result != Fraction(c):
            return Candidate(line, start, end, f"{a} {operation} {b} is {result}, not {c}")
        left = [*numbers, c]
        if sorted(map(Fraction, left)) != stated:
            return Candidate(line, start, end, corrected=f"{a} {operation} {b} = {c} (left: {' '.join(left)})")
        return Candidate(line, start, end)

    def grade(self, answer: str | None) -> bool:
        """Whether an expression makes 24 of exactly these numbers."""
        return answer is not None and check_game24(answer, [int(number) for number in self.numbers])

    def parse_answer(self, text: str) -> str | None:
        """The expression after "Answer:", without its result."""
        for line in reversed(text.splitlines()):
            head = re.sub(r"^.*answer\s*:?", "", line, flags=re.IGNORECASE).rsplit("=", 1)[0]
            expression = head.replace("×", "*").replace("÷", "/").strip(" *`.")  # noqa: RUF001
            if re.fullmatch(r"[-+*/() \d.]+", expression) and re.search(r"\d\s*[-+*/]", expression):
                return " ".join(expression.split())
        return None


_OPERATIONS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": operator.add,
    "-": operator.sub,
    **dict.fromkeys("*x×", operator.mul),  # noqa: RUF001
    **dict.fromkeys("/÷", operator.truediv),
}

_PROBLEMS: dict[str, tuple[type[Problem], str]] = {"text": (Problem, "tot-text"), "game24": (Game24, "tot-game24")}


def load_problem(name: str | None, question: str, *, prompt: str | None = None) -> Problem:
    """The problem of that name; ``None`` takes ``game24`` for four numbers and ``text`` for anything else.

    Raises:
        UnknownNameError: No problem has that name.
        InputError: The prompt file lacks a template.
    """
    if name is None:
        name = "game24" if _is_game24(question) else "text"
    if name not in _PROBLEMS:
        raise UnknownNameError("problem", name, _PROBLEMS)
    problem, default = _PROBLEMS[name]
    return problem(question, load_prompt(prompt or default, requires=["propose", "value", "final"]))


def game24_numbers(question: str) -> list[str]:
    """The four numbers of a Game of 24: the first four that the question names.

    Raises:
        InputError: It names fewer.
    """
    numbers = re.findall(r"\d+", question)
    if question and len(numbers) < 4:
        raise InputError(
            f"a Game of 24 needs four numbers, the question has {len(numbers)}: write them like '4 5 6 10'"
        )
    return numbers[:4]


def lines(text: str) -> list[tuple[str, int, int]]:
    """Non-empty lines with their characters, without list markers."""
    result: list[tuple[str, int, int]] = []
    for match in re.finditer(r"^[ \t]*(?:[-*•]\s+|\d{1,2}[.)]\s+)?(?P<text>\S[^\n]*?)[ \t]*$", text, re.MULTILINE):
        result.append((match.group("text"), match.start("text"), match.end("text")))
    return result


def _is_game24(question: str) -> bool:
    """Four bare numbers, or a text that asks to make 24."""
    numbers = re.findall(r"\d+", question)
    bare = not re.search(r"[^\W\d_]", question) and len(numbers) == 4
    asked = re.search(r"\b(?:game of|mak(?:e|es|ing)|equals?|gives?|get)\s+24\b", question, re.IGNORECASE)
    return bare or (asked is not None and len(numbers) >= 5)
