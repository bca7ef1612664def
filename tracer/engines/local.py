"""The in-process engine: a transformers model with a decoding loop of our own.

The loop is ours for three reasons: many completions share one pass over their prompt, rows that are finished stop
costing anything, and a transcript that grows from call to call is only read where it is new.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from tracer.engines.base import LOGPROB_FLOOR, OnTokens, TokenChunk, check_request, check_score
from tracer.engines.decoding import (
    Grammar,
    Row,
    StopMatcher,
    TokenText,
    choose,
    fresh_seed,
    grammar_tokenizer,
    row_generator,
)
from tracer.engines.kv_cache import Batch, Prefix, PrefixStore
from tracer.engines.loading import (
    DTYPES,
    context_length_of,
    layer_count,
    load_weights,
    out_of_memory,
    use_batched_linear,
)
from tracer.engines.tokenizer import ChatTokenizer, load_tokenizer
from tracer.engines.weights.identity import chat_template_sha256, tokenizer_sha256
from tracer.errors import CancelledError, EngineUnavailableError, InputError
from tracer.trace.trace import Completion, ModelInfo, Sampling

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from tracer.engines.models import ResolvedModel

_PREFILL_TOKENS = 512
"""Prompt tokens in one forward pass; between two of them a call can be cancelled."""
_LOGIT_ELEMENTS = 1 << 26
"""Logits that scoring holds at once: 256 MiB in float32."""
_EMPTY = Prefix(np.empty(0, dtype=np.int64), ())


class LocalEngine:
    """A model in this process.

    Log-probabilities are those of the model before temperature and filters; under ``Sampling.structured`` the
    forbidden tokens are masked first, as with vLLM. In float32 a completion does not depend on what it is batched
    with, up to rounding (about 1e-6); in 16-bit types rounding can change tokens.

    Args:
        model: Where the weights are.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        device: ``None`` takes the GPU where there is one.
        max_batch: Completions that are written at the same time; more of them wait.
        context_length: A smaller limit than the model's own.
        prefix_cache_bytes: Memory for keys and values of recent transcripts, so that a continuation is computed only
            where it is new; 0 switches it off.

    Raises:
        InputError: An argument cannot be used.
        ModelError: The weights are missing, incomplete or of an architecture that cannot run here.
        EngineUnavailableError: They do not fit in memory.
    """

    def __init__(
        self,
        model: ResolvedModel,
        *,
        dtype: str = "float32",
        device: str | None = None,
        max_batch: int = 16,
        context_length: int | None = None,
        prefix_cache_bytes: int = 512 << 20,
    ) -> None:
        if dtype not in DTYPES:
            raise InputError(f"unknown dtype {dtype!r}; use one of {', '.join(DTYPES)}")
        if max_batch < 1:
            raise InputError(f"max_batch is {max_batch}; it must be at least 1")
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._max_batch = max_batch
        self._tokenizer = load_tokenizer(model.path)
        self._prefixes = PrefixStore(prefix_cache_bytes)
        self._lock = threading.RLock()
        self._model: Any = load_weights(model.path, dtype=dtype, device=self._device)
        use_batched_linear(self._model)
        self._layers = layer_count(self._model.config)
        self._context_length = context_length_of(self._model.config, context_length)
        self._vocabulary = int(self._model.get_input_embeddings().weight.shape[0])
        self._grammar_tokenizer: LLTokenizer | None = None
        self._info = ModelInfo(
            name=model.name,
            dtype=dtype,
            tokenizer_sha256=tokenizer_sha256(model.path),
            chat_template_sha256=chat_template_sha256(model.path),
            engine="local",
            engine_version=transformers.__version__,
        )
        self.description = (
            f"transformers {transformers.__version__} in this process on {self._device}, model {model.name} ({dtype})"
        )

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def info(self) -> ModelInfo:
        """Identity of the model."""
        return self._info

    @property
    def tokenizer(self) -> ChatTokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    @property
    def context_length(self) -> int:
        """How many tokens a prompt and its completion may have together."""
        return self._context_length

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        on_tokens: OnTokens | None = None,
        cancel: threading.Event | None = None,
    ) -> list[list[Completion]]:
        """Draw ``sampling.n`` completions for each prompt; see `tracer.engines.base.Engine.generate`.

        Raises:
            InputError: The sampling parameters, a constraint or a token id cannot be used.
            PromptTooLongError: A prompt does not fit; nothing was computed.
            EngineError: The model ran out of memory or produced no numbers.
            CancelledError: ``cancel`` was set.
        """
        check_request(prompts, sampling, self._context_length)
        self._check_ids(prompts)
        rows = self._rows(prompts, sampling, streaming=on_tokens is not None)
        with self._running(cancel):
            for start in range(0, len(rows), self._max_batch):
                self._decode(rows[start : start + self._max_batch], sampling, on_tokens, cancel)
        completions = [self._completion(row) for row in rows]
        return [completions[start : start + sampling.n] for start in range(0, len(rows), sampling.n)]

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[int]],
        *,
        cancel: threading.Event | None = None,
    ) -> list[list[float]]:
        """Log-probability of every token of each continuation; see `tracer.engines.base.Engine.score`.

        Raises:
            InputError: The lists do not pair up, or a token id cannot be used.
            PromptTooLongError: A prompt and its continuation do not fit; nothing was computed.
            EngineError: The model ran out of memory.
            CancelledError: ``cancel`` was set.
        """
        check_score(prompts, continuations, self._context_length)
        self._check_ids(prompts)
        self._check_ids(continuations)
        result: list[list[float]] = [[] for _ in prompts]
        # Continuations of similar length together: short ones leave the batch at once instead of waiting as padding.
        order = sorted(range(len(prompts)), key=lambda index: -len(continuations[index]))
        with self._running(cancel):
            for start in range(0, len(order), self._max_batch):
                chosen = order[start : start + self._max_batch]
                pairs = [(prompts[index], continuations[index]) for index in chosen]
                for index, values in zip(chosen, self._score_batch(pairs, cancel), strict=True):
                    result[index] = values
        return result

    def close(self) -> None:
        """Release the model's memory."""
        with self._lock:
            self._model = None
            self._prefixes.clear()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _rows(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, streaming: bool) -> list[Row]:
        seed = fresh_seed() if sampling.seed is None else sampling.seed
        grammar = Grammar(sampling.structured, self._grammar_vocabulary()) if sampling.structured else None
        rows = []
        for index, prompt in enumerate(prompts):
            prompt_ids = np.asarray(prompt, dtype=np.int64)
            for sample in range(sampling.n):
                row = Row(
                    prompt=index,
                    sample=sample,
                    prompt_ids=prompt_ids,
                    generator=row_generator(seed, index, sample),
                    stop=StopMatcher(sampling.stop),
                    text=TokenText(self._tokenizer.backend) if streaming or sampling.stop else None,
                    constraint=grammar.row() if grammar else None,
                )
                rows.append(row)
        return rows

    def _decode(
        self, rows: list[Row], sampling: Sampling, on_tokens: OnTokens | None, cancel: threading.Event | None
    ) -> None:
        prefixes = self._prefill([row.prompt_ids for row in rows], cancel)
        batch = Batch(prefixes, layers=self._layers, room=min(sampling.max_tokens, _PREFILL_TOKENS))
        del prefixes
        active = rows
        while active:
            _check(cancel)
            logits = self._forward(batch, [[row.next_input] for row in active])[:, -1].float()
            for index, row in enumerate(active):
                if row.constraint:
                    allowed = row.constraint.allowed(logits.shape[-1]).to(logits.device)
                    logits[index].masked_fill_(~allowed, -torch.inf)
            chosen, logprobs = choose(logits, sampling, [row.generator for row in active])
            for row, token_id, logprob in zip(active, chosen, logprobs, strict=True):
                text = row.push(token_id, logprob, max_tokens=sampling.max_tokens, eos=self._tokenizer.eos_token_ids)
                if on_tokens:
                    on_tokens(TokenChunk(row.prompt, row.sample, (token_id,), text))
            active = self._drop_finished(batch, active)

    def _drop_finished(self, batch: Batch, rows: list[Row]) -> list[Row]:
        """Take finished rows out of the batch, keeping what they computed for a prompt that continues them."""
        going = [index for index, row in enumerate(rows) if row.finish_reason is None]
        if len(going) == len(rows):
            return rows
        for index, row in enumerate(rows):
            if row.finish_reason is not None:
                self._prefixes.add(batch.prefix(index, row.seen))
        if going:
            batch.keep(going, self._device)
        return [rows[index] for index in going]

    def _prefill(self, prompts: Sequence[NDArray[np.int64]], cancel: threading.Event | None) -> list[Prefix]:
        """Keys and values of each prompt but its last token, which the first decoding step reads.

        Prompts go through one by one, each from where it leaves the closest one before it: nothing is padded and no
        beginning is computed twice.
        """
        known: dict[bytes, Prefix] = {}
        result = []
        for prompt in prompts:
            key = prompt.tobytes()
            if key not in known:
                known[key] = self._read(prompt[:-1], cancel)
            result.append(known[key])
        return result

    def _read(self, token_ids: NDArray[np.int64], cancel: threading.Event | None) -> Prefix:
        found = self._prefixes.find(token_ids) or _EMPTY
        done = len(found.token_ids)
        if done == len(token_ids):
            return found
        batch = Batch([found], layers=self._layers, room=len(token_ids) - done)
        for start in range(done, len(token_ids), _PREFILL_TOKENS):
            _check(cancel)
            piece = torch.from_numpy(token_ids[start : start + _PREFILL_TOKENS]).to(self._device)[None]
            # The model without its head: no logits are wanted here, and the head is a fifth of a small model.
            self._model.base_model(input_ids=piece, use_cache=True, **batch.inputs(piece.shape[1], self._device))
        prefix = batch.prefix(0, token_ids)
        self._prefixes.add(prefix)
        return prefix

    def _forward(self, batch: Batch, token_ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """Extend every row of a batch; returns logits ``(rows, new tokens, vocabulary)``."""
        ids = torch.tensor(token_ids, device=self._device)
        logits: torch.Tensor = self._model(
            input_ids=ids, use_cache=True, **batch.inputs(ids.shape[1], self._device)
        ).logits
        return logits

    def _score_batch(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], cancel: threading.Event | None
    ) -> list[list[float]]:
        """Score pairs whose continuations are sorted from long to short."""
        prefixes = self._prefill([np.asarray(prompt, dtype=np.int64) for prompt, _ in pairs], cancel)
        batch = Batch(prefixes, layers=self._layers, room=min(len(pairs[0][1]), _PREFILL_TOKENS))
        inputs = [[prompt[-1], *continuation[:-1]] for prompt, continuation in pairs]
        targets = [list(continuation) for _, continuation in pairs]
        result: list[list[float]] = [[] for _ in pairs]
        active = len(pairs)
        start = 0
        while active:
            _check(cancel)
            width = min(_PREFILL_TOKENS, max(1, _LOGIT_ELEMENTS // (active * self._vocabulary)))
            width = min(width, len(targets[0]) - start)
            logits = self._forward(batch, [_padded(row[start : start + width], width) for row in inputs[:active]])
            wanted = torch.tensor(
                [_padded(row[start : start + width], width) for row in targets[:active]], device=self._device
            )
            for row, values in enumerate(_token_logprobs(logits, wanted).tolist()):
                result[row] += [max(value, LOGPROB_FLOOR) for value in values[: len(targets[row]) - start]]
            start += width
            still = sum(len(row) > start for row in targets)
            if 0 < still < active:
                batch.keep(range(still), self._device)
            active = still
        return result

    def _completion(self, row: Row) -> Completion:
        return Completion(
            token_ids=row.token_ids,
            logprobs=row.logprobs,
            text=self._tokenizer.decode(row.token_ids).text,
            finish_reason=row.finish_reason or "error",
            stop_reason=row.stop_reason,
        )

    def _grammar_vocabulary(self) -> LLTokenizer:
        with self._lock:
            if self._grammar_tokenizer is None:
                self._grammar_tokenizer = grammar_tokenizer(
                    self._tokenizer.backend, self._vocabulary, sorted(self._tokenizer.eos_token_ids)
                )
            return self._grammar_tokenizer

    def _check_ids(self, sequences: Sequence[Sequence[int]]) -> None:
        for sequence in sequences:
            for token_id in (min(sequence), max(sequence)):
                if not 0 <= token_id < self._vocabulary:
                    raise InputError(
                        f"token id {token_id} is outside the model's vocabulary of {self._vocabulary}; "
                        "encode the prompt with this model's tokenizer"
                    )

    @contextmanager
    def _running(self, cancel: threading.Event | None) -> Iterator[None]:
        """Hold the model; running out of memory becomes an error that says what to lower."""
        while not self._lock.acquire(timeout=0.1):
            _check(cancel)
        try:
            if self._model is None:
                raise EngineUnavailableError("this engine is closed; connect again")
            with torch.inference_mode():
                yield
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            self._prefixes.clear()
            raise EngineUnavailableError(
                f"the model ran out of memory on {self._device}; lower max_batch (now {self._max_batch}), n or "
                "max_tokens, or use dtype bfloat16"
            ) from None
        finally:
            self._lock.release()


def _token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Float32 log-probabilities of given tokens, ``(rows, tokens)``."""
    scores = logits.float()
    return scores.gather(-1, token_ids[..., None]).squeeze(-1) - scores.logsumexp(dim=-1)


def _padded(token_ids: Sequence[int], width: int) -> list[int]:
    """Filled up at the end, where causal attention keeps the filling from being seen."""
    return [*token_ids, *([0] * (width - len(token_ids)))]


def _check(cancel: threading.Event | None) -> None:
    if cancel is not None and cancel.is_set():
        raise CancelledError("the run was stopped; what was recorded so far is kept")
