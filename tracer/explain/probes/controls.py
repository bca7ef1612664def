"""What a probe has to beat: itself with nothing to learn, and the text of a statement alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tracer.explain.probes.directions import along
from tracer.explain.probes.examples import Examples, Flags, Floats
from tracer.explain.probes.fit import fit
from tracer.explain.probes.held_out import REPEATS, Material, Trainer, equal_rows
from tracer.explain.probes.probe import Probe

TEXT = "TF-IDF of the text"
"""Name of the baseline that reads no hidden state."""
Texts = NDArray[np.object_]
"""Texts, ``(rows,)``."""
_WORD = r"(?u)\b\w+\b"
"""Single letters count as well: symbols of elements."""


class Control(NamedTuple):
    """Scores of a control.

    Args:
        scores: ``(repeats, rows)``.
        layers: The layer for each topic.
    """

    scores: Floats
    layers: Mapping[int, int]


class Run(Protocol):
    """`tracer.explain.probes.held_out.left_out` with all but what is trained, and where, filled in."""

    def __call__(self, train: Trainer, layers: Mapping[int, int]) -> Floats:
        """Scores ``(repeats, rows)``."""


def trainer(kind: str) -> Trainer:
    """Fits probes of a kind."""
    return lambda examples, seed: fit(kind, examples, seed=seed)


def control_scores(kind: str, material: Material, layers: Mapping[int, int], run: Run) -> dict[str, Control]:
    """The same protocol where there is nothing to learn.

    Args:
        kind: The kind of probe.
        material: The statements.
        layers: The layer for each topic.
        run: Leaves topics out.

    Returns:
        Shuffled labels, a random direction, and the first layer, by name.
    """

    def on_shuffled(examples: Examples, seed: int) -> Probe:
        labels = np.random.default_rng(seed).permutation(examples.labels)
        return fit(kind, examples.with_labels(labels), seed=seed)

    first = dict.fromkeys(layers, material.layers[0])
    return {
        f"{kind}, shuffled labels": Control(run(on_shuffled, layers), layers),
        "random direction": Control(run(_random_direction, layers), layers),
        f"{kind}, layer {material.layers[0]}": Control(run(trainer(kind), first), first),
    }


def text_scores(material: Material, *, repeats: int = REPEATS, seed: int = 0) -> Floats:
    """Scores of every statement by logistic regression on TF-IDF of the words of other topics' statements.

    Returns:
        ``(repeats, rows)``, above zero for true.
    """
    examples = material.examples
    texts = np.array([item.text for item in material.statements], dtype=object)
    scores = np.full((repeats, len(texts)), np.nan)
    for topic in range(len(material.topics)):
        test = np.flatnonzero(examples.topics == topic)
        others = [number for number in range(len(material.topics)) if number != topic]
        for repeat in range(repeats):
            rows = equal_rows(examples, others, np.random.default_rng([seed, repeat, topic]))
            scores[repeat, test] = text_scorer(texts[rows], examples.labels[rows])(texts[test])
    return scores


def text_scorer(texts: Texts, labels: Flags) -> Callable[[Texts], Floats]:
    """Logistic regression on TF-IDF of single words and pairs; scores other texts, above zero for true."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    words = TfidfVectorizer(ngram_range=(1, 2), token_pattern=_WORD)
    model = LogisticRegression(max_iter=1000).fit(words.fit_transform(texts), labels)

    def score(others: Texts) -> Floats:
        found: Floats = model.decision_function(words.transform(others))
        return found

    return score


def _random_direction(examples: Examples, seed: int) -> Probe:
    """A direction that knows nothing, with the sign and threshold that the training rows give it."""
    direction: Floats = np.random.default_rng(seed).standard_normal((examples.values.shape[1],))
    return along("random", examples, direction)
