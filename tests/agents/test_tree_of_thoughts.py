"""Tree of thoughts, on a scripted player of the Game of 24."""

import re
from collections.abc import Callable

import pytest

from tracer.agents.scripted import ScriptedEngine
from tracer.agents.tot_problems import Game24, game24_numbers, lines, load_problem
from tracer.agents.tree_of_thoughts import TreeOfThoughts, TreeSettings
from tracer.errors import InputError, UnknownNameError
from tracer.trace.trace import Step, Trace

PROPOSALS = {
    "4 4 6 8": "4 + 8 = 12 (left: 4 6 12)\n8 + 4 = 12 (left: 4 6 12)\n4 + 4 = 9 (left: 6 8 9)\nhm\n"
    "6 * 8 = 48 (left: 4 4 48)",
    "4 6 12": "6 - 4 = 2 (left: 2 12)\n4 * 6 = 24 (left: 12 24)",
    "4 4 48": "4 * 4 = 16 (left: 16 48)",
    "2 12": "2 * 12 = 24 (left: 24)\n2 + 12 = 14 (left: 14)",
    "12 24": "24 - 12 = 12 (left: 12)",
    "16 48": "48 - 16 = 32 (left: 32)",
}


def player(judge: Callable[[str], str]) -> Callable[[str], str]:
    def play(prompt: str) -> str:
        text = prompt.rstrip()
        left = re.findall(r"Numbers: ([\d ]+)", text)[-1].strip() if "Numbers: " in text else ""
        if text.endswith("Possible next steps:"):
            return PROPOSALS.get(left, "nothing comes to mind") + "\nNumbers: 1"
        if text.endswith("Answer:"):
            return " (6 - 4) * (4 + 8) = 24" if "2 * 12 = 24" in text.split("Input:")[-1] else " no idea"
        return judge(left)

    return play


def sensible(left: str) -> str:
    """Knows that 12 24, 12, 14 and 32 lead nowhere."""
    return "impossible" if left in ("12 24", "12", "14", "32", "16 48") else "sure" if "12" in left else "likely"


def solve(settings: TreeSettings, judge: Callable[[str], str] = sensible) -> tuple[Trace, ScriptedEngine]:
    engine = ScriptedEngine(player(judge))
    trace = TreeOfThoughts(engine, settings=settings).run("4 4 6 8")
    trace.check()
    return trace, engine


def test_breadth_first_search_finds_the_game() -> None:
    trace, _ = solve(TreeSettings(breadth=2, judgements=2))
    assert (trace.outcome.answer, trace.outcome.correct) == ("(6 - 4) * (4 + 8)", True)
    assert trace.outcome.details["top_value_ties"] == 1
    assert trace.outcome.details["any_kept_correct"] is True
    chosen = trace.steps[-2] if trace.steps[-1].pruned else trace.steps[-1]
    assert [edge.kind for edge in trace.edges if edge.target == chosen.id] == ["selects"]


def test_all_states_of_a_level_go_out_together() -> None:
    _, engine = solve(TreeSettings(breadth=5, judgements=2))
    # propose, value, propose, value, propose, value, final: seven requests whatever the number of states.
    assert len(engine.requests) == 7
    assert [len(prompts) for prompts, _ in engine.requests][:3] == [1, 2, 3]


def test_bad_proposals_are_kept_with_their_error_and_counted() -> None:
    trace, _ = solve(TreeSettings(breadth=1, judgements=1))
    errors = {step.text: step.error for step in trace.steps if step.kind == "thought" and step.error}
    assert errors == {
        "4 + 4 = 9 (left: 6 8 9)": "4 + 4 is 8, not 9",
        "hm": "not of the form 'a + b = c (left: ...)'",
    }
    assert all(step.pruned for step in trace.steps if step.error)
    assert trace.outcome.details["parse_failures"] == 2


