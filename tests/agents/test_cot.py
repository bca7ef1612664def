"""Chain of thought and self-consistency, on scripts."""

import math

import pytest

from tracer.agents.base import Budget
from tracer.agents.cot import ChainOfThought
from tracer.agents.scripted import ScriptedEngine
from tracer.agents.self_consistency import SelfConsistency
from tracer.errors import (
    BudgetExceededError,
    EngineResponseError,
    InputError,
    PromptTooLongError,
    UnknownNameError,
)
from tracer.trace.trace import Document, Trace


def text_of(engine: ScriptedEngine, trace: Trace, step_id: str) -> str:
    """A step's text, read back from its tokens."""
    step = trace.step(step_id)
    assert step.call_id is not None and step.completion is not None
    completion = trace.call(step.call_id).completions[step.completion]
    return engine.tokenizer.decode(completion.token_ids[step.start : step.end]).text.strip()


def test_zero_shot_asks_twice_and_appends_ids_to_ids() -> None:
    engine = ScriptedEngine(["First, 3 + 4 = 7. So it is done.", " 7."])
    trace = ChainOfThought(engine, shots="zero").run("What is 3 + 4?", reference="7")
    trace.check()
    assert [step.kind for step in trace.steps] == ["question", "thought", "thought", "answer"]
    assert (trace.outcome.answer, trace.outcome.correct) == ("7", True)
    first, second = trace.calls
    written = first.completions[0].token_ids[:-1]
    assert second.prompt_token_ids[: len(first.prompt_token_ids) + len(written)] == first.prompt_token_ids + written
    shown = [(segment.kind, segment.step_id) for segment in second.segments]
    assert ("thought", "s2") in shown and ("thought", "s3") in shown and ("question", "s1") in shown
    assert all(text_of(engine, trace, step) == trace.step(step).text for step in ("s2", "s3", "s4"))


def test_few_shot_reads_the_answer_in_the_chain_and_stops_before_the_next_question() -> None:
    engine = ScriptedEngine(["So 3 + 4 = 7. The answer is 7.\nQ: more"])
    trace = ChainOfThought(engine, shots="few").run("What is 3 + 4?", reference="8")
    assert [(step.kind, step.text) for step in trace.steps][-1] == ("answer", "The answer is 7.")
    assert (trace.outcome.answer, trace.outcome.correct) == ("7", False)
    assert sum(segment.end - segment.start for segment in trace.calls[0].segments if segment.kind == "exemplar") > 300
    assert trace.calls[0].completions[0].stop_reason == "\nQ:"


def test_documents_are_steps_and_segments() -> None:
    engine = ScriptedEngine(["The answer is Sorv."])
    documents = [Document(id="d1", title="Rivers", text="The Sorv is a river."), Document(id="d2", title="", text="x")]
    trace = ChainOfThought(engine, shots="few").run("Which river?", documents=documents)
    assert [step.kind for step in trace.steps][:3] == ["document", "document", "question"]
    assert trace.steps[2].parents == ["s1", "s2"]
    assert {segment.step_id for segment in trace.calls[0].segments if segment.kind == "document"} == {"s1", "s2"}


def test_a_chain_without_answer_and_a_truncated_one_are_told_apart() -> None:
    none = ChainOfThought(ScriptedEngine(["I do not know."]), shots="few").run("What is 3 + 4?", reference="7")
    assert (none.outcome.answer, none.outcome.correct) == (None, False)
    assert none.outcome.details["answer_class"] == "no_answer"
    cut = ChainOfThought(ScriptedEngine(["Well, 3 and 4 and so on"]), shots="few", max_tokens=5).run("3 + 4?")
    assert cut.outcome.details["answer_class"] == "truncated"
    assert cut.outcome.details["truncated"] == 1


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_sent() -> None:
    engine = ScriptedEngine(["never"], context_length=20)
    with pytest.raises(PromptTooLongError, match=r"the prompt has \d+ tokens .* holds 20") as caught:
        ChainOfThought(engine).run("What is " + "3 + " * 50 + "4?")
    assert engine.requests == []
    trace = caught.value.trace
    assert trace is not None
    assert (trace.status, trace.steps[0].kind, trace.steps[-1].kind) == ("failed", "question", "error")


