"""ReAct in the paper's text form: ``Thought 1: ... / Action 1: search[...] / Observation 1: ...``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tracer.agents.base import Reply, Run, document_pieces
from tracer.agents.react import FINISH, Action, Dialogue
from tracer.agents.tools import ToolResult, tool_specs
from tracer.trace.segments import Piece, Rendered, Tokenizer, render_chat, render_text
from tracer.trace.steps import token_range
from tracer.trace.trace import Sampling, SegmentKind, Step, StepKind

if TYPE_CHECKING:
    from tracer.agents.react import ReAct

_ACTION = re.compile(r"^[ \t]*Action(?:[ \t]+\d+)?[ \t]*:[ \t]*(?P<call>[^\n]*)", re.MULTILINE | re.IGNORECASE)
_CALL = re.compile(r"^(?P<tool>[\w.-]+)\s*[\[(](?P<arguments>.*?)[\])]?\s*\.?\s*$", re.DOTALL)


class TextDialogue(Dialogue):
    """One assistant turn that grows: the model writes thoughts and actions, observations are filled in between."""

    def __init__(self, agent: ReAct, run: Run, question: Step, documents: Sequence[Step]) -> None:
        super().__init__(agent, run, question, documents)
        functions = [spec["function"] for spec in tool_specs(agent.tools)]
        specs = "\n".join(f"{tool['name']}[input]: {' '.join(tool['description'].split())}" for tool in functions)
        user = agent.prompt.fill(
            "user",
            {
                "tools": [Piece(specs, "tools")],
                "question": [Piece(question.text.strip(), "question", question.id)],
                "documents": document_pieces(documents),
            },
        )
        self.prompt = render_chat(agent.prompt.chat(user), run.tokenizer)
        self._pending: _Pending | None = None

    def next_action(self) -> tuple[Action | None, Step | None]:
        """One round: a thought and an action, or a second call for the action that the thought lacks."""
        self.rounds += 1
        self._append(f"Thought {self.rounds}:", "template")
        reply = self._complete([f"\nObservation {self.rounds}:"])
        written = reply.text[: reply.stop_position]
        match = _ACTION.search(written)
        thought = self._record("thought", reply, 0, match.start() if match else len(written))
        if match is not None:
            action = self._record("action", reply, match.start(), match.end(), call=match.group("call"))
            self._pending = _Pending(reply, [thought, action], match.end())
            return self._parse(match.group("call")), action
        # The paper's remedy: ask for the action alone.
        self.run.count("missing_actions")
        self._pending = _Pending(reply, [thought], len(written))
        self._append(f"\nAction {self.rounds}:", "template")
        reply = self._complete(["\n"])
        written = reply.text[: reply.stop_position]
        action = self._record("action", reply, 0, len(written), call=written)
        self._pending = _Pending(reply, [action], len(written))
        return self._parse(written), action

    def observe(self, result: ToolResult, action: Step | None) -> None:
        """Fill in the observation."""
        step = self.record_observation(result, action)
        self._append(f"\nObservation {self.rounds}:", "template")
        self._append(f" {' '.join(result.text.split())}", "observation", step.id)
        self._append("\n", "template")

    def force_finish(self) -> str | None:
        """Write ``finish[`` for the model and let it fill in the answer."""
        self.rounds += 1
        self._append(f"Action {self.rounds}: {FINISH}[", "template")
        reply = self._complete(["]", "\n"])
        written = reply.text[: reply.stop_position]
        self._record("answer", reply, 0, len(written), forced=True)
        self.run.count("forced_finishes")
        return written.strip() or None

    def _parse(self, call: str) -> Action:
        """Read ``tool[arguments]``; JSON between the brackets becomes named arguments."""
        match = _CALL.match(call.strip())
        if match is None:
            self.run.count("malformed_actions")
            return Action(call.strip() or "nothing", "")
        tool, text = match.group("tool"), match.group("arguments").strip()
        if tool.casefold() == FINISH:
            return Action(FINISH, text)
        if text.startswith("{"):
            try:
                arguments = json.loads(text)
            except ValueError:
                arguments = None
            if isinstance(arguments, dict):
                return Action(tool, arguments)
        return Action(tool, text.strip("\"'"))

    def _complete(self, stop: list[str]) -> Reply:
        sampling = Sampling(max_tokens=self.agent.max_tokens, stop=stop)
        ((reply,),) = self.run.complete([self.prompt], sampling)
        return reply

    def _record(
        self, kind: StepKind, reply: Reply, start: int, end: int, *, call: str | None = None, forced: bool = False
    ) -> Step:
        span = token_range(reply.decoded, start, end)
        finishing = kind == "answer" or (call is not None and call.strip().casefold().startswith(FINISH))
        step = self.run.recorder.step(
            "answer" if finishing else kind,
            reply.text[start:end].strip(),
            parents=[self.last],
            call=reply.call_id,
            completion=reply.index,
            start=span.start,
            end=span.end,
            data={"forced": True} if forced else {"call": call.strip()} if call is not None else None,
        )
        self.last = step
        return step

    def _append(self, text: str, kind: SegmentKind, step_id: str | None = None) -> None:
        """Append text of our own; first the model's ids that it follows."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            text = pending.settle(self.prompt, text, self.run.tokenizer)
        self.prompt.extend(render_text([Piece(text, kind, step_id)], self.run.tokenizer))


@dataclass(frozen=True, slots=True)
class _Pending:
    r"""What the model wrote last, up to the character ``end``, not yet part of the prompt.

    A stop string rarely ends where a token does: the model may have written ``]\n`` as one token, or all of the label
    that it was stopped at. So its ids are appended only when it is known which text follows them.
    """

    reply: Reply
    steps: Sequence[Step]
    end: int

    def settle(self, prompt: Rendered, following: str, tokenizer: Tokenizer) -> str:
        """Append as many ids as agree with the text that follows.

        Returns:
            What is left of ``following``.
        """
        ids, ends, text = self.reply.body_ids, self.reply.decoded.ends, self.reply.text
        count = sum(end <= self.end for end in ends[: len(ids)])
        while count < len(ids) and following.startswith(text[self.end : ends[count]]):
            count += 1
        position = 0
        for step in self.steps:
            start, end = min(step.start or 0, count), min(step.end or 0, count)
            prompt.append(ids[position:start], "template")
            prompt.append(ids[max(position, start) : end], step.kind, step.id)
            position = max(position, end)
        prompt.append(ids[position:count], "template")
        kept = ends[count - 1] if count else 0
        if kept < self.end:
            # The token goes on beyond what may stay; only its first characters are kept, as new tokens.
            last = self.steps[-1]
            prompt.extend(render_text([Piece(text[kept : self.end], last.kind, last.id)], tokenizer))
        return following[max(0, kept - self.end) :]
