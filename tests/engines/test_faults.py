"""What the HTTP engine makes of servers that fail, over real sockets."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE

from tracer.engines.base import LOGPROB_FLOOR, TokenChunk
from tracer.engines.transport import Patience
from tracer.engines.vllm import VllmEngine
from tracer.errors import (
    CancelledError,
    EngineResponseError,
    EngineTimeoutError,
    EngineUnavailableError,
    InputError,
    ModelError,
    PromptTooLongError,
    UnknownNameError,
)
from tracer.trace.trace import Sampling

QUICK = Patience(timeout=20, backoff=0.01, heartbeat=0.1, heartbeat_timeout=0.2)
JsonObject = dict[str, Any]


class Handler(BaseHTTPRequestHandler):
    """Answers like vLLM, unless the test queued something else for the next completion."""

    protocol_version = "HTTP/1.1"
    server: FakeVllm

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:  # noqa: N802
        page = self.server.pages.get(self.path)
        if page is None:
            self.reply(404, {"detail": "Not Found"})
        else:
            page(self)

    def do_POST(self) -> None:  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/tokenize":
            tokens = self.server.backend.encode(body["prompt"]).ids
            self.reply(200, {"tokens": tokens[::-1] if self.server.other_tokenizer else tokens})
            return
        with self.server.lock:
            self.server.requests.append(body)
            behave = self.server.script.pop(0) if self.server.script else right
        behave(self, body)

    def reply(self, status: int, data: object, kind: str = "application/json") -> None:
        payload = data.encode() if isinstance(data, str) else json.dumps(data).encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True

    def event(self, data: object) -> None:
        self.wfile.write(b"data: " + (data if isinstance(data, str) else json.dumps(data)).encode() + b"\n\n")
        self.wfile.flush()


Behaviour = Callable[[Handler, JsonObject], None]


class FakeVllm(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.backend = Backend.from_file(str(folder / "tokenizer.json"))
        self.lock = threading.Lock()
        self.requests: list[JsonObject] = []
        self.script: list[Behaviour] = []
        self.other_tokenizer = False
        self.hung_up = threading.Event()
        self.bugs: list[BaseException | None] = []
        models = {"data": [{"id": "tiny", "root": str(folder), "parent": None, "max_model_len": 64}]}
        self.pages: dict[str, Callable[[Handler], None]] = {
            "/v1/models": lambda handler: handler.reply(200, models),
            "/version": lambda handler: handler.reply(200, {"version": "0.32.0"}),
            "/health": lambda handler: handler.reply(200, ""),
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):
            self.bugs.append(error)


def choice(body: JsonObject, token_ids: list[int], finish: str | None = "length", **fields: object) -> JsonObject:
    logprobs = {"token_logprobs": [-0.5] * len(token_ids)}
    return {
        "index": 0,
        "token_ids": token_ids,
        "logprobs": logprobs,
        "finish_reason": finish,
        "stop_reason": None,
        "prompt_token_ids": body["prompt"],
        **fields,
    }


def right(handler: Handler, body: JsonObject) -> None:
    if not body.get("stream"):
        handler.reply(200, {"choices": [choice(body, [40, 41])]})
        return
    handler.begin_stream()
    handler.event({"choices": [choice(body, [40], None)]})
    handler.event({"choices": [choice(body, [41])]})
    handler.event("[DONE]")


def status(code: int, data: object, kind: str = "application/json") -> Behaviour:
    return lambda handler, body: handler.reply(code, data, kind)


def answer(*token_ids: int, **fields: object) -> Behaviour:
    return lambda handler, body: handler.reply(200, {"choices": [choice(body, list(token_ids), **fields)]})  # type: ignore[arg-type]


def hang(handler: Handler, body: JsonObject) -> None:
    handler.close_connection = True
    handler.connection.settimeout(20)
    # An empty read is the client closing its end.
    if not handler.rfile.read(1):
        handler.server.hung_up.set()


def break_off(handler: Handler, body: JsonObject) -> None:
    handler.send_response(200)
    handler.send_header("content-type", "application/json")
    handler.send_header("content-length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def stream(*events: Callable[[JsonObject], object]) -> Behaviour:
    def behave(handler: Handler, body: JsonObject) -> None:
        handler.begin_stream()
        for event in events:
            handler.event(event(body))

    return behave


def tokens(*token_ids: int) -> Callable[[JsonObject], object]:
    return lambda body: {"choices": [choice(body, list(token_ids), None)]}


def error_event(code: int) -> Callable[[JsonObject], object]:
    return lambda body: {"error": {"message": "engine trouble", "type": "X", "code": code}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose tokens are single bytes."""
    folder = tmp_path_factory.mktemp("tiny")
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "a"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def fake(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVllm]:
    monkeypatch.setenv("TRACER_STATE", str(tmp_path))
    with FakeVllm(tiny) as fake:
        thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield fake
        fake.shutdown()
        thread.join()
        assert fake.bugs == []