def test_a_state_that_stands_there_already_is_worth_nothing() -> None:
    trace, engine = solve(TreeSettings(breadth=1, judgements=1))
    duplicate = next(step for step in trace.steps if step.text == "8 + 4 = 12 (left: 4 6 12)")
    first = next(step for step in trace.steps if step.text == "4 + 8 = 12 (left: 4 6 12)")
    assert (duplicate.score, duplicate.data["duplicate_of"], duplicate.pruned) == (0.0, first.id, True)
    assert len(engine.requests[1][0]) == 2


def test_values_of_several_judgements_add_up() -> None:
    trace, _ = solve(TreeSettings(breadth=2, judgements=3))
    first = next(step for step in trace.steps if step.text == "4 + 8 = 12 (left: 4 6 12)")
    assert first.score == pytest.approx(60.0)
    judged = [edge for edge in trace.edges if edge.kind == "evaluates" and edge.target == first.id]
    assert len(judged) == 3


def test_pruned_branches_stay_in_the_trace() -> None:
    trace, _ = solve(TreeSettings(breadth=1, judgements=1))
    pruned = {step.text for step in trace.steps if step.pruned and step.error is None and step.kind == "thought"}
    assert {"6 * 8 = 48 (left: 4 4 48)", "2 + 12 = 14 (left: 14)"} <= pruned


def test_tokens_of_a_thought_are_those_of_its_line() -> None:
    trace, engine = solve(TreeSettings(breadth=2, judgements=1))
    for step in trace.steps:
        if step.kind == "thought" and step.call_id is not None and step.completion is not None:
            ids = trace.call(step.call_id).completions[step.completion].token_ids[step.start : step.end]
            assert engine.tokenizer.decode(ids).text.strip() == step.text


def test_depth_first_search_gives_impossible_states_up_and_backtracks() -> None:
    # This judge prefers the way that leads nowhere, so that the search has to come back.
    def judge(left: str) -> str:
        return {"4 4 48": "sure", "16 48": "impossible"}.get(left, "likely")

    trace, _ = solve(TreeSettings(search="dfs", judgements=1), judge)
    assert trace.outcome.correct is True
    texts = [step.text for step in trace.steps if step.kind == "thought"]
    assert texts.index("4 * 4 = 16 (left: 16 48)") < texts.index("6 - 4 = 2 (left: 2 12)")
    given_up = next(step for step in trace.steps if step.text == "4 * 4 = 16 (left: 16 48)")
    assert given_up.pruned


def test_the_node_limit_ends_a_search() -> None:
    trace, _ = solve(TreeSettings(search="dfs", judgements=1, nodes=3))
    assert isinstance(trace.outcome.details["nodes"], int) and trace.outcome.details["nodes"] <= 5 + 2
    assert trace.status == "completed"


def test_votes_choose_among_all_states_of_a_level() -> None:
    def play(prompt: str) -> str:
        if "Which choice" in prompt:
            return "2"
        return "The answer is B." if "Finish" in prompt else "1. A thing\n2. Another"

    engine = ScriptedEngine(play)
    settings = TreeSettings(evaluate="vote", breadth=1, depth=1, judgements=3)
    trace = TreeOfThoughts(engine, settings=settings).run("What now?", reference="B")
    trace.check()
    thoughts = [step for step in trace.steps if step.kind == "thought"]
    found = [(step.text, step.score, step.pruned) for step in thoughts]
    assert found == [("A thing", 0.0, True), ("Another", 3.0, False)]
    assert [edge.target for edge in trace.edges if edge.kind == "votes_for"] == [thoughts[1].id] * 3
    assert trace.outcome.correct is True
    structured = engine.requests[1][1].structured
    assert structured is not None and (structured.kind, structured.value) == ("choice", ["1", "2"])


def test_sampled_thoughts_are_one_request_a_level() -> None:
    def play(prompt: str) -> str:
        return "sure" if "one word" in prompt else "The answer is 1." if "Finish" in prompt else "go"

    engine = ScriptedEngine(play)
    settings = TreeSettings(generate="sample", samples=4, depth=1, judgements=1)
    TreeOfThoughts(engine, problem="text", settings=settings).run("What now?")
    assert engine.requests[0][1].n == 4


