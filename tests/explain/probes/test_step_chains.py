"""Chains are verified by computing them again; wrong steps are wrong, and nothing but the result gives them away."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from tracer.errors import InputError
from tracer.explain.probes.step_chains import (
    ARITHMETIC,
    OPERATIONS,
    Chain,
    Step,
    StepExample,
    chains,
    fingerprint,
    perturbed,
    right_steps,
    split,
)

CHAINS = chains(150, seed=3)


def is_right(chain: Chain, position: int, text: str) -> bool:
    """Judge a step by the problem alone, in another way than the generator's."""
    operation = chain.steps[position].operation
    if operation in ARITHMETIC:
        left, sign, right, result = re.fullmatch(r"(\d+) (.) (\d+) = (\d+)\.", text).groups()  # type: ignore[union-attr]
        start, *changes = re.findall(r"(Start with|Add|Subtract|Multiply by|Divide by) (\d+)", chain.problem)
        value = int(start[1])
        for number, (name, operand) in enumerate(changes):
            other = int(operand)
            if number == position:
                assert (int(left), int(right)) == (value, other)
                assert {"Add": "+", "Subtract": "-", "Multiply by": "*", "Divide by": "/"}[name] == sign
            done = {
                "Add": value + other,
                "Subtract": value - other,
                "Multiply by": value * other,
                "Divide by": value / other,
            }
            if number == position:
                return bool(done[name] == int(result))
            value = int(done[name])
    if operation == "swap":
        owned = dict(re.findall(r"(\w+) has the (\w+) \w+", chain.problem))
        swaps = re.findall(r"(\w+) and (\w+) swap\.", chain.problem)
        for left, right in swaps[: position + 1]:
            owned[left], owned[right] = owned[right], owned[left]
        name, colour = re.search(r"so (\w+) now has the (\w+)", text).groups()  # type: ignore[union-attr]
        return bool(owned[name] == colour)
    facts = set(re.findall(r"(\w+) is (\w+) than (\w+)\.", chain.problem))
    more = next(iter(facts))[1]
    less = {"older": "younger", "taller": "shorter", "faster": "slower"}[more]
    above = {left: right for left, _, right in facts}
    left, word, right = re.search(r"so (\w+) is (\w+) than (\w+)\.", text).groups()  # type: ignore[union-attr]
    high, low = (left, right) if word == more else (right, left)
    assert word in (more, less)
    while high in above:
        high = above[high]
        if high == low:
            return True
    return False


def test_every_right_step_follows_and_no_wrong_result_does() -> None:
    assert {step.operation for chain in CHAINS for step in chain.steps} == set(OPERATIONS)
    for chain in CHAINS:
        assert len(chain.steps) >= 2
        for position, step in enumerate(chain.steps):
            assert is_right(chain, position, step.text)
            assert step.text[step.start : step.end] == step.result
            assert chain.wrong[position]
            for result in chain.wrong[position]:
                assert not is_right(chain, position, step.with_result(result).text)


def test_twins_differ_in_the_result_alone() -> None:
    examples = perturbed(CHAINS)
    assert len(examples) == 2 * sum(len(chain.steps) for chain in CHAINS)
    for right, wrong in zip(examples[::2], examples[1::2], strict=True):
        assert (right.label, wrong.label) == (True, False)
        assert (right.problem, right.context, right.before, right.position) == (
            wrong.problem,
            wrong.context,
            wrong.before,
            wrong.position,
        )
        assert right.step.text[: right.step.start] == wrong.step.text[: wrong.step.start]
        assert right.step.text[right.step.end :] == wrong.step.text[wrong.step.end :]
        assert right.before == tuple(step.text for step in CHAINS[right.problem].steps[: right.position])
    # Numbers are as long as the right ones, nearly always: length says nothing.
    lengths = np.array([[len(right.step.text), len(wrong.step.text)] for right, wrong in _pairs(examples)])
    assert (lengths[:, 0] == lengths[:, 1]).mean() > 0.7
    assert abs(lengths[:, 0].mean() - lengths[:, 1].mean()) < 0.3


def _pairs(examples: list[StepExample]) -> list[tuple[StepExample, StepExample]]:
    return [
        (right, wrong)
        for right, wrong in zip(examples[::2], examples[1::2], strict=True)
        if right.step.operation in ARITHMETIC
    ]


def test_results_of_orders_are_balanced() -> None:
    rights = [item for item in right_steps(chains(300, seed=8)) if item.step.operation == "order"]
    words = Counter(item.step.result in ("older", "taller", "faster") for item in rights)
    assert 0.35 < words[True] / len(rights) < 0.65


def test_the_seed_decides_and_problems_are_different() -> None:
    assert chains(30, seed=1) == chains(30, seed=1)
    assert chains(30, seed=1) != chains(30, seed=2)
    assert len({chain.problem for chain in CHAINS}) == 150
    examples = perturbed(CHAINS[:20], seed=4)
    assert fingerprint(examples) == fingerprint(perturbed(CHAINS[:20], seed=4))
    assert fingerprint(examples) != fingerprint(perturbed(CHAINS[:20], seed=5))


def test_no_problem_is_on_both_sides_of_a_split() -> None:
    examples = perturbed(CHAINS[:40])
    train, test = split(examples, share=0.6, seed=2)
    assert sorted(train + test) == list(range(len(examples)))
    sides = [{examples[number].problem for number in side} for side in (train, test)]
    assert not sides[0] & sides[1]
    assert len(sides[0]) == 24


def test_operations_can_be_chosen() -> None:
    only = chains(12, operations=["multiply", "add"])
    assert {step.operation for chain in only for step in chain.steps} <= {"multiply", "add"}
    logic = chains(12, operations=["swap"])
    assert {step.operation for chain in logic for step in chain.steps} == {"swap"}
    with pytest.raises(InputError, match="unknown operation 'power'"):
        chains(3, operations=["power"])


def test_a_step_with_another_result() -> None:
    step = Step("3 + 4 = 7.", 8, 9, "add")
    assert step.result == "7"
    assert step.with_result("12").text == "3 + 4 = 12."
    assert step.with_result("12").result == "12"
