"""A store of its own for every test of the app."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import streamlit as st

from tracer.store import Store


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The empty store that the app shows; no model has probes."""
    monkeypatch.setenv("TRACER_PROBES", str(tmp_path / "probes"))
    location = tmp_path / "runs.db"
    monkeypatch.setenv("TRACER_STORE", str(location))
    with Store(location) as opened:
        yield opened
    st.cache_resource.clear()
