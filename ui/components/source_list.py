"""What a step read, most first, as a list that can be clicked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ui import palette
from ui.components.mount import component, mount
from ui.evidence import Reading

OPEN = "open"
"""The component's event: the number of the source that was clicked."""
_KINDS = (*palette.KINDS, *palette.PARTS, "")
_LIST = component("source_list")


class Source(NamedTuple):
    """A reading with what a person needs to know of the thing that was read."""

    reading: Reading
    where: str
    """Which step or part it is."""
    text: str
    """What it says, on one line."""


def source_list(
    sources: Sequence[Source], *, signed: bool, through: bool, key: str, on_open: Callable[[], None]
) -> None:
    """Draw the list.

    Args:
        sources: Most first.
        signed: Whether values below zero speak against the step.
        through: Whether to show the share over all ways through earlier steps as well.
        key: The component's key.
        on_open: Called when a source is clicked; `ui.components.mount.event_value` tells which.
    """
    mount(_LIST, list_data(sources, signed=signed, through=through), key=key, on_event={OPEN: on_open})


def list_data(sources: Sequence[Source], *, signed: bool, through: bool) -> dict[str, Any]:
    """What is sent to the browser."""
    return {
        "looks": [palette.source_look(kind)._asdict() for kind in _KINDS],
        "scale": palette.scale_properties(),
        "signed": signed,
        "through": through,
        "rows": [
            {
                "look": _KINDS.index(reading.kind) if reading.kind in _KINDS else _KINDS.index(""),
                "where": where,
                "text": text,
                "share": round(reading.share, 4),
                "through": None if reading.through is None else round(reading.through, 4),
                "sign": -1 if reading.value < 0 else 1,
                "open": reading.step_id is not None or reading.part is not None,
            }
            for reading, where, text in sources
        ],
    }
