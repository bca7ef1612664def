"""A calculator for models: arithmetic and common functions, and nothing else of Python.

The expression is parsed, every node is checked against a short list, and ``simpleeval`` walks what is left with
operators that bound the size of their results. So neither time nor memory can run away: an expression has at most
1,000 characters and no intermediate value has more than 4,096 bits.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated

from simpleeval import InvalidExpression, SimpleEval

from tracer.errors import ToolError

if TYPE_CHECKING:
    from langchain_core.tools import BaseTool

Number = int | float

MAX_CHARS = 1000
MAX_NESTING = 50
MAX_BITS = 4096


def _sized(value: object) -> Number:
    if not isinstance(value, (int, float)):
        raise ToolError("the result is not a real number; check the signs of what is under a root or a power")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ToolError("the result is too large or not a number")
    elif value.bit_length() > MAX_BITS:
        raise ToolError("the result is too large; use smaller numbers or exponents")
    return value


def _power(base: Number, exponent: Number) -> Number:
    # The size of an integer power is known before it is computed; floats overflow by themselves.
    if isinstance(base, int) and isinstance(exponent, int) and abs(base).bit_length() * abs(exponent) > 2 * MAX_BITS:
        if abs(base) > 1:
            raise ToolError("the power is too large; use a smaller base or exponent")
        exponent %= 2
    return _sized(base**exponent)


def _round(value: Number, digits: int | None = None) -> Number:
    # Rounding a whole number to -n digits computes 10**n.
    if digits is not None and (not isinstance(digits, int) or abs(digits) > 400):
        raise ToolError("round takes a whole number of digits between -400 and 400")
    return round(value, digits)


def _factorial(value: Number) -> int:
    if value != int(value) or not 0 <= value <= 400:
        raise ToolError("factorial takes a whole number between 0 and 400")
    return math.factorial(int(value))


def _bounded(function: Callable[..., object]) -> Callable[..., Number]:
    def call(*values: Number) -> Number:
        return _sized(function(*values))

    return call


_CONSTANTS = {"pi": math.pi, "e": math.e}
_ONE_ARGUMENT: Mapping[str, Callable[..., object]] = {
    "abs": abs,
    "ceil": math.ceil,
    "cos": math.cos,
    "exp": math.exp,
    "factorial": _factorial,
    "floor": math.floor,
    "ln": math.log,
    "log10": math.log10,
    "log2": math.log2,
    "sin": math.sin,
    "sqrt": math.sqrt,
    "tan": math.tan,
}
_MORE_ARGUMENTS: Mapping[str, Callable[..., object]] = {
    "gcd": math.gcd,
    "log": math.log,
    "max": max,
    "min": min,
    "round": _round,
}
_FUNCTIONS = {name: _bounded(function) for name, function in (_ONE_ARGUMENT | _MORE_ARGUMENTS).items()}  # type: ignore[operator]
_OPERATORS: Mapping[type[ast.AST], Callable[..., object]] = {
    ast.Add: _bounded(operator.add),
    ast.Sub: _bounded(operator.sub),
    ast.Mult: _bounded(operator.mul),
    ast.Div: _bounded(operator.truediv),
    ast.FloorDiv: _bounded(operator.floordiv),
    ast.Mod: _bounded(operator.mod),
    ast.Pow: _power,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Not: operator.not_,
}
_ALLOWED = (ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.And, ast.Or, ast.Compare, ast.Load, *_OPERATORS)

_SIGNS = str.maketrans(
    {"×": "*", "⋅": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "≤": "<=", "≥": ">=", "≠": "!=", "^": "**", "\n": " "}
)
_SEPARATED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_FOREIGN = re.compile(r"[^0-9A-Za-z_+\-*/%().,<>=! \t]")
_GLUED = re.compile(r"(?<![A-Za-z_\d.])((?>\d[\d_]*\.?\d*|\.\d+)(?>(?:[eE][+-]?\d+)?))(?=([A-Za-z_]+|\())")
_CALLED = re.compile(r"([A-Za-z_]\w*)\s*$")


def _drop_separators(text: str) -> str:
    """Turn ``1,000`` into ``1000``, but not where a comma may separate a function's arguments."""
    inside: list[str] = []
    kept: list[str] = []
    start = 0
    for match in re.finditer(r"[()]|$", text):
        piece = text[start : match.start()]
        ambiguous = bool(inside) and inside[-1] in _MORE_ARGUMENTS
        kept.append(piece if ambiguous else _SEPARATED.sub(lambda found: found[0].replace(",", ""), piece))
        kept.append(match[0])
        if match[0] == "(":
            name = _CALLED.search(piece)
            inside.append(name[1] if name else "")
        elif match[0] == ")" and inside:
            inside.pop()
        start = match.end()
    return "".join(kept)


