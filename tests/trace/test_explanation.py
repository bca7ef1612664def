"""Which of several explanations by one method stands for it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.strategies import small_trace
from tracer.errors import TraceFormatError, UnknownNameError
from tracer.trace.explanation import choose_explanations, find_explanation


def document(seed: int, *, targets: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "method": "m",
        "targets": [f"s{number}" for number in range(targets)],
        "sources": [],
        "values": [[]] * targets,
        "seed": seed,
        **changes,
    }


FORCED = {"parity": {"forced": True}}


@pytest.mark.parametrize(
    ("documents", "chosen"),
    [
        ([document(1), document(2)], 2),
        ([document(1, targets=3), document(2)], 1),
        ([document(1), document(2, targets=3, target_function="contrast")], 1),
        ([document(1, target_function="logit"), document(2, targets=3, **FORCED)], 1),
        ([document(1, targets=3, **FORCED), document(2)], 2),
        ([document(1), document(2, targets=0)], 1),
        ([document(1), {"method": "m", "values": "odd"}], 1),
    ],
)
def test_the_one_that_says_most_of_what_ran_stands_for_a_method(documents: list[dict[str, Any]], chosen: int) -> None:
    found, unreadable = choose_explanations(documents)
    assert found["m"].seed == chosen
    assert unreadable == sum("seed" not in item for item in documents)
    trace = small_trace().model_copy(update={"explanations": documents})
    assert find_explanation(trace, "m").seed == chosen


def test_what_cannot_be_read_or_is_not_there_is_said() -> None:
    trace = small_trace().model_copy(update={"explanations": [{"method": "m", "values": "odd"}]})
    with pytest.raises(TraceFormatError, match="cannot be read"):
        find_explanation(trace, "m")
    with pytest.raises(UnknownNameError, match="known: m"):
        find_explanation(trace, "another")
