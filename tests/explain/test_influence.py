"""Influence through the steps, against a walk over every path and against the matrix inverse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import relaxed, small_trace
from tracer.errors import TraceFormatError, UnknownNameError
from tracer.explain.influence import influence_on, influences, is_complete, shares, through_steps
from tracer.trace.explanation import Explanation, ExplanationSource


def explanation(targets: list[str], steps: list[str | None], values: list[list[float]]) -> Explanation:
    sources = [ExplanationSource(id=f"x{number}", step_id=step) for number, step in enumerate(steps)]
    return Explanation(method="m", targets=targets, sources=sources, values=values)


@st.composite
def explanations(draw: st.DrawFn) -> Explanation:
    """Steps in a row, each shown by one or two sources, and roots; a step reads roots, itself and earlier steps."""
    count = draw(st.integers(1, 6))
    names = [f"s{number}" for number in range(count)]
    explained = [name for name in names[:-1] if draw(st.booleans())] + names[-1:]
    steps: list[str | None] = [None] * draw(st.integers(1, 3))
    for name in names:
        steps += [name] * draw(st.integers(1, 2))
    values = []
    for target in explained:
        row = []
        for step in steps:
            readable = step is None or int(step[1:]) <= int(target[1:])
            row.append(draw(st.floats(-2, 2)) if readable else 0.0)
        row[0] = draw(st.sampled_from([0.5, -1.0]))  # something is always read
        values.append(row)
    order = draw(st.permutations(range(len(explained))))
    return explanation([explained[at] for at in order], steps, [values[at] for at in order])


def by_paths(found: Explanation, step_id: str) -> list[float]:
    """Follow every path from a step to every source, one at a time."""
    total = [0.0] * len(found.sources)

    def walk(step: str, weight: float) -> None:
        for number, share in enumerate(shares(found, step)):
            if share == 0.0:
                continue
            total[number] += weight * share
            onward = found.sources[number].step_id
            if onward in found.targets:
                walk(str(onward), weight * share)

    walk(step_id, 1.0)
    return total


@relaxed
@given(explanations())
def test_it_equals_the_sum_over_all_paths(found: Explanation) -> None:
    for target in found.targets:
        through = through_steps(found, target)
        np.testing.assert_allclose(list(through.values()), by_paths(found, target), atol=1e-12)


@relaxed
@given(explanations())
def test_it_equals_the_resolvent_and_roots_add_up_to_one(found: Explanation) -> None:
    share = np.array([shares(found, target) for target in found.targets])
    shown = np.array([[source.step_id == target for target in found.targets] for source in found.sources], dtype=float)
    root = ~shown.any(axis=1)
    for number, target in enumerate(found.targets):
        flow = np.linalg.inv(np.eye(len(found.targets)) - share @ shown)[number]
        through = np.array(list(through_steps(found, target).values()))
        np.testing.assert_allclose(through, flow @ share, atol=1e-12)
        assert through[root].sum() == pytest.approx(1.0)


def test_a_chain_worked_out_by_hand() -> None:
    # s2 read the question only; s3 read 1/4 of the question and 3/4 of s2, of which it half spoke against.
    found = explanation(["s2", "s3"], ["s1", "s2", "s3"], [[2.0, 9.0, 0.0], [1.0, -3.0, 5.0]])
    trace = small_trace(explanations=[found.model_dump(mode="json")])
    (question, thought) = influence_on(trace, "m", "s3")
    assert (question.source.step_id, question.direct, question.through, question.root) == ("s1", 0.25, 1.0, True)
    assert (thought.source.step_id, thought.direct, thought.through, thought.root) == ("s2", 0.75, 0.75, False)


def test_steps_that_were_not_explained_or_read_nothing_are_roots() -> None:
    found = explanation(["s3", "s4"], ["s1", "s2", "s3"], [[0.0, 0.0, 7.0], [1.0, 1.0, 2.0]])
    assert {item.source.step_id: (item.through, item.root) for item in influences(found, "s4")} == {
        "s1": (0.25, True),
        "s2": (0.25, True),
        "s3": (0.5, True),
    }


def test_what_cannot_be_asked() -> None:
    circle = explanation(["a", "b"], ["a", "b"], [[0.0, 1.0], [1.0, 0.0]])
    with pytest.raises(TraceFormatError, match="contradicts itself"):
        through_steps(circle, "a")
    with pytest.raises(UnknownNameError, match="target of m"):
        through_steps(circle, "c")
    with pytest.raises(UnknownNameError, match="explanation of this trace"):
        influence_on(small_trace(), "m", "a")


def test_ways_are_complete_where_all_steps_of_the_model_on_them_are_explained() -> None:
    sources = [
        ExplanationSource(id="x0", step_id="s1"),
        ExplanationSource(id="x1", step_id="s2", completion=0),
        ExplanationSource(id="x2", step_id="s3", completion=0),
    ]

    def made(**rows: list[float]) -> Explanation:
        return Explanation(method="m", targets=list(rows), sources=sources, values=list(rows.values()))

    assert not is_complete(made(s4=[1.0, 2.0, 0.0]), "s4")
    assert is_complete(made(s2=[1.0, 0.0, 0.0], s4=[1.0, 2.0, 0.0]), "s4")
    # What was not read need not be explained; a question is no step of the model.
    assert is_complete(made(s4=[1.0, 0.0, 0.0]), "s4")
    # The thought in between leads to one that is not explained.
    assert not is_complete(made(s3=[1.0, 2.0, 0.0], s4=[1.0, 0.0, 2.0]), "s4")
