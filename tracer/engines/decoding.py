"""What happens between a row of logits and a finished completion: choosing, constraining, stopping.

Everything here follows vLLM, so that both engines give the same tokens: log-probabilities are taken before the
temperature; the order is mask, temperature, top-k, top-p; of several stop strings the one that is complete first ends
the completion.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from tracer.engines.base import LOGPROB_FLOOR
from tracer.errors import EngineResponseError, InputError
from tracer.trace.trace import FinishReason, Sampling, StructuredOutput

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from tokenizers import Tokenizer as Backend

GREEDY_BELOW = 1e-5
"""A temperature below this is greedy: dividing by it would only overflow (vLLM's limit)."""

_CANDIDATES = 1024
"""How many of the likeliest tokens top-p looks at before it sorts the whole vocabulary."""


def row_generator(seed: int, prompt: int, sample: int) -> torch.Generator:
    """The source of randomness of one completion.

    It depends on nothing else, so the same request gives the same completions however it is batched; it lives on the
    CPU, so it gives the same numbers whatever the device.

    Args:
        seed: The request's seed.
        prompt: Position of the prompt in the request.
        sample: Position of the completion among those of its prompt.
    """
    digest = hashlib.blake2b(f"{seed}/{prompt}/{sample}".encode(), digest_size=8).digest()
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(digest, "little") >> 1)
    return generator


def fresh_seed() -> int:
    """A seed from the system's entropy."""
    return secrets.randbits(63)


def filtered_probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The distribution that a token is drawn from: temperature, then top-k, then top-p.

    Tokens exactly as likely as the last one that a filter keeps are kept too, so the result does not depend on how
    a sort happens to order them.

    Args:
        logits: Float32, ``(rows, vocabulary)``.
        sampling: A temperature of at least `GREEDY_BELOW`, and the filters.

    Returns:
        Float64 weights ``(rows, vocabulary)``; without top-p they sum to one, with it to the mass it kept.
    """
    scaled = logits / sampling.temperature
    size = scaled.shape[-1]
    if 0 < sampling.top_k < size:
        smallest = scaled.topk(sampling.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < smallest, -torch.inf)
    probabilities = scaled.softmax(dim=-1, dtype=torch.float64)
    if sampling.top_p < 1:
        smallest = _nucleus_threshold(probabilities, sampling.top_p)
        probabilities = probabilities.masked_fill(probabilities < smallest, 0.0)
    return probabilities


def _nucleus_threshold(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """The probability of the last token that top-p keeps, ``(rows, 1)``."""
    size = probabilities.shape[-1]
    likeliest = probabilities.topk(min(_CANDIDATES, size), dim=-1).values
    if likeliest.shape[-1] < size and bool((likeliest.sum(dim=-1) < top_p).any()):
        likeliest = probabilities.sort(dim=-1, descending=True).values
    before = likeliest.cumsum(dim=-1) - likeliest
    kept = (before < top_p).sum(dim=-1, keepdim=True).clamp(min=1)
    return likeliest.gather(-1, kept - 1)


def choose(
    logits: torch.Tensor, sampling: Sampling, generators: Sequence[torch.Generator]
) -> tuple[list[int], list[float]]:
    """Choose the next token of every row.

    Args:
        logits: Float32, ``(rows, vocabulary)``; minus infinity where a constraint forbids a token.
        sampling: How to choose.
        generators: One for each row.

    Returns:
        Token ids and their log-probabilities before temperature and filters (after a constraint's mask).

    Raises:
        EngineResponseError: The model produced no numbers.
    """
    if sampling.temperature < GREEDY_BELOW:
        chosen = logits.argmax(dim=-1)
    else:
        # Inverse transform: one uniform number a row decides, which is far cheaper than noise for every token.
        cumulative = filtered_probabilities(logits, sampling).cumsum(dim=-1)
        uniform = torch.stack([torch.rand(1, generator=each, dtype=torch.float64) for each in generators])
        points = uniform.to(logits.device) * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, points, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
    picked = logits.gather(-1, chosen[:, None]).squeeze(-1)
    logprobs = (picked - logits.logsumexp(dim=-1)).tolist()
    if any(value != value for value in logprobs):
        raise EngineResponseError(
            "the model produced values that are not numbers; use float32 or bfloat16, or check its weights"
        )
    # Rounding can leave a certain token a hair above zero.
    return chosen.tolist(), [min(value, 0.0) for value in logprobs]


class StopMatcher:
    """Looks for stop strings in a text that arrives in pieces.

    Args:
        stops: The stop strings.

    Raises:
        InputError: One of them is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise InputError("a stop string is empty; give at least one character or leave it out")
        self._stops = tuple(stops)
        self._keep = max(map(len, stops), default=1) - 1
        self._tail = ""

    def push(self, text: str) -> str | None:
        """Add text; return the stop string that is complete first in it, if any (the first given on a tie)."""
        if not text or not self._stops:
            return None
        window = self._tail + text
        self._tail = window[-self._keep :] if self._keep else ""
        found = [(at + len(stop), order) for order, stop in enumerate(self._stops) if (at := window.find(stop)) >= 0]
        return self._stops[min(found)[1]] if found else None


class TokenText:
    """Text of ids that arrive one by one; a character appears with the token that completes it.

    Args:
        backend: The tokenizer's fast backend.
    """

    def __init__(self, backend: Backend) -> None:
        from tokenizers.decoders import DecodeStream

        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token_id: int) -> str:
        """The text that this token adds, which may be none."""
        return self._stream.step(self._backend, token_id) or ""


