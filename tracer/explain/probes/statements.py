"""True and false statements, affirmative and negated, and how to split them so that nothing leaks.

Each fact gives four statements: with the value that is right and with one that is wrong, affirmed and denied. Two facts
lend each other their values, so that true and false statements use the same words equally often and are equally long;
only the pairing tells them apart. All eight stay together in every split.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tracer.errors import InputError, UnknownNameError
from tracer.explain.probes import facts, reasoning
from tracer.explain.probes.facts import VALUE, Fact

PER_TOPIC = 120
"""Facts of a topic, where it has as many; each gives four statements."""

Indices = NDArray[np.int64]

_TOPICS: Mapping[str, Callable[[Random], list[Fact]]] = {
    "cities": lambda _: list(facts.cities()),
    "capitals": lambda _: list(facts.capitals()),
    "continents": lambda _: list(facts.continents()),
    "currencies": lambda _: list(facts.currencies()),
    "states": lambda _: list(facts.states()),
    "element_symbols": lambda _: list(facts.symbols()),
    "atomic_numbers": lambda _: list(facts.atomic_numbers()),
    "translations": lambda _: list(facts.translations()),
    "arithmetic": reasoning.arithmetic,
    "comparisons": reasoning.comparisons,
    "numbers": reasoning.numbers,
    "inference": reasoning.inference,
}
TOPICS = tuple(_TOPICS)
"""Topics of the statements that `generate` makes."""
REASONING_TOPICS = ("arithmetic", "comparisons", "numbers", "inference")
"""Those of them that look like steps of reasoning."""

_ALIKE = 3
"""A wrong value that begins like the right one might be another name for it (krone and krona)."""
_NEGATIONS = frozenset({"not", "never", "no", "cannot", "does", "do", "did"})


@dataclass(frozen=True, slots=True)
class Statement:
    """A sentence that is true or false.

    Args:
        text: The sentence.
        label: Whether it is true.
        topic: What kind of thing it is about.
        negated: Whether it denies something.
        entity: What in particular it is about; statements of the same entity stay together in a split.
    """

    text: str
    label: bool
    topic: str
    negated: bool
    entity: str


class Split(NamedTuple):
    """Rows to learn from and rows to be judged by."""

    train: Indices
    test: Indices


def generate(*, seed: int = 0, per_topic: int = PER_TOPIC, topics: Collection[str] = TOPICS) -> tuple[Statement, ...]:
    """Statements of tracer's own, four for each fact; the same for the same seed.

    Args:
        seed: Decides which facts are taken and which wrong values they get.
        per_topic: Most facts of a topic, 2 or more.
        topics: Which of `TOPICS`.

    Raises:
        UnknownNameError: There is no such topic.
        InputError: ``per_topic`` is less than 2.
    """
    if per_topic < 2:
        raise InputError(f"per_topic must be 2 or more, found {per_topic}")
    for topic in topics:
        if topic not in _TOPICS:
            raise UnknownNameError("topic", topic, TOPICS)
    found: list[Statement] = []
    for topic in TOPICS:
        if topic in topics:
            # A generator of its own for each topic: leaving one out does not change the others.
            rng = Random(f"{seed} {topic}")  # noqa: S311
            found.extend(_statements(topic, _TOPICS[topic](rng), per_topic, rng))
    return tuple(found)


def _statements(topic: str, known: Sequence[Fact], most: int, rng: Random) -> Iterator[Statement]:
    groups = _groups(known, rng)
    rng.shuffle(groups)
    taken = 0
    for group in groups:
        taken += len(group)
        if taken > most:
            return
        entity = " / ".join(sorted({fact.entity for fact, _ in group}))
        for fact, wrong in group:
            for sentence, negated in ((fact.affirmative, False), (fact.negated, True)):
                for value, right in ((fact.value, True), (wrong, False)):
                    yield Statement(sentence.replace(VALUE, value), right != negated, topic, negated, entity)


def _groups(known: Sequence[Fact], rng: Random) -> list[list[tuple[Fact, str]]]:
    """Facts, each with a wrong value, in groups that form one entity.

    Facts without a wrong value of their own swap values two by two: on each side of a split every value is then as
    often right as wrong, and no count of words on one tells anything about the other. One that is left over is dropped.
    """
    found = [[(fact, fact.wrong)] for fact in known if fact.wrong is not None]
    pools: dict[str, list[Fact]] = defaultdict(list)
    for fact in known:
        if fact.wrong is None:
            pools[fact.pool].append(fact)
    for waiting in pools.values():
        rng.shuffle(waiting)
        while waiting:
            one = waiting.pop()
            fits = [other for other in waiting if not _alike(one.value, other.value)]
            if fits:
                # The most frequent values first, or only those would be left over.
                counts = Counter(fact.value for fact in waiting)
                most = max(counts[fact.value] for fact in fits)
                other = rng.choice([fact for fact in fits if counts[fact.value] == most])
                waiting.remove(other)
                found.append([(one, other.value), (other, one.value)])
    return found


def _alike(left: str, right: str) -> bool:
    return left[:_ALIKE].casefold() == right[:_ALIKE].casefold()


def split(
    statements: Sequence[Statement], *, by: Literal["topic", "entity"], share: float = 0.25, seed: int = 0
) -> Split:
    """Cut statements in two so that no topic, or no entity, is on both sides.

    Args:
        statements: The statements.
        by: What is kept together. Entities of the same name are one, whatever their topics.
        share: About what share of topics or entities is for the test; at least one, and not all.
        seed: Decides which.

    Raises:
        InputError: There is only one topic or entity, or no such way to split.
    """
    if by not in ("topic", "entity"):
        raise InputError(f"statements can be split by topic or by entity, not by {by!r}")
    keys = [(item.topic if by == "topic" else item.entity).casefold() for item in statements]
    names = sorted(set(keys))
    if len(names) < 2:
        raise InputError(f"statements of one {by} cannot be split by {by}; add some of another")
    Random(seed).shuffle(names)  # noqa: S311
    held = set(names[: min(max(1, round(share * len(names))), len(names) - 1)])
    test = np.array([key in held for key in keys], dtype=np.bool_)
    return Split(np.flatnonzero(~test), np.flatnonzero(test))


def partners(statements: Sequence[Statement]) -> Indices:
    """For each statement the row of its negation, or of what it negates; -1 where there is none.

    The two are about the same entity, differ in polarity and in label, and have the same words but for the negation.

    Returns:
        ``(statements,)``; ``partners[partners[i]] == i`` where there is one.
    """
    found = np.full(len(statements), -1, dtype=np.int64)
    waiting: dict[tuple[str, str, bool], list[tuple[int, frozenset[str]]]] = defaultdict(list)
    for row, item in enumerate(statements):
        if item.negated:
            waiting[item.topic, item.entity, item.label].append((row, frozenset(words_of(item.text))))
    for row, item in enumerate(statements):
        candidates = waiting[item.topic, item.entity, not item.label]
        if item.negated or not candidates:
            continue
        own = frozenset(words_of(item.text))
        best, words = min(candidates, key=lambda other: (len(own ^ other[1]), other[0]))
        # "means" and "does not mean" differ in two words; so do "has" and "does not have".
        if len(own ^ words) <= 2:
            found[row], found[best] = best, row
            candidates.remove((best, words))
    return found


def words_of(text: str) -> list[str]:
    """The words of a sentence in lower case, without those that negate it."""
    return [word for word in re.findall(r"\w+", text.casefold()) if word not in _NEGATIONS]


def fingerprint(statements: Sequence[Statement]) -> str:
    """SHA-256 of statements and their labels, whatever their order: what a probe was trained on."""
    rows = sorted([item.text, item.label, item.topic, item.negated] for item in statements)
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()
