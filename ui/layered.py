"""A layered drawing of a small directed graph, from left to right.

After Sugiyama, Tagawa and Toda (1981), in the three steps that matter for some dozens of nodes: layers by the longest
path, an order in each layer by barycentres, and places as close to the neighbours' mean as the order allows (isotonic
regression, by pooling adjacent violators). Edges that skip layers get no bends: whoever draws them lets them bulge.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

SWEEPS = 8
"""Passes over the layers, to and fro in turn."""
_Neighbours = Mapping[int, Sequence[int]]


class Place(NamedTuple):
    """Where a node is."""

    layer: int
    """Its column, from 0."""
    row: float
    """Its height in rows; nodes of one layer are at least one row apart, and the topmost of all is at 0."""


def layered(count: int, edges: Iterable[tuple[int, int]], *, sweeps: int = SWEEPS) -> list[Place]:
    """Places for nodes so that every edge goes from left to right.

    Args:
        count: Nodes, numbered from 0 in an order in which they came about: an edge is taken to go from its lower to
            its higher end, so that there are no cycles.
        edges: Pairs of nodes.
        sweeps: Passes over the layers.
    """
    if not count:
        return []
    pairs = sorted({(min(edge), max(edge)) for edge in edges if edge[0] != edge[1]})
    before: dict[int, list[int]] = {}
    after: dict[int, list[int]] = {}
    for source, target in pairs:
        after.setdefault(source, []).append(target)
        before.setdefault(target, []).append(source)
    layer = _layers(count, before, after)
    columns: list[list[int]] = [[] for _ in range(max(layer) + 1)]
    for node in range(count):
        columns[layer[node]].append(node)
    rows = [0.0] * count
    for column in columns:
        _spread(column, rows, [float(place) - (len(column) - 1) / 2 for place in range(len(column))])
    best, crossings = list(rows), _crossings(pairs, layer, rows)
    for sweep in range(sweeps):
        neighbours = before if sweep % 2 == 0 else after
        for column in columns if sweep % 2 == 0 else reversed(columns):
            wanted = {node: _mean([rows[other] for other in neighbours.get(node, ())], rows[node]) for node in column}
            # The order of the trace decides between equals, so that the same graph is always drawn alike.
            column.sort(key=lambda node: (wanted[node], node))
            _spread(column, rows, [wanted[node] for node in column])
        found = _crossings(pairs, layer, rows)
        if found <= crossings:
            best, crossings = list(rows), found
    top = min(best)
    return [Place(layer[node], best[node] - top) for node in range(count)]


def _layers(count: int, before: _Neighbours, after: _Neighbours) -> list[int]:
    """The longest path to each node; one that nothing leads to stands just before the first that it leads to."""
    layer = [0] * count
    for node in range(count):
        layer[node] = max((layer[other] + 1 for other in before.get(node, ())), default=0)
    for node in range(count):
        if not before.get(node) and after.get(node):
            layer[node] = min(layer[other] for other in after[node]) - 1
    return layer


def _spread(column: Sequence[int], rows: list[float], wanted: Sequence[float]) -> None:
    """Rows as close to the wanted ones as can be, in the column's order and one row apart: least squares."""
    pools: list[tuple[float, int]] = []
    for place, value in enumerate(wanted):
        total: float = value - place
        size = 1
        while pools and pools[-1][0] / pools[-1][1] > total / size:
            other, more = pools.pop()
            total, size = total + other, size + more
        pools.append((total, size))
    fitted = [total / size for total, size in pools for _ in range(size)]
    for place, node in enumerate(column):
        rows[node] = fitted[place] + place


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _crossings(pairs: Sequence[tuple[int, int]], layer: Sequence[int], rows: Sequence[float]) -> int:
    """How many pairs of edges between the same two layers cross."""
    groups: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for source, target in pairs:
        groups.setdefault((layer[source], layer[target]), []).append((rows[source], rows[target]))
    total = 0
    for ends in groups.values():
        ends.sort()
        for place, (_, end) in enumerate(ends):
            total += sum(other > end for _, other in ends[:place])
    return total
