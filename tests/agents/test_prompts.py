"""Prompt files."""

from pathlib import Path

import pytest

from tracer.agents.cot import ChainOfThought
from tracer.agents.prompts import Prompt, bundled_prompts, load_prompt
from tracer.agents.scripted import ScriptedEngine
from tracer.errors import InputError
from tracer.trace.segments import Piece

BUNDLED = {
    "cot-few-shot", "cot-zero-shot", "react-native", "react-one-shot", "react-text", "tot-game24", "tot-text",
}  # fmt: skip


def test_bundled_prompts_load() -> None:
    assert set(bundled_prompts()) == BUNDLED
    for name in BUNDLED:
        prompt = load_prompt(name)
        assert prompt.name == name and prompt.description and prompt.templates


def test_the_few_shot_exemplars_are_right() -> None:
    # Every "a * b = c" in them is calculated again: a wrong exemplar would teach the model to be wrong.
    import re

    from tracer.agents.tools.calculator import evaluate

    prompt = load_prompt("cot-few-shot")
    assert len(prompt.exemplars) == 8
    for exemplar in prompt.exemplars:
        equations = re.findall(r"((?:\d+ [-+*/] )+\d+) = (\d+)", exemplar.text)
        assert equations and all(evaluate(left) == int(right) for left, right in equations)
        assert exemplar.text.rstrip().endswith(f"The answer is {equations[-1][1]}.")


def test_fields_become_pieces_with_their_own_labels() -> None:
    prompt = Prompt(name="p", templates={"user": "A {{x}} {question}!{documents}"})
    pieces = prompt.fill("user", {"question": [Piece("why?", "question", "s1")], "documents": ""})
    assert pieces == [Piece("A {x} ", "instruction"), Piece("why?", "question", "s1"), Piece("!", "instruction")]


def test_braces_in_values_are_left_alone() -> None:
    prompt = Prompt(name="p", templates={"user": "{question}"})
    assert prompt.fill("user", {"question": [Piece("{documents} {x}", "question")]})[0].text == "{documents} {x}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name = ", "not valid TOML"),
        ("title = 'x'", "name"),
        ("name = 'x'\nodd = 1", "odd"),
        ("name = 'x'", "no template 'user'"),
        ("name = 'x'\n[templates]\nuser = '{questoin}'", "unknown field"),
    ],
)
def test_a_bad_prompt_file_is_refused_with_the_reason(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "own.toml"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        ChainOfThought(ScriptedEngine(["7"]), prompt=str(path)).run("3 + 4?")


def test_a_prompt_of_ones_own_is_used_and_recorded(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text("name = 'mine'\n[templates]\nuser = 'Say it: {question}'")
    engine = ScriptedEngine(["The answer is 7."])
    trace = ChainOfThought(engine, prompt=str(path)).run("3 + 4?")
    assert trace.agent.parameters["prompt"] == "mine"
    assert "Say it: 3 + 4?" in engine.prompt_texts()[0][0]


def test_an_absent_file_is_refused() -> None:
    with pytest.raises(InputError, match="cannot read"):
        load_prompt("/nowhere/own.toml")
