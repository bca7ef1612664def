"""Traces with explanations whose every number is known, for the pages that show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import JsonValue

from tests.ui import samples
from tracer.trace.probes import ProbeScore
from tracer.trace.trace import AgentInfo, Edge, ModelInfo, Outcome, Step, Task, Trace

METHOD = "grad_x_input"


def explanation(
    targets: Mapping[str, Mapping[str, float]],
    *,
    method: str = METHOD,
    faithfulness: dict[str, JsonValue] | None = None,
    key: str = "a",
) -> dict[str, JsonValue]:
    """An explanation document.

    Args:
        targets: For each explained step, the value of each step that it read.
        method: Name of the method.
        faithfulness: What was measured.
        key: One hexadecimal digit that tells explanations apart.
    """
    sources = list(dict.fromkeys(source for row in targets.values() for source in row))
    return {
        "key": 64 * key,
        "method": method,
        "unit": "nats",
        "signed": True,
        "targets": list(targets),
        # Half of each value comes from either of two sources that show the same step.
        "sources": [
            {"id": f"x{number}{half}", "kind": "thought", "step_id": step}
            for number, step in enumerate(sources)
            for half in "ab"
        ],
        "values": [[row.get(step, 0.0) / 2 for step in sources for _ in "ab"] for row in targets.values()],
        "faithfulness": faithfulness,
    }


def measured(
    targets: Mapping[str, float | None],
    *,
    better: bool,
    agreement: Mapping[str, float] | None = None,
    curves: dict[str, JsonValue] | None = None,
) -> dict[str, JsonValue]:
    """A faithfulness document.

    Args:
        targets: The LDS of each target.
        better: Whether it is better than random.
        agreement: Rank correlation with each other method.
        curves: The same curves for each target, if they were kept.
    """
    document: dict[str, JsonValue] = {
        "sources": 5,
        "top_k_drop": 1.5,
        "k": 1,
        "deletion": 0.5,
        "insertion": 0.25,
        "deletion_rank": 1.0,
        "gap": 1.0 if better else 0.15,
        "random_gap": 0.1,
        "random_spread": 0.2,
        "passes": 30,
        "curves": curves,
    }
    return {
        "targets": {target: {**document, "lds": lds} for target, lds in targets.items()},
        "agreement": {target: dict(agreement or {}) for target in targets},
        # The app judges by the figures; what somebody wrote beside them is not believed.
        "z": 9.0,
        "better_than_random": not better,
        "removal": "delete",
    }


def react() -> Trace:
    """A run with one tool call, each of whose steps was explained by one method that is better than random."""
    trace = samples.react()
    ids = [step.id for step in trace.steps]
    rows = {
        ids[2]: {ids[0]: 0.5, ids[1]: 2.0},
        ids[4]: {ids[0]: -1.0, ids[3]: 4.0, ids[1]: 0.1},
        ids[5]: {ids[0]: 0.25, ids[3]: -0.75, ids[4]: 1.0},
    }
    document = explanation(rows, faithfulness=measured({ids[5]: 0.8}, better=True))
    return trace.model_copy(update={"explanations": [document]})


def chain(steps: int, *, explained: bool = True) -> Trace:
    """Steps in a row, every one of which read all before it, the nearest most."""
    ids = [f"s{number}" for number in range(steps)]
    rows = {
        step: {other: 1.0 / (place - before) for before, other in enumerate(ids[:place])}
        for place, step in enumerate(ids)
        if place
    }
    trace = samples.long(steps)
    return trace.model_copy(
        update={
            "id": "chain",
            "steps": [step.model_copy(update={"id": own}) for step, own in zip(trace.steps, ids, strict=True)],
            "edges": [Edge(source=a, target=b, kind="next") for a, b in zip(ids, ids[1:], strict=False)],
            "explanations": [explanation(rows)] if explained else [],
        }
    )


def small(
    edges: Sequence[tuple[str, str, str]], *, steps: str, parents: Mapping[str, list[str]] | None = None
) -> Trace:
    """A trace of one-letter steps with the given edges and no calls."""
    trace = samples.long(1)
    return trace.model_copy(
        update={
            "id": "small",
            "agent": AgentInfo(kind="external"),
            "model": ModelInfo(name="elsewhere"),
            "task": Task(question="?"),
            "outcome": Outcome(),
            "steps": [
                Step(id=name, kind="thought", text=f"Step {name}.", parents=(parents or {}).get(name, []))
                for name in steps
            ],
            "edges": [Edge.model_validate({"source": a, "target": b, "kind": kind}) for a, b, kind in edges],
        }
    )


CURVES: dict[str, JsonValue] = {
    "shares": [0.0, 0.5, 1.0],
    "deletion": [-1.0, -4.0, -6.0],
    "insertion": [-6.0, -2.0, -1.0],
    "random_deletion": [-1.0, -2.0, -6.0],
    "random_insertion": [-6.0, -3.0, -1.0],
}


def judged() -> Trace:
    """A run with a method that is better than random, one that is not, and one that was not measured."""
    trace = samples.react()
    ids = [step.id for step in trace.steps]
    rows = {ids[5]: {ids[0]: 0.5, ids[4]: 1.0}, ids[4]: {ids[0]: 0.5}}
    good = measured({ids[5]: 0.8, ids[4]: 0.6}, better=True, agreement={"attention": 0.5}, curves=CURVES)
    bad = measured({ids[5]: -0.2, ids[4]: None}, better=False, agreement={METHOD: 0.5})
    documents = [
        explanation(rows, method="attention", faithfulness=bad, key="b"),
        {
            **explanation(rows, faithfulness=good, key="c"),
            "cost": {"seconds": 2.5, "forward_tokens": 300, "backward_passes": 4},
        },
        explanation(rows, method="alti", key="d"),
    ]
    return trace.model_copy(update={"explanations": documents})


def hostile() -> Trace:
    """A run each of whose steps, methods, units and probes is called by a text that would load something."""
    texts = samples.CORPUS
    trace = samples.hostile(texts[0], trace_id="hostile-explained")
    steps = [
        Step(id=f"s{number}{text}", kind="thought", text=text, branch=text, parents=[])
        for number, text in enumerate(texts)
    ]
    ids = [step.id for step in steps]
    rows = {target: dict.fromkeys(ids[:place], 1.0) for place, target in enumerate(ids) if place}
    known = {other: 0.5 for other in texts}
    documents = [
        {
            **explanation(rows, method=text, key=f"{number:x}"),
            "unit": text,
            "faithfulness": measured(
                dict.fromkeys(ids[1:], 0.5), better=bool(number % 2), agreement=known, curves=CURVES
            ),
            "replica": {"weights_sha256": text},
        }
        for number, text in enumerate(texts)
    ]
    scores = [
        ProbeScore(
            name=text,
            layer=1,
            position=text,
            step_id=ids[number],
            text=text,
            probability=0.5,
            low=0.25,
            high=0.75,
            flags=[text],
            held_out={"kind": text},
        ).model_dump(mode="json")
        for number, text in enumerate(texts)
    ]
    edges = [Edge(source=a, target=b, kind="next") for a, b in zip(ids, ids[1:], strict=False)]
    return trace.model_copy(
        update={"steps": steps, "edges": edges, "calls": [], "explanations": documents, "probes": scores}
    )
