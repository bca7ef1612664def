"""A layered drawing: nothing lies on anything else, and edges go one way."""

from __future__ import annotations

import itertools
import time

from hypothesis import given
from hypothesis import strategies as st

from ui.layered import layered

NODES = 50
graphs = st.integers(1, NODES).flatmap(
    lambda count: st.tuples(
        st.just(count),
        st.lists(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)), max_size=120),
    )
)


@given(graphs)
def test_no_two_nodes_overlap_and_edges_go_right(graph: tuple[int, list[tuple[int, int]]]) -> None:
    count, edges = graph
    places = layered(count, edges)
    for a, b in itertools.combinations(places, 2):
        assert a.layer != b.layer or abs(a.row - b.row) > 1 - 1e-9
    for a, b in edges:
        if a != b:
            assert places[min(a, b)].layer < places[max(a, b)].layer
    assert min(place.row for place in places) == 0


@given(graphs)
def test_the_same_graph_is_always_drawn_alike(graph: tuple[int, list[tuple[int, int]]]) -> None:
    count, edges = graph
    assert layered(count, edges) == layered(count, reversed(edges))


def test_a_chain_is_a_straight_line() -> None:
    assert layered(4, [(0, 1), (1, 2), (2, 3)]) == [(0, 0.0), (1, 0.0), (2, 0.0), (3, 0.0)]


def test_a_parent_is_between_its_children() -> None:
    places = layered(4, [(0, 1), (0, 2), (0, 3)])
    assert places[0].row == places[2].row == 1.0
    assert {place.layer for place in places[1:]} == {1}


def test_a_crossing_that_can_be_avoided_is() -> None:
    """Two chains whose second members come in the other order."""
    places = layered(4, [(0, 3), (1, 2)])
    assert (places[0].row < places[1].row) == (places[3].row < places[2].row)


def test_a_step_that_nothing_leads_to_stands_beside_what_it_leads_to() -> None:
    places = layered(5, [(0, 1), (1, 2), (2, 4), (3, 4)])
    assert places[3].layer == places[2].layer == 2


def test_an_edge_that_points_back_is_drawn_from_the_earlier_step() -> None:
    """An evaluation comes after what it evaluates, and its edge leads back to it."""
    assert layered(2, [(1, 0)])[1].layer == 1


def test_nothing_and_one() -> None:
    assert layered(0, []) == []
    assert layered(1, [(0, 0)]) == [(0, 0.0)]


def test_fifty_steps_that_are_all_related_take_no_time() -> None:
    began = time.perf_counter()
    places = layered(NODES, itertools.combinations(range(NODES), 2))
    assert [place.layer for place in places] == list(range(NODES))
    assert time.perf_counter() - began < 5
