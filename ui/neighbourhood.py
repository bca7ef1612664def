"""The steps around a step: what is within a few hops of it, over structural edges and influences.

Nothing here looks at all pairs of steps: a hop asks each step that it reached for its own edges.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from tracer.trace.trace import Trace
from ui.influence import Influences

Direction = Literal["in", "out", "both"]
DIRECTIONS: tuple[Direction, ...] = ("in", "out", "both")
HOPS = (1, 2, 3)
MOST_STEPS = 50
MOST_INFLUENCES = 150
PARENT = "parent"
"""Kind of an edge that is known from a step's parents only."""
INFLUENCES = "influences"


class Relation(NamedTuple):
    """An edge between two steps, given by their places from 0."""

    source: int
    target: int
    kinds: tuple[str, ...]
    """``influences``, or every structural kind that joins the two in this direction."""
    weight: float | None = None
    strength: float = 1.0
    """For influences, the share of the strongest one on the same target; 1 for structure."""


@dataclass(frozen=True, slots=True)
class Structure:
    """The structural edges of a trace, by their ends.

    Args:
        into: Edges to a step, by its place.
        out_of: Edges from a step, by its place.
    """

    into: Mapping[int, Sequence[Relation]]
    out_of: Mapping[int, Sequence[Relation]]

    @classmethod
    def of(cls, trace: Trace) -> Structure:
        """The edges of ``trace.graph()``, and parents that no edge leads from."""
        places = {step.id: place for place, step in enumerate(trace.steps)}
        kinds: dict[tuple[int, int], list[str]] = {}
        for source, target, kind in trace.graph().edges(keys=True):
            if source != target:
                kinds.setdefault((places[source], places[target]), []).append(str(kind))
        for step in trace.steps:
            for parent in step.parents:
                if parent in places and parent != step.id:
                    kinds.setdefault((places[parent], places[step.id]), [PARENT])
        into: dict[int, list[Relation]] = {}
        out_of: dict[int, list[Relation]] = {}
        for (begin, end), found in kinds.items():
            relation = Relation(begin, end, tuple(found))
            into.setdefault(end, []).append(relation)
            out_of.setdefault(begin, []).append(relation)
        return cls(into, out_of)


@dataclass(frozen=True, slots=True)
class Neighbourhood:
    """Some steps of a trace and the edges among them.

    Args:
        places: The steps, by their places from 0 and in that order.
        hops: How far each is from the centre; pinned steps beyond are not in it.
        relations: Edges between them; structure first, then influences from the strongest down.
        left_out: Steps within the hops that are not shown, for there are too many.
        influences_left_out: Influences among the shown steps that are not shown, for the same reason.
    """

    places: tuple[int, ...]
    hops: Mapping[int, int]
    relations: tuple[Relation, ...]
    left_out: int
    influences_left_out: int


def neighbourhood(
    structure: Structure,
    influences: Influences | None,
    centre: int,
    *,
    hops: int,
    direction: Direction,
    minimum: float = 0.0,
    pins: Iterable[int] = (),
    most: int = MOST_STEPS,
    most_influences: int = MOST_INFLUENCES,
) -> Neighbourhood:
    """The steps within some hops of one step, nearest first where there are too many.

    Args:
        structure: Structural edges.
        influences: A method's influences, if they shall be followed too.
        centre: Place of the step.
        hops: How many edges away a step may be.
        direction: Whether edges are followed against their direction, along it, or both.
        minimum: Least strength of an influence.
        pins: Steps that are shown wherever they are.
        most: Most steps to show.
        most_influences: Most influences to show.
    """
    edges = _Edges(structure, influences, minimum)
    pinned = set(pins)
    reached: dict[int, tuple[int, float]] = {centre: (0, 1.0)}
    frontier = [centre]
    for hop in range(1, hops + 1):
        found: dict[int, float] = {}
        for place, strength in edges.around(frontier, direction):
            if place not in reached:
                found[place] = max(strength, found.get(place, 0.0))
        reached |= {place: (hop, strength) for place, strength in found.items()}
        frontier = list(found)

    def near(place: int) -> tuple[bool, int, float, int]:
        hop, strength = reached[place]
        return place not in pinned, hop, -strength, abs(place - centre)

    beyond = sorted(pinned - set(reached))
    ranked = [centre, *beyond, *sorted(set(reached) - {centre}, key=near)]
    shown = sorted(ranked[:most])
    relations, influences_left_out = edges.among(shown, most_influences)
    distances = {place: reached[place][0] for place in shown if place in reached}
    return Neighbourhood(tuple(shown), distances, relations, max(0, len(ranked) - most), influences_left_out)


@dataclass(frozen=True, slots=True)
class _Edges:
    structure: Structure
    influences: Influences | None
    minimum: float

    def around(self, places: Sequence[int], direction: Direction) -> Iterator[tuple[int, float]]:
        """Steps that are one edge away from any of some steps, with the strength of that edge."""
        back, on = direction in ("in", "both"), direction in ("out", "both")
        if self.influences is not None and back:
            yield from self.influences.read_by(places, self.minimum).items()
        if self.influences is not None and on:
            yield from self.influences.readers_of(places, self.minimum).items()
        for place in places:
            if back:
                yield from ((relation.source, 1.0) for relation in self.structure.into.get(place, ()))
            if on:
                yield from ((relation.target, 1.0) for relation in self.structure.out_of.get(place, ()))

    def into(self, place: int) -> Iterator[Relation]:
        yield from self.structure.into.get(place, ())
        if self.influences is not None:
            for item in self.influences.into(place, self.minimum):
                yield Relation(item.source, item.target, (INFLUENCES,), item.weight, item.strength)

    def among(self, places: Sequence[int], most: int) -> tuple[tuple[Relation, ...], int]:
        """Edges both of whose ends are shown, and how many influences are too many."""
        shown = set(places)
        found = [relation for place in places for relation in self.into(place) if relation.source in shown]
        structural = [relation for relation in found if relation.weight is None]
        read = sorted((relation for relation in found if relation.weight is not None), key=lambda item: -item.strength)
        return (*structural, *read[:most]), max(0, len(read) - most)
