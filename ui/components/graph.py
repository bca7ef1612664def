"""The graph of a step's neighbourhood: what is drawn where, as plain data for ``graph.js``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypedDict

from tracer.trace.trace import Step
from ui import palette
from ui.components.mount import component, mount
from ui.evidence import Part
from ui.layered import Place, layered
from ui.neighbourhood import Neighbourhood, Relation
from ui.palette import Look, Theme
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


@dataclass(frozen=True, slots=True)
class Names:
    """What places stand for.

    Args:
        steps: The steps of the trace.
        parts: The parts of its prompts that show no step.
        part_texts: What these say.
    """

    steps: Sequence[Step]
    parts: Sequence[Part]
    part_texts: Sequence[str]

    def thing(self, place: int) -> Step | Part:
        """The step or part itself."""
        return self.steps[place] if place < len(self.steps) else self.parts[place - len(self.steps)]

    def place(self, thing: Step | Part) -> int:
        """Where a step or part of this trace stands."""
        if isinstance(thing, Part):
            return len(self.steps) + thing.number - 1
        return next(place for place, step in enumerate(self.steps) if step.id == thing.id)

    def text(self, place: int) -> str:
        """What it says."""
        return self.steps[place].text if place < len(self.steps) else self.part_texts[place - len(self.steps)]

    def look(self, place: int) -> Look:
        """How its kind is shown."""
        return palette.source_look(self.thing(place).kind)

    def short(self, place: int) -> str:
        """Number and kind of a step, or the kind of a part."""
        return f"{place + 1} {self.look(place).name}" if place < len(self.steps) else self.look(place).name

    def name(self, place: int) -> str:
        """The same in words, with the number of a part."""
        if place < len(self.steps):
            return f"Step {place + 1}, {self.look(place).label}"
        return f"Prompt part {place - len(self.steps) + 1}, {self.look(place).label}"


class NodeData(TypedDict):
    """A box."""

    place: int
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
    named: Names, shown: Neighbourhood, centre: int, *, unit: str, pins: Collection[int], theme: Theme
) -> GraphData:
    """What the browser needs for one neighbourhood; a few kilobytes.

    Args:
        named: What the places stand for.
        shown: What is drawn.
        centre: Place of what is selected.
        unit: What influences are measured in.
        pins: Places of pinned steps.
        theme: The background that colours are chosen for.
    """
    # Parts of a prompt came before every step.
    order = sorted(shown.places, key=lambda place: (place < len(named.steps), place))
    index = {place: number for number, place in enumerate(order)}
    ends = [(index[item.source], index[item.target]) for item in shown.relations]
    at = layered(len(index), ends)
    nodes = [
        _node(named, place, hops=shown.hops.get(place), pinned=place in pins, at=at[number], theme=theme)
        for place, number in index.items()
    ]
    edges = [
        EdgeData(
            source=source,
            target=target,
            weight=item.weight,
            strength=round(item.strength, 3),
            label=f"{named.name(item.source)} → {named.name(item.target)}: {describe(item, unit)}",
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
    """Draw the graph; callbacks find the place of what was meant by `ui.components.mount.event_value`.

    Args:
        data: From `graph_data`.
        key: Of the component.
        on_select: Something was clicked; ``select``.
        on_pin: It shall be pinned, or no longer; ``pin``.
        on_open: It was clicked twice, or Enter was pressed; ``open``.
    """
    mount(_RENDER, data, key=key, on_event={"select": on_select, "pin": on_pin, "open": on_open})


def _node(named: Names, place: int, *, hops: int | None, pinned: bool, at: Place, theme: Theme) -> NodeData:
    thing, text = named.thing(place), named.text(place)
    step = thing if isinstance(thing, Step) else None
    title = [named.short(place)]
    if step is not None and step.branch is not None:
        title.append(f"({one_line(step.branch, limit=8)})")
    if pinned:
        title.append("◆")
    away = {None: "pinned", 0: "selected", 1: "1 hop away"}.get(hops, f"{hops} hops away")
    pruned = step is not None and step.pruned
    return NodeData(
        place=place,
        title=" ".join(title),
        text=one_line(text, limit=TEXT_CHARACTERS),
        label=f"{named.name(place)}{', pruned' if pruned else ''}, {away}: {one_line(text, limit=LABEL_CHARACTERS)}",
        x=at.layer * COLUMN,
        y=round(at.row * ROW, 1),
        column=at.layer,
        colour=named.look(place).colour(theme),
        pruned=pruned,
    )


def _shown(relation: Relation, count: int) -> str:
    if count > LABELLED_EDGES:
        return ""
    if relation.weight is not None:
        return f"{relation.weight:+.2g}"
    kinds: Sequence[str] = [kind for kind in relation.kinds if kind != "next"]
    return ", ".join(kind.replace("_", " ") for kind in kinds)