def _normalise(expression: str) -> str:
    if len(expression) > MAX_CHARS:
        raise ToolError(f"the expression has {len(expression)} characters; the calculator takes at most {MAX_CHARS}")
    text = expression.translate(_SIGNS).strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'`":
        text = text[1:-1]
    text = text.strip().removesuffix("=").rstrip()
    if not text:
        raise ToolError("the expression is empty; give arithmetic such as 3 * (4 + 5)")
    if foreign := _FOREIGN.search(text):
        raise ToolError(f"the character {foreign[0]!r} is not arithmetic; use numbers, + - * / % ^ ( ) and functions")
    depth = deepest = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    if deepest > MAX_NESTING:
        raise ToolError(f"parentheses are nested {deepest} deep; the calculator takes at most {MAX_NESTING}")
    text = _drop_separators(text)
    if glued := _GLUED.search(text):
        raise ToolError(f"write the multiplication after {glued[1]!r} as {glued[1]} * {glued[2]}")
    return text


def _check(node: ast.AST) -> None:
    names = {id(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)}
    for part in ast.walk(node):
        match part:
            case ast.Call(func=ast.Name(id=name), keywords=[]) if name in _FUNCTIONS:
                continue
            case ast.Call(func=ast.Name(id=name)) if name in _FUNCTIONS:
                raise ToolError(f"{name} takes plain arguments, without names")
            case ast.Call(func=ast.Name(id=name)):
                raise ToolError(f"there is no function {name!r} here; known: {', '.join(sorted(_FUNCTIONS))}")
            case ast.Name(id=name) if id(part) not in names and name not in _CONSTANTS:
                raise ToolError(f"the name {name!r} stands for nothing here; use numbers, pi, e and functions")
            case ast.Constant(value=value) if type(value) not in (int, float):
                raise ToolError("only whole and decimal numbers can be used")
            case ast.Tuple():
                raise ToolError("the commas are not clear; write numbers without them, such as 12000")
            case ast.Name() | ast.Constant():
                continue
            case _ if not isinstance(part, _ALLOWED):
                raise ToolError(f"{type(part).__name__} is not arithmetic; use numbers, operators and functions only")


def evaluate(expression: str) -> int | float | bool:
    """Compute an arithmetic expression.

    ``^`` is a power, ``%`` is the remainder, ``1,000`` is a thousand (outside the arguments of a function that takes
    several), and the signs ``× ÷ −`` are understood.

    Args:
        expression: The text to compute, at most 1,000 characters.

    Returns:
        The value, as Python would compute it.

    Raises:
        ToolError: If it is not arithmetic, has no real value, or the value would be too large.
    """
    text = _normalise(expression)
    evaluator = SimpleEval(operators=dict(_OPERATORS), functions=dict(_FUNCTIONS), names=dict(_CONSTANTS))
    try:
        tree = ast.parse(text, mode="eval").body
        _check(tree)
        value = evaluator.eval(text, previously_parsed=tree)
    except ToolError:
        raise
    except SyntaxError:
        hint = "; compare with ==" if re.search(r"(?<![<>=!])=(?!=)", text) else ""
        hint = hint or ("; write 15% of 80 as 15 / 100 * 80" if "%" in text else "")
        raise ToolError(f"{_shown(expression)} is not an arithmetic expression{hint}") from None
    except (RecursionError, MemoryError):
        raise ToolError("the expression is nested too deeply") from None
    except ZeroDivisionError:
        raise ToolError(f"division by zero in {_shown(expression)}") from None
    except OverflowError:
        raise ToolError("the result is too large") from None
    except (ValueError, TypeError, ArithmeticError, InvalidExpression) as error:
        raise ToolError(f"{_shown(expression)} cannot be computed: {error}") from None
    return value if isinstance(value, bool) else _sized(value)


def _shown(expression: str) -> str:
    text = " ".join(expression.split())
    return repr(text if len(text) <= 80 else text[:77] + "...")


def format_number(value: int | float | bool) -> str:
    """Write a value the way a person would: whole numbers without ``.0``, other ones with 12 significant digits."""
    if isinstance(value, float):
        if value.is_integer() and abs(value) < 1e15:
            return str(int(value))
        return format(value, ".12g")
    return str(value)


def _calculate(
    expression: Annotated[str, "An arithmetic expression, for example (3 + 4) * 12 / 2 or sqrt(2) ^ 3"],
) -> str:
    return format_number(evaluate(expression))


def calculator() -> BaseTool:
    """Build the calculator tool, which takes one ``expression`` (see `evaluate`)."""
    from langchain_core.tools import StructuredTool

    return StructuredTool.from_function(
        func=_calculate,
        name="calculator",
        description="Computes an arithmetic expression and returns the number.",
    )
