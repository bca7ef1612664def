"""Chain of thought: zero-shot in two stages (Kojima et al. 2022) and few-shot (Wei et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import JsonValue

from tracer.agents.base import Agent, Budget, Reply, Run, append_steps, ask, document_pieces
from tracer.agents.prompts import Prompt, load_prompt
from tracer.engines.base import Engine
from tracer.trace.answers import Answer, AnswerClass, answer_class, extract_answer
from tracer.trace.segments import Piece, Rendered, render_chat, render_text
from tracer.trace.trace import AgentKind, Sampling, Step, Task

Shots = Literal["zero", "few"]
AnswerType = Literal["auto", "number", "text"]

EXTRACT_TOKENS = 48
"""Room for the second stage's answer."""


@dataclass(frozen=True, slots=True)
class Chain:
    """One sampled chain of thought."""

    reply: Reply
    answer: str | None
    answer_class: AnswerClass
    answer_step: Step | None
    """The step that holds the answer."""


class ChainOfThought(Agent):
    """One greedy chain of thought and its answer.

    Args:
        engine: What runs the model.
        shots: ``zero`` asks to think step by step and then, in a second call, for the answer; ``few`` shows worked
            exemplars and reads the answer after "The answer is".
        answer_type: Whether to look for a number or for any text; ``auto`` looks for a number where the question
            holds one.
        prompt: A prompt's name or file, in place of the default for ``shots``.
        max_tokens: Length of a chain.
        budget: Limits of one run.
    """

    kind: AgentKind = "cot"

    def __init__(
        self,
        engine: Engine,
        *,
        shots: Shots = "zero",
        answer_type: AnswerType = "auto",
        prompt: str | None = None,
        max_tokens: int = 512,
        budget: Budget | None = None,
    ) -> None:
        super().__init__(engine, budget=budget)
        self.shots = shots
        self.answer_type = answer_type
        self.prompt = load_prompt(prompt or f"cot-{shots}-shot", requires=["user"])
        self.max_tokens = max_tokens

    def parameters(self) -> dict[str, JsonValue]:
        """The agent's parameters."""
        return {
            "shots": self.shots,
            "answer_type": self.answer_type,
            "prompt": self.prompt.name,
            "max_tokens": self.max_tokens,
        }

    def solve(self, run: Run, task: Task) -> None:
        """Sample one chain greedily."""
        question, documents = ask(run, task)
        sampler = ChainSampler(
            run, self.prompt, question, documents, numeric=is_numeric(self.answer_type, task.question)
        )
        (chain,) = sampler.sample(Sampling(max_tokens=self.max_tokens), branches=[None])
        run.finish(chain.answer, answer_class=chain.answer_class)


def is_numeric(answer_type: AnswerType, question: str) -> bool:
    """Whether the answer to look for is a number."""
    return answer_type == "number" or (answer_type == "auto" and any(map(str.isdigit, question)))


class ChainSampler:
    """Samples chains for one question and records them.

    Args:
        run: The run.
        prompt: A prompt file with the template ``user`` and optionally ``reply`` (the beginning of the reply),
            ``extract`` (the second stage) and ``stop`` (a stop string).
        question: The question's step.
        documents: The documents' steps.
        numeric: Whether the answer is a number.
    """

    def __init__(self, run: Run, prompt: Prompt, question: Step, documents: Sequence[Step], *, numeric: bool) -> None:
        self.run = run
        self.prompt = prompt
        self.question = question
        self.numeric = numeric
        user = prompt.fill(
            "user",
            {
                "question": [Piece(question.text.strip(), "question", question.id)],
                "documents": document_pieces(documents),
            },
        )
        self.rendered = render_chat(prompt.chat(user), run.tokenizer)
        if "reply" in prompt.templates:
            self.rendered.extend(render_text(prompt.fill("reply", {}), run.tokenizer))

    def sample(self, sampling: Sampling, *, branches: Sequence[str | None]) -> list[Chain]:
        """Sample one chain for each branch, in one request.

        Where the prompt has a second stage, the answers are asked for together in another one: the template
        ``extract`` is appended to the very ids that the model wrote.
        """
        stop = [self.prompt.templates["stop"]] if "stop" in self.prompt.templates else []
        request = sampling.model_copy(update={"n": len(branches), "stop": stop})
        (replies,) = self.run.complete([self.rendered], request)
        if "extract" in self.prompt.templates:
            return self._extract(replies, branches)
        return [self._read(reply, branch) for reply, branch in zip(replies, branches, strict=True)]

    def _read(self, reply: Reply, branch: str | None) -> Chain:
        """Record a chain that holds its own answer."""
        found = extract_answer(reply.text, numeric=self.numeric)
        span = (found.start, found.end) if found else None
        steps = self.run.think(reply, [self.question], branch=branch, answer=span)
        answer_step = next((step for step in steps if step.kind == "answer"), None)
        return self._chain(reply, found, answer_step, cut=reply.completion.finish_reason == "length")

    def _extract(self, replies: Sequence[Reply], branches: Sequence[str | None]) -> list[Chain]:
        """Record chains, ask for their answers, record those."""
        chains = [
            self.run.think(reply, [self.question], branch=branch)
            for reply, branch in zip(replies, branches, strict=True)
        ]
        continued: list[Rendered] = []
        for reply, steps in zip(replies, chains, strict=True):
            prompt = self.rendered.copy()
            append_steps(prompt, reply, steps)
            prompt.extend(render_text(self.prompt.fill("extract", {}), self.run.tokenizer))
            continued.append(prompt)
        seconds = self.run.complete(continued, Sampling(max_tokens=EXTRACT_TOKENS, stop=["\n"]))
        result: list[Chain] = []
        for reply, steps, branch, (second,) in zip(replies, chains, branches, seconds, strict=True):
            # The second stage continues the sentence "the answer is", so it is read as its end.
            found = extract_answer(f"the answer is {second.text.strip()}", numeric=self.numeric)
            answer_step = None
            if found:
                answer_step = self.run.recorder.step(
                    "answer",
                    second.text.strip(),
                    parents=steps[-1:] or [self.question],
                    branch=branch,
                    call=second.call_id,
                    completion=second.index,
                    start=0,
                    end=len(second.completion.token_ids),
                )
            result.append(self._chain(reply, found, answer_step, cut=reply.completion.finish_reason == "length"))
        return result

    def _chain(self, reply: Reply, found: Answer | None, step: Step | None, *, cut: bool) -> Chain:
        kind = answer_class(found, cut=cut)
        if kind == "no_answer":
            self.run.count("no_answer")
        if found and step:
            self.run.recorder.update(step, data={"value": found.value, "found": found.found})
        return Chain(reply, found.value if found else None, kind, step)
