"""Which step of one run stands beside which of the other."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from tests.ui import samples
from tracer.trace.trace import Step, Trace
from ui.alignment import align, word_changes


def run(*steps: tuple[str, str] | tuple[str, str, str]) -> Trace:
    """A run of steps given by kind, text and perhaps branch."""
    return samples.long(1).model_copy(
        update={
            "steps": [
                Step(id=f"s{number}", kind=step[0], text=step[1], branch=step[2] if len(step) > 2 else None)  # type: ignore[arg-type]
                for number, step in enumerate(steps)
            ]
        }
    )


def shown(left: Trace, right: Trace) -> list[tuple[int | None, int | None, str]]:
    """The pairs as plain tuples."""
    return [tuple(pair) for pair in align(left, right)]


def test_a_run_is_the_same_as_itself() -> None:
    trace = samples.tot()
    assert shown(trace, trace) == [(place, place, "same") for place in range(len(trace.steps))]


def test_a_changed_step_stands_beside_what_it_was() -> None:
    left = run(("question", "q"), ("thought", "a"), ("answer", "x"))
    right = run(("question", "q"), ("thought", "b"), ("answer", "x"))
    assert shown(left, right) == [(0, 0, "same"), (1, 1, "changed"), (2, 2, "same")]


def test_a_step_that_came_in_between_stands_alone() -> None:
    left = run(("question", "q"), ("thought", "a"), ("answer", "x"))
    right = run(("question", "q"), ("action", "search"), ("observation", "found"), ("thought", "a"), ("answer", "y"))
    assert shown(left, right) == [
        (0, 0, "same"),
        (None, 1, "right"),
        (None, 2, "right"),
        (1, 3, "same"),
        (2, 4, "changed"),
    ]


def test_branches_keep_to_themselves() -> None:
    left = run(("question", "q"), ("thought", "a", "b1"), ("answer", "1", "b1"), ("thought", "c", "b2"))
    right = run(("question", "q"), ("thought", "z", "b1"), ("thought", "d", "b2"), ("answer", "2", "b2"))
    assert (3, 2, "changed") in shown(left, right)
    assert (2, None, "left") in shown(left, right)


def test_runs_of_different_agents_meet_in_question_and_answer() -> None:
    left = run(("question", "q"), ("thought", "a"), ("answer", "x"))
    right = run(("question", "q"), ("action", "b"), ("observation", "c"), ("answer", "x"))
    assert shown(left, right)[0] == (0, 0, "same") and shown(left, right)[-1] == (2, 3, "same")


steps = st.lists(st.tuples(st.sampled_from(["thought", "action", "answer"]), st.sampled_from("abc")), max_size=12)


@given(steps, steps)
def test_every_step_is_shown_once_and_in_order(left: list[tuple[str, str]], right: list[tuple[str, str]]) -> None:
    pairs = align(run(*left), run(*right))
    assert [pair.left for pair in pairs if pair.left is not None] == list(range(len(left)))
    assert [pair.right for pair in pairs if pair.right is not None] == list(range(len(right)))
    for pair in pairs:
        if pair.left is not None and pair.right is not None:
            assert left[pair.left][0] == right[pair.right][0]
            assert (pair.change == "same") == (left[pair.left][1] == right[pair.right][1])


def test_thousands_of_different_steps_take_no_minutes() -> None:
    left, right = samples.long(1500), samples.long(1500)
    for step in right.steps:
        step.text += "!"
    began = time.perf_counter()
    assert {pair.change for pair in align(left, right)} == {"changed"}
    assert time.perf_counter() - began < 10


def test_words_that_came_and_went() -> None:
    assert list(word_changes("the answer is 7 now", "so the answer is 8 now")) == [
        ("+", "so"),
        (" ", "the answer is"),
        ("-", "7"),
        ("+", "8"),
        (" ", "now"),
    ]
