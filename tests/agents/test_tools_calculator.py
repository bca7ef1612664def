"""The calculator agrees with Python on arithmetic and refuses everything else."""

from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer.agents.tools import calculator
from tracer.agents.tools.calculator import evaluate, format_number
from tracer.errors import ToolError

numbers = st.one_of(
    st.integers(0, 10**6).map(str),
    st.floats(0, 1e6, allow_nan=False).map(lambda value: format(value, ".6f")),
)


def combine(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    operator = st.sampled_from(["+", "-", "*", "/", "//", "%"])
    return st.one_of(
        st.tuples(inner, operator, inner).map(" ".join),
        inner.map(lambda text: f"({text})"),
        inner.map(lambda text: f"-({text})"),
        inner.map(lambda text: f"abs({text})"),
        st.tuples(inner, inner).map(lambda pair: f"max({pair[0]}, {pair[1]})"),
        st.tuples(inner, st.integers(-2, 4)).map(lambda pair: f"round({pair[0]}, {pair[1]})"),
        inner.map(lambda text: f"round({text})"),
        st.tuples(inner, st.sampled_from(["<", "<=", "==", "!="]), inner).map(lambda t: f"(({t[0]}) {t[1]} ({t[2]}))"),
        st.tuples(inner, st.integers(0, 3)).map(lambda pair: f"({pair[0]}) ** {pair[1]}"),
    )


@given(st.recursive(numbers, combine, max_leaves=8))
def test_it_agrees_with_python(expression: str) -> None:
    try:
        expected = eval(expression, {"__builtins__": {}}, {"abs": abs, "max": max, "round": round})  # noqa: S307
    except (ZeroDivisionError, OverflowError):
        with pytest.raises(ToolError):
            evaluate(expression)
        return
    if isinstance(expected, float) and not math.isfinite(expected):
        return
    value = evaluate(expression)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2 ^ 10", 1024),
        ("1,000 * 3", 3000),
        ("1,234,567.5 + 1", 1234568.5),
        ("max(100,200)", 200),
        ("max((1,000), 5)", 1000),
        ("sqrt(1,000,000)", 1000),
        ("round(2.345,2)", round(2.345, 2)),
        ("3 × 4 ÷ 2 − 1", 5),
        ("17 % 5", 2),
        ("2 * pi", 2 * math.pi),
        ("ln(e)", 1),
        ("floor(2.7) + ceil(2.2)", 5),
        ("log(8, 2)", 3),
        ("3 >= 2", True),
        ("1 < 2 and not 3 < 2", True),
        ("12 + 30 =", 42),
        ("'12 + 30'", 42),
        ("1e3 + 1_000", 2000),
        ("(-1) ** 99999999", -1),
        ("factorial(5)", 120),
    ],
)
def test_it_reads_what_people_and_models_write(expression: str, value: float) -> None:
    assert evaluate(expression) == pytest.approx(value)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "empty"),
        ("   \n ", "empty"),
        ("9**9**9", "too large"),
        ("9^9^9^9", "too large"),
        ("2 ** 5000", "too large"),
        ("10.0 ** 400", "too large"),
        ("1e400", "too large"),
        ("factorial(100000)", "between 0 and 400"),
        ("round(1, -10**9)", "between -400 and 400"),
        ("(2 ** 4000) * (2 ** 4000)", "too large"),
        ("9" * 100_000, "at most 1000"),
        ("(" * 10_000 + "1" + ")" * 10_000, "at most 1000"),
        ("(" * 400 + "1" + ")" * 400, "nested 400 deep"),
        ("-" * 990 + "1", "nested too deeply"),
        ("1 / 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("sqrt(-1)", "cannot be computed"),
        ("(-8) ** (1/3)", "not a real number"),
        ("2j * 2", "write the multiplication"),
        ("2pi", "2 \\* pi"),
        ("3(4)", "write the multiplication"),
        ("15% of 80", "15 / 100 \\* 80"),
        ("1,00 + 2", "commas"),
        ("2 + 2 = 4", "=="),
        ("x + 1", "'x' stands for nothing"),
        ("sqrt", "stands for nothing"),
        ("open(1)", "no function 'open'"),
        ("round(1, ndigits=2)", "without names"),
        ("max(*1)", "Starred"),
        ("max()", "cannot be computed"),
        ("True + 1", "whole and decimal"),
        ("1 if 2 else 3", "not arithmetic"),
        ("lambda: 1", "':' is not arithmetic"),
        ("__import__('os').system('true')", "is not arithmetic"),
        ("pi.__class__", "Attribute"),
        ("(1).real", "Attribute"),
        ("[1] * 9", "'\\[' is not arithmetic"),
        ("1; 2", "';' is not arithmetic"),
        ("1\0", "is not arithmetic"),
        ("+", "not an arithmetic expression"),
    ],
)
def test_it_refuses_the_rest_in_one_line(expression: str, message: str) -> None:
    with pytest.raises(ToolError, match=message) as caught:
        evaluate(expression)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@given(st.text(max_size=200))
def test_any_text_gives_a_number_or_a_tool_error(expression: str) -> None:
    with contextlib.suppress(ToolError):
        assert isinstance(evaluate(expression), (int, float))


@given(st.text(alphabet="0123456789.,+-*/%^()<>=! epsqrtmaxlogund", max_size=60))
def test_any_near_arithmetic_gives_a_number_or_a_tool_error(expression: str) -> None:
    with contextlib.suppress(ToolError):
        assert isinstance(evaluate(expression), (int, float))


@pytest.mark.parametrize(
    ("value", "text"),
    [(6.0, "6"), (-0.0, "0"), (0.1 + 0.2, "0.3"), (1e300, "1e+300"), (10**30, "1" + "0" * 30), (True, "True")],
)
def test_numbers_are_written_as_a_person_would(value: float, text: str) -> None:
    assert format_number(value) == text


def test_the_tool_takes_an_expression() -> None:
    assert calculator().invoke({"expression": "(3 + 4) * 12 / 2"}) == "42"