def test_the_token_limit_is_lowered_to_what_fits_and_recorded() -> None:
    engine = ScriptedEngine(["The answer is 7.", "7"], context_length=120)
    trace = ChainOfThought(engine).run("What is 3 + 4?")
    call = trace.calls[0]
    assert call.sampling.max_tokens == 120 - len(call.prompt_token_ids)


def test_the_token_budget_ends_a_run() -> None:
    engine = ScriptedEngine(["one two three four five six", "7"])
    with pytest.raises(BudgetExceededError, match="raise the token budget") as caught:
        ChainOfThought(engine, budget=Budget(tokens=5)).run("What is 3 + 4?")
    assert caught.value.trace is not None
    assert len(caught.value.trace.calls[0].completions[0].token_ids) == 5


def test_an_empty_question_is_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        ChainOfThought(ScriptedEngine([])).run(" \n")


def test_a_failing_engine_leaves_a_failed_call_behind() -> None:
    with pytest.raises(EngineResponseError) as caught:
        ChainOfThought(ScriptedEngine([])).run("What is 3 + 4?")
    trace = caught.value.trace
    assert trace is not None
    assert trace.calls[0].error == "the script has no more replies"
    assert trace.status == "failed"


def test_all_chains_go_out_in_one_request() -> None:
    engine = ScriptedEngine([f"So it is {n}. The answer is {n}." for n in (7, 8, 7, 9)])
    trace = SelfConsistency(engine, n=4).run("What is 3 + 4?", reference="7")
    trace.check()
    assert len(engine.requests) == 1 and engine.requests[0][1].n == 4
    assert trace.outcome.answer == "7"
    assert trace.outcome.details["margin"] == pytest.approx(0.25)
    assert {step.branch for step in trace.steps} == {None, "b1", "b2", "b3", "b4"}
    final = trace.steps[-1]
    votes = [(edge.source, edge.target) for edge in trace.edges if edge.kind == "votes_for"]
    assert votes == [(parent, final.id) for parent in final.parents] and len(votes) == 2


def test_second_stages_go_out_together_too() -> None:
    engine = ScriptedEngine(["a. b.", "c.", " 7", " 8"])
    SelfConsistency(engine, n=2, shots="zero").run("What is 3 + 4?")
    assert [len(prompts) for prompts, _ in engine.requests] == [1, 2]


def test_a_tie_is_told_and_goes_to_the_first() -> None:
    engine = ScriptedEngine([f"The answer is {n}." for n in ("8", "7", "7.0", "8")])
    details = SelfConsistency(engine, n=4).run("What is 3 + 4?").outcome
    assert (details.answer, details.details["tied"], details.details["margin"]) == ("8", ["8", "7"], 0.0)


def test_chains_without_an_answer_abstain() -> None:
    engine = ScriptedEngine(["no idea", "The answer is 7.", "hm"])
    outcome = SelfConsistency(engine, n=3).run("What is 3 + 4?").outcome
    assert (outcome.answer, outcome.details["abstained"]) == ("7", 2)
    silent = SelfConsistency(ScriptedEngine(["a", "b"]), n=2).run("What is 3 + 4?")
    assert (silent.outcome.answer, silent.status) == (None, "completed")


@pytest.mark.parametrize(("vote", "normalised"), [("weighted", True), ("unnormalised", False)])
def test_weighted_votes_are_sums_of_probabilities(vote: str, normalised: bool) -> None:
    texts = ["It is surely so. The answer is 7.", "The answer is 8.", "Then the answer is 7."]
    trace = SelfConsistency(ScriptedEngine(texts), n=3, vote=vote).run("What is 3 + 4?")  # type: ignore[arg-type]
    expected: dict[str, float] = {}
    for completion, answer in zip(trace.calls[0].completions, ["7", "8", "7"], strict=True):
        total = sum(completion.logprobs)
        weight = math.exp(total / len(completion.logprobs) if normalised else total)
        expected[answer] = expected.get(answer, 0.0) + weight
    assert trace.outcome.details["weights"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"n": 0}, "at least one"), ({"temperature": 0.0}, "temperature above 0"), ({"vote": "mayority"}, "majority")],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SelfConsistency(ScriptedEngine([]), **options)  # type: ignore[arg-type]


def test_unknown_prompts_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(UnknownNameError, match="cot-zero-shot"):
        ChainOfThought(ScriptedEngine([]), prompt="cot-zero-shots")
