"""Registers and mounts the components in this folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import streamlit as st

Render = Callable[..., object]
"""Draws a component; what `component` gives."""
_FOLDER = Path(__file__).parent
COMMON = "common"


def component(name: str) -> Render:
    """A component whose script and style are files of this folder.

    Args:
        name: Name of the files without their suffixes.
    """
    js, css = (_text([COMMON, name], suffix) for suffix in (".js", ".css"))
    return st.components.v2.component(f"tracer_{name}", js=js, css=css)


def _text(names: Iterable[str], suffix: str) -> str:
    return "\n".join((_FOLDER / f"{name}{suffix}").read_text(encoding="utf-8") for name in names)


_RELAY: Render = st.components.v2.component("tracer_relay", js=_text(["relay"], ".js"))


def mount(render: Render, data: Mapping[str, Any], *, key: str, on_event: Mapping[str, Callable[[], None]]) -> None:
    """Draw a component.

    Args:
        render: What `component` gave.
        data: JSON values; ``rev``, a hash of them, is added.
        key: Its key.
        on_event: For each event of the component, what to do; `event_value` tells there what happened.
    """
    rev = hashlib.blake2b(json.dumps(data, sort_keys=True).encode(), digest_size=8).hexdigest()
    callbacks: dict[str, Any] = {f"on_{event}_change": callback for event, callback in on_event.items()}
    render(key=key, data={**data, "rev": rev}, **callbacks)


def tell(channel: str, news: Mapping[str, Any]) -> None:
    """Hand something small to a component that is drawn already, such as what is selected.

    It is a component of its own, so that what the other one shows is not sent again.

    Args:
        channel: The other component's key; its data must name it as ``channel``.
        news: JSON values.
    """
    _RELAY(key=f"{channel}_news", data={"channel": channel, **news})


def event_value(key: str, event: str) -> object:
    """What a component said with an event, while its callback runs; anything, since it comes from a browser."""
    state = st.session_state.get(key)
    return state.get(event) if isinstance(state, Mapping) else None
