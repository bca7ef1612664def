"""Statements about numbers, order and inference: what steps of reasoning look like. Drawn at random."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tracer.explain.probes.facts import VALUE, Fact, is_fact

_FACTS = 400
"""Facts that each source draws; the generator takes as many of them as it needs."""
_NAMES = (
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Frank",
    "Grace",
    "Henry",
    "Iris",
    "Jack",
    "Kate",
    "Leo",
    "Mary",
    "Paul",
)
_KINDS = ("boats", "boxes", "cars", "cups", "doors", "hats", "lamps", "rings", "shirts", "stamps", "tents", "vases")
_COLOURS = ("black", "blue", "brown", "green", "red", "white", "yellow")
_ORDERS = (("older", "younger"), ("taller", "shorter"), ("faster", "slower"), ("richer", "poorer"))
_COMPARED = (("greater", "smaller"), ("larger", "less"))


def arithmetic(rng: Random) -> list[Fact]:
    """Sums, differences, products and quotients; a wrong result is close to the right one and as long."""
    makers = (_sum, _difference, _product, _quotient)
    return _different(rng, lambda: rng.choice(makers)(rng))


def _sum(rng: Random) -> Fact:
    left, right = rng.randint(3, 89), rng.randint(3, 89)
    return _equation(rng, f"{left} plus {right}", left + right)


def _difference(rng: Random) -> Fact:
    right, result = rng.randint(3, 60), rng.randint(3, 60)
    return _equation(rng, f"{right + result} minus {right}", result)


def _product(rng: Random) -> Fact:
    left, right = rng.randint(2, 12), rng.randint(2, 19)
    return _equation(rng, f"{left} times {right}", left * right)


def _quotient(rng: Random) -> Fact:
    right, result = rng.randint(2, 12), rng.randint(2, 19)
    return _equation(rng, f"{right * result} divided by {right}", result)


def _equation(rng: Random, term: str, result: int) -> Fact:
    wrong = _near(rng, result)
    return Fact(term, f"{term} equals {VALUE}.", f"{term} does not equal {VALUE}.", str(result), str(wrong))


def _near(rng: Random, number: int) -> int:
    """Another number of as many digits, a little more or less."""
    steps = [step for step in (-10, -3, -2, -1, 1, 2, 3, 10) if len(str(number + step)) == len(str(number))]
    return number + rng.choice(steps)


def comparisons(rng: Random) -> list[Fact]:
    """Which of two numbers is the greater one."""

    def make() -> Fact:
        digits = rng.choice((2, 3, 4))
        left, right = rng.sample(range(10 ** (digits - 1), 10**digits), 2)
        words = rng.choice(_COMPARED)
        right_word, wrong_word = words if left > right else words[::-1]
        sentence = f"The number {left} is {VALUE} than the number {right}."
        return is_fact(f"{left} and {right}", sentence, right_word, wrong_word)

    return _different(rng, make)


def numbers(rng: Random) -> list[Fact]:
    """Even and odd numbers, what they can be divided by, and what they are the squares of."""

    def parity() -> Fact:
        number = rng.randint(10, 999)
        words = ("even", "odd") if number % 2 == 0 else ("odd", "even")
        return is_fact(str(number), f"The number {number} is {VALUE}.", *words)

    def divisor() -> Fact:
        right = rng.randint(3, 9)
        number = right * rng.randint(4, 30)
        wrong = rng.choice([other for other in range(3, 10) if number % other])
        return is_fact(str(number), f"The number {number} is divisible by {VALUE}.", str(right), str(wrong))

    def square() -> Fact:
        root = rng.randint(4, 31)
        wrong = _near(rng, root**2)
        return is_fact(f"{root} squared", f"The square of {root} is {VALUE}.", str(root**2), str(wrong))

    makers = (parity, divisor, square)
    return _different(rng, lambda: rng.choice(makers)())


def inference(rng: Random) -> list[Fact]:
    """Conclusions that follow from what is said before them, and conclusions that it rules out."""
    return _different(rng, lambda: rng.choice((_order, _membership, _place))(rng))


def _order(rng: Random) -> Fact:
    more, less = rng.choice(_ORDERS)
    first, second, third = rng.sample(_NAMES, 3)
    premise = f"{first} is {more} than {second} and {second} is {more} than {third}"
    word, other = (more, less)
    conclusion = f"{first} is {VALUE} than {third}"
    if rng.random() < 0.5:
        conclusion, word, other = f"{third} is {VALUE} than {first}", less, more
    return _therefore(premise, conclusion, word, other)


def _membership(rng: Random) -> Fact:
    kind, owner = rng.choice(_KINDS), rng.choice(_NAMES)
    colour, other = rng.sample(_COLOURS, 2)
    premise = f"All {kind} in this shop are {colour} and {owner} bought one of them there"
    return _therefore(premise, f"what {owner} bought is {VALUE}", colour, other)


def _place(rng: Random) -> Fact:
    first, second = rng.sample(_NAMES, 2)
    kind = rng.choice(_KINDS)
    total, own = rng.randint(6, 19), rng.randint(2, 5)
    premise = f"{first} and {second} have {total} {kind} together and {own} of these belong to {first}"
    result = total - own
    return _therefore(premise, f"the number that belongs to {second} is {VALUE}", str(result), str(_near(rng, result)))


def _therefore(premise: str, conclusion: str, right: str, wrong: str) -> Fact:
    return is_fact(premise, f"{premise}, so {conclusion}.", right, wrong)


def _different(rng: Random, make: Callable[[], Fact]) -> list[Fact]:
    """Facts about different entities."""
    found: dict[str, Fact] = {}
    for _ in range(4 * _FACTS):
        fact = make()
        found.setdefault(fact.entity, fact)
        if len(found) == _FACTS:
            break
    return list(found.values())
