"""Bundled tasks: word problems, Games of 24, and questions over documents about fictional places."""

from __future__ import annotations

import ast
import importlib.resources
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

from tracer.errors import UnknownNameError
from tracer.trace.trace import Document

__all__ = ["BundledTask", "TaskKind", "check_game24", "documents_folder", "load_tasks"]

TaskKind = Literal["word", "game24", "multihop", "rag"]


@dataclass(frozen=True)
class BundledTask:
    """A task that comes with the package.

    Args:
        id: Unique among all bundled tasks.
        kind: ``"word"``, ``"game24"``, ``"multihop"`` or ``"rag"``.
        question: What the agent is asked.
        reference: The right answer: a number, one solution of a game, or a name.
        documents: Folder of the documents that hold the answer, for ``"multihop"``.
        supporting: Ids of the documents that are needed, in the order of the hops.
        numbers: The four numbers of a game.
        passages: The six passages that go with the question, for ``"rag"``: some are needed, the others are not.
    """

    id: str
    kind: TaskKind
    question: str
    reference: str
    documents: Path | None = None
    supporting: tuple[str, ...] = ()
    numbers: tuple[int, ...] = ()
    passages: tuple[Document, ...] = ()


def _package() -> Path:
    return Path(str(importlib.resources.files("tracer.tasks")))


def documents_folder() -> Path:
    """Give the folder of the bundled documents."""
    return _package() / "documents"


def load_tasks(kind: TaskKind) -> list[BundledTask]:
    """Load the bundled tasks of one kind.

    Args:
        kind: ``"word"`` (ten), ``"game24"`` (five), ``"multihop"`` (six) or ``"rag"`` (ten).

    Returns:
        The tasks, in a fixed order.

    Raises:
        UnknownNameError: If there is no such kind.
    """
    if kind not in get_args(TaskKind):
        raise UnknownNameError("kind of task", kind, get_args(TaskKind))
    rows: list[dict[str, Any]] = json.loads((_package() / "data" / f"{kind}.json").read_text(encoding="utf-8"))
    return [
        BundledTask(
            id=row["id"],
            kind=kind,
            question=row["question"],
            reference=row["reference"],
            documents=documents_folder() if kind == "multihop" else None,
            supporting=tuple(row.get("supporting", ())),
            numbers=tuple(row.get("numbers", ())),
            passages=tuple(_passage(name) for name in row.get("passages", ())),
        )
        for row in rows
    ]


def _passage(name: str) -> Document:
    """The first paragraph of a bundled document."""
    title, _, text = (documents_folder() / f"{name}.md").read_text(encoding="utf-8").partition("\n\n")
    return Document(id=name, title=title.removeprefix("# "), text=text.partition("\n\n")[0])


def _value(node: ast.expr, used: list[int]) -> Fraction:
    match node:
        case ast.Constant(value=int(value)):
            used.append(value)
            return Fraction(value)
        case ast.BinOp(left=left, op=op, right=right):
            first, second = _value(left, used), _value(right, used)
            match op:
                case ast.Add():
                    return first + second
                case ast.Sub():
                    return first - second
                case ast.Mult():
                    return first * second
                case ast.Div():
                    return first / second
    raise ValueError("not a sum, difference, product or quotient of whole numbers")


def check_game24(expression: str, numbers: Sequence[int]) -> bool:
    """Check a solution of a Game of 24 exactly.

    Args:
        expression: Arithmetic with ``+ - * /`` and parentheses; ``= 24`` may follow it.
        numbers: The numbers that it must use, each exactly once.

    Returns:
        Whether it is such an expression, uses those numbers and is exactly 24.
    """
    text, equals, result = expression.partition("=")
    if len(text) > 200 or not re.fullmatch(r"[0-9+\-*/() \t]+", text) or (equals and result.strip() != "24"):
        return False
    used: list[int] = []
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body, used)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return False
    return value == 24 and sorted(used) == sorted(numbers)