@pytest.fixture
def engine(fake: FakeVllm) -> Iterator[VllmEngine]:
    with VllmEngine(fake.url, patience=QUICK) as engine:
        yield engine


def generate(engine: VllmEngine, **kwargs: Any) -> list[int]:
    return engine.generate([[1, 2, 3]], Sampling(max_tokens=2), **kwargs)[0][0].token_ids


def test_every_sampling_field_is_sent(engine: VllmEngine, fake: FakeVllm) -> None:
    engine.generate([[1]], Sampling(max_tokens=2, temperature=0.5, seed=7, stop=["x"]))
    sent = fake.requests[0]
    assert sent["repetition_penalty"] == 1.0
    assert {sent["presence_penalty"], sent["frequency_penalty"], sent["min_p"], sent["top_k"]} == {0}
    assert (sent["temperature"], sent["top_p"], sent["seed"], sent["n"]) == (0.5, 1.0, 7, 1)
    assert sent["stop_token_ids"] == sorted(engine.tokenizer.eos_token_ids)


def test_server_errors_are_tried_again(engine: VllmEngine, fake: FakeVllm) -> None:
    fake.script = [status(500, {"error": {"message": "oops"}}), status(503, "busy", "text/plain")]
    assert generate(engine) == [40, 41]
    assert len(fake.requests) == 3


def test_lasting_server_errors_end_with_the_reason(engine: VllmEngine, fake: FakeVllm) -> None:
    fake.script = [status(500, {"error": {"message": "out of memory"}})] * 9
    with pytest.raises(EngineUnavailableError, match=r"500: out of memory; tried 4 times.*tracer serve"):
        generate(engine)
    assert len(fake.requests) == 4


def test_connection_closed_in_mid_answer_is_tried_again(engine: VllmEngine, fake: FakeVllm) -> None:
    fake.script = [break_off]
    assert generate(engine) == [40, 41]


def test_bad_request_is_not_tried_again(engine: VllmEngine, fake: FakeVllm) -> None:
    fake.script = [status(400, {"error": {"message": "bad\nschema", "code": 400}})]
    with pytest.raises(InputError, match="refuses the request: bad schema"):
        generate(engine)
    assert len(fake.requests) == 1


def test_html_is_shown_on_one_safe_line(engine: VllmEngine, fake: FakeVllm) -> None:
    fake.script = [status(200, "<html>\n<b>\x1b[31mWelcome</b>" + "x" * 500, "text/html")]
    with pytest.raises(EngineResponseError) as caught:
        generate(engine)
    message = str(caught.value)
    assert "received: <html> <b>?[31mWelcome</b>" in message
    assert message.isprintable()
    assert len(message) < 300


def test_html_server_is_found_when_connecting(fake: FakeVllm) -> None:
    fake.pages["/v1/models"] = lambda handler: handler.reply(200, "<html>hello", "text/html")
    with pytest.raises(EngineResponseError, match="check the address"):
        VllmEngine(fake.url, patience=QUICK)


def test_hanging_request_times_out_once(fake: FakeVllm) -> None:
    fake.script = [hang]
    with (
        VllmEngine(fake.url, timeout=0.4) as engine,
        pytest.raises(EngineTimeoutError, match=r"nothing for 0\.4 s.*longer timeout"),
    ):
        generate(engine)
    assert len(fake.requests) == 1


def test_frozen_server_is_found_by_its_heartbeat(engine: VllmEngine, fake: FakeVllm) -> None:
    fake.script = [hang]
    fake.pages["/health"] = lambda handler: hang(handler, {})
    with pytest.raises(EngineTimeoutError, match="stopped answering: 3 health checks"):
        generate(engine)


def test_dead_engine_behind_a_living_server_is_found(engine: VllmEngine, fake: FakeVllm) -> None:
    fake.script = [hang]
    fake.pages["/health"] = lambda handler: handler.reply(503, "")
    with pytest.raises(EngineUnavailableError, match="3 health checks in a row failed"):
        generate(engine)


