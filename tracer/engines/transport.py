"""HTTP to a vLLM server: one event loop in a background thread, retries, heartbeat, cancellation, clear errors."""

from __future__ import annotations

import asyncio
import json
import queue
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final, TypeVar

import httpx
from pydantic import JsonValue

from tracer.errors import (
    CancelledError,
    EngineResponseError,
    EngineTimeoutError,
    EngineUnavailableError,
    InputError,
)

T = TypeVar("T")
R = TypeVar("R")
JsonObject = dict[str, JsonValue]

MAX_CONCURRENT: Final = 64
_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
# Below uvicorn's five seconds, so that a connection is not reused while the server closes it.
_KEEPALIVE_SECONDS: Final = 2.0
_CONNECT_SECONDS: Final = 10.0
_CANCEL_POLL_SECONDS: Final = 0.05


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for a server, and how often to try again; times in seconds."""

    timeout: float = 600.0
    """Without a byte for this long, a request has failed."""
    max_retries: int = 3
    """Further tries after a connection error or an answer of 500 and above."""
    backoff: float = 0.5
    """Before the first retry; doubled before each one that follows, with up to a half of jitter."""
    heartbeat: float = 10.0
    """Between health checks while requests are in flight."""
    heartbeat_timeout: float = 10.0
    heartbeat_failures: int = 3
    """Failed health checks in a row that mean that the server has stopped answering."""


class _TryAgainError(Exception):
    """A failure that another try may mend."""


def sanitise(text: str, limit: int = 80) -> str:
    """Foreign text on one line of printable characters, cut to ``limit``."""
    line = " ".join(text[: 4 * limit].split())
    line = "".join(character if character.isprintable() else "?" for character in line)
    return line if len(line) <= limit else f"{line[:limit]}..."


def normalise_url(url: str) -> str:
    """The server's address without a trailing ``/v1``.

    Raises:
        InputError: It is no http or https address.
    """
    try:
        parsed = httpx.URL(url.strip())
    except (httpx.InvalidURL, TypeError):
        raise InputError("the server's address cannot be read; write it like http://127.0.0.1:8000") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InputError("the server's address must start with http:// or https:// and name a host")
    return str(parsed).split("?")[0].split("#")[0].rstrip("/").removesuffix("/v1").rstrip("/")


def display_url(url: str) -> str:
    """The address without a user name or password in it."""
    parsed = httpx.URL(url)
    return str(parsed.copy_with(userinfo=b"")).rstrip("/")


class Transport:
    """Sends JSON to one server, many requests at once; safe to share between threads.

    Args:
        url: The server's address, as `normalise_url` returns it.
        api_key: Sent as a bearer token, never shown.
        patience: Time-outs and retries.
        note: Appended to the message where the server died, such as the path of its log.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, patience: Patience | None = None, note: str = ""
    ) -> None:
        self.url = url
        self.shown = display_url(url)
        self.patience = patience or Patience()
        self._note = note
        self._lock = threading.Lock()
        self._closed = False
        self._ready = threading.Event()
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="tracer-http", daemon=True)
        self._thread.start()
        self._ready.wait()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._slots = asyncio.Semaphore(MAX_CONCURRENT)
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers=self._headers,
            timeout=httpx.Timeout(self.patience.timeout, connect=_CONNECT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=_KEEPALIVE_SECONDS),
            trust_env=httpx.URL(self.url).host not in _LOOPBACK,
        )
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._client.aclose())
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def close(self) -> None:
        """Abort what is in flight and end the thread; a second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result(timeout=10)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=10)

    def run(
        self,
        job: Callable[[Callable[[R], None]], Coroutine[object, object, T]],
        *,
        on_event: Callable[[R], None] | None = None,
        cancel: threading.Event | None = None,
    ) -> T:
        """Run a coroutine on the loop under a heartbeat and wait for it.

        Args:
            job: Called with a function that hands an event to the waiting thread; returns the coroutine.
            on_event: Receives those events, in the waiting thread.
            cancel: Once set, the job is cancelled, which closes its connections.

        Raises:
            CancelledError: ``cancel`` was set.
            EngineError: What the job raised, or the server stopped answering.
        """
        if self._closed:
            raise EngineUnavailableError("this engine was closed; connect again")
        events: queue.SimpleQueue[R | None] = queue.SimpleQueue()
        settled = threading.Event()
        future = asyncio.run_coroutine_threadsafe(self._guarded(job(events.put), settled), self._loop)
        future.add_done_callback(lambda _: events.put(None))
        try:
            self._wait(future, events, on_event, cancel)
        except BaseException:
            # Also Ctrl-C: the connections are closed before it goes on, and vLLM drops their requests.
            future.cancel()
            settled.wait(timeout=10)
            raise
        if future.cancelled():
            raise EngineUnavailableError("this engine was closed in mid-request")
        return future.result()

    @staticmethod
    def _wait(
        future: Future[T],
        events: queue.SimpleQueue[R | None],
        on_event: Callable[[R], None] | None,
        cancel: threading.Event | None,
    ) -> None:
        while True:
            if cancel is not None and cancel.is_set():
                raise CancelledError("cancelled; what was recorded before is kept")
            try:
                event = events.get(timeout=_CANCEL_POLL_SECONDS if cancel is not None else 1.0)
            except queue.Empty:
                continue
            if event is None:
                if future.done():
                    return
            elif on_event is not None:
                on_event(event)

    async def _guarded(self, work: Coroutine[object, object, T], settled: threading.Event) -> T:
        """Run ``work`` until it ends or the server stops answering its health checks; set ``settled`` at the end."""
        task = asyncio.ensure_future(work)
        watch = asyncio.ensure_future(self._heartbeat())
        try:
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                await watch
            return await task
        finally:
            for other in (task, watch):
                other.cancel()
            await asyncio.gather(task, watch, return_exceptions=True)
            settled.set()

    async def _heartbeat(self) -> None:
        """Raise once the server has failed several health checks in a row.

        Raises:
            EngineUnavailableError: Nothing listens any more, or the server says that its engine is dead.
            EngineTimeoutError: It listens and does not answer.
        """
        patience = self.patience
        failures = 0
        while failures < patience.heartbeat_failures:
            await asyncio.sleep(patience.heartbeat)
            refused = True
            try:
                response = await self._client.get("/health", timeout=patience.heartbeat_timeout)
                # Any answer below 500 is a sign of life: gateways may not have this page.
                failures = failures + 1 if response.status_code >= 500 else 0
            except httpx.TimeoutException:
                failures += 1
                refused = False
            except httpx.TransportError:
                failures += 1
        if refused:
            raise self._gone(f"{failures} health checks in a row failed")
        raise EngineTimeoutError(
            f"the server at {self.shown} stopped answering: {failures} health checks of "
            f"{patience.heartbeat_timeout:g} s each went unanswered; restart it with `tracer serve`{self._note}"
        )

    async def get(self, path: str) -> JsonObject:
        """GET a JSON object.

        Raises:
            EngineError: No usable answer came.
        """
        return await self._retried(lambda: self._json("GET", path, None))

    async def post(self, path: str, body: JsonObject) -> JsonObject:
        """POST a JSON object and read one back.

        Raises:
            InputError: The server says that the request is wrong.
            EngineError: No usable answer came.
        """
        async with self._slots:
            return await self._retried(lambda: self._json("POST", path, body))

    async def stream(self, path: str, body: JsonObject, on_data: Callable[[JsonObject], None]) -> None:
        """POST a JSON object and hand over the objects of the event stream that comes back.

        A stream that breaks is tried again only while ``on_data`` has not been called: what a caller has seen
        is never taken back.

        Raises:
            InputError: The server says that the request is wrong.
            EngineError: The stream broke or holds something else.
        """
        seen = 0

        def receive(data: JsonObject) -> None:
            nonlocal seen
            seen += 1
            on_data(data)

        async def attempt() -> None:
            try:
                await self._stream_once(path, body, receive)
            except _TryAgainError as error:
                if seen:
                    raise self._gone(f"the stream broke after {seen} events: {error}") from None
                raise

        async with self._slots:
            await self._retried(attempt)

    async def _stream_once(self, path: str, body: JsonObject, receive: Callable[[JsonObject], None]) -> None:
        async with self._errors(), self._client.stream("POST", path, json=body) as response:
            kind = response.headers.get("content-type", "")
            if response.status_code != 200 or not kind.startswith("text/event-stream"):
                await response.aread()
                self._check(response)
                raise self._not_json(response.text)
            async for line in response.aiter_lines():
                if not line.startswith("data:"):
                    continue
                payload = line.removeprefix("data:").strip()
                if payload == "[DONE]":
                    return
                data = self._parse(payload)
                if "error" in data:
                    self._raise_for(_error_code(data), payload)
                receive(data)
        raise _TryAgainError("it ended without its end mark")

    async def _json(self, method: str, path: str, body: JsonObject | None) -> JsonObject:
        async with self._errors():
            response = await self._client.request(method, path, json=body)
        self._check(response)
        return self._parse(response.text)

    async def _retried(self, attempt: Callable[[], Awaitable[T]]) -> T:
        tries = self.patience.max_retries + 1
        delay = self.patience.backoff
        for left in reversed(range(tries)):
            try:
                return await attempt()
            except _TryAgainError as error:
                if not left:
                    raise self._gone(f"{error}; tried {tries} times" if tries > 1 else str(error)) from None
            await asyncio.sleep(delay * random.uniform(1.0, 1.5))  # noqa: S311
            delay *= 2
        raise AssertionError("unreachable")

    @asynccontextmanager
    async def _errors(self) -> AsyncIterator[None]:
        """Translate the client's exceptions."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _TryAgainError(f"cannot connect ({sanitise(str(error)) or type(error).__name__})") from None
        except httpx.TimeoutException:
            raise EngineTimeoutError(
                f"the server at {self.shown} sent nothing for {self.patience.timeout:g} s (the timeout); give a "
                "longer timeout, ask for fewer tokens or samples at once, or restart the server with `tracer serve`"
            ) from None
        except httpx.TransportError as error:
            raise _TryAgainError(f"the connection broke ({sanitise(str(error)) or type(error).__name__})") from None
        except httpx.DecodingError:
            raise EngineResponseError(
                f"the server at {self.shown} sent data that cannot be decoded; check the address"
            ) from None

    def _check(self, response: httpx.Response) -> None:
        if response.status_code != 200:
            self._raise_for(response.status_code, response.text)

    def _raise_for(self, status: int, text: str) -> None:
        """Raise what a status other than 200 means."""
        message = _server_message(text)
        if status >= 500:
            raise _TryAgainError(f"it answered {status}: {message or sanitise(text) or 'no reason given'}")
        if status in (401, 403):
            raise EngineUnavailableError(
                f"the server at {self.shown} refuses the API key (status {status}); set TRACER_API_KEY to the right one"
            )
        if status == 429:
            raise EngineUnavailableError(f"the server at {self.shown} has too many requests; try again later")
        if status == 404 and message is not None:
            raise NotFoundError(f"the server at {self.shown} does not know that: {message}")
        if status in (400, 422) and message is not None:
            raise InputError(f"the server at {self.shown} refuses the request: {message}")
        if message is not None:
            raise EngineResponseError(f"the server at {self.shown} answered with status {status}: {message}")
        raise self._not_json(text, status)

    def _parse(self, text: str) -> JsonObject:
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            raise self._not_json(text) from None
        if not isinstance(data, dict):
            raise self._not_json(text)
        return data

    def _not_json(self, text: str, status: int = 200) -> EngineResponseError:
        received = sanitise(text) or "nothing"
        return EngineResponseError(
            f"{self.shown} does not answer like a vLLM server (status {status}, received: {received}); "
            "check the address and any proxy in between"
        )

    def _gone(self, reason: str) -> EngineUnavailableError:
        return EngineUnavailableError(
            f"the server at {self.shown} cannot be used: {reason}; see whether it runs with `tracer serve --status`, "
            f"or start one with `tracer serve`{self._note}"
        )


class NotFoundError(EngineResponseError):
    """The server has no such page or model (status 404)."""


async def _cancel_others() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _error_code(data: JsonObject) -> int:
    error = data.get("error")
    code = error.get("code") if isinstance(error, dict) else None
    # A stream's status was sent before the error happened; without a code it is the server's own fault.
    return code if isinstance(code, int) and code >= 400 else 500


def _server_message(text: str) -> str | None:
    """The reason in an error body, or ``None`` where the body is none of vLLM's."""
    with suppress(ValueError, RecursionError):
        data = json.loads(text)
        if isinstance(data, dict):
            error = data.get("error", data.get("detail", data.get("message")))
            message = error.get("message") if isinstance(error, dict) else error
            if message is not None:
                return sanitise(str(message), 300)
    return None
