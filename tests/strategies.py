"""Hypothesis strategies for valid traces, and one small trace to build examples from."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any, get_args

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tracer.trace.trace import (
    AgentInfo,
    AgentKind,
    Call,
    Completion,
    Document,
    Edge,
    EdgeKind,
    FinishReason,
    ModelInfo,
    Outcome,
    Sampling,
    Segment,
    SegmentKind,
    Status,
    Step,
    StepKind,
    Task,
    Trace,
)

# Building a whole trace takes a while on a busy machine, and no test here is about time.
relaxed = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
CREATED = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def small_trace(trace_id: str = "t1", **changes: Any) -> Trace:
    """A completed run of one call with two steps; ``changes`` replace its fields."""
    call = Call(
        id="c1",
        prompt_token_ids=[1, 2, 3],
        segments=[Segment(start=0, end=1, kind="template"), Segment(start=1, end=3, kind="question", step_id="s1")],
        sampling=Sampling(),
        completions=[Completion(token_ids=[4, 5], logprobs=[-0.1, -0.2], text="two rivers", finish_reason="stop")],
        started_at=CREATED,
        seconds=1.5,
    )
    steps = [
        Step(id="s1", kind="question", text="Which river crosses the valley?"),
        Step(id="s2", kind="thought", text="two rivers", parents=["s1"], call_id="c1", completion=0, start=0, end=2),
    ]
    trace = Trace(
        id=trace_id,
        name="a run",
        created_at=CREATED,
        status="completed",
        agent=AgentInfo(kind="cot"),
        model=ModelInfo(name="demo"),
        task=Task(question="Which river crosses the valley?", reference="Lira"),
        calls=[call],
        steps=steps,
        edges=[Edge(source="s1", target="s2", kind="next")],
        outcome=Outcome(answer="Lira", correct=True),
    )
    return trace.model_copy(update=changes)


def _names(alias: Any) -> st.SearchStrategy[str]:
    """The values of an annotated literal."""
    return st.sampled_from(get_args(get_args(alias)[0]))


texts = st.text(max_size=30)
keys = st.text(min_size=1, max_size=6)
finite = st.floats(allow_nan=False, allow_infinity=False)
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=5,
)
json_objects = st.dictionaries(keys, json_values, max_size=3)
# Names that no version of the format uses, as a newer minor version would add them.
extras = st.dictionaries(keys.map(lambda key: f"new_{key}"), json_values, max_size=2)
zones = st.just(UTC) | st.integers(-840, 840).map(lambda minutes: timezone(timedelta(minutes=minutes)))
_first, _last = datetime(1900, 1, 1), datetime(2200, 1, 1)
moments = st.datetimes(_first, _last) | st.datetimes(_first, _last, timezones=zones)


@st.composite
def completions(draw: st.DrawFn) -> Completion:
    ids = draw(st.lists(st.integers(0, 200_000), max_size=6))
    return Completion(
        token_ids=ids,
        logprobs=draw(st.just([]) | st.lists(finite, min_size=len(ids), max_size=len(ids))),
        text=draw(texts),
        finish_reason=draw(_names(FinishReason)),
        stop_reason=draw(st.none() | texts),
        **draw(extras),
    )


@st.composite
def calls(draw: st.DrawFn, call_id: str, steps: list[str]) -> Call:
    prompt = draw(st.lists(st.integers(0, 200_000), max_size=8))
    cuts = sorted({0, len(prompt), *draw(st.lists(st.integers(0, len(prompt)), max_size=3))})
    segments = [
        Segment(
            start=start,
            end=end,
            kind=draw(_names(SegmentKind)),
            step_id=draw(st.sampled_from([None, *steps])),
        )
        for start, end in zip(cuts, cuts[1:], strict=False)
    ]
    return Call(
        id=call_id,
        prompt_token_ids=prompt,
        segments=segments,
        sampling=Sampling(temperature=draw(st.floats(0, 2)), seed=draw(st.none() | st.integers()), stop=["\n"]),
        completions=draw(st.lists(completions(), max_size=2)),
        started_at=draw(moments),
        seconds=draw(st.none() | st.floats(0, 1e6)),
        error=draw(st.none() | texts),
        **draw(extras),
    )


@st.composite
def steps(draw: st.DrawFn, step_id: str, earlier: list[str], *, made: list[Call]) -> Step:
    where: dict[str, Any] = {}
    sources = [(call, index) for call in made for index in range(len(call.completions))]
    source = draw(st.sampled_from([None, *sources]))
    if source is not None:
        call, index = source
        end = draw(st.integers(0, len(call.completions[index].token_ids)))
        where = {"call_id": call.id, "completion": index, "start": draw(st.integers(0, end)), "end": end}
    return Step(
        id=step_id,
        kind=draw(_names(StepKind)),
        text=draw(texts),
        parents=draw(st.lists(st.sampled_from(earlier), unique=True, max_size=2)) if earlier else [],
        branch=draw(st.none() | texts),
        pruned=draw(st.booleans()),
        score=draw(st.none() | finite),
        error=draw(st.none() | texts),
        data=draw(json_objects),
        **where,
        **draw(extras),
    )


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Valid traces of this and of newer minor versions, complete or not."""
    step_ids = draw(st.lists(keys, unique=True, max_size=4))
    call_ids = draw(st.lists(keys, unique=True, max_size=3))
    made = [draw(calls(call_id, step_ids)) for call_id in call_ids]
    taken = [draw(steps(step_id, step_ids[:index], made=made)) for index, step_id in enumerate(step_ids)]
    ends = st.sampled_from(step_ids) if step_ids else st.nothing()
    edges = st.builds(Edge, source=ends, target=ends, kind=_names(EdgeKind)) if step_ids else st.nothing()
    agent = AgentInfo(kind=draw(_names(AgentKind)), parameters=draw(json_objects))
    document = st.builds(Document, id=keys, title=texts, text=texts)
    return Trace(
        schema_version=draw(st.sampled_from(["1.0", "1.9"])),
        id=draw(st.text(alphabet="0123456789abcdefXYZ-_é", min_size=1, max_size=12)),
        name=draw(texts),
        created_at=draw(moments),
        status=draw(_names(Status)),
        agent=agent,
        model=ModelInfo(name=draw(texts), engine=draw(texts), **draw(extras)),
        task=Task(
            question=draw(texts), reference=draw(st.none() | texts), documents=draw(st.lists(document, max_size=2))
        ),
        calls=made,
        steps=taken,
        edges=draw(st.lists(edges, max_size=4)) if step_ids else [],
        outcome=Outcome(
            answer=draw(st.none() | texts), correct=draw(st.none() | st.booleans()), details=draw(json_objects)
        ),
        explanations=draw(st.lists(json_objects, max_size=2)),
        probes=draw(st.lists(json_objects, max_size=2)),
        fork_of=draw(st.none() | json_objects),
        error=draw(st.none() | texts),
        **draw(extras),
    )
