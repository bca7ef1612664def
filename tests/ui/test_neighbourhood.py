"""What is within some hops of a step, checked against networkx and the trace's own graph."""

from __future__ import annotations

import networkx as nx
import pytest

from tests.ui import explained, samples
from tracer.trace.explanation import find_explanation
from tracer.trace.trace import Trace
from ui.influence import Influences
from ui.neighbourhood import DIRECTIONS, Direction, Neighbourhood, Structure, neighbourhood

RUNS = {"react": explained.react, "chain": lambda: explained.chain(12), "tot": samples.tot, "votes": samples.cot_sc}


def influences_of(trace: Trace) -> Influences | None:
    """Those of a trace's only explanation."""
    return Influences.of(trace, find_explanation(trace, explained.METHOD)) if trace.explanations else None


def around(
    trace: Trace,
    centre: int,
    *,
    hops: int = 1,
    direction: Direction = "both",
    minimum: float = 0.0,
    pins: tuple[int, ...] = (),
    most: int = 50,
    most_influences: int = 150,
) -> Neighbourhood:
    """The neighbourhood of a step in a trace with or without an explanation."""
    return neighbourhood(
        Structure.of(trace),
        influences_of(trace),
        centre,
        hops=hops,
        direction=direction,
        minimum=minimum,
        pins=pins,
        most=most,
        most_influences=most_influences,
    )


@pytest.mark.parametrize("name", ["react", "chain"])
def test_influences_are_those_of_the_traces_graph(name: str) -> None:
    trace = RUNS[name]()
    found = influences_of(trace)
    assert found is not None
    own = {
        (trace.steps[item.source].id, trace.steps[item.target].id): item.weight
        for place in range(len(trace.steps))
        for item in found.into(place, 0.0)
    }
    graph = trace.graph(influence=explained.METHOD)
    expected = {(a, b): data["weight"] for a, b, key, data in graph.edges(keys=True, data=True) if key == "influences"}
    assert own == pytest.approx(expected)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("hops", [1, 2, 3])
def test_the_neighbourhood_is_that_of_networkx(name: str, direction: Direction, hops: int) -> None:
    trace = RUNS[name]()
    graph = nx.DiGraph(trace.graph(influence=explained.METHOD if trace.explanations else None))
    if direction == "in":
        graph = graph.reverse()
    for centre, step in enumerate(trace.steps):
        distances = nx.single_source_shortest_path_length(
            graph.to_undirected() if direction == "both" else graph, step.id, cutoff=hops
        )
        found = around(trace, centre, hops=hops, direction=direction)
        assert {trace.steps[place].id: hop for place, hop in found.hops.items()} == distances


def test_every_edge_between_shown_steps_is_there_once() -> None:
    trace = explained.react()
    found = around(trace, 5, hops=3)
    expected = {(a, b, key) for a, b, key in trace.graph(influence=explained.METHOD).edges(keys=True)}
    shown = [
        (trace.steps[item.source].id, trace.steps[item.target].id, kind)
        for item in found.relations
        for kind in item.kinds
    ]
    assert sorted(shown) == sorted(expected)


def test_weak_influences_are_left_out_by_their_share_of_the_strongest() -> None:
    trace = explained.react()
    strengths = {item.source: item.strength for item in around(trace, 4).relations if item.target == 4 and item.weight}
    assert strengths == pytest.approx({0: 0.25, 3: 1.0, 1: 0.025})
    kept = around(trace, 4, minimum=0.2)
    assert {item.source for item in kept.relations if item.target == 4 and item.weight} == {0, 3}


def test_a_method_that_found_nothing_leads_nowhere() -> None:
    trace = explained.small([], steps="ab")
    trace.explanations.append(explained.explanation({"b": {"a": 0.0}}))
    assert around(trace, 1, hops=3).places == (1,)


def test_the_nearest_and_strongest_are_kept_and_the_others_counted() -> None:
    trace = explained.chain(30)
    found = around(trace, 20, hops=1, most=10)
    assert len(found.places) == 10 and found.left_out == 20
    assert {20, 19, 21} <= set(found.places)
    assert found.places == tuple(sorted(found.places))


def test_the_strongest_influences_are_kept_and_the_others_counted() -> None:
    trace = explained.chain(30)
    found = around(trace, 20, most=10, most_influences=12)
    weights = [item.strength for item in found.relations if item.weight is not None]
    assert len(weights) == 12 and found.influences_left_out == 45 - 12
    assert weights == sorted(weights, reverse=True)


def test_a_pinned_step_is_shown_from_anywhere() -> None:
    trace = explained.chain(40, explained=False)
    found = around(trace, 30, pins=(2,))
    assert found.places == (2, 29, 30, 31)
    assert 2 not in found.hops


def test_parents_are_edges_where_nothing_else_says_so() -> None:
    trace = explained.small([("a", "b", "next")], steps="abc", parents={"b": ["a"], "c": ["b"]})
    found = around(trace, 1)
    assert {(item.source, item.target, item.kinds) for item in found.relations} == {
        (0, 1, ("next",)),
        (1, 2, ("parent",)),
    }


def test_kinds_between_the_same_steps_are_one_edge() -> None:
    trace = explained.small([("a", "b", "next"), ("a", "b", "selects")], steps="ab")
    assert [item.kinds for item in around(trace, 0).relations] == [("next", "selects")]
