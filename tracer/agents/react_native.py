"""ReAct through the model's own tool calls, as its chat template writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from pydantic import JsonValue

from tracer.agents.base import Reply, Run, append_steps, document_pieces
from tracer.agents.react import FINISH, Action, Dialogue
from tracer.agents.tools import ToolResult, tool_specs
from tracer.trace.answers import extract_answer
from tracer.trace.segments import Message, Piece, chat_pieces, render_chat, render_text
from tracer.trace.steps import token_range
from tracer.trace.trace import Sampling, Step, StructuredOutput

if TYPE_CHECKING:
    from tracer.agents.react import ReAct

_PLACEHOLDER = "…"
_ANSWER_LEAD = "The answer is"


class ParsedCall(NamedTuple):
    """A tool call and its characters in the reply."""

    action: Action
    start: int
    end: int


class NativeDialogue(Dialogue):
    """A conversation in which tool results are turns of their own.

    A model that writes a broken call is asked once more, with its output constrained to a call.
    """

    def __init__(self, agent: ReAct, run: Run, question: Step, documents: Sequence[Step]) -> None:
        super().__init__(agent, run, question, documents)
        self.specs = tool_specs(agent.tools)
        user = agent.prompt.fill(
            "user",
            {
                "question": [Piece(question.text.strip(), "question", question.id)],
                "documents": document_pieces(documents),
            },
        )
        self.messages = agent.prompt.chat(user)
        self.prompt = render_chat(self.messages, run.tokenizer, tools=self.specs or None)
        self._unanswered: tuple[Reply, list[Step]] | None = None

    def next_action(self) -> tuple[Action | None, Step | None]:
        """One turn of the model: a tool call, or the final answer."""
        self.rounds += 1
        reply = self._complete()
        parsed = parse_tool_call(reply.text)
        if parsed is None and looks_like_call(reply.text) and self.specs:
            self.run.count("malformed_actions")
            self._record(reply, 0, len(reply.text), "thought", error="this tool call cannot be read; asked once more")
            reply = self._complete(StructuredOutput(kind="json_schema", value=self._call_schema()))
            parsed = parse_tool_call(reply.text)
        if parsed is None:
            self._finish(reply)
            return None, None
        steps: list[Step] = []
        if reply.text[: parsed.start].strip():
            steps.append(self._record(reply, 0, parsed.start, "thought"))
        action = self._without_strays(parsed.action)
        arguments = action.arguments
        data: dict[str, JsonValue] = {"call": {"name": action.tool, "arguments": arguments}}
        steps.append(self._record(reply, parsed.start, parsed.end, "action", data=data))
        self._unanswered = (reply, steps)
        return action, steps[-1]

    def _without_strays(self, action: Action) -> Action:
        """Leave out arguments that the tool does not have: small models copy words of the schema into their calls."""
        functions = [spec["function"] for spec in self.specs if spec["function"]["name"] == action.tool]
        if not functions or not isinstance(action.arguments, dict):
            return action
        known = functions[0]["parameters"].get("properties", {})
        kept = {name: value for name, value in action.arguments.items() if name in known}
        self.run.count("ignored_arguments", len(action.arguments) - len(kept))
        return Action(action.tool, kept)

    def observe(self, result: ToolResult, action: Step | None) -> None:
        """Append the model's turn by ids, and the result as the template writes it."""
        step = self.record_observation(result, action)
        if self._unanswered is not None:
            append_steps(self.prompt, *self._unanswered)
            self._unanswered = None
        pieces = chat_pieces(
            [
                *self.messages,
                Message("assistant", [Piece(_PLACEHOLDER, "thought")]),
                Message("tool", [Piece(result.text, "observation", step.id)]),
            ],
            self.run.tokenizer,
            tools=self.specs or None,
        )
        turn = max(index for index, piece in enumerate(pieces) if piece == Piece(_PLACEHOLDER, "thought"))
        self.prompt.extend(render_text(pieces[turn + 1 :], self.run.tokenizer))

    def force_finish(self) -> str | None:
        """Begin the final answer for the model."""
        self.rounds += 1
        self.prompt.extend(render_text([Piece(_ANSWER_LEAD, "template")], self.run.tokenizer))
        self.run.count("forced_finishes")
        self._finish(self._complete(), lead=f"{_ANSWER_LEAD} ")
        return self.answer

    def _finish(self, reply: Reply, *, lead: str = "") -> None:
        text = f"{lead}{reply.text.strip()}"
        found = extract_answer(text)
        # Made to answer, a small model may write yet another call: that is no answer.
        calls = bool(lead) and parse_tool_call(reply.text) is not None
        self.answer = None if calls else found.value if found else text.strip() or None
        self._record(reply, 0, len(reply.text), "answer", data={"forced": True} if lead else None)

    def _record(
        self,
        reply: Reply,
        start: int,
        end: int,
        kind: str,
        *,
        error: str | None = None,
        data: dict[str, JsonValue] | None = None,
    ) -> Step:
        span = token_range(reply.decoded, start, end)
        self.last = self.run.recorder.step(
            "action" if kind == "action" else "answer" if kind == "answer" else "thought",
            reply.text[start:end].strip(),
            parents=[self.last],
            call=reply.call_id,
            completion=reply.index,
            start=span.start,
            end=span.end,
            error=error,
            data=data,
        )
        return self.last

    def _complete(self, structured: StructuredOutput | None = None) -> Reply:
        sampling = Sampling(max_tokens=self.agent.max_tokens, structured=structured)
        ((reply,),) = self.run.complete([self.prompt], sampling)
        return reply

    def _call_schema(self) -> dict[str, JsonValue]:
        """A JSON schema that admits a call of any of the tools."""
        calls: list[JsonValue] = []
        for spec in self.specs:
            function = spec["function"]
            calls.append(
                {
                    "type": "object",
                    "properties": {"name": {"const": function["name"]}, "arguments": function["parameters"]},
                    "required": ["name", "arguments"],
                    "additionalProperties": False,
                }
            )
        return {"anyOf": calls}


def parse_tool_call(text: str) -> ParsedCall | None:
    """The first tool call in a reply: an object with ``name`` and ``arguments``, in call tags, a code block or bare."""
    decoder = json.JSONDecoder()
    position = text.find("{")
    while position >= 0:
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            position = text.find("{", position + 1)
            continue
        if isinstance(value, dict) and isinstance(value.get("name"), str):
            arguments = value.get("arguments", value.get("parameters", {}))
            if isinstance(arguments, dict | str):
                return ParsedCall(Action(_known(value["name"]), arguments), *_with_tags(text, position, end))
        position = text.find("{", end)
    return None


def looks_like_call(text: str) -> bool:
    """Whether a reply without a readable call seems to be meant as one."""
    return "<tool_call>" in text or ('"name"' in text and '"arguments"' in text)


def _known(name: str) -> str:
    # A model that calls a tool of this name means to end the run, but in this style it ends by answering.
    return f"{name} " if name == FINISH else name


def _with_tags(text: str, start: int, end: int) -> tuple[int, int]:
    """The call with the tags around it."""
    opening, closing = "<tool_call>", "</tool_call>"
    before = text[:start].rstrip()
    if before.endswith(opening):
        start = len(before) - len(opening)
    after = text[end:]
    if after.lstrip().startswith(closing):
        end += len(after) - len(after.lstrip()) + len(closing)
    return start, end
