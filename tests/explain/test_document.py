"""Keys of explanations, and their typed view."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given

from tests.strategies import relaxed, small_trace, traces
from tests.trace.test_trace import small_trace as two_steps
from tracer.errors import TraceFormatError, UnknownNameError
from tracer.explain.base import Cost
from tracer.explain.document import Draft, Setting, content_sha256
from tracer.explain.methods import request
from tracer.trace.explanation import Explanation
from tracer.trace.trace import Segment, Trace

SETTING: dict[str, Any] = {
    "content": "c" * 64,
    "replica": {"name": "demo", "dtype": "float32"},
    "target_function": "logprob",
    "foil": None,
    "chunk_tokens": None,
    "seed": 0,
}


def test_the_key_depends_on_everything_that_the_scores_depend_on() -> None:
    asked = request("integrated_gradients")
    keys = {Setting(**SETTING).key(asked)}
    for change in (
        {"content": "d" * 64},
        {"replica": {"name": "demo", "dtype": "bfloat16"}},
        {"target_function": "contrast"},
        {"foil": 3},
        {"chunk_tokens": 64},
        {"seed": 1},
    ):
        keys.add(Setting(**{**SETTING, **change}).key(asked))
    keys.add(Setting(**SETTING).key(request("integrated_gradients", {"points": 32})))
    keys.add(Setting(**SETTING).key(request("grad_l1")))
    assert len(keys) == 9
    same = Setting(**{**SETTING, "replica": {"dtype": "float32", "name": "demo"}})
    assert same.key(request("integrated_gradients", {"points": 16})) == Setting(**SETTING).key(asked)


@pytest.mark.parametrize(
    "change",
    [
        lambda trace: trace.calls[0].prompt_token_ids.__setitem__(0, 9),
        lambda trace: trace.calls[0].completions[0].token_ids.__setitem__(0, 9),
        lambda trace: trace.calls[0].completions[0].logprobs.__setitem__(0, -9.0),
        lambda trace: trace.calls[0].segments.__setitem__(0, Segment(start=0, end=1, kind="system")),
        lambda trace: setattr(trace.steps[1], "kind", "thought"),
        lambda trace: setattr(trace.steps[1], "end", 1),
    ],
)
def test_the_content_is_what_a_replay_reads(change: Callable[[Trace], None]) -> None:
    trace = two_steps()
    change(trace)
    assert content_sha256(trace) != content_sha256(two_steps())


def test_names_and_explanations_are_no_content() -> None:
    trace = two_steps()
    trace.name, trace.id, trace.explanations = "another", "t9", [{"method": "m"}]
    trace.outcome.correct = False
    assert content_sha256(trace) == content_sha256(two_steps())


@relaxed
@given(traces())
def test_the_content_survives_a_file(trace: Trace) -> None:
    assert content_sha256(Trace.from_json(trace.to_json())) == content_sha256(trace)


def test_an_explanation_is_read_with_what_it_does_not_know() -> None:
    raw = {"method": "m", "targets": ["a"], "sources": [{"id": "x0", "mood": 1}], "values": [[0.1]], "later": True}
    found = Explanation.read(raw)
    assert found.row("a") == [0.1]
    assert found.model_dump()["later"] is True and found.sources[0].model_dump()["mood"] == 1
    with pytest.raises(UnknownNameError, match="target of m"):
        found.row("b")


@pytest.mark.parametrize(
    "change",
    [
        {"values": [[0.1, 0.2]]},
        {"values": []},
        {"values": [[float("nan")]]},
        {"values": "odd"},
        {"targets": [3]},
        {"method": None},
    ],
)
def test_an_explanation_that_contradicts_itself_is_refused(change: dict[str, Any]) -> None:
    raw = {"method": "m", "targets": ["a"], "sources": [{"id": "x0"}], "values": [[0.1]], **change}
    with pytest.raises(TraceFormatError, match="an explanation cannot be read"):
        Explanation.read(raw)
    if change.get("method", "m"):
        with pytest.raises(TraceFormatError, match="an explanation cannot be read"):
            small_trace(explanations=[raw]).graph(influence="m")


def test_cost_adds_up_over_calls() -> None:
    found = Explanation(method="m", targets=[], sources=[], values=[])
    draft = Draft(request("grad_l1"), found, before={"seconds": 1.5, "forward_tokens": 10, "backward_passes": 2})
    draft.finish([], Cost(seconds=0.5, forward_tokens=5, backward_passes=1))
    assert draft.explanation.cost == {"seconds": 2.0, "forward_tokens": 15, "backward_passes": 3}
