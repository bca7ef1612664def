"""Running tools: whatever a tool does, there is one clean result."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.tools import BaseTool, InjectedToolArg, StructuredTool, Tool, ToolException
from pydantic import BaseModel, Field

from tracer.agents.tools import bundled, calculator, find_tool, run_tool, tool_specs
from tracer.agents.tools.run import clean_text, redact
from tracer.errors import InputError, ToolError, UnknownNameError


class Unprintable:
    """An object whose text cannot be had."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def returning(value: object) -> BaseTool:
    return Tool(name="box", description="Returns something.", func=lambda _: value)


def raising(error: BaseException) -> BaseTool:
    def fail(_: str) -> str:
        raise error

    return Tool(name="box", description="Fails.", func=fail)


def area(width: float, height: Annotated[float, "in metres"], unit: str = "m2") -> str:
    """Computes an area."""
    return f"{width * height} {unit}"


@pytest.fixture
def rectangle() -> BaseTool:
    return StructuredTool.from_function(area)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain\ttext\n", "plain\ttext\n"),
        (None, "(no output)"),
        ("", "(no output)"),
        ("\x1b[0m\0", "(no output)"),
        (b"caf\xc3\xa9 \xff", "café \ufffd"),
        ({"a": [1, None], "é": Path("x")}, '{"a": [1, null], "é": "x"}'),
        ([1, 2], "[1, 2]"),
        (0, "0"),
        (False, "False"),
        ("\x1b[31mred\x1b[0m \x1b]8;;http://x\x07link\x1b]8;;\x07 bell\x07 back\x08 \x9b1mc1", "red link bell back c1"),
        ("over\rwritten\r\nnext", "over\nwritten\nnext"),
        ("evil\u202etxt.exe\u2066", "eviltxt.exe"),
        ("broken \ud800 pair", "broken ? pair"),
    ],
)
def test_any_result_becomes_clean_text(value: object, text: str) -> None:
    result = run_tool(returning(value), "go")
    assert (result.text, result.error, result.truncated) == (text, None, False)
    assert result.original_chars == len(text)


def test_a_dictionary_that_holds_itself_becomes_text() -> None:
    value: dict[str, object] = {}
    value["self"] = value
    assert run_tool(returning(value), "go").text == "{'self': {...}}"


def test_ten_megabytes_are_cut_with_a_note() -> None:
    result = run_tool(returning("x" * 10_000_000), "go", max_chars=100)
    assert result.text == "x" * 100 + "\n[... 9999900 characters left out]"
    assert result.truncated
    assert result.original_chars == 10_000_000


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("bad\nthing\x1b[31m"), "box failed: ValueError: bad thing"),
        (KeyError(), "box failed: KeyError"),
        (SystemExit(3), "box failed: SystemExit: 3"),
        (KeyboardInterrupt(), "box failed: KeyboardInterrupt"),
        (ToolError("try again"), "box: try again"),
        (ToolException("no such page"), "box: no such page"),
        (RecursionError("deep"), "box failed: RecursionError: deep"),
    ],
)
def test_an_exception_becomes_one_line(error: BaseException, line: str) -> None:
    result = run_tool(raising(error), "go")
    assert result.error == line
    assert result.text == f"Error: {line}"


def test_a_long_error_is_cut() -> None:
    assert len(run_tool(raising(ValueError("x" * 10_000_000)), "go").text) < 600


