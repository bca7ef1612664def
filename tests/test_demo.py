"""What the demo runs, without running it."""

from __future__ import annotations

from tests.ui import samples
from tracer.demo import plan, story_of
from tracer.trace.trace import Trace


def stored(name: str, **more: object) -> Trace:
    """A completed run of that name."""
    return samples.react().model_copy(update={"name": name, **more})


def test_names_tell_the_runs_apart_and_stay_the_same() -> None:
    few, every = ({run.name for run in plan(every=choice)} for choice in (False, True))
    assert len(few) == len(plan()) == 11
    assert few < every
    assert {run.options.kind for run in plan()} == {"cot", "cot-sc", "tot", "react"}


def test_the_story_is_found_among_the_runs() -> None:
    traces = [stored(run.name) for run in plan()]
    story = story_of(traces)
    assert story is not None and story.name == "demo react react-one-shot: multihop-birthplace"
    assert story_of([trace for trace in traces if trace is not story]) is None
    assert story_of([stored(story.name, status="failed")]) is None
