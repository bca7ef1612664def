"""Finding and comparing answers."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer.trace.answers import answer_class, extract_answer, is_correct, normalise, parse_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("So it is 12. The answer is 1,000.", "1,000"),
        ("The answer is $18.50.", "18.50"),
        ("The answer is 3 + 4 = 7. Good.", "7"),
        ("the answer is 12 apples", "12"),
        ("Answer: -5", "-5"),
        ("it is \\boxed{42}, and 3 more", "42"),
        ("so \\boxed{\\frac{3}{4}}", "\\frac{3}{4}"),
        ("The answer is 5. Wait, the answer is 6.", "6"),
        ("first 12, then 15 apples", "15"),
        ("3/4 of it", "3/4"),
        ("no number here", None),
        ("The answer is unknown", None),
        ("version v2", None),
        ("", None),
    ],
)
def test_numbers(text: str, value: str | None) -> None:
    found = extract_answer(text, numeric=True)
    assert (found.value if found else None) == value
    if found:
        assert text[found.start : found.end] == found.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("So the answer is Norway. Because of it.", "Norway"),
        ("The final answer is: **the Sorv**", "the Sorv"),
        ("Answer: St. Ives is it", "St. Ives is it"),
        ("nothing of the kind", None),
        ("the answer is", None),
    ],
)
def test_texts(text: str, value: str | None) -> None:
    found = extract_answer(text)
    assert (found.value if found else None) == value


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1,000", "1000.0", True),
        ("$5", "5 dollars", True),
        ("3/4", "0.75", True),
        ("\\frac{3}{4}", "0.75", True),
        ("x = 4", "4", True),
        ("-4", "4", False),
        ("The Norway!", "norway", True),
        ("5", "five", False),
        ("3 or 4", "3", False),
        ("1/0", "0", False),
        ("12 * 8 / (5 - 1)", "12 * 8 / 5 - 1", False),
        ("(1 + 2) * 3", "(1+2)*3.", True),
    ],
)
def test_equal_answers_have_equal_forms(one: str, other: str, same: bool) -> None:
    assert (normalise(one) == normalise(other)) is same


@given(st.fractions(max_denominator=1000))
def test_fractions_are_exact(number: Fraction) -> None:
    assert parse_number(f"{number.numerator}/{number.denominator}") == number


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{:,}", "${:,}", "{} apples", "x = {}", " {} "]))
def test_integers_survive_their_decoration(number: int, form: str) -> None:
    assert parse_number(form.format(number)) == number


@given(st.lists(st.sampled_from(["Oslo", "the", "River", "12", "no"]), max_size=6))
def test_case_space_articles_and_punctuation_do_not_matter(words: list[str]) -> None:
    assert normalise(" ".join(words)) == normalise(f"  {'  '.join(words).upper()}!")


@given(st.text(max_size=60))
def test_any_text_can_be_searched_and_normalised(text: str) -> None:
    normalise(text)
    for numeric in (True, False):
        found = extract_answer(text, numeric=numeric)
        assert found is None or text[found.start : found.end] == found.value


def test_correctness() -> None:
    assert is_correct("72", None) is None
    assert is_correct(None, "72") is False
    assert is_correct("72.0", "72") is True


def test_a_truncated_chain_is_a_class_of_its_own() -> None:
    late = extract_answer("we have 3 and", numeric=True)
    stated = extract_answer("the answer is 3 and", numeric=True)
    assert answer_class(late, cut=True) == "truncated"
    assert answer_class(stated, cut=True) == "answered"
    assert answer_class(late, cut=False) == "answered"
    assert answer_class(None, cut=False) == "no_answer"
    assert answer_class(None, cut=True) == "truncated"
