"""Reads vLLM's completions: from one answer or from many streamed chunks, checked token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

from pydantic import JsonValue

from tracer.engines.base import LOGPROB_FLOOR, TokenChunk
from tracer.engines.transport import JsonObject, sanitise
from tracer.errors import EngineResponseError
from tracer.trace.segments import Tokenizer
from tracer.trace.trace import Completion, FinishReason

Emit = Callable[[TokenChunk], None]


class Deltas:
    """Turns arriving tokens of one prompt into chunks with text."""

    def __init__(self, tokenizer: Tokenizer, prompt: int, n: int, emit: Emit) -> None:
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._emit = emit
        self._windows = [_Window() for _ in range(n)]

    def add(self, completion: int, token_ids: list[int]) -> None:
        """Pass on tokens that have just arrived."""
        text = self._windows[completion].add(token_ids, self._tokenizer)
        self._emit(TokenChunk(self._prompt, completion, tuple(token_ids), text))


class _Window:
    """The last tokens of a growing completion: enough of them to decode the next ones in context."""

    def __init__(self) -> None:
        self._token_ids: list[int] = []
        self._shown = 0

    def add(self, token_ids: list[int], tokenizer: Tokenizer) -> str:
        """The text that these tokens add; a character that is not complete yet waits for its last token."""
        ids = self._token_ids = [*self._token_ids, *token_ids]
        decoded = tokenizer.decode(ids)
        before = decoded.ends[self._shown - 1] if self._shown else 0
        text = decoded.text[before:]
        if text:
            # Everything up to the last token that completed a character is settled: it becomes the context.
            settled = decoded.ends.index(len(decoded.text))
            self._token_ids = ids[self._shown :]
            self._shown = settled + 1 - self._shown
        return text


class Gathered:
    """Collects the choices of one prompt from one answer or from many chunks, and checks them."""

    def __init__(self, prompt: Sequence[int], n: int, deltas: Deltas | None = None) -> None:
        self._prompt = list(prompt)
        self._n = n
        self._deltas = deltas
        self._token_ids: list[list[int]] = [[] for _ in range(n)]
        self._logprobs: list[list[float]] = [[] for _ in range(n)]
        self._finish: list[FinishReason | None] = [None] * n
        self._stop: list[str | None] = [None] * n

    def add(self, data: JsonObject) -> None:
        """Take in an answer or a chunk.

        Raises:
            EngineResponseError: It is not what was asked for.
        """
        choices = data.get("choices")
        if not isinstance(choices, list):
            raise EngineResponseError("the server's answer has no choices; is it a vLLM server?")
        for choice in choices:
            if not isinstance(choice, dict) or not isinstance(choice.get("index"), int):
                raise EngineResponseError("the server's answer holds a choice that cannot be read")
            self._add_choice(cast(int, choice["index"]), choice)

    def _add_choice(self, index: int, choice: JsonObject) -> None:
        if not 0 <= index < self._n:
            raise EngineResponseError(f"the server sent completion {index}, but {self._n} were asked for")
        echoed = choice.get("prompt_token_ids")
        if echoed is not None and echoed != self._prompt:
            raise EngineResponseError("the server ran other prompt ids than those that were sent; it cannot be trusted")
        token_ids = _ids(choice.get("token_ids"))
        logprobs = choice.get("logprobs")
        values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
        values = values if isinstance(values, list) else []
        if len(values) != len(token_ids):
            raise EngineResponseError(f"the server sent {len(values)} log-probabilities for {len(token_ids)} tokens")
        self._token_ids[index].extend(token_ids)
        self._logprobs[index].extend(_logprob(value) for value in values)
        reason = choice.get("finish_reason")
        if reason is not None:
            if reason not in ("stop", "length"):
                raise EngineResponseError(f"the server ended a completion with {sanitise(str(reason))!r}; try again")
            self._finish[index] = cast(FinishReason, reason)
            stop = choice.get("stop_reason")
            # Numbers are ids of end-of-sequence tokens, which the completion itself ends with.
            self._stop[index] = stop if isinstance(stop, str) else None
        if self._deltas is not None and token_ids:
            self._deltas.add(index, token_ids)

    def completions(self, tokenizer: Tokenizer) -> list[Completion]:
        """The finished completions, in order.

        Raises:
            EngineResponseError: One of them never ended.
        """
        result: list[Completion] = []
        for index, reason in enumerate(self._finish):
            if reason is None:
                raise EngineResponseError(f"the server's answer lacks the end of completion {index}; try again")
            token_ids = self._token_ids[index]
            result.append(
                Completion(
                    token_ids=token_ids,
                    logprobs=self._logprobs[index],
                    # The server's text lacks part of a character where a stop string ends inside a token.
                    text=tokenizer.decode(token_ids).text,
                    finish_reason=reason,
                    stop_reason=self._stop[index],
                )
            )
        return result


def _ids(value: JsonValue) -> list[int]:
    if not isinstance(value, list) or not all(isinstance(item, int) and item >= 0 for item in value):
        raise EngineResponseError(
            "the server sent no token ids; tracer needs vLLM 0.10.2 or newer, which knows return_token_ids"
        )
    return cast(list[int], value)


def _logprob(value: JsonValue) -> float:
    if not isinstance(value, int | float) or math.isnan(value):
        raise EngineResponseError("the server sent a log-probability that is no number; the model's output is broken")
    return max(float(value), LOGPROB_FLOOR)


def prompt_logprobs(answer: JsonObject, token_ids: Sequence[int]) -> list[float]:
    """Log-probability of every prompt token; 0 stands in for the first one, which has none."""
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    rows = choice.get("prompt_logprobs") if isinstance(choice, dict) else None
    if not isinstance(rows, list) or len(rows) != len(token_ids):
        raise EngineResponseError("the server sent no prompt log-probabilities; tracer needs vLLM 0.10.2 or newer")
    values = [0.0]
    for token_id, row in zip(token_ids[1:], rows[1:], strict=True):
        found = row.get(str(token_id)) if isinstance(row, dict) else None
        if not isinstance(found, dict):
            raise EngineResponseError(
                f"the server scored other tokens than those that were sent ({token_id} is missing)"
            )
        values.append(_logprob(found.get("logprob")))
    return values


def next_logprob(answer: JsonObject, token_id: int) -> float:
    """Log-probability that the first generated position gives to one token."""
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    logprobs = choice.get("logprobs") if isinstance(choice, dict) else None
    tops = logprobs.get("top_logprobs") if isinstance(logprobs, dict) else None
    top = tops[0] if isinstance(tops, list) and tops else None
    if not isinstance(top, dict) or f"token_id:{token_id}" not in top:
        raise EngineResponseError(
            "the server did not score the last token; scoring needs a vLLM with logprob_token_ids"
        )
    return _logprob(top[f"token_id:{token_id}"])
