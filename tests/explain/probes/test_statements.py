"""Statements of tracer's own: balanced, true where they say so, and split so that nothing leaks."""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from tracer.errors import InputError, UnknownNameError
from tracer.explain.probes.statements import (
    REASONING_TOPICS,
    TOPICS,
    Statement,
    fingerprint,
    generate,
    partners,
    split,
)

ALL = generate()


def of_topic(topic: str) -> list[Statement]:
    return [item for item in ALL if item.topic == topic]


def test_there_are_thousands_and_the_seed_decides_which() -> None:
    assert len(ALL) > 4000
    assert {item.topic for item in ALL} == set(TOPICS)
    assert generate() == ALL
    assert generate(seed=1) != ALL
    assert generate(topics=["capitals", "numbers"]) == tuple(
        item for item in ALL if item.topic in ("capitals", "numbers")
    )


@pytest.mark.parametrize("topic", TOPICS)
def test_each_topic_is_balanced_by_label_polarity_and_length(topic: str) -> None:
    counts = Counter((item.label, item.negated) for item in of_topic(topic))
    assert len(set(counts.values())) == 1
    assert len(counts) == 4
    for negated in (False, True):
        true, false = (
            [len(item.text) for item in of_topic(topic) if item.label == label and item.negated == negated]
            for label in (True, False)
        )
        assert statistics.mean(true) == pytest.approx(statistics.mean(false), rel=0.015)
        assert statistics.median(true) == pytest.approx(statistics.median(false), abs=1.0)


def test_negation_adds_no_more_than_a_word_or_two() -> None:
    lengths = {
        negated: statistics.mean(len(item.text) for item in ALL if item.negated == negated) for negated in (False, True)
    }
    assert 3 < lengths[True] - lengths[False] < 7


@pytest.mark.parametrize("topic", ["capitals", "element_symbols", "currencies", "states"])
def test_values_are_as_often_right_as_wrong(topic: str) -> None:
    """The last words of true and of false affirmative statements are the same ones, equally often."""
    ends: dict[bool, Counter[str]] = defaultdict(Counter)
    for item in of_topic(topic):
        if not item.negated:
            ends[item.label][re.split(r" (?:is|the) ", item.text)[-1]] += 1
    assert ends[True] == ends[False]


def test_the_text_alone_tells_nothing() -> None:
    """A bag of words does no better than chance on entities that it has not seen."""
    found = []
    for seed in range(4):
        parts = split(ALL, by="entity", seed=seed)
        train, test = ([ALL[row] for row in rows] for rows in parts)
        words = TfidfVectorizer(ngram_range=(1, 2))
        model = LogisticRegression(max_iter=1000).fit(
            words.fit_transform([item.text for item in train]), [item.label for item in train]
        )
        found.append(model.score(words.transform([item.text for item in test]), [item.label for item in test]))
    assert 0.47 < statistics.mean(found) < 0.53


def test_every_statement_has_its_negation() -> None:
    found = partners(ALL)
    assert (found >= 0).all()
    assert (found[found] == np.arange(len(ALL))).all()
    for row, item in enumerate(ALL):
        other = ALL[found[row]]
        assert (item.entity, item.topic) == (other.entity, other.topic)
        assert item.label != other.label
        assert item.negated != other.negated
        assert re.sub(r" (does )?not ", " ", max(item.text, other.text, key=len)).split()[-1] == item.text.split()[-1]


SUM = re.compile(r"(\d+) (plus|minus|times|divided by) (\d+) (equals|does not equal) (\d+)\.")
OPERATIONS = {"plus": int.__add__, "minus": int.__sub__, "times": int.__mul__, "divided by": int.__floordiv__}


