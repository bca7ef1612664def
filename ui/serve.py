"""Start the app: a Streamlit server on this machine, with security headers and without remote requests."""

from __future__ import annotations

import base64
import hashlib
import importlib
import ipaddress
import os
import re
import socket
import threading
import time
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil
import streamlit as st
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tracer.errors import InputError
from tracer.trace.trace import MAX_FILE_BYTES
from ui.palette import PRIMARY

HEALTH = "/_stcore/health"
PORTS_TRIED = 50
_APP = Path(__file__).with_name("app.py")
_NEEDED = (
    "altair",
    "pandas",
    "pyarrow",
    "tracer.explain.methods",
    "tracer.jobs",
    "tracer.store",
    "tracer.token_texts",
    "ui.payload",
)
"""What pages import that takes long, and holds nothing of a session."""
_INLINE_SCRIPT = re.compile(rb"<script>(.*?)</script>", re.DOTALL)


class SecurityHeaders:
    """Adds fixed headers to every HTTP response.

    Args:
        app: What answers the request.
        headers: Names and values.
    """

    def __init__(self, app: ASGIApp, *, headers: Mapping[str, str]) -> None:
        self._app = app
        self._headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._headers)
            await send(message)

        await self._app(scope, receive, send_with_headers)


def security_headers(page: bytes) -> dict[str, str]:
    """The headers of every response: nothing is loaded from, or sent to, any other place.

    Args:
        page: Streamlit's index page; the scripts inside it are allowed by their hashes.
    """
    hashes = [base64.b64encode(hashlib.sha256(script).digest()).decode() for script in _INLINE_SCRIPT.findall(page)]
    policy = {
        "default-src": ["'self'"],
        # Streamlit hands a component's script to the browser as a blob, which only a script of the page can make.
        "script-src": ["'self'", "blob:", *(f"'sha256-{digest}'" for digest in hashes)],
        # Streamlit's styles are made at run time.
        "style-src": ["'self'", "'unsafe-inline'"],
        "img-src": ["'self'", "data:", "blob:"],
        "font-src": ["'self'", "data:"],
        "media-src": ["'self'", "blob:"],
        "worker-src": ["'self'", "blob:"],
        "connect-src": ["'self'"],
        "frame-src": ["'self'"],
        "frame-ancestors": ["'none'"],
        "object-src": ["'none'"],
        "base-uri": ["'none'"],
        "form-action": ["'self'"],
    }
    return {
        "content-security-policy": "; ".join(f"{name} {' '.join(values)}" for name, values in policy.items()),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }


def allowed_hosts(host: str) -> list[str]:
    """The names under which a browser may ask for the app; others are refused, against DNS rebinding.

    Args:
        host: The address that the server is bound to; a wildcard stands for all names and addresses of the machine.
    """
    names = {host, "localhost", "127.0.0.1", "::1"}
    if host in ("0.0.0.0", "::"):  # noqa: S104
        names |= {socket.gethostname(), socket.getfqdn()}
        found = (entry.address for entries in psutil.net_if_addrs().values() for entry in entries)
        names |= {address.partition("%")[0] for address in found if _is_address(address.partition("%")[0])}
    return sorted(name.lower() for name in names)


def free_port(host: str, wanted: int) -> int:
    """The wanted port, or the next one that nothing listens on.

    Raises:
        InputError: The host is not an address of this machine, or no port can be had.
    """
    for port in (*range(wanted, min(wanted + PORTS_TRIED, 65536)), 0):
        try:
            return _bound_port(host, port)
        except socket.gaierror:
            raise InputError(f"{host!r} is no address; give one of this machine's, such as 127.0.0.1") from None
        except OverflowError:
            raise InputError(f"{wanted} is no port; give one from 0 to 65535") from None
        except OSError as error:
            last = error
    raise InputError(f"cannot listen on {host}: {last.strerror or last}; give another address of this machine")


def serve(port: int = 8501, *, store: str | None, host: str = "127.0.0.1", open_browser: bool = False) -> int:
    """Serve the app until Ctrl-C; prints its address once it answers. To be called in the main thread.

    Args:
        port: Where to listen; the next free port is taken if something else listens there.
        store: The store to show, a path or a database URL; ``None`` for the default one.
        host: The address to listen on.
        open_browser: Whether to open the address in a browser.

    Returns:
        The exit status.

    Raises:
        InputError: The host or port cannot be used.
    """
    if not 0 <= port < 65536:
        raise InputError(f"{port} is no port; give one from 0 to 65535")
    chosen = free_port(host, port)
    if port not in (0, chosen):
        print(f"Port {port} is taken; using {chosen}.", flush=True)
    if store is not None:
        os.environ["TRACER_STORE"] = store
    hosts = allowed_hosts(host)
    page = Path(st.__file__).with_name("static") / "index.html"
    app = st.App(
        _APP,
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False),
            Middleware(SecurityHeaders, headers=security_headers(page.read_bytes())),
        ],
    )
    threading.Thread(target=_announce, args=(host, chosen, open_browser), daemon=True).start()
    try:
        app.run(config=settings(host, chosen, hosts=hosts))
    except KeyboardInterrupt:
        return 0
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else 1
    return 0


def settings(host: str, port: int, *, hosts: Iterable[str]) -> dict[str, object]:
    """Streamlit's options; given here because the checkout has no place for its configuration file."""
    return {
        "server.address": host,
        "server.port": port,
        "server.headless": True,
        "server.allowedHosts": list(hosts),
        "server.fileWatcherType": "none",
        "server.maxUploadSize": MAX_FILE_BYTES >> 20,
        "browser.gatherUsageStats": False,
        "client.toolbarMode": "minimal",
        # A traceback's message can hold text from a trace; the terminal shows it in full.
        "client.showErrorDetails": "stacktrace",
        "client.showErrorLinks": False,
        "logger.hideWelcomeMessage": True,
        "logger.level": "warning",
        # Otherwise a bare expression in a page would be drawn as markdown.
        "runner.magicEnabled": False,
        "theme.light.primaryColor": PRIMARY["light"],
        "theme.dark.primaryColor": PRIMARY["dark"],
    }


def _announce(host: str, port: int, open_browser: bool) -> None:
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    url = f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
    # The first person to come shall not wait for this.
    for name in _NEEDED:
        importlib.import_module(name)
    while not _answers(url + HEALTH):
        time.sleep(0.1)
    print(f"The app is at {url} (Ctrl-C stops it).", flush=True)
    if open_browser:
        webbrowser.open(url)


def _answers(url: str) -> bool:
    # A proxy from the environment has no business between this process and itself.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _bound_port(host: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        probe.listen(1)
        return int(probe.getsockname()[1])


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
