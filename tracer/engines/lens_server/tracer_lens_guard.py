"""What stands before a vLLM server that gives hidden states: it lets through what tracer asks, and nothing else.

The plugin that reads hidden states also takes pickled functions and runs them, on paths that a key does not protect.
Here no request that carries one reaches it. This file runs in vLLM's own environment, which has no tracer in it: it
uses the standard library alone, and its folder holds nothing else that could be imported.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

READABLE = frozenset({"/health", "/metrics", "/version", "/v1/models"})
WRITABLE = frozenset({"/v1/completions", "/tokenize"})
EXTRAS = frozenset({"output_residual_stream", "output_qk"})
"""What may be asked of the plugin."""
LARGEST = 64 << 20
"""Bytes of a request."""


class Guard:
    """ASGI middleware; vLLM loads it by ``--middleware tracer_lens_guard.Guard``.

    Args:
        app: The server.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        method, path = scope["method"], scope["path"]
        if method == "GET" and path in READABLE:
            await self._app(scope, receive, send)
            return
        if method != "POST" or path not in WRITABLE:
            await _refuse(send, f"{method} {path} is closed on a server that gives hidden states")
            return
        # A browser sends JSON from another site only after asking, which is refused above.
        if not _is_json(scope):
            await _refuse(send, "requests must be JSON")
            return
        body = await _body(receive)
        content = None if body is None else _checked(body)
        if content is None:
            await _refuse(send, f"vllm_xargs may hold {' and '.join(sorted(EXTRAS))} and nothing else")
            return
        await self._app(_with_length(scope, len(content)), _once(content, receive), send)


def _checked(body: bytes) -> bytes | None:
    """The request as it was understood here, so that nobody behind understands it in another way."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(request, dict):
        return None
    extras = request.get("vllm_xargs")
    if extras is not None and not (isinstance(extras, dict) and set(extras) <= EXTRAS):
        return None
    if any(name in request for name in ("extra_args", "kv_transfer_params", "ec_transfer_params")):
        return None
    return json.dumps(request).encode()


def _is_json(scope: Scope) -> bool:
    kinds = [value for name, value in scope["headers"] if name.lower() == b"content-type"]
    return len(kinds) == 1 and kinds[0].split(b";")[0].strip().lower() == b"application/json"


async def _body(receive: Receive) -> bytes | None:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        part = message.get("body", b"")
        size += len(part)
        if size > LARGEST:
            return None
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _with_length(scope: Scope, length: int) -> Scope:
    headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", str(length).encode())]}


def _once(content: bytes, receive: Receive) -> Receive:
    """Give the content, and afterwards what the client sends: that it has gone."""
    left = [content]

    async def give() -> MutableMapping[str, Any]:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return give


async def _refuse(send: Send, why: str) -> None:
    error = {"message": why, "type": "Forbidden", "param": None, "code": 403}
    content = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": content})