def test_labels_of_numbers_are_right() -> None:
    for item in of_topic("arithmetic"):
        match = SUM.fullmatch(item.text)
        assert match is not None, item.text
        left, operation, right, verb, result = match.groups()
        holds = OPERATIONS[operation](int(left), int(right)) == int(result)
        assert item.label == (holds == (verb == "equals")), item.text
    for item in of_topic("comparisons"):
        match = re.fullmatch(r"The number (\d+) is (not )?(\w+) than the number (\d+)\.", item.text)
        assert match is not None, item.text
        left, negation, word, right = match.groups()
        holds = int(left) > int(right) if word in ("greater", "larger") else int(left) < int(right)
        assert item.label == (holds == (negation is None)), item.text
    for item in of_topic("numbers"):
        holds = _number_holds(item.text.replace(" not ", " "))
        assert item.label == (holds != (" not " in item.text)), item.text


def _number_holds(text: str) -> bool:
    parity = re.fullmatch(r"The number (\d+) is (even|odd)\.", text)
    divisor = re.fullmatch(r"The number (\d+) is divisible by (\d+)\.", text)
    square = re.fullmatch(r"The square of (\d+) is (\d+)\.", text)
    if parity is not None:
        return (int(parity[1]) % 2 == 0) == (parity[2] == "even")
    if divisor is not None:
        return int(divisor[1]) % int(divisor[2]) == 0
    assert square is not None, text
    return int(square[1]) ** 2 == int(square[2])


def test_labels_of_inferences_are_right() -> None:
    opposite = dict([pair for pair in (("older", "younger"), ("taller", "shorter"), ("faster", "slower"))])
    opposite |= {"richer": "poorer"}
    checked = 0
    for item in of_topic("inference"):
        match = re.fullmatch(
            r"(\w+) is (\w+) than (\w+) and \3 is \2 than (\w+), so (\w+) is (not )?(\w+) than (\w+)\.", item.text
        )
        if match is None:
            continue
        first, word, _, third, left, negation, said, right = match.groups()
        assert {left, right} == {first, third}
        holds = (left == first) == (said == word)
        assert said in (word, opposite[word])
        assert item.label == (holds == (negation is None)), item.text
        checked += 1
    assert checked > 100


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("The capital of France is Paris.", True),
        ("The capital of the United Kingdom is not London.", False),
        ("Italy belongs to the continent of Europe.", True),
        ("The money that people use in Japan is called the yen.", True),
        ("The chemical symbol of gold is Au.", True),
        ("An atom of carbon does not have 6 protons.", False),
        ("The state capital of Texas is Austin.", True),
        ("The Spanish word for Monday is lunes.", True),
        ("Mumbai is a city in India.", True),
    ],
)
def test_facts_that_everybody_knows(text: str, label: bool) -> None:
    found = {item.text: item.label for item in generate(per_topic=1000)}
    assert found[text] == label


@pytest.mark.parametrize("by", ["topic", "entity"])
@settings(max_examples=20)
@given(seed=st.integers(0, 50), share=st.floats(0.01, 0.99))
def test_nothing_is_on_both_sides_of_a_split(by: Literal["topic", "entity"], seed: int, share: float) -> None:
    statements = ALL[::7]
    parts = split(statements, by=by, seed=seed, share=share)
    assert sorted([*parts.train, *parts.test]) == list(range(len(statements)))
    sides = [{getattr(statements[row], by).casefold() for row in rows} for rows in parts]
    assert all(sides)
    assert not sides[0] & sides[1]


def test_twins_stay_together() -> None:
    found = partners(ALL)
    parts = split(ALL, by="entity", seed=3)
    test = set(parts.test.tolist())
    assert all((row in test) == (int(found[row]) in test) for row in range(len(ALL)))


def test_a_fingerprint_is_that_of_the_set() -> None:
    some: Sequence[Statement] = ALL[:40]
    assert fingerprint(some) == fingerprint(some[::-1])
    assert fingerprint(some) != fingerprint(some[1:])


def test_what_cannot_be_split_or_made_is_refused() -> None:
    with pytest.raises(InputError, match="of one topic"):
        split(of_topic("cities"), by="topic")
    with pytest.raises(UnknownNameError, match="citys"):
        generate(topics=["citys"])
    with pytest.raises(InputError, match="per_topic"):
        generate(per_topic=1)
    assert {item.topic for item in generate(per_topic=2, topics=REASONING_TOPICS)} == set(REASONING_TOPICS)
    assert len(generate(per_topic=2)) == 8 * len(TOPICS)