def test_an_exception_without_text_is_named() -> None:
    class Silent(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert run_tool(raising(Silent()), "go").error == "box failed: Silent"


def test_a_result_without_text_is_an_error() -> None:
    assert run_tool(returning(Unprintable()), "go").error == "box failed: RuntimeError: no text"


@pytest.mark.parametrize(
    "secret",
    [
        "sk-proj-abcdefghijklmnop1234",
        "hf_abcdefghijklmnopqrstuv",
        "ghp_abcdefghijklmnopqrstuv",
        "AKIAABCDEFGHIJKLMNOP",
        "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.c2lnbmF0dXJl",
        "0123456789abcdef0123456789abcdef",
    ],
)
def test_what_looks_like_a_key_is_redacted(secret: str) -> None:
    result = run_tool(raising(ValueError(f"401 for {secret}, try later")), "go")
    assert result.error is not None
    assert secret not in result.error
    assert "[redacted]" in result.error
    assert result.error.endswith("try later")


@pytest.mark.parametrize(
    "text",
    [
        "https://host/?api_key=hunter22&x=1",
        "Authorization: Bearer hunter22",
        "{'password': 'hunter22'}",
        "postgres://me:hunter22@host/db",
        "MY_TOKEN = hunter22",
    ],
)
def test_named_secrets_are_redacted(text: str) -> None:
    assert "hunter22" not in redact(text)


def test_secret_values_of_the_environment_are_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_KEY", "plain words")
    assert redact("refused: plain words") == "refused: [redacted]"


def test_a_harmless_message_is_left_alone() -> None:
    message = "max_tokens: 5 is over the limit of 3 at line 12 of notes/plan.md"
    assert redact("the key is wrong at " + message.split("at ")[1]) == "the key is wrong at line 12 of notes/plan.md"


def test_a_tool_that_hangs_is_given_up() -> None:
    release = threading.Event()
    tool = Tool(name="box", description="Hangs.", func=lambda _: str(release.wait(60)))
    result = run_tool(tool, "go", timeout=0.1)
    release.set()
    assert result.error == "box: no result within 0.1 s; it was given up"


def test_a_cancelled_call_is_given_up() -> None:
    release = threading.Event()
    cancel = threading.Event()
    cancel.set()
    tool = Tool(name="box", description="Hangs.", func=lambda _: str(release.wait(60)))
    result = run_tool(tool, "go", cancel=cancel)
    release.set()
    assert result.error == "box: cancelled"


def test_a_hanging_tool_does_not_keep_the_program_from_ending() -> None:
    program = (
        "import time\nfrom langchain_core.tools import Tool\nfrom tracer.agents.tools import run_tool\n"
        "print(run_tool(Tool(name='t', description='d', func=lambda _: time.sleep(600)), 'x', timeout=0.1).error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert "given up" in done.stdout


def test_importing_the_package_does_not_import_langchain() -> None:
    program = (
        "import sys, tracer.agents.tools; print([m for m in ('langchain_core', 'torch', 'bm25s') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_a_string_goes_to_the_one_argument() -> None:
    assert run_tool(calculator(), "6 * 7").text == "42"


def test_a_string_may_be_an_object_of_arguments(rectangle: BaseTool) -> None:
    assert run_tool(calculator(), '{"expression": "6 * 7"}').text == "42"
    assert run_tool(rectangle, '{"width": "2", "height": 3}').text == "6.0 m2"


def test_named_arguments_are_checked_and_converted(rectangle: BaseTool) -> None:
    assert run_tool(rectangle, {"width": "2", "height": 3, "unit": "ft2"}).text == "6.0 ft2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("2 by 3", "arguments must be a JSON object with 'width', 'height'"),
        ("[1, 2]", "arguments must be a JSON object with 'width', 'height'"),
        ({"width": 2}, "argument 'height' is missing; it takes 'width', 'height', 'unit'"),
        ({"width": 2, "height": 3, "depth": 4}, "unknown argument 'depth'; it takes 'width', 'height', 'unit'"),
        ({"width": "wide", "height": 3}, "argument 'width': Input should be a valid number"),
    ],
)
def test_wrong_arguments_are_explained(rectangle: BaseTool, arguments: str | dict[str, Any], message: str) -> None:
    error = run_tool(rectangle, arguments).error
    assert error is not None
    assert error.startswith(f"area: {message}")


def test_a_model_cannot_set_an_injected_argument() -> None:
    def look(name: str, owner: Annotated[str, InjectedToolArg] = "nobody") -> str:
        """Looks up a name."""
        return f"{name} of {owner}"

    tool = StructuredTool.from_function(look)
    assert run_tool(tool, {"name": "x"}).text == "x of nobody"
    assert run_tool(tool, {"name": "x", "owner": "root"}).error == "look: unknown argument 'owner'; it takes 'name'"


def test_a_tool_with_a_plain_json_schema_is_checked_too() -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tool = StructuredTool(name="weather", description="d", args_schema=schema, func=lambda city: f"rain in {city}")
    assert run_tool(tool, "Bergen").text == "rain in Bergen"
    assert run_tool(tool, {"town": "Bergen"}).error == "weather: unknown argument 'town'; it takes 'city'"


def test_a_tool_without_arguments_runs() -> None:
    def noon() -> str:
        """Tells the time."""
        return "12:00"

    tool = StructuredTool.from_function(noon)
    assert run_tool(tool, "").text == run_tool(tool, {}).text == run_tool(tool, "{}").text == "12:00"


def test_a_tool_that_is_only_asynchronous_runs() -> None:
    async def later(word: str) -> str:
        return word.upper()

    tool = StructuredTool.from_function(coroutine=later, name="later", description="d")
    assert run_tool(tool, "now").text == "NOW"


def test_a_subclass_of_base_tool_runs() -> None:
    class Query(BaseModel):
        text: str = Field(min_length=3)

    class Echo(BaseTool):
        name: str = "echo"
        description: str = "Repeats."
        args_schema: type[BaseModel] = Query

        def _run(self, text: str) -> str:
            return text

    assert run_tool(Echo(), "hello").text == "hello"
    assert run_tool(Echo(), "a").error == "echo: argument 'text': String should have at least 3 characters"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=50) | st.dictionaries(st.text(max_size=8), json_values, max_size=3) | json_values)
