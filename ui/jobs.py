"""Starting a job from a page."""

from __future__ import annotations

from collections.abc import Mapping

import streamlit as st


def start_button(label: str, kind: str, parameters: Mapping[str, object], key: str) -> None:
    """A button that starts a job, or the job of that kind and parameters that runs already."""
    st.button(label, key=key, disabled=True)
