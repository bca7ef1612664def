"""Steps of reasoning that are known to be right or wrong: verified chains, and the same with one result changed.

A chain is a problem and the right steps to its answer. Each step is taken as it is and with a wrong result, both behind
the right steps before it. What could give a wrong step away without reading it,
the kind of operation, the place in the chain and the length, is recorded with every step and alike on both sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

from tracer.errors import InputError

_NAMES = ("Alba", "Bruno", "Carmen", "Dario", "Elsa", "Fabio", "Greta", "Hugo", "Ines", "Jonas", "Karla", "Luis")
_THINGS = ("ball", "book", "coin", "hat", "key", "pen", "ring", "scarf")
_COLOURS = ("amber", "black", "blue", "green", "purple", "red", "white", "yellow")
_ORDERS = (("older", "younger"), ("taller", "shorter"), ("faster", "slower"))
_LONGEST_NUMBER = 99_999
ARITHMETIC = ("add", "subtract", "multiply", "divide")
LOGIC = ("order", "swap")
OPERATIONS = (*ARITHMETIC, *LOGIC)
"""Kinds of steps."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a chain.

    Args:
        text: What it says.
        start: Where its result begins in the text.
        end: One past its last character.
        operation: One of `OPERATIONS`.
    """

    text: str
    start: int
    end: int
    operation: str

    @property
    def result(self) -> str:
        """What the step comes to."""
        return self.text[self.start : self.end]

    def with_result(self, result: str) -> Step:
        """The same step with another result."""
        text = self.text[: self.start] + result + self.text[self.end :]
        return replace(self, text=text, end=self.start + len(result))


@dataclass(frozen=True, slots=True)
class Chain:
    """A problem with its right steps.

    Args:
        problem: What is asked.
        steps: Right steps.
        wrong: For each step results that are wrong there.
    """

    problem: str
    steps: tuple[Step, ...]
    wrong: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class StepExample:
    """A step that is right or wrong, behind right steps.

    Args:
        problem: Number of its problem; steps of one problem never lie on both sides of a split.
        context: The problem's text.
        before: The right steps before it.
        step: The step.
        label: Whether it is right.
        position: Its place in the chain, from 0.
    """

    problem: int
    context: str
    before: tuple[str, ...]
    step: Step
    label: bool
    position: int


def chains(count: int, *, seed: int = 0, operations: Sequence[str] = OPERATIONS) -> list[Chain]:
    """Different problems with their right steps, kinds of chains in turn.

    Args:
        count: How many.
        seed: Decides them.
        operations: What their steps may be.

    Raises:
        InputError: An operation is unknown, or there are not so many different problems.
    """
    if unknown := sorted(set(operations) - set(OPERATIONS)):
        raise InputError(f"unknown operation {unknown[0]!r}; use some of {', '.join(OPERATIONS)}")
    arithmetic = tuple(name for name in ARITHMETIC if name in operations)
    kinds: list[Callable[[Random], Chain]] = []
    if arithmetic:
        kinds.append(lambda rng: _arithmetic(rng, arithmetic))
    kinds += [_LOGIC[name] for name in LOGIC if name in operations]
    rng = Random(f"step chains {seed}")  # noqa: S311
    found: dict[str, Chain] = {}
    for _ in range(20 * count + 100):
        if len(found) == count:
            break
        # Two of three chains calculate: most reasoning steps of small models do.
        kind = kinds[0] if arithmetic and rng.random() < 2 / 3 else rng.choice(kinds)
        chain = kind(rng)
        found.setdefault(chain.problem, chain)
    if len(found) < count:
        raise InputError(f"only {len(found)} different problems were found; ask for fewer, or for more operations")
    return list(found.values())


def right_steps(chosen: Sequence[Chain]) -> list[StepExample]:
    """Every step of chains as it should be; the chains' numbers are those of the problems."""
    return [
        StepExample(number, chain.problem, tuple(item.text for item in chain.steps[:position]), step, True, position)
        for number, chain in enumerate(chosen)
        for position, step in enumerate(chain.steps)
    ]


def perturbed(chosen: Sequence[Chain], *, seed: int = 0) -> list[StepExample]:
    """Every step of chains as it should be and with a wrong result; the seed decides which one."""
    rng = Random(f"perturbed {seed}")  # noqa: S311
    found: list[StepExample] = []
    for right in right_steps(chosen):
        result = rng.choice(chosen[right.problem].wrong[right.position])
        found += [right, replace(right, step=right.step.with_result(result), label=False)]
    return found


def split(examples: Sequence[StepExample], *, share: float = 0.5, seed: int = 0) -> tuple[list[int], list[int]]:
    """Numbers of examples to train on and to test on; all examples of a problem are on one side.

    Args:
        examples: The examples.
        share: Of the problems that are trained on.
        seed: Decides which ones.
    """
    problems = sorted({example.problem for example in examples})
    Random(f"split {seed}").shuffle(problems)  # noqa: S311
    train = set(problems[: round(share * len(problems))])
    sides = [[n for n, example in enumerate(examples) if (example.problem in train) == side] for side in (True, False)]
    return sides[0], sides[1]


