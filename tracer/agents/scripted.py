"""A deterministic engine without weights, for testing agent logic.

It speaks the same protocol as the real engines: ids in, ids and log-probabilities out, stop strings, token limits,
structured choices, streaming and cancellation. What it "generates" is given by the test.
"""

from __future__ import annotations

import hashlib
import math
import re
import threading
from collections.abc import Callable, Sequence

from tracer.engines.base import OnTokens, TokenChunk, check_request, check_score
from tracer.errors import CancelledError, EngineResponseError
from tracer.trace.segments import Decoded, Encoded
from tracer.trace.trace import Completion, FinishReason, ModelInfo, Sampling

EOS = "<|end|>"
_SPECIAL = re.compile(r"<\|(?:end|system|user|assistant|tool)\|>")
_WORD = re.compile(r" ?\w+|\s|[^\w\s]")

Reply = str | Callable[[str], str]
"""A text, or a function from the prompt's text to one."""


class ScriptedTokenizer:
    """Words and punctuation as tokens; ids are given out as words are first seen."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._texts: list[str] = []
        self._lock = threading.Lock()
        self._special = {self._id(text) for text in (EOS, "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")}

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The one end-of-sequence id."""
        return frozenset({self._id(EOS)})

    @property
    def vocab_size(self) -> int:
        """How many words have been seen."""
        return len(self._texts)

    @property
    def start_token_ids(self) -> tuple[int, ...]:
        """Nothing."""
        return ()

    def _id(self, text: str) -> int:
        with self._lock:
            if text not in self._ids:
                self._ids[text] = len(self._texts)
                self._texts.append(text)
            return self._ids[text]

    def encode(self, text: str, *, trusted: Sequence[tuple[int, int]] | None = None) -> Encoded:
        """Cut a text into words; control tokens count only in trusted ranges."""
        cuts = [
            match
            for match in _SPECIAL.finditer(text)
            if any(start <= match.start() and match.end() <= end for start, end in trusted or ())
        ]
        found: list[tuple[int, int]] = []
        position = 0
        for cut in cuts:
            found.extend(match.span() for match in _WORD.finditer(text, position, cut.start()))
            found.append(cut.span())
            position = cut.end()
        found.extend(match.span() for match in _WORD.finditer(text, position))
        # A control token in untrusted text is cut into harmless words by the pattern above.
        return Encoded([self._id(text[start:end]) for start, end in found], found)

    def decode(self, token_ids: Sequence[int]) -> Decoded:
        """Join words again."""
        parts: list[str] = []
        ends: list[int] = []
        length = 0
        for token_id in token_ids:
            part = "" if token_id in self._special else self._texts[token_id]
            parts.append(part)
            length += len(part)
            ends.append(length)
        return Decoded("".join(parts), ends)

    def render_chat(
        self,
        messages: Sequence[dict[str, object]],
        *,
        tools: Sequence[dict[str, object]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """A plain template: every turn between a role's control token and the end token."""
        names = ", ".join(str(tool["function"]["name"]) for tool in tools or () if isinstance(tool["function"], dict))
        head = f"<|system|>\nTools: {names}{EOS}\n" if tools else ""
        turns = "".join(f"<|{message['role']}|>\n{message['content']}{EOS}\n" for message in messages)
        return head + turns + ("<|assistant|>\n" if add_generation_prompt else "")


class ScriptedEngine:
    """Answers calls from a script.

    Args:
        replies: One entry for every completion, in order, or a function from a prompt's text to the reply.
        context_length: Tokens of prompt and completion together.
    """

    def __init__(self, replies: Sequence[Reply] | Callable[[str], str], *, context_length: int = 4096) -> None:
        self._replies = list(replies) if isinstance(replies, Sequence) else None
        self._function = replies if callable(replies) else None
        self._tokenizer = ScriptedTokenizer()
        self._context_length = context_length
        self._lock = threading.Lock()
        self.requests: list[tuple[list[list[int]], Sampling]] = []
        """Every request that was made."""

    @property
    def info(self) -> ModelInfo:
        """A fixed identity."""
        return ModelInfo(name="scripted", engine="scripted", engine_version="1")

    @property
    def description(self) -> str:
        """One line about the engine."""
        return "a script, no model"

    @property
    def tokenizer(self) -> ScriptedTokenizer:
        """The tokenizer."""
        return self._tokenizer

    @property
    def context_length(self) -> int:
        """Tokens of prompt and completion together."""
        return self._context_length

    def prompt_texts(self) -> list[list[str]]:
        """The prompts of every request, as text."""
        return [[self._tokenizer.decode(prompt).text for prompt in prompts] for prompts, _ in self.requests]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        on_tokens: OnTokens | None = None,
        cancel: threading.Event | None = None,
    ) -> list[list[Completion]]:
        """Answer from the script; see `tracer.engines.base.Engine.generate`."""
        check_request(prompts, sampling, self._context_length)
        with self._lock:
            self.requests.append(([list(prompt) for prompt in prompts], sampling))
            results: list[list[Completion]] = []
            for index, prompt in enumerate(prompts):
                row: list[Completion] = []
                for sample in range(sampling.n):
                    if cancel is not None and cancel.is_set():
                        raise CancelledError("the run was stopped")
                    completion = self._complete(self._next(prompt), sampling)
                    if on_tokens is not None:
                        on_tokens(TokenChunk(index, sample, tuple(completion.token_ids), completion.text))
                    row.append(completion)
                results.append(row)
            return results

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[int]],
        *,
        cancel: threading.Event | None = None,
    ) -> list[list[float]]:
        """Log-probabilities that depend on the token alone."""
        check_score(prompts, continuations, self._context_length)
        return [[_logprob(self._text(token_id)) for token_id in continuation] for continuation in continuations]

    def close(self) -> None:
        """Nothing to release."""

    def _next(self, prompt: Sequence[int]) -> str:
        text = self._tokenizer.decode(prompt).text
        if self._function is not None:
            return self._function(text)
        if not self._replies:
            raise EngineResponseError("the script has no more replies")
        reply = self._replies.pop(0)
        return reply if isinstance(reply, str) else reply(text)

    def _complete(self, text: str, sampling: Sampling) -> Completion:
        ids = self._tokenizer.encode(text).token_ids
        ends = self._tokenizer.decode(ids).ends
        finish: FinishReason = "stop"
        stop_reason: str | None = None
        found = [(text.index(stop) + len(stop), stop) for stop in sampling.stop if stop in text]
        if found:
            end, stop_reason = min(found)
            ids = ids[: next(i + 1 for i, position in enumerate(ends) if position >= end)]
        else:
            ids = [*ids, *self._tokenizer.eos_token_ids]
        if len(ids) > sampling.max_tokens:
            ids, finish, stop_reason = ids[: sampling.max_tokens], "length", None
        return Completion(
            token_ids=ids,
            logprobs=[_logprob(self._text(token_id)) for token_id in ids],
            text=self._tokenizer.decode(ids).text,
            finish_reason=finish,
            stop_reason=stop_reason,
        )

    def _text(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id]).text or EOS


def _logprob(text: str) -> float:
    """Between -ln 2 and 0, fixed for a word."""
    digest = hashlib.sha256(text.encode()).digest()
    return math.log(0.5 + digest[0] / 512)