def test_refused_key_is_named_but_not_shown(fake: FakeVllm) -> None:
    fake.pages["/v1/models"] = lambda handler: handler.reply(401, {"error": "Unauthorized"})
    with pytest.raises(EngineUnavailableError, match="TRACER_API_KEY") as caught:
        VllmEngine(fake.url, api_key="sk-very-secret", patience=QUICK)
    assert "secret" not in str(caught.value)


def test_password_in_the_address_is_not_shown(fake: FakeVllm) -> None:
    fake.script = [status(400, {"error": {"message": "no"}})]
    with VllmEngine(fake.url.replace("//", "//me:hidden@"), patience=QUICK) as engine:
        with pytest.raises(InputError) as caught:
            generate(engine)
        assert "hidden" not in f"{caught.value} {engine.url} {engine.description}"


def test_nobody_listens(fake: FakeVllm) -> None:
    port = fake.server_port
    fake.server_close()
    with pytest.raises(EngineUnavailableError, match="cannot connect.*tracer serve"):
        VllmEngine(f"http://127.0.0.1:{port}", patience=QUICK)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://host:port"])
def test_address_that_is_none(url: str) -> None:
    with pytest.raises(InputError, match="address"):
        VllmEngine(url)


def test_unknown_model_lists_those_served(fake: FakeVllm) -> None:
    with pytest.raises(UnknownNameError, match="'tinny'; did you mean 'tiny'"):
        VllmEngine(fake.url, model="tinny", patience=QUICK)


def test_model_can_be_named_by_its_folder(fake: FakeVllm, tiny: Path) -> None:
    with VllmEngine(fake.url, model=str(tiny), patience=QUICK) as engine:
        assert engine.info.name == "tiny"


def test_other_tokenizer_is_refused(fake: FakeVllm) -> None:
    fake.other_tokenizer = True
    with pytest.raises(ModelError, match="another tokenizer"):
        VllmEngine(fake.url, patience=QUICK)


def test_answer_without_ids_asks_for_a_newer_vllm(engine: VllmEngine, fake: FakeVllm) -> None:
    fake.script = [lambda handler, body: handler.reply(200, {"choices": [{**choice(body, [40]), "token_ids": None}]})]
    with pytest.raises(EngineResponseError, match=r"vLLM 0\.10\.2 or newer.*return_token_ids"):
        generate(engine)


def test_other_prompt_ids_are_refused(engine: VllmEngine, fake: FakeVllm) -> None:
    fake.script = [answer(40, prompt_token_ids=[1, 2, 4])]
    with pytest.raises(EngineResponseError, match="other prompt ids"):
        generate(engine)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"logprobs": {"token_logprobs": [-1.0]}}, "1 log-probabilities for 2 tokens"),
        ({"logprobs": {"token_logprobs": [-1.0, float("nan")]}}, "no number"),
        ({"index": 5}, "completion 5"),
        ({"finish_reason": None}, "lacks the end"),
        ({"finish_reason": "abort"}, "'abort'"),
        ({"token_ids": [-1, 2]}, "no token ids"),
    ],
)
def test_inconsistent_answers_are_refused(engine: VllmEngine, fake: FakeVllm, fields: JsonObject, words: str) -> None:
    fake.script = [lambda handler, body: handler.reply(200, {"choices": [{**choice(body, [40, 41]), **fields}]})]
    with pytest.raises(EngineResponseError, match=words):
        generate(engine)


def test_minus_infinity_becomes_the_floor(engine: VllmEngine, fake: FakeVllm) -> None:
    fake.script = [answer(40, logprobs={"token_logprobs": [float("-inf")]})]
    completion = engine.generate([[1]], Sampling(max_tokens=2))[0][0]
    assert completion.logprobs == [LOGPROB_FLOOR]


def test_too_long_prompt_is_never_sent(engine: VllmEngine, fake: FakeVllm) -> None:
    with pytest.raises(PromptTooLongError, match=r"60 tokens and 5 more.*64"):
        engine.generate([[1], [1] * 60], Sampling(max_tokens=5))
    assert fake.requests == []


def test_a_full_context_is_scored_with_room_for_the_token_that_vllm_adds(engine: VllmEngine, fake: FakeVllm) -> None:
    fake.script = [answer(40, logprobs={"token_logprobs": [-0.5], "top_logprobs": [{"token_id:9": -4.0}]})]
    assert engine.score([[1] * 63], [[9]]) == [[-4.0]]
    assert len(fake.requests[0]["prompt"]) + fake.requests[0]["max_tokens"] == engine.context_length
    with pytest.raises(PromptTooLongError):
        engine.score([[1] * 63], [[9, 9]])


