"""Small pieces that both pages show.

Parameters called ``label`` end in markdown, so callers pass constants; ``tests/ui/test_untrusted.py`` checks that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import streamlit as st

from tracer.errors import TracerError
from ui.payload import shortened


def fact(label: str, value: str) -> None:
    """A named value; the value may be any text."""
    with st.container(gap=None):
        st.caption(label)
        st.text(value)


def long_text(text: str) -> None:
    """A text of any length and origin, as it is."""
    shown, missing = shortened(text)
    st.code(shown, language=None, wrap_lines=True)
    if missing:
        st.caption(f"{missing:,d} more characters are in the exported trace.")


def doubts(names: Collection[str]) -> None:
    """Marks of scores that may be of something else than what ran, whatever was measured of them."""
    if "forced" in names:
        st.error(
            "Forced: the weights behind these scores do not reproduce the recorded log-probabilities. They may be "
            "those of another model."
        )
    if "retokenised" in names:
        st.error(
            "Tokenised again: the run was recorded without its token ids, so these need not be the tokens that the "
            "model saw."
        )


@contextmanager
def folded(label: str, key: str, *, expanded: bool = False) -> Iterator[bool]:
    """A part that can be folded away; what it holds is made and sent only while it is open, which is what this yields.

    It stays as a person left it while other steps are selected.
    """
    part = st.expander(label, expanded=expanded, key=key, on_change="rerun")
    with part:
        yield bool(part.open)


@contextmanager
def failures(label: str) -> Iterator[None]:
    """Show an expected failure as a sentence and end the page there."""
    try:
        yield
    except TracerError as error:
        st.error(label)
        st.text(str(error))
        st.stop()


def clicked_row(event: Mapping[str, Any], *, before: int | None = None) -> int | None:
    """The row of a table that was clicked, by its marker or by any of its cells.

    Args:
        event: The table's state.
        before: The row that was selected before; clicking its marker again leaves it selected.
    """
    selection = event.get("selection", {})
    cells: Sequence[tuple[int, str]] = selection.get("cells") or ()
    rows: Sequence[int] = selection.get("rows") or ()
    if cells and cells[0][0] != before:
        return cells[0][0]
    return rows[0] if rows else before


def whole_number(label: str, key: str, *, value: int | None = None) -> int | None:
    """A number of at least 1, or nothing for the default of whatever it is given to."""
    return st.number_input(
        label,
        min_value=1,
        max_value=100_000,
        value=value,
        step=1,
        key=key,
        placeholder="the default",
        persist_state="session",
    )


def choice(label: str, options: Sequence[str], key: str, *, index: int | None = 0) -> str | None:
    """One of a few words; without an index, nothing for the default."""
    return st.selectbox(label, options, index=index, key=key, placeholder="the default", persist_state="session")
