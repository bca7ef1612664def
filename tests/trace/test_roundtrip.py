"""Traces survive serialisation and the way through events."""

from __future__ import annotations

import json

from hypothesis import given

from tests import strategies
from tracer.trace.events import event_from_json, event_to_json, fold, unfold
from tracer.trace.trace import Trace


@strategies.relaxed
@given(strategies.traces())
def test_json_round_trip_gives_the_same_bytes(trace: Trace) -> None:
    text = trace.to_json()
    assert Trace.from_json(text).to_json() == text


@strategies.relaxed
@given(strategies.traces())
def test_unfolded_events_fold_into_the_same_trace(trace: Trace) -> None:
    folded = fold(unfold(trace))
    # Explanations and probes are no part of a run's events.
    folded.explanations, folded.probes = trace.explanations, trace.probes
    assert folded == trace


@strategies.relaxed
@given(strategies.traces())
def test_events_survive_their_json_form(trace: Trace) -> None:
    events = unfold(trace)
    lines = [event_to_json(event) for event in events]
    assert all("\n" not in line for line in lines)
    assert [event_from_json(line) for line in lines] == events


def test_names_of_a_newer_minor_version_survive_events() -> None:
    raw = json.loads(strategies.small_trace().to_json())
    raw |= {"schema_version": "1.9", "status": "paused", "colour": {"event": 1, "trace_id": 2}, "extra": [1]}
    raw["steps"][1] |= {"kind": "dream", "mood": "calm"}
    trace = Trace.from_json(json.dumps(raw))
    lines = [event_to_json(event) for event in unfold(trace)]
    folded = fold(event_from_json(line, newer_minor=True) for line in lines)
    assert folded.to_json() == trace.to_json()


def test_folding_leaves_the_given_events_unchanged() -> None:
    events = unfold(strategies.small_trace())
    before = [event_to_json(event) for event in events]
    fold(events).steps[0].text = "changed"
    assert [event_to_json(event) for event in events] == before
