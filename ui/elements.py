"""Small pieces that both pages show.

Parameters called ``label`` end in markdown, so callers pass constants; ``tests/ui/test_untrusted.py`` checks that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def failures(label: str) -> Iterator[None]:
    """Show an expected failure as a sentence and end the page there."""
    try:
        yield
    except TracerError as error:
        st.error(label)
        st.text(str(error))
        st.stop()
