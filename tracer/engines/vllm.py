"""The engine that sends exact token ids to a vLLM server over HTTP."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from tracer.engines import lens, models, server
from tracer.engines.base import OnTokens, check_request, check_score
from tracer.engines.completions import Deltas, Emit, Gathered, next_logprob, prompt_logprobs
from tracer.engines.tokenizer import ChatTokenizer, load_tokenizer
from tracer.engines.transport import JsonObject, NotFoundError, Patience, Transport, normalise_url, sanitise
from tracer.engines.weights.identity import chat_template_sha256, tokenizer_sha256
from tracer.errors import EngineResponseError, InputError, ModelError, UnknownNameError
from tracer.trace.segments import Tokenizer
from tracer.trace.trace import Completion, ModelInfo, Sampling, StructuredOutput

_PROBE: Final = "Tracer 0.125 naïve\n\t§ 東京 \U0001f600 don't  x+=1;"
"""Text on which tokenizers differ: numbers, accents, scripts, emoji, white space."""

_STRUCTURED: Final = {"json_schema": "json", "regex": "regex", "choice": "choice"}

T = TypeVar("T")


class VllmEngine:
    """A model behind a vLLM server (0.10.2 or newer).

    Log-probabilities are those of the model before temperature, except under ``Sampling.structured``: there vLLM
    masks the forbidden tokens first, so that a replay cannot match them.

    Args:
        url: The server's address, with or without ``/v1``.
        model: The served name or the folder of the model; ``None`` takes the only one that is served.
        timeout: Seconds without a byte after which a request has failed.
        api_key: The server's key, if it wants one.
        max_retries: Further tries after connection errors and answers of 500 and above.
        process: The server's handle where tracer started it; an owned one is stopped by `close`.
        patience: All waiting times at once, in place of ``timeout`` and ``max_retries``.

    Raises:
        InputError: The address is none.
        UnknownNameError: The server does not serve ``model``.
        ModelError: The model's tokenizer is not on this machine, or the server runs another one.
        EngineError: The server does not answer, or is no vLLM.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        timeout: float = 600.0,
        api_key: str | None = None,
        max_retries: int = 3,
        process: server.ServerHandle | None = None,
        patience: Patience | None = None,
    ) -> None:
        self._process = process
        address = normalise_url(url)
        state = process.state if process is not None else server.find(address)
        patience = patience or Patience(timeout=timeout, max_retries=max_retries)
        note = f"; its log is {state.log}" if state is not None else ""
        self._transport = Transport(address, api_key=api_key, patience=patience, note=note)
        try:
            self._connect(model, state)
        except BaseException:
            self._transport.close()
            raise

    def _connect(self, wanted: str | None, state: server.ServerState | None) -> None:
        served = self._fetch_models()
        entry = self._choose(served, wanted)
        self._name = str(entry["id"])
        self._context_length = _positive(entry.get("max_model_len"), "max_model_len")
        folder = self.folder = self._model_folder(entry, wanted)
        self._tokenizer = load_tokenizer(folder)
        self._check_tokenizer(self._tokenizer)
        version: str | None = None
        with suppress(NotFoundError, EngineResponseError):
            version = str(self._get("/version").get("version"))
        self._info = ModelInfo(
            name=self._name,
            dtype=state.dtype if state is not None else None,
            tokenizer_sha256=tokenizer_sha256(folder),
            chat_template_sha256=chat_template_sha256(folder),
            engine="vllm",
            engine_version=version,
        )
        precision = f" ({self._info.dtype})" if self._info.dtype else ""
        self.description = f"vLLM {version or '(version unknown)'} at {self.url}, model {self._name}{precision}"

    def __enter__(self) -> VllmEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """The server's address, without any password in it."""
        return self._transport.shown

    @property
    def info(self) -> ModelInfo:
        """Identity of the model that is served."""
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        """The served model's tokenizer."""
        return self._tokenizer

    @property
    def context_length(self) -> int:
        """How many tokens a prompt and its completion may have together."""
        return self._context_length

    def close(self) -> None:
        """Abort what is in flight; a server that was started for this engine alone is stopped."""
        self._transport.close()
        if self._process is not None and self._process.state.owned:
            self._process.stop()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        on_tokens: OnTokens | None = None,
        cancel: threading.Event | None = None,
    ) -> list[list[Completion]]:
        """Draw completions; see `tracer.engines.base.Engine.generate`. ``on_tokens`` is called in this thread."""
        check_request(prompts, sampling, self._context_length)
        shared = self._body(sampling)

        async def job(emit: Emit) -> list[list[Completion]]:
            async def one(index: int, prompt: Sequence[int]) -> list[Completion]:
                body: JsonObject = {**shared, "prompt": list(prompt)}
                if on_tokens is None:
                    gathered = Gathered(prompt, sampling.n)
                    gathered.add(await self._transport.post("/v1/completions", body))
                else:
                    gathered = Gathered(prompt, sampling.n, Deltas(self._tokenizer, index, sampling.n, emit))
                    await self._transport.stream("/v1/completions", {**body, "stream": True}, gathered.add)
                return gathered.completions(self._tokenizer)

            return await _together([one(index, prompt) for index, prompt in enumerate(prompts)])

        try:
            return self._transport.run(job, on_event=on_tokens, cancel=cancel)
        except NotFoundError:
            self._choose(self._fetch_models(), self._name)
            raise

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[int]],
        *,
        cancel: threading.Event | None = None,
    ) -> list[list[float]]:
        """Teacher-forced log-probabilities; see `tracer.engines.base.Engine.score`.

        vLLM computes these without its prefix cache.
        """
        check_score(prompts, continuations, self._context_length)
        shared = self._body(Sampling(max_tokens=1))

        async def job(_: Callable[[None], None]) -> list[list[float]]:
            async def one(prompt: Sequence[int], continuation: Sequence[int]) -> list[float]:
                # The last token is scored as the next one: so a full context fits, although vLLM must add a token,
                # and a single token is scored from the prefix cache.
                *known, last = [*prompt, *continuation]
                body: JsonObject = {**shared, "prompt": list[JsonValue](known), "logprob_token_ids": [last]}
                if len(continuation) > 1:
                    body["prompt_logprobs"] = 0
                answer = await self._transport.post("/v1/completions", body)
                before = prompt_logprobs(answer, known)[len(prompt) :] if len(continuation) > 1 else []
                return [*before, next_logprob(answer, last)]

            pairs = zip(prompts, continuations, strict=True)
            return await _together([one(prompt, continuation) for prompt, continuation in pairs])

        return self._transport.run(job, cancel=cancel)

    def hidden_states(
        self, sequences: Sequence[Sequence[int]], layers: Sequence[int], *, cancel: threading.Event | None = None
    ) -> list[NDArray[np.float32]]:
        """Residual streams of token ids as the served model computes them; its prefix cache is not used.

        Args:
            sequences: Token ids, each at least one and fewer than the context holds.
            layers: Decoder layers, counted from 0.
            cancel: Ends the requests.

        Returns:
            For each sequence the outputs of the layers before the final norm, ``(layers, tokens, width)``, layers in
            the order given.

        Raises:
            InputError: The server is on another machine, or there are no tokens or layers.
            PromptTooLongError: A sequence does not fit with the one token that vLLM adds.
            EngineResponseError: The server gives no hidden states: it was started without ``--lens``.
            EngineError: It failed.
            CancelledError: ``cancel`` was set.
        """
        lens.check_loopback(self._transport.url)
        if not layers or len(set(layers)) != len(layers):
            raise InputError(f"name different layers to read, found {list(layers)}")
        check_request(sequences, Sampling(max_tokens=1), self._context_length)
        rising = sorted(layers)
        body = self._body(Sampling(max_tokens=1))
        body["vllm_xargs"] = {lens.REQUEST: list[JsonValue](rising)}

        async def job(_: Callable[[None], None]) -> list[NDArray[np.float32]]:
            async def one(ids: Sequence[int]) -> NDArray[np.float32]:
                answer = await self._transport.post("/v1/completions", {**body, "prompt": list[JsonValue](ids)})
                return lens.residual_stream(answer, rising, len(ids))[[rising.index(layer) for layer in layers]]

            return await _together([one(ids) for ids in sequences])

        return self._transport.run(job, cancel=cancel)

    def _body(self, sampling: Sampling) -> JsonObject:
        """The request without its prompt; every field is there, so that no default of the server applies."""
        body: JsonObject = {
            "model": self._name,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "n": sampling.n,
            "seed": sampling.seed,
            "stop": list(sampling.stop),
            "stop_token_ids": list[JsonValue](sorted(self._tokenizer.eos_token_ids)),
            "include_stop_str_in_output": True,
            "skip_special_tokens": True,
            "ignore_eos": False,
            "min_tokens": 0,
            "logprobs": 0,
            "return_token_ids": True,
            # Token strings would not say which bytes they are; ids are compared instead.
            "return_tokens_as_token_ids": True,
        }
        if sampling.structured is not None:
            body["structured_outputs"] = _structured(sampling.structured)
        return body

    def _get(self, path: str) -> JsonObject:
        return self._transport.run(lambda _: self._transport.get(path))

    def _fetch_models(self) -> list[JsonObject]:
        try:
            data = self._get("/v1/models").get("data")
        except NotFoundError as error:
            raise EngineResponseError(f"{self.url} is no vLLM server: {error}; check the address") from None
        entries = [item for item in data if isinstance(item, dict) and item.get("id")] if isinstance(data, list) else []
        if not entries:
            raise EngineResponseError(f"the server at {self.url} lists no models; check the address")
        return entries

    def _choose(self, served: list[JsonObject], wanted: str | None) -> JsonObject:
        """The entry for a name, a folder, or the only base model."""
        for entry in served:
            if wanted is not None and (entry["id"] == wanted or _same_folder(entry.get("root"), wanted)):
                return entry
        names = [str(entry["id"]) for entry in served]
        if wanted is not None:
            raise UnknownNameError(f"model of the server at {self.url}", wanted, names)
        # Adapters name their base model as their parent.
        base = [entry for entry in served if not entry.get("parent")]
        if len(base) != 1:
            raise UnknownNameError(f"model of the server at {self.url}", "(none given)", names)
        return base[0]

    def _model_folder(self, entry: JsonObject, wanted: str | None) -> Path:
        """The folder with the model's tokenizer on this machine."""
        root = Path(str(entry.get("root") or ""))
        if root.is_absolute() and (root / "tokenizer.json").is_file():
            return root
        problem: Exception | None = None
        for name in dict.fromkeys(str(item) for item in (wanted, entry["id"], entry.get("root")) if item):
            try:
                # Only what the caller named may be fetched: these are whole weights.
                return models.resolve(name, fetch=name == wanted).path
            except (ModelError, ValueError) as error:
                problem = error
        raise ModelError(
            f"the server at {self.url} runs {sanitise(str(entry['id']))!r}, whose tokenizer is not on this machine; "
            f"pass model= a local folder or hub id of the same model ({problem})"
        )

    def _check_tokenizer(self, tokenizer: ChatTokenizer) -> None:
        body: JsonObject = {"model": self._name, "prompt": _PROBE, "add_special_tokens": False}
        try:
            answer = self._transport.run(lambda _: self._transport.post("/tokenize", body))
        except NotFoundError:
            # Gateways often pass only /v1; the ids that come back are still checked against those sent.
            return
        if answer.get("tokens") != tokenizer.encode(_PROBE).token_ids:
            raise ModelError(
                f"the server at {self.url} runs another tokenizer than the model {self._name!r} on this machine; "
                "pass the model that the server really runs"
            )


async def _together(work: list[Coroutine[object, object, T]]) -> list[T]:
    """Run all; the first failure cancels the rest and is raised alone."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _structured(output: StructuredOutput) -> JsonObject:
    return {_STRUCTURED[output.kind]: output.value}


def _positive(value: JsonValue, what: str) -> int:
    if not isinstance(value, int) or value < 1:
        raise EngineResponseError(f"the server does not tell its {what}; tracer needs vLLM 0.10.2 or newer")
    return value


def _same_folder(root: JsonValue, wanted: str) -> bool:
    return isinstance(root, str) and Path(root).is_dir() and Path(wanted).expanduser().resolve() == Path(root).resolve()