def fingerprint(examples: Sequence[StepExample]) -> str:
    """SHA-256 of steps, what is before them, and their labels."""
    digest = hashlib.sha256()
    for example in examples:
        for text in (example.context, *example.before, example.step.text, str(example.label)):
            digest.update(f"{len(text.encode())}:{text}\n".encode())
    return digest.hexdigest()


def _arithmetic(rng: Random, operations: Sequence[str]) -> Chain:
    """A number that is changed a few times."""
    value = rng.randint(12, 89)
    words = [f"Start with {value}."]
    steps: list[Step] = []
    wrong: list[tuple[str, ...]] = []
    for _ in range(rng.randint(3, 5)):
        possible = [name for name in operations if _operand(name, value, Random(0)) is not None]  # noqa: S311
        if not possible:
            break
        name = rng.choice(possible)
        operand = _operand(name, value, rng)
        if operand is None:
            break
        phrase, sign = _PHRASES[name]
        result = _apply(name, value, operand)
        head = f"{value} {sign} {operand} = "
        steps.append(Step(f"{head}{result}.", len(head), len(head) + len(str(result)), name))
        wrong.append(_near(result, {_apply(other, value, operand) for other in ("add", "subtract", "multiply")}))
        words.append(phrase.format(operand))
        value = result
    problem = " ".join(words) + " What is the result?"
    if len(steps) < 2:
        return _arithmetic(rng, ("add", "subtract", *operations))
    return Chain(problem, tuple(steps), tuple(wrong))


_PHRASES: Mapping[str, tuple[str, str]] = {
    "add": ("Add {}.", "+"),
    "subtract": ("Subtract {}.", "-"),
    "multiply": ("Multiply by {}.", "*"),
    "divide": ("Divide by {}.", "/"),
}


def _operand(name: str, value: int, rng: Random) -> int | None:
    """The other number of an operation, or ``None`` where it is not possible."""
    if name == "add":
        return rng.randint(12, 499) if value < _LONGEST_NUMBER - 499 else None
    if name == "subtract":
        return rng.randint(3, min(value - 2, 499)) if value > 6 else None
    if name == "multiply":
        return rng.randint(3, 29) if value * 29 <= _LONGEST_NUMBER else None
    divisors = [number for number in range(2, 13) if value % number == 0 and value // number > 2]
    return rng.choice(divisors) if divisors else None


def _apply(name: str, value: int, operand: int) -> int:
    if name == "add":
        return value + operand
    if name == "subtract":
        return value - operand
    return value * operand if name == "multiply" else value // operand


def _near(result: int, others: set[int]) -> tuple[str, ...]:
    """Wrong results as long as the right one: a digit off, digits swapped, or what another operation gives."""
    digits = str(result)
    off = {result + change for change in (-100, -20, -10, -2, -1, 1, 2, 10, 20, 100)}
    swapped = {int(digits[:at] + digits[at + 1] + digits[at] + digits[at + 2 :]) for at in range(len(digits) - 1)}
    found = sorted(number for number in off | swapped | others if number > 0 and number != result)
    alike = tuple(str(number) for number in found if len(str(number)) == len(digits))
    return alike or tuple(str(number) for number in found)


def _order(rng: Random) -> Chain:
    """Who is the older one, step by step through a row of comparisons."""
    more, less = rng.choice(_ORDERS)
    people = rng.sample(_NAMES, rng.randint(4, 5))
    facts = [f"{left} is {more} than {right}." for left, right in zip(people, people[1:], strict=False)]
    shuffled = rng.sample(facts, len(facts))
    steps: list[Step] = []
    for position in range(2, len(people)):
        first, middle, last = people[0], people[position - 1], people[position]
        premise = f"{first} is {more} than {middle} and {middle} is {more} than {last}, so "
        forward = rng.random() < 0.5
        left, right, word = (first, last, more) if forward else (last, first, less)
        start = len(premise) + len(f"{left} is ")
        steps.append(Step(f"{premise}{left} is {word} than {right}.", start, start + len(word), "order"))
    wrong = tuple((less if step.result == more else more,) for step in steps)
    problem = f"{' '.join(shuffled)} Compare {people[0]} with everyone."
    return Chain(problem, tuple(steps), wrong)


def _swap(rng: Random) -> Chain:
    """Who has what after people swapped."""
    count = rng.randint(3, 4)
    people, thing = rng.sample(_NAMES, count), rng.choice(_THINGS)
    owned = dict(zip(people, rng.sample(_COLOURS, count), strict=True))
    words = ["At first " + ", ".join(f"{name} has the {colour} {thing}" for name, colour in owned.items()) + "."]
    steps: list[Step] = []
    wrong: list[tuple[str, ...]] = []
    for _ in range(rng.randint(3, 4)):
        left, right = rng.sample(people, 2)
        owned[left], owned[right] = owned[right], owned[left]
        words.append(f"{left} and {right} swap.")
        head = f"{left} and {right} swap, so {left} now has the "
        steps.append(Step(f"{head}{owned[left]} {thing}.", len(head), len(head) + len(owned[left]), "swap"))
        wrong.append(tuple(colour for name, colour in owned.items() if name != left))
    return Chain(" ".join(words) + " Follow the swaps.", tuple(steps), tuple(wrong))


_LOGIC: Mapping[str, Callable[[Random], Chain]] = {"order": _order, "swap": _swap}
