"""A trace as a networkx graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tracer.trace.explanation import find_explanation
from tracer.trace.trace import Trace

if TYPE_CHECKING:
    import networkx as nx


def build_graph(trace: Trace, *, influence: str | None = None) -> nx.MultiDiGraph[str]:
    """The steps of a trace and how they are related.

    Nodes are step ids with the step's ``kind``, ``text``, ``branch``, ``pruned`` and ``score``. Edges carry their
    ``kind`` (``next``, ``branch``, ``observes``, ``evaluates``, ``votes_for``, ``selects``), which is also their key.

    Args:
        trace: The trace.
        influence: Name of an explanation method; adds ``influences`` edges from every source that shows a step to the
            target, with the summed score as ``weight``; none from a step to itself, and none where it is zero.

    Raises:
        UnknownNameError: The trace has no explanation by that method.
        TraceFormatError: It has one that cannot be read.
    """
    import networkx as nx

    graph: nx.MultiDiGraph[str] = nx.MultiDiGraph(trace_id=trace.id)
    for step in trace.steps:
        graph.add_node(
            step.id, kind=step.kind, text=step.text, branch=step.branch, pruned=step.pruned, score=step.score
        )
    for edge in trace.edges:
        graph.add_edge(edge.source, edge.target, key=edge.kind, kind=edge.kind)
    if influence is not None:
        for source, target, weight in _influences(trace, influence):
            graph.add_edge(source, target, key="influences", kind="influences", method=influence, weight=weight)
    return graph


def _influences(trace: Trace, method: str) -> list[tuple[str, str, float]]:
    explanation = find_explanation(trace, method)
    steps = {step.id for step in trace.steps}
    weights: dict[tuple[str, str], float] = {}
    for target, row in zip(explanation.targets, explanation.values, strict=True):
        for source, value in zip(explanation.sources, row, strict=True):
            # A zero mostly means that the step came later, or in another branch.
            if source.step_id in steps and target in steps and source.step_id != target and value:
                weights[source.step_id, target] = weights.get((source.step_id, target), 0.0) + value
    return [(source, target, weight) for (source, target), weight in weights.items()]