def grammar_tokenizer(backend: Backend, vocabulary: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """Prepare a tokenizer for constraints; takes about a second, so keep the result.

    Args:
        backend: The tokenizer's fast backend.
        vocabulary: How many logits the model gives, which may be more than the tokenizer has tokens.
        eos_token_ids: Tokens that may end a completion.
    """
    from llguidance import LLTokenizer
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(backend.to_str())
    copy.no_padding()
    copy.no_truncation()
    size = max(vocabulary, copy.get_vocab_size(with_added_tokens=True))
    return LLTokenizer(copy.to_str(), n_vocab=size, eos_token=list(eos_token_ids) or None)


class Grammar:
    """A compiled constraint, from which every row gets a matcher of its own.

    JSON may contain whitespace between its parts, as with vLLM.

    Args:
        output: What the completion must look like.
        tokenizer: From `grammar_tokenizer`.

    Raises:
        InputError: The schema, expression or list of choices cannot be used.
    """

    def __init__(self, output: StructuredOutput, tokenizer: LLTokenizer) -> None:
        from llguidance import LLMatcher

        source = _grammar_source(output)
        problem = LLMatcher.validate_grammar(source, tokenizer)
        if not problem:
            self._matcher = LLMatcher(tokenizer, source, log_level=0)
            problem = self._matcher.get_error()
        if problem:
            raise InputError(f"this {_NAMES[output.kind]} cannot be used: {' '.join(problem.split())}")

    def row(self) -> RowConstraint:
        """A matcher at the start of the grammar."""
        return RowConstraint(self._matcher.deep_copy())


_NAMES = {"json_schema": "JSON schema", "regex": "regular expression", "choice": "list of choices"}


def _grammar_source(output: StructuredOutput) -> str:
    from llguidance import LLMatcher

    value = output.value
    if output.kind == "json_schema":
        if not isinstance(value, dict | str):
            raise InputError(f"a JSON schema must be an object, not {type(value).__name__}")
        try:
            schema: Any = json.loads(value) if isinstance(value, str) else value
            return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": True})
        except ValueError as error:
            raise InputError(f"this JSON schema cannot be used: {' '.join(str(error).split())}") from None
    if output.kind == "regex":
        if not isinstance(value, str):
            raise InputError(f"a regular expression must be a string, not {type(value).__name__}")
        return LLMatcher.grammar_from_regex(value)
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
        raise InputError("choices must be a list of strings, at least one and none of them empty")
    return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(item, ensure_ascii=False) for item in value))


class RowConstraint:
    """Which tokens one row may continue with."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self, vocabulary: int) -> torch.Tensor:
        """Tokens that may come next, bool ``(vocabulary,)``.

        Raises:
            EngineResponseError: The constraint became too complex to follow.
        """
        words = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise EngineResponseError(
                f"the constraint on the completion failed: {' '.join(self._matcher.get_error().split())}; simplify it"
            )
        return torch.from_numpy(np.unpackbits(words, bitorder="little")[:vocabulary].astype(np.bool_))

    def push(self, token_id: int) -> None:
        """Advance by the token that was chosen."""
        self._matcher.consume_token(token_id)

    @property
    def finished(self) -> bool:
        """Whether nothing can follow but an end-of-sequence token."""
        return bool(self._matcher.is_stopped())


@dataclass(slots=True)
class Row:
    """One completion that is being written.

    ``prompt`` and ``sample`` are its position in the request. ``text`` may be absent where nobody reads the text.
    """

    prompt: int
    sample: int
    prompt_ids: NDArray[np.int64]
    generator: torch.Generator
    stop: StopMatcher
    text: TokenText | None
    constraint: RowConstraint | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | None = None

    @property
    def next_input(self) -> int:
        """The token that the model has not seen yet."""
        return self.token_ids[-1] if self.token_ids else int(self.prompt_ids[-1])

    @property
    def seen(self) -> NDArray[np.int64]:
        """All tokens that the model has seen: everything but the last."""
        token_ids: NDArray[np.int64] = np.concatenate([self.prompt_ids, np.asarray(self.token_ids, dtype=np.int64)])
        return token_ids[:-1]

    def push(self, token_id: int, logprob: float, *, max_tokens: int, eos: frozenset[int]) -> str:
        """Take in the next token, which may end the completion; returns the text that it adds."""
        self.token_ids.append(token_id)
        self.logprobs.append(max(logprob, LOGPROB_FLOOR))
        text = self.text.push(token_id) if self.text else ""
        if self.constraint:
            self.constraint.push(token_id)
        if token_id in eos:
            self.finish_reason = "stop"
        elif stop := self.stop.push(text):
            self.finish_reason, self.stop_reason = "stop", stop
        elif not eos and self.constraint and self.constraint.finished:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= max_tokens:
            self.finish_reason = "length"
        return text
