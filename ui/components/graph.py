"""The graph of a step's neighbourhood: what is drawn where, as plain data for ``graph.js``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TypedDict

from tracer.trace.trace import Step, Trace
from ui import palette
from ui.components.mount import component, mount
from ui.layered import layered
from ui.neighbourhood import Neighbourhood, Relation
from ui.palette import Theme
from ui.payload import one_line

BOX_WIDTH, BOX_HEIGHT = 184, 48
"""Size of a step's box in pixels; ``graph.js`` draws it."""
COLUMN, ROW = 256, 70
"""From one layer, and from one row, to the next, in pixels."""
TEXT_CHARACTERS = 28
LABEL_CHARACTERS = 240
LABELLED_EDGES = 40
"""Beyond this many edges their weights would hide each other; a table beside the graph has them all."""
_RENDER = component("graph")


class NodeData(TypedDict):
    """A step's box."""

    id: str
    title: str
    text: str
    label: str
    x: float
    y: float
    column: int
    colour: str
    pruned: bool


class EdgeData(TypedDict):
    """A curve between two boxes, given by their places among the nodes."""

    source: int
    target: int
    weight: float | None
    strength: float
    label: str
    shown: str


class GraphData(TypedDict):
    """All that is drawn."""

    centre: int
    raises: str
    lowers: str
    nodes: list[NodeData]
    edges: list[EdgeData]


def graph_data(
    trace: Trace, shown: Neighbourhood, centre: int, *, unit: str, pins: Collection[int], theme: Theme
) -> GraphData:
    """What the browser needs for one neighbourhood; a few kilobytes.

    Args:
        trace: The trace.
        shown: Which of its steps and edges.
        centre: Place of the selected step, from 0.
        unit: What influences are measured in.
        pins: Places of pinned steps.
        theme: The background that colours are chosen for.
    """
    index = {place: number for number, place in enumerate(shown.places)}
    ends = [(index[item.source], index[item.target]) for item in shown.relations]
    at = layered(len(index), ends)
    nodes = [
        _node(
            trace.steps[place],
            place,
            hops=shown.hops.get(place),
            pinned=place in pins,
            at=(at[number].layer, at[number].row),
            theme=theme,
        )
        for place, number in index.items()
    ]
    edges = [
        EdgeData(
            source=source,
            target=target,
            weight=item.weight,
            strength=round(item.strength, 3),
            label=f"{item.source + 1} → {item.target + 1}: {describe(item, unit)}",
            shown=_shown(item, len(ends)),
        )
        for item, (source, target) in zip(shown.relations, ends, strict=True)
    ]
    return {
        "centre": index[centre],
        "raises": palette.SCALES[theme].raises,
        "lowers": palette.SCALES[theme].lowers,
        "nodes": nodes,
        "edges": edges,
    }


def describe(relation: Relation, unit: str) -> str:
    """What an edge says, in words."""
    if relation.weight is None:
        return ", ".join(kind.replace("_", " ") for kind in relation.kinds)
    return f"{relation.weight:+.3g} {unit}, {relation.strength:.0%} of the strongest"


def draw(
    data: GraphData,
    *,
    key: str,
    on_select: Callable[[], None],
    on_pin: Callable[[], None],
    on_open: Callable[[], None],
) -> None:
    """Draw the graph; a callback finds the step's id in the session's state under the key.

    Args:
        data: From `graph_data`.
        key: Of the component.
        on_select: A step was clicked; its id is ``select``.
        on_pin: It shall be pinned, or no longer; ``pin``.
        on_open: It was clicked twice, or opened by Enter; ``open``.
    """
    mount(_RENDER, data, key=key, on_event={"select": on_select, "pin": on_pin, "open": on_open})


def _node(step: Step, place: int, *, hops: int | None, pinned: bool, at: tuple[int, float], theme: Theme) -> NodeData:
    look = palette.look(step.kind)
    column, row = at
    title = [f"{place + 1}", look.name]
    if step.branch is not None:
        title.append(f"({one_line(step.branch, limit=8)})")
    if pinned:
        title.append("◆")
    away = {None: "pinned", 0: "selected", 1: "1 hop away"}.get(hops, f"{hops} hops away")
    pruned = ", pruned" if step.pruned else ""
    return NodeData(
        id=step.id,
        title=" ".join(title),
        text=one_line(step.text, limit=TEXT_CHARACTERS),
        label=f"Step {place + 1}, {look.label}{pruned}, {away}: {one_line(step.text, limit=LABEL_CHARACTERS)}",
        x=column * COLUMN,
        y=round(row * ROW, 1),
        column=column,
        colour=look.colour(theme),
        pruned=step.pruned,
    )


def _shown(relation: Relation, count: int) -> str:
    if count > LABELLED_EDGES:
        return ""
    if relation.weight is not None:
        return f"{relation.weight:+.2g}"
    kinds: Sequence[str] = [kind for kind in relation.kinds if kind != "next"]
    return ", ".join(kind.replace("_", " ") for kind in kinds)
