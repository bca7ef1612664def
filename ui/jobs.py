"""A button that starts a job. Here only what the command line does for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import streamlit as st


def start_button(label: str, kind: str, parameters: Mapping[str, object], key: str) -> None:
    """Say how to do a job on the command line.

    Args:
        label: What the button says; markdown, so a constant.
        kind: What the job does.
        parameters: What it takes.
        key: Of the button.
    """
    if not st.button(label, key=key):
        return
    words = ["tracer", kind, str(parameters.get("trace", ""))]
    for name in ("methods", "targets", "faithfulness"):
        value = parameters.get(name)
        if value is not None:
            words += [
                f"--{name}",
                str(value) if isinstance(value, str) or not isinstance(value, Sequence) else ",".join(value),
            ]
    st.code(" ".join(words), language=None)
