"""What an engine is: something that turns prompt ids into completions.

Two engines run models (`tracer.engines.vllm`, `tracer.engines.local`); `tracer.agents.scripted` is a test double.
Under greedy decoding and in the same precision both give the same tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tracer.errors import InputError, PromptTooLongError
from tracer.trace.segments import Tokenizer
from tracer.trace.trace import Completion, ModelInfo, Sampling

LOGPROB_FLOOR = -9999.0
"""Stands for minus infinity, which JSON cannot hold; the value that vLLM uses too."""


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """Tokens that have just arrived for one completion of one prompt."""

    prompt: int
    completion: int
    token_ids: tuple[int, ...]
    text: str


OnTokens = Callable[[TokenChunk], None]


class Engine(Protocol):
    """Generates and scores, on token ids only.

    Engines are safe to share between threads.
    """

    @property
    def info(self) -> ModelInfo:
        """Identity of the model that is served."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """The served model's tokenizer."""
        ...

    @property
    def context_length(self) -> int:
        """How many tokens a prompt and its completion may have together."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        on_tokens: OnTokens | None = None,
        cancel: threading.Event | None = None,
    ) -> list[list[Completion]]:
        """Draw ``sampling.n`` completions for each prompt, all prompts together.

        Args:
            prompts: Token ids, one sequence a prompt.
            sampling: How to draw, when to stop, how many.
            on_tokens: Called with tokens as they arrive (streaming), from any thread.
            cancel: Once set, the call ends as soon as it can.

        Returns:
            One list for each prompt, of ``sampling.n`` completions.

        Raises:
            InputError: The sampling parameters contradict each other.
            PromptTooLongError: A prompt does not fit; nothing was sent.
            EngineError: The engine failed.
            CancelledError: ``cancel`` was set.
        """
        ...

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[int]],
        *,
        cancel: threading.Event | None = None,
    ) -> list[list[float]]:
        """Log-probability of every token of each continuation after its prompt (teacher forcing).

        Returns:
            For each pair, natural-log probabilities ``(len(continuation),)``.

        Raises:
            PromptTooLongError: A prompt and its continuation do not fit.
            EngineError: The engine failed.
            CancelledError: ``cancel`` was set.
        """
        ...

    def close(self) -> None:
        """Release what the engine holds; a server that it did not start goes on running."""
        ...


def check_request(prompts: Sequence[Sequence[int]], sampling: Sampling, context_length: int) -> None:
    """Refuse a request that cannot be served, before anything is sent.

    Raises:
        InputError: No prompt, an empty prompt, or several greedy completions of one prompt.
        PromptTooLongError: A prompt does not fit together with ``sampling.max_tokens``.
    """
    if not prompts:
        raise InputError("nothing to generate from: give at least one prompt")
    if sampling.n > 1 and sampling.temperature == 0:
        raise InputError(
            f"{sampling.n} greedy completions of one prompt would all be the same; set a temperature above 0 or n to 1"
        )
    for prompt in prompts:
        if not prompt:
            raise InputError("a prompt is empty: it needs at least one token")
        if len(prompt) + sampling.max_tokens > context_length:
            raise PromptTooLongError(len(prompt), sampling.max_tokens, context_length)


def check_score(prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], context_length: int) -> None:
    """Refuse a scoring request that cannot be served.

    Raises:
        InputError: The lists differ in length, or a prompt or continuation is empty.
        PromptTooLongError: A pair does not fit in the context.
    """
    if len(prompts) != len(continuations):
        raise InputError(f"{len(prompts)} prompts but {len(continuations)} continuations; they must pair up")
    for prompt, continuation in zip(prompts, continuations, strict=True):
        if not prompt or not continuation:
            raise InputError("a prompt or continuation is empty: both need at least one token")
        if len(prompt) + len(continuation) > context_length:
            raise PromptTooLongError(len(prompt), len(continuation), context_length)
