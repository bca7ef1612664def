"""Running any LangChain tool so that nothing it does can break the agent, and finding tools by name."""

from __future__ import annotations

import asyncio
import contextvars
import json
import os
import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracer.agents.tools.calculator import calculator
from tracer.agents.tools.python import python_tool
from tracer.agents.tools.search import search
from tracer.errors import InputError, ToolError, TracerError, UnknownNameError

if TYPE_CHECKING:
    from langchain_core.tools import BaseTool

BUNDLED = ("calculator", "python", "search")
MAX_ERROR_CHARS = 500
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class ToolResult:
    """What came out of one tool call.

    Args:
        text: The observation for the model: the cleaned output, or ``"Error: ..."``.
        error: One line that says what went wrong, or ``None``.
        truncated: Whether output was left out.
        seconds: Wall time.
        original_chars: Length of the output before anything was left out; cleaned, unless it is far over the limit.
    """

    text: str
    error: str | None
    truncated: bool
    seconds: float
    original_chars: int


_ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor
    r"|\x1b[\]PX^_][^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"  # OSC and other strings: titles, links
    r"|\x1b[ -/]*[0-~]?"
    r"|\x9b[0-?]*[ -/]*[@-~]"
)
# C0 and C1 controls but tab and newline, and the marks that reverse the direction of text on screen.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_SECRETS = re.compile(
    r"\b(?:sk|pk|rk)[-_](?:[A-Za-z0-9]+[-_])*[A-Za-z0-9]{12,}"
    r"|\b(?:hf|gh[opsur]|github_pat|glpat|xox[abprs]|npm|pypi|lsv2)[-_][A-Za-z0-9_-]{12,}"
    r"|\bA(?:KIA|SIA)[A-Z0-9]{16}\b"
    r"|\bAIza[A-Za-z0-9_-]{30,}"
    r"|\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*)?"
    r"|\b[0-9a-fA-F]{32,}\b"
)
_NAMED_SECRETS = re.compile(
    r"""(?ix) ( \b[a-z0-9_-]{0,40} (?:api[_-]?key|secret|token|passw(?:or)?d|authorization|credential) [a-z0-9_-]{0,40}
    ["']? \s* [=:] \s* ["']? (?:(?:bearer|basic)\s+)? | \bbearer\s+ ) [^\s"',;&}]{4,}"""
)
_URL_PASSWORDS = re.compile(r"(://[^\s/:@]{0,200}:)[^\s/@]{1,200}@")
_SECRET_NAMES = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


def clean_text(text: str) -> str:
    """Take out terminal escapes, control characters other than newline and tab, and broken surrogates."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = _CONTROLS.sub("", _ESCAPES.sub("", text))
    return text.encode("utf-8", "replace").decode("utf-8")


def hide_environment(text: str) -> str:
    """Replace secret values of this process's environment, such as an API key."""
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_NAMES.search(name):
            text = text.replace(value, "[redacted]")
    return text


def redact(text: str) -> str:
    """Replace what looks like a key, a token or a password, and secret values of this process's environment."""
    text = hide_environment(text)
    text = _URL_PASSWORDS.sub(r"\1[redacted]@", text)
    text = _NAMED_SECRETS.sub(r"\1[redacted]", text)
    return _SECRETS.sub("[redacted]", text)


def _one_line(text: str) -> str:
    # Redacted before it is cut, so that a cut cannot hide the shape of a key.
    line = redact(" ".join(clean_text(text[:20_000]).split()))
    return line if len(line) <= MAX_ERROR_CHARS else line[: MAX_ERROR_CHARS - 3] + "..."


def _describe(name: str, error: BaseException) -> str:
    try:
        message = str(error).strip()
    except Exception:
        message = ""
    # Errors meant to be read need no class name: ours, and LangChain's own.
    if message and (isinstance(error, TracerError) or type(error).__name__ == "ToolException"):
        return _one_line(f"{name}: {message}")
    kind = type(error).__name__
    return _one_line(f"{name} failed: {kind}: {message}" if message else f"{name} failed: {kind}")


