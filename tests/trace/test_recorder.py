"""Recording a run."""

import threading

import pytest

import tracer
from tracer.errors import CancelledError, EngineUnavailableError, InputError, StoreError, TraceFormatError
from tracer.trace.events import Event, RunFinished, event_from_json, event_to_json, fold
from tracer.trace.recorder import Recorder, record
from tracer.trace.segments import Rendered
from tracer.trace.trace import Completion, Sampling, Trace


class Memory:
    """A sink that keeps events as JSON; from event ``full`` on, it is full."""

    def __init__(self, full: int | None = None) -> None:
        self.lines: list[str] = []
        self.full = full

    def append(self, trace_id: str, event: Event) -> None:
        if self.full is not None and len(self.lines) >= self.full:
            raise StoreError("the disk is full; free some space")
        self.lines.append(event_to_json(event))

    def trace(self) -> Trace:
        return fold(event_from_json(line) for line in self.lines)


def write_run(run: Recorder) -> None:
    question = run.step("question", "Which river?")
    prompt = Rendered()
    prompt.append([1, 2], "template")
    prompt.append([3], "question", question.id)
    call = run.call(prompt, Sampling(max_tokens=4))
    call.finish([Completion(token_ids=[7, 8], logprobs=[-0.1, -0.2], text="The Sorv", finish_reason="stop")])
    thought = run.step("thought", "hm", parents=[question], branch="b1")
    run.step("answer", "The Sorv", parents=[thought.id], edge="selects", call=call.id, completion=0, start=0, end=2)
    run.update(thought, pruned=True, score=0.5, data={"why": "weak"})
    run.edge(question, "s3", "evaluates")
    run.finish(answer="The Sorv", correct=True, details={"votes": 1})


def test_what_is_recorded_is_what_the_events_fold_into() -> None:
    sink = Memory()
    with record("Which river?", model="m", sinks=[sink]) as run:
        write_run(run)
    trace = run.trace
    trace.check()
    assert trace.status == "completed"
    assert (trace.outcome.answer, trace.outcome.correct, trace.outcome.details) == ("The Sorv", True, {"votes": 1})
    assert [(edge.source, edge.target, edge.kind) for edge in trace.edges] == [
        ("s1", "s2", "next"),
        ("s2", "s3", "selects"),
        ("s1", "s3", "evaluates"),
    ]
    assert (trace.step("s2").pruned, trace.step("s2").score, trace.step("s2").data) == (True, 0.5, {"why": "weak"})
    assert trace.call("c1").seconds is not None
    assert sink.trace().to_json() == trace.to_json()


def test_any_prefix_of_the_events_is_a_trace() -> None:
    sink = Memory()
    with record("q", sinks=[sink]) as run:
        write_run(run)
    for length in range(1, len(sink.lines) + 1):
        trace = fold(event_from_json(line) for line in sink.lines[:length])
        assert trace.status == ("completed" if length == len(sink.lines) else "running")
        assert Trace.from_json(trace.to_json()).to_json() == trace.to_json() or trace.calls


def test_an_exception_ends_the_run_as_failed_and_goes_on() -> None:
    sink = Memory()
    with pytest.raises(EngineUnavailableError), record("q", sinks=[sink]) as run:
        run.step("question", "q")
        raise EngineUnavailableError("the server died; start it again")
    trace = sink.trace()
    assert (trace.status, trace.error) == ("failed", "the server died; start it again")
    assert [(step.kind, step.parents) for step in trace.steps] == [("question", []), ("error", ["s1"])]


@pytest.mark.parametrize("error", [CancelledError("the run was stopped"), KeyboardInterrupt()])
def test_a_stopped_run_is_cancelled(error: BaseException) -> None:
    sink = Memory()
    with pytest.raises(type(error)), record("q", sinks=[sink]) as run:
        run.step("question", "q")
        raise error
    assert (sink.trace().status, len(sink.trace().steps)) == ("cancelled", 1)


def test_a_full_store_fails_the_run_and_keeps_the_first_error_and_the_trace_in_memory() -> None:
    sink = Memory(full=3)
    with pytest.raises(StoreError, match="disk is full"), record("q", sinks=[sink]) as run:
        for _ in range(5):
            run.step("thought", "x")
    assert len(sink.trace().steps) == 2
    assert run.trace.status == "failed"
    assert len(run.trace.steps) >= 3


def test_nothing_is_recorded_after_the_end() -> None:
    with record("q") as run:
        pass
    with pytest.raises(InputError, match="has ended"):
        run.step("thought", "late")
    assert run.close() is run.trace


def test_references_to_what_is_not_there_are_refused() -> None:
    with record("q") as run:
        with pytest.raises(TraceFormatError, match="no step 's9'"):
            run.update("s9", pruned=True)
        assert run.trace.steps == []


def test_threads_record_side_by_side() -> None:
    sink = Memory()
    with record("q", sinks=[sink]) as run:

        def work() -> None:
            for _ in range(50):
                run.call([1], Sampling()).finish([], seconds=0.0)
                run.step("thought", "x")

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    trace = sink.trace()
    trace.check()
    assert sorted(int(step.id[1:]) for step in trace.steps) == list(range(1, 201))
    assert len({call.id for call in trace.calls}) == 200


def test_an_empty_question_is_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        record("  ")


def test_the_public_recorder_is_this_one_and_listeners_hear_everything() -> None:
    heard: list[Event] = []
    with tracer.record("x" * 200, listeners=[heard.append]) as run:
        run.step("thought", "x")
    assert len(run.trace.name) <= 80
    assert isinstance(heard[-1], RunFinished)
    assert len(heard) == 3
