"""Which row a click is on, and what a download is called."""

from __future__ import annotations

import pytest

from tests.ui import samples
from ui import elements
from ui.app_pages import trace as trace_page


@pytest.mark.parametrize(
    ("rows", "cells", "before", "expected"),
    [
        ([3], [], 1, 3),
        ([1], [(4, "text")], 1, 4),
        ([5], [(1, "text")], 1, 5),
        ([], [], 1, 1),
        ([], [(2, "kind")], None, 2),
        ([], [], None, None),
    ],
)
def test_the_clicked_step(
    rows: list[int], cells: list[tuple[int, str]], before: int | None, expected: int | None
) -> None:
    assert elements.clicked_row({"selection": {"rows": rows, "cells": cells}}, before=before) == expected


@pytest.mark.parametrize(
    ("trace_id", "expected"),
    [("20250101-abc", "20250101-abc.json"), ("../../etc/passwd", "etc_passwd.json"), ("\u202e<>", "trace.json")],
)
def test_downloads_have_harmless_names(trace_id: str, expected: str) -> None:
    assert trace_page.file_name(trace_id) == expected


def test_filters_keep_the_numbers_of_steps() -> None:
    trace = samples.cot_sc()
    shown = trace_page.visible(trace, kinds=["answer"], branch=None)
    assert [trace.steps[number - 1].id for number, _ in shown] == [step.id for _, step in shown]
    assert {step.kind for _, step in shown} == {"answer"}