def _to_text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value).decode("utf-8", "replace")
    if isinstance(value, (dict, list, tuple)):
        try:
            return json.dumps(value, ensure_ascii=False, default=str)
        except (TypeError, ValueError, RecursionError):
            return str(value)
    content = getattr(value, "content", None)
    return content if isinstance(content, str) else str(value)


def _schema(tool: BaseTool) -> Mapping[str, Any]:
    """Give the JSON schema of what a model may pass; injected arguments are not in it."""
    from pydantic import BaseModel

    schema = tool.tool_call_schema
    if isinstance(schema, dict):
        return schema
    return schema.model_json_schema() if issubclass(schema, BaseModel) else schema.schema()


def _parse_arguments(tool: BaseTool, arguments: str | Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    properties = list(schema.get("properties", {}))
    required = list(schema.get("required", []))
    if isinstance(arguments, Mapping):
        return dict(arguments)
    if not isinstance(arguments, str):
        raise ToolError(f"arguments must be text or an object, not {type(arguments).__name__}")
    wanted = required or properties
    if len(wanted) == 1 and not _is_object(arguments, properties):
        return {wanted[0]: arguments}
    if not properties and not arguments.strip():
        return {}
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise ToolError(f"arguments must be a JSON object with {_names(wanted) or 'no keys'}")
    return parsed


def _is_object(text: str, properties: Sequence[str]) -> bool:
    """Whether a string is a JSON object of named arguments rather than the one argument itself."""
    if not text.lstrip().startswith("{"):
        return False
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(parsed, dict) and bool(parsed) and set(parsed) <= set(properties)


def _names(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _validate(tool: BaseTool, arguments: dict[str, Any], schema: Mapping[str, Any]) -> None:
    from pydantic import BaseModel, ValidationError

    properties = schema.get("properties", {})
    unknown = [name for name in arguments if name not in properties]
    if unknown and not schema.get("additionalProperties"):
        raise ToolError(f"unknown argument {_names(unknown)}; it takes {_names(properties) or 'none'}")
    missing = [name for name in schema.get("required", []) if name not in arguments]
    if missing:
        raise ToolError(f"argument {_names(missing)} is missing; it takes {_names(properties)}")
    model = tool.tool_call_schema
    if isinstance(model, type) and issubclass(model, BaseModel):
        try:
            model.model_validate(arguments)
        except ValidationError as error:
            found = error.errors(include_url=False, include_input=False, include_context=False)
            raise ToolError(
                "; ".join(f"argument {'.'.join(map(str, e['loc'])) or '?'!r}: {e['msg']}" for e in found[:3])
            ) from None


def _invoke(tool: BaseTool, arguments: str | Mapping[str, Any]) -> object:
    from langchain_core.tools import Tool

    if isinstance(tool, Tool) and tool.args_schema is None:
        given: str | dict[str, Any] = arguments if isinstance(arguments, str) else dict(arguments)
    else:
        schema = _schema(tool)
        given = _parse_arguments(tool, arguments, schema)
        _validate(tool, given, schema)
    if getattr(tool, "coroutine", None) is not None and getattr(tool, "func", None) is None:
        return asyncio.run(tool.ainvoke(given))
    return tool.invoke(given)


class _Call:
    """One tool call on a daemon thread; if it hangs, the thread is left behind and cannot hold up the exit."""

    def __init__(self, tool: BaseTool, arguments: str | Mapping[str, Any], *, max_chars: int) -> None:
        self.done = threading.Event()
        self.text = ""
        self.original_chars = 0
        self._max_chars = max_chars
        self.error: str | None = None
        self._tool = tool
        self._arguments = arguments
        # LangChain finds its callbacks through context variables, which a new thread does not inherit.
        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(self._work,), name=f"tool {tool.name}", daemon=True).start()

    def _work(self) -> None:
        try:
            raw = _to_text(_invoke(self._tool, self._arguments))
            # Cleaning all of a huge output would take longer than most tools; some of what is cut off is enough.
            head = hide_environment(clean_text(raw[: 4 * self._max_chars])) or "(no output)"
            self.original_chars = max(len(head), len(raw)) if len(raw) > 4 * self._max_chars else len(head)
            self.text = head
        except BaseException as error:
            self.error = _describe(self._tool.name, error)
        finally:
            self.done.set()


def _wait(call: _Call, name: str, timeout: float, cancel: threading.Event | None) -> str | None:
    """Wait for a call; says why not if it is not waited for to its end."""
    deadline = time.monotonic() + timeout
    while not call.done.is_set():
        if cancel is not None and cancel.is_set():
            return f"{name}: cancelled"
        left = deadline - time.monotonic()
        if left <= 0:
            return f"{name}: no result within {timeout:g} s; it was given up"
        call.done.wait(left if cancel is None else min(left, _POLL_SECONDS))
    return None


def run_tool(
    tool: BaseTool,
    arguments: str | Mapping[str, Any],
    *,
    timeout: float = 30.0,
    max_chars: int = 8000,
    cancel: threading.Event | None = None,
) -> ToolResult:
    """Run a tool; whatever it does, the outcome is a result and never an exception.

    A string goes to the one argument of a tool that needs one, or is read as a JSON object. Arguments are checked
    against the tool's schema first. Output of any type becomes text without control characters and terminal escapes;
    text over ``max_chars`` is cut with a note. An error becomes one line, without traceback, and with whatever looks
    like a key or password replaced. A tool that hangs is given up; its thread goes on in the background but does not
    keep the program from ending.

    Args:
        tool: Any LangChain tool, also one that is only asynchronous.
        arguments: What the model wrote: text, or named arguments.
        timeout: Seconds to wait.
        max_chars: The most characters of output to keep.
        cancel: Give up as soon as this is set.

    Returns:
        The outcome.
    """
    started = time.monotonic()
    name = str(getattr(tool, "name", type(tool).__name__))
    try:
        call = _Call(tool, arguments, max_chars=max_chars)
        error = _wait(call, name, timeout, cancel) or call.error
        text, original = call.text, call.original_chars
    except Exception as failure:
        error, text, original = _describe(name, failure), "", 0
    seconds = time.monotonic() - started
    if error is not None:
        shown = f"Error: {error}"
        return ToolResult(shown, error, False, seconds, len(shown))
    if original <= max_chars:
        return ToolResult(text, None, False, seconds, original)
    shown = text[:max_chars]
    cut = f"{shown}\n[... {original - len(shown)} characters left out]"
    return ToolResult(cut, None, True, seconds, original)


def tool_specs(tools: Iterable[BaseTool]) -> list[dict[str, Any]]:
    """Describe tools for a chat template, in the OpenAI form.

    Args:
        tools: The tools.

    Returns:
        For each ``{"type": "function", "function": {"name", "description", "parameters"}}``.
    """
    from langchain_core.utils.function_calling import convert_to_openai_tool

    return [convert_to_openai_tool(tool) for tool in tools]


def find_tool(tools: Iterable[BaseTool], name: str) -> BaseTool:
    """Find a tool by its name, ignoring case and surrounding space.

    Args:
        tools: Where to look.
        name: The name that the model or the user wrote.

    Returns:
        The tool.

    Raises:
        UnknownNameError: If no tool is called that.
    """
    known = {tool.name: tool for tool in tools}
    if name in known:
        return known[name]
    folded = {key.casefold(): tool for key, tool in known.items()}
    try:
        return folded[name.strip().casefold()]
    except KeyError:
        raise UnknownNameError("tool", _one_line(name), known) from None


def bundled(names: Iterable[str], docs: str | Path | None = None) -> list[BaseTool]:
    """Build bundled tools by name.

    Args:
        names: Any of ``"calculator"``, ``"search"`` and ``"python"``; one named twice is built once.
        docs: The folder for ``"search"``.

    Returns:
        The tools, in the order of the names.

    Raises:
        UnknownNameError: If a name is not that of a bundled tool.
        InputError: If ``"search"`` is asked for without a folder, or the folder cannot be used.
    """
    tools: list[BaseTool] = []
    for name in dict.fromkeys(names):
        match name:
            case "calculator":
                tools.append(calculator())
            case "python":
                tools.append(python_tool())
            case "search":
                if docs is None:
                    raise InputError("the search tool needs a folder of documents; pass --docs DIR")
                tools.append(search(docs))
            case _:
                raise UnknownNameError("tool", name, BUNDLED)
    return tools
