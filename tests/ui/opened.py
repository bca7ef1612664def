"""Pages of the app as a link would open them, without a browser."""

from __future__ import annotations

from pathlib import Path

from streamlit.testing.v1 import AppTest

APP = Path(__file__).parents[2] / "ui" / "app.py"


def open_page(page: str, **query: str) -> AppTest:
    """A page that nothing went wrong on."""
    at = AppTest.from_file(str(APP), default_timeout=60).run().switch_page(page)
    for name, value in query.items():
        at.query_params[name] = value
    at.run()
    assert not at.exception
    return at


def captions(at: AppTest) -> str:
    """All small print."""
    return " ".join(element.value for element in at.caption)