def test_it_never_raises_for_any_arguments(arguments: Any) -> None:
    for tool in (calculator(), returning("ok"), StructuredTool.from_function(area)):
        result = run_tool(tool, arguments)
        assert (result.error is None) or result.text == f"Error: {result.error}"


@settings(max_examples=60, deadline=None)
@given(json_values | st.binary(max_size=50) | st.builds(object))
def test_it_never_raises_for_any_result(value: object) -> None:
    assert run_tool(returning(value), "go").text.encode()


@given(st.text())
def test_clean_text_has_no_controls_and_stays_clean(text: str) -> None:
    cleaned = clean_text(text)
    assert all(c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160) for c in cleaned)
    assert clean_text(cleaned) == cleaned


def test_specs_are_those_of_a_chat_template(rectangle: BaseTool) -> None:
    [spec] = tool_specs([rectangle])
    assert spec == {
        "type": "function",
        "function": {
            "name": "area",
            "description": "Computes an area.",
            "parameters": {
                "type": "object",
                "properties": {
                    "width": {"type": "number"},
                    "height": {"type": "number", "description": "in metres"},
                    "unit": {"type": "string", "default": "m2"},
                },
                "required": ["width", "height"],
            },
        },
    }


def test_a_tool_is_found_by_name(rectangle: BaseTool) -> None:
    tools = [calculator(), rectangle]
    assert find_tool(tools, " Calculator ") is tools[0]
    with pytest.raises(UnknownNameError, match="unknown tool 'calculater'; did you mean 'calculator'"):
        find_tool(tools, "calculater")


def test_bundled_tools_are_built_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# A\n\ntext")
    tools = bundled(["search", "calculator", "python", "search"], docs=tmp_path)
    assert [tool.name for tool in tools] == ["search", "calculator", "python"]


def test_an_unknown_bundled_tool_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'calculator'"):
        bundled(["calculators"])


def test_search_without_documents_says_what_to_pass() -> None:
    with pytest.raises(InputError, match="--docs"):
        bundled(["search"])


def test_the_environment_is_not_touched() -> None:
    before = dict(os.environ)
    run_tool(calculator(), "1")
    assert dict(os.environ) == before
