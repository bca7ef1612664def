"""ReAct: thought, action, observation, until the agent finishes (Yao et al. 2023b).

The run is one growing sequence of ids: what the model wrote is never tokenised again, and an observation is
appended as tokens of its own. So a server's prefix cache serves every step, and one replay covers the whole run.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import JsonValue

from tracer.agents.base import Agent, Budget, Run, ask
from tracer.agents.prompts import load_prompt
from tracer.agents.tools import ToolResult, find_tool, run_tool
from tracer.engines.base import Engine
from tracer.errors import CancelledError, InputError, UnknownNameError
from tracer.trace.trace import AgentKind, Step, Task

if TYPE_CHECKING:
    from langchain_core.tools import BaseTool

Style = Literal["text", "native"]
Arguments = str | dict[str, JsonValue]

MAX_STEPS = 7
"""The paper's limit for HotpotQA."""
MAX_REPEATS = 2
"""How often the same action may come back before the run is ended as a loop."""
FINISH = "finish"
LOOP_NOTICE = "This action was taken before and gives nothing new. The task ends here."


@dataclass(frozen=True, slots=True)
class Action:
    """What the model wants to do next."""

    tool: str
    arguments: Arguments

    @property
    def key(self) -> str:
        """Equal for actions that do the same."""
        text = self.arguments if isinstance(self.arguments, str) else repr(sorted(self.arguments.items()))
        return f"{self.tool.casefold()}({' '.join(text.casefold().split())})"


class ReAct(Agent):
    """An agent that uses tools.

    Args:
        engine: What runs the model.
        tools: LangChain tools.
        style: ``text`` is the paper's form (``Action 1: search[...]``); ``native`` uses the model's own tool calls.
        prompt: A prompt's name or file, in place of the style's own.
        max_tokens: Length of one thought and action.
        tool_timeout: Seconds that a tool may take.
        tool_chars: Characters of a tool's result that the model is shown.
        budget: Limits of one run; seven steps by default.

    Raises:
        InputError: Two tools have the same name, or one is called ``finish``.
    """

    kind: AgentKind = "react"

    def __init__(
        self,
        engine: Engine,
        *,
        tools: Iterable[BaseTool] = (),
        style: Style = "text",
        prompt: str | None = None,
        max_tokens: int = 192,
        tool_timeout: float = 30.0,
        tool_chars: int = 2000,
        budget: Budget | None = None,
    ) -> None:
        super().__init__(engine, budget=budget)
        if style not in ("text", "native"):
            raise UnknownNameError("style", style, ["text", "native"])
        self.tools = list(tools)
        names = [tool.name for tool in self.tools]
        if len({*names, FINISH}) <= len(names):
            raise InputError(f"tools need different names, none of them {FINISH!r}; found {', '.join(names)}")
        self.style: Style = style
        self.prompt = load_prompt(prompt or f"react-{style}", requires=["user"])
        self.max_tokens = max_tokens
        self.tool_timeout = tool_timeout
        self.tool_chars = tool_chars
        self.max_steps = self.budget.steps or MAX_STEPS

    def parameters(self) -> dict[str, JsonValue]:
        """The agent's parameters."""
        return {
            "tools": [tool.name for tool in self.tools],
            "style": self.style,
            "prompt": self.prompt.name,
            "max_steps": self.max_steps,
            "max_tokens": self.max_tokens,
            "tool_timeout": self.tool_timeout,
            "tool_chars": self.tool_chars,
        }

    def solve(self, run: Run, task: Task) -> None:
        """Think, act and observe until the agent finishes or has used up its steps."""
        from tracer.agents.react_native import NativeDialogue
        from tracer.agents.react_text import TextDialogue

        question, documents = ask(run, task)
        form = TextDialogue if self.style == "text" else NativeDialogue
        dialogue = form(self, run, question, documents)
        answer, reason = self._loop(run, dialogue)
        run.finish(answer, steps=dialogue.rounds, ended_by=reason)

    def _loop(self, run: Run, dialogue: Dialogue) -> tuple[str | None, str]:
        seen: dict[str, list[Step]] = {}
        while dialogue.rounds < self.max_steps:
            action, step = dialogue.next_action()
            if action is None:
                return dialogue.answer, "answer" if dialogue.answer is not None else "no_action"
            if action.tool == FINISH:
                return str(action.arguments).strip() or None, FINISH
            before = seen.setdefault(action.key, [])
            if before and step is not None:
                run.count("repeated_actions")
                run.recorder.update(step, data={"repeats": before[0].id})
            if len(before) >= MAX_REPEATS:
                dialogue.observe(_notice(LOOP_NOTICE), step)
                return dialogue.force_finish(), "loop"
            if step is not None:
                before.append(step)
            dialogue.observe(self._act(run, action), step)
        return dialogue.force_finish(), "step_budget"

    def _act(self, run: Run, action: Action) -> ToolResult:
        """Run a tool; whatever goes wrong becomes an observation that the model can react to."""
        try:
            tool = find_tool(self.tools, action.tool)
        except UnknownNameError:
            run.count("invalid_actions")
            known = ", ".join([*(tool.name for tool in self.tools), FINISH])
            text = f"Invalid action: there is no tool {action.tool[:40]!r}. Possible actions: {known}."
            return _notice(text, error=f"unknown tool {action.tool[:40]!r}")
        result = run_tool(
            tool, action.arguments, timeout=self.tool_timeout, max_chars=self.tool_chars, cancel=run.cancel
        )
        if run.cancel.is_set():
            raise CancelledError("the run was stopped")
        if result.error:
            run.count("tool_errors")
        return result


class Dialogue:
    """The growing sequence of one run; the two styles differ in how it is written and read.

    Args:
        agent: The agent.
        run: The run.
        question: The question's step.
        documents: The documents' steps.
    """

    def __init__(self, agent: ReAct, run: Run, question: Step, documents: Sequence[Step]) -> None:
        self.agent = agent
        self.run = run
        self.last = question
        self.rounds = 0
        self.answer: str | None = None

    @abstractmethod
    def next_action(self) -> tuple[Action | None, Step | None]:
        """Let the model think and choose an action; record both.

        Returns:
            The action and its step. Without an action the run ends, with `answer` if there is one.
        """

    @abstractmethod
    def observe(self, result: ToolResult, action: Step | None) -> None:
        """Show the model what a tool returned, and record it."""

    @abstractmethod
    def force_finish(self) -> str | None:
        """Make the model answer now, with what it has."""

    def record_observation(self, result: ToolResult, action: Step | None) -> Step:
        """Record an observation under the action that caused it."""
        data: dict[str, JsonValue] = {"seconds": round(result.seconds, 3)}
        if result.truncated:
            data["original_chars"] = result.original_chars
        self.last = self.run.recorder.step(
            "observation",
            result.text,
            parents=[action or self.last],
            edge="observes",
            error=result.error,
            data=data,
        )
        return self.last


def _notice(text: str, *, error: str | None = None) -> ToolResult:
    """An observation that comes from the agent and not from a tool."""
    return ToolResult(text, error, truncated=False, seconds=0.0, original_chars=len(text))