def test_a_model_that_only_babbles_ends_without_an_answer() -> None:
    trace = TreeOfThoughts(ScriptedEngine(lambda _: "blah")).run("4 4 6 8")
    assert (trace.status, trace.outcome.answer, trace.outcome.correct) == ("completed", None, False)
    assert trace.outcome.details["parse_failures"] == 1


def test_unreadable_judgements_are_counted() -> None:
    trace, _ = solve(TreeSettings(breadth=1, judgements=1, structured=False), lambda _: "well")
    assert isinstance(trace.outcome.details["parse_failures"], int) and trace.outcome.details["parse_failures"] > 2
    assert any(step.error == "this judgement could not be read" for step in trace.steps)


@pytest.mark.parametrize(
    ("line", "left", "error"),
    [
        ("4 + 8 = 12 (left: 4 6 12)", "4 4 6 8", None),
        ("8 - 10 = -2 (left: -2 3)", "3 8 10", None),
        ("10 / 4 = 2.5 (left: 2.5 3)", "3 4 10", None),
        ("1 / 3 = 1/3 (left: 1/3 8)", "1 3 8", None),
        ("6 x 4 = 24 (left: 24)", "4 6", None),
        ("4 / 0 = 0 (left: 0)", "0 4", "not a possible operation"),
        ("5 + 8 = 13 (left: 4 6 13)", "4 4 6 8", "uses 5, which is not left"),
        ("4 + 4 = 8 (left: 6 8)", "4 4 6 8", None),
        ("8 + 8 = 16 (left: 4 16)", "4 8", "uses 8, which is not left"),
    ],
)
def test_operations_are_checked_exactly(line: str, left: str, error: str | None) -> None:
    problem = load_problem("game24", "1 1 1 1")
    assert isinstance(problem, Game24)
    problem.numbers = left.split()
    (candidate,) = problem.parse_thoughts(problem.root(Step(id="s1", kind="question", text=left)), line)
    assert candidate.error == error


def test_a_wrong_list_of_what_is_left_is_corrected() -> None:
    problem = load_problem("game24", "4 4 6 8")
    root = problem.root(Step(id="s1", kind="question", text="4 4 6 8"))
    (candidate,) = problem.parse_thoughts(root, "4 * 6 = 24 (left: 4 6)")
    assert (candidate.text, candidate.corrected) == ("4 * 6 = 24 (left: 4 6)", "4 * 6 = 24 (left: 4 8 24)")
    state = root.extend(Step(id="s2", kind="thought", text=candidate.text), candidate)
    assert problem.key(state) == "24 4 8"


def test_list_markers_are_left_out() -> None:
    text = "1. one\n\n  - two \n* three\n4 + 4 = 8"
    assert [line for line, _, _ in lines(text)] == ["one", "two", "three", "4 + 4 = 8"]
    assert all(text[start:end] == line for line, start, end in lines(text))


@pytest.mark.parametrize(
    ("question", "problem"),
    [
        ("4 5 6 10", "game24"),
        ("4, 5, 6, 10", "game24"),
        ("Game of 24: 4 5 6 10", "game24"),
        ("Use each of the numbers 1, 5, 8 and 12 once to make 24.", "game24"),
        ("What is 4 5 6 10 a?", "text"),
    ],
)
def test_a_game_of_24_is_recognised(question: str, problem: str) -> None:
    assert load_problem(None, question).name == problem


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="four numbers"):
        game24_numbers("4 5 6")
    with pytest.raises(UnknownNameError, match="game24"):
        TreeOfThoughts(ScriptedEngine([]), problem="game42")
    with pytest.raises(InputError, match="at least 1"):
        TreeSettings(breadth=0)
    with pytest.raises(UnknownNameError, match="bfs"):
        TreeSettings(search="best")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="evaluate='value'"):
        TreeSettings(search="dfs", evaluate="vote")
    with pytest.raises(InputError, match="temperature"):
        TreeSettings(temperature=0)
