"""Which rows of the step map words are found in."""

from __future__ import annotations

import pytest

from tests.ui import samples
from ui.components.step_map import Row, map_data, matches
from ui.evidence import Evidence


def rows(*texts: str) -> list[Row]:
    """Steps of these texts."""
    steps = samples.long(len(texts)).steps
    return [
        Row(step.model_copy(update={"text": text}), None, number, text)
        for number, (step, text) in enumerate(zip(steps, texts, strict=True), 1)
    ]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", []),
        ("  \n ", []),
        ("OSLO", [0, 2]),
        ("born in", [0]),
        ("in  oslo", [0]),
        ("<b>", [1]),
        ("bergen", []),
        ("x" * 10_000, []),
    ],
)
def test_words_are_found_in_whole_texts(query: str, expected: list[int]) -> None:
    found = rows("She was " + "long ago " * 100 + "born in\nOslo.", "<b>bold</b>", "oslo")
    assert matches(found, query) == expected


def test_whether_lines_are_shortened_is_told() -> None:
    evidence = Evidence(samples.long(2))
    assert not map_data(evidence, rows("short", "also short"), method=None)["shortened"]
    assert map_data(evidence, rows("short", "word " * 100), method=None)["shortened"]
