"""The bundled tasks: every reference is right, and every question can be answered from the documents."""

from __future__ import annotations

import ast
import json
from fractions import Fraction
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer.agents.tools import load_documents
from tracer.agents.tools.search import index_folder
from tracer.errors import UnknownNameError
from tracer.tasks import BundledTask, TaskKind, check_game24, documents_folder, load_tasks
from tracer.trace.trace import Document

KINDS: tuple[TaskKind, ...] = ("word", "game24", "multihop", "rag")


def raw(kind: TaskKind) -> dict[str, dict[str, Any]]:
    text = (documents_folder().parent / "data" / f"{kind}.json").read_text(encoding="utf-8")
    return {row["id"]: row for row in json.loads(text)}


def documents() -> dict[str, Document]:
    return {document.id: document for document in load_documents(documents_folder())}


def solutions(values: tuple[Fraction, ...]) -> bool:
    """Brute force: combine any two values by any operator until one is left."""
    if len(values) == 1:
        return values[0] == 24
    for first, second, *rest in permutations(values):
        results = [first + second, first - second, first * second]
        if second:
            results.append(first / second)
        if any(solutions((result, *rest)) for result in results):
            return True
    return False


def exact(node: ast.expr) -> Fraction:
    """Evaluate a word problem's expression exactly."""
    if isinstance(node, ast.Constant):
        return Fraction(str(node.value))
    assert isinstance(node, ast.BinOp)
    left, right = exact(node.left), exact(node.right)
    match node.op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case _:
            return left / right


def operations(expression: str) -> int:
    return sum(isinstance(node, ast.BinOp) for node in ast.walk(ast.parse(expression)))


@pytest.mark.parametrize(("kind", "count"), [("word", 10), ("game24", 5), ("multihop", 6), ("rag", 10)])
def test_the_promised_number_of_tasks_is_there(kind: TaskKind, count: int) -> None:
    tasks = load_tasks(kind)
    assert len(tasks) == count
    assert all(task.kind == kind and task.question and task.reference for task in tasks)


def test_ids_are_unique() -> None:
    ids = [task.id for kind in KINDS for task in load_tasks(kind)]
    assert len(ids) == len(set(ids))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'word'"):
        load_tasks("words")  # type: ignore[arg-type]


@pytest.mark.parametrize("task", load_tasks("word"), ids=lambda task: task.id)
def test_a_word_problem_has_the_reference_that_its_arithmetic_gives(task: BundledTask) -> None:
    expression = raw("word")[task.id]["expression"]
    assert exact(ast.parse(expression, mode="eval").body) == Fraction(task.reference)
    assert operations(expression) >= 2


@pytest.mark.parametrize("task", load_tasks("game24"), ids=lambda task: task.id)
def test_a_game_can_be_solved(task: BundledTask) -> None:
    assert len(task.numbers) == 4
    assert solutions(tuple(map(Fraction, task.numbers)))
    assert check_game24(task.reference, task.numbers)
    assert all(str(number) in task.question for number in task.numbers)


@pytest.mark.parametrize(
    ("expression", "numbers", "right"),
    [
        ("8 / (3 - 8 / 3)", (3, 3, 8, 8), True),
        ("(1 + 2 + 3) * 4", (1, 2, 3, 4), True),
        ("(1 + 2 + 3) * 4 = 24", (4, 3, 2, 1), True),
        ("(1 + 2 + 3) * 4 = 25", (1, 2, 3, 4), False),
        ("6 * 4", (1, 2, 3, 4), False),
        ("4 * 3 * 2 * 1 * 1", (1, 2, 3, 4), False),
        ("12 * 2", (1, 2, 2), False),
        ("24", (24,), True),
        ("-(-24)", (24,), False),
        ("4 ** 2 + 8", (4, 2, 8), False),
        ("49 // 2", (49, 2), False),
        ("24 / (1 - 1)", (24, 1, 1), False),
        ("__import__('os')", (1, 2, 3, 4), False),
        ("", (1, 2, 3, 4), False),
        ("24.0", (24,), False),
        ("(" * 5000 + "24" + ")" * 5000, (24,), False),
        ("6 + 6 + 6 + 6 = 24 = 24", (6, 6, 6, 6), False),
    ],
)
def test_a_solution_is_judged_exactly(expression: str, numbers: tuple[int, ...], right: bool) -> None:
    assert check_game24(expression, numbers) is right


@given(st.text(alphabet="0123456789+-*/() =", max_size=40))
def test_any_text_is_judged_without_an_exception(expression: str) -> None:
    assert isinstance(check_game24(expression, (1, 2, 3, 4)), bool)


def test_the_documents_are_short_and_titled() -> None:
    found = documents()
    assert 15 <= len(found) <= 20
    for document in found.values():
        assert 60 <= len(document.text.split()) <= 150, document.id
        assert document.title and not document.text.startswith("#")


@pytest.mark.parametrize("task", load_tasks("multihop"), ids=lambda task: task.id)
def test_a_question_needs_both_of_its_documents(task: BundledTask) -> None:
    found = documents()
    first, second = (found[doc_id] for doc_id in task.supporting)
    assert task.documents == documents_folder()
    assert task.reference in second.text
    assert task.reference not in first.text
    # The way from one to the other: the first names the second, the question does not.
    assert second.title in first.text
    assert second.title not in task.question
    assert task.reference not in task.question


@pytest.mark.parametrize("task", load_tasks("multihop"), ids=lambda task: task.id)
def test_searching_the_name_in_the_question_finds_the_first_document(task: BundledTask) -> None:
    key = raw("multihop")[task.id]["key"]
    assert key in task.question
    index = index_folder(documents_folder())
    for query in (key, task.question):
        assert task.supporting[0] in [passage.doc_id for passage in index.find(query, 3)]


@pytest.mark.parametrize("task", load_tasks("multihop"), ids=lambda task: task.id)
def test_searching_the_title_of_the_second_document_finds_it_first(task: BundledTask) -> None:
    second = task.supporting[1]
    index = index_folder(documents_folder())
    assert index.find(documents()[second].title, 3)[0].doc_id == second


@pytest.mark.parametrize("task", load_tasks("rag"), ids=lambda task: task.id)
def test_a_question_is_answered_by_its_supporting_passages_alone(task: BundledTask) -> None:
    found = {passage.id: passage for passage in task.passages}
    assert len(task.passages) == len(found) == 6
    assert set(task.supporting) < set(found)
    assert task.reference in found[task.supporting[-1]].text
    assert task.reference not in task.question
    whole = documents()
    for passage in task.passages:
        assert whole[passage.id].text.startswith(passage.text)
        assert whole[passage.id].title == passage.title
    # With two passages the first alone does not say it.
    assert all(task.reference not in found[name].text for name in task.supporting[:-1])