def test_stream_with_an_error_before_any_token_is_tried_again(engine: VllmEngine, fake: FakeVllm) -> None:
    fake.script = [stream(error_event(500))]
    assert generate(engine, on_tokens=lambda chunk: None) == [40, 41]


def test_stream_with_an_error_after_tokens_fails(engine: VllmEngine, fake: FakeVllm) -> None:
    fake.script = [stream(tokens(40), error_event(500))]
    with pytest.raises(EngineUnavailableError, match="broke after 1 events.*engine trouble"):
        generate(engine, on_tokens=lambda chunk: None)
    assert len(fake.requests) == 1


def test_stream_error_that_is_the_callers_fault(engine: VllmEngine, fake: FakeVllm) -> None:
    fake.script = [stream(error_event(400))]
    with pytest.raises(InputError, match="engine trouble"):
        generate(engine, on_tokens=lambda chunk: None)


def test_stream_that_drops_after_tokens_fails(engine: VllmEngine, fake: FakeVllm) -> None:
    fake.script = [stream(tokens(40))]
    with pytest.raises(EngineUnavailableError, match="broke after 1 events"):
        generate(engine, on_tokens=lambda chunk: None)


def test_stream_of_a_page_that_is_none(engine: VllmEngine, fake: FakeVllm) -> None:
    fake.script = [status(200, "<html>", "text/html")]
    with pytest.raises(EngineResponseError, match="<html>"):
        generate(engine, on_tokens=lambda chunk: None)


def test_streamed_characters_arrive_whole(engine: VllmEngine, fake: FakeVllm) -> None:
    text = "né 🙂!"
    ids = engine.tokenizer.encode(text).token_ids
    events = [tokens(*ids[:2]), tokens(*ids[2:6]), *(tokens(token_id) for token_id in ids[6:])]
    fake.script = [stream(*events, lambda body: {"choices": [choice(body, [])]}, lambda body: "[DONE]")]
    chunks: list[TokenChunk] = []
    completion = engine.generate([[1]], Sampling(max_tokens=20), on_tokens=chunks.append)[0][0]
    assert completion.text == text
    assert [chunk.text for chunk in chunks] == ["n", "é ", "", "🙂", "!"]


@pytest.mark.parametrize("streaming", [False, True])
def test_cancel_closes_the_connection(engine: VllmEngine, fake: FakeVllm, streaming: bool) -> None:
    fake.script = [hang]
    cancel = threading.Event()
    threading.Timer(0.2, cancel.set).start()
    with pytest.raises(CancelledError):
        generate(engine, cancel=cancel, on_tokens=(lambda chunk: None) if streaming else None)
    assert fake.hung_up.wait(10)


def test_interrupt_closes_the_connections_and_goes_on(engine: VllmEngine, fake: FakeVllm) -> None:
    def press(chunk: TokenChunk) -> None:
        raise KeyboardInterrupt

    def one_token_and_hang(handler: Handler, body: JsonObject) -> None:
        handler.begin_stream()
        handler.event(tokens(40)(body))
        hang(handler, body)

    fake.script = [one_token_and_hang]
    with pytest.raises(KeyboardInterrupt):
        generate(engine, on_tokens=press)
    assert fake.hung_up.wait(10)


def test_one_failure_ends_the_other_requests(engine: VllmEngine, fake: FakeVllm) -> None:
    def fail_third(handler: Handler, body: JsonObject) -> None:
        if body["prompt"] == [3]:
            handler.reply(400, {"error": {"message": "third"}})
        else:
            hang(handler, body)

    fake.script = [fail_third] * 3
    with pytest.raises(InputError, match="third"):
        engine.generate([[1], [2], [3]], Sampling(max_tokens=2))
    assert fake.hung_up.wait(10)


def test_results_keep_the_order_of_prompts(engine: VllmEngine, fake: FakeVllm) -> None:
    barrier = threading.Barrier(3, timeout=10)

    def echo(handler: Handler, body: JsonObject) -> None:
        barrier.wait()
        handler.reply(200, {"choices": [choice(body, body["prompt"])]})

    fake.script = [echo] * 3
    # The barrier opens only when all three are there at once.
    results = engine.generate([[5], [6], [7]], Sampling(max_tokens=2))
    assert [completions[0].token_ids for completions in results] == [[5], [6], [7]]


def test_closed_engine_says_so(fake: FakeVllm) -> None:
    engine = VllmEngine(fake.url, patience=QUICK)
    engine.close()
    engine.close()
    with pytest.raises(EngineUnavailableError, match="closed"):
        generate(engine)
