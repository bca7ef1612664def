"""A real server with sample runs, and the system's Chromium."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Request, sync_playwright

from tests.ui import samples
from tracer.jobs import Jobs
from tracer.store import Store

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
]
SECONDS = 60
"""How long anything may take before a test gives up; a busy machine starts Chromium slowly."""


@dataclass
class Server:
    """A running app."""

    url: str
    store: Store
    process: subprocess.Popen[str]
    ids: list[str]
    jobs: Jobs


@contextmanager
def serving(store: Store, ids: list[str]) -> Iterator[Server]:
    """The app on a free port, showing a store."""
    code = f"from ui.serve import serve; raise SystemExit(serve(0, store={store.where!r}))"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "STREAMLIT_SERVER_COOKIE_SECRET": "for tests only"},
    )
    jobs = Jobs.of_store(store.where)
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found
        yield Server(found.group(), store, process, ids, jobs)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(SECONDS)
        assert process.stdout is not None
        process.stdout.close()
        for job in jobs.list():
            jobs.remove(job.id)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A store with one run of every agent, a failed and a long one, and hostile ones."""
    with Store(tmp_path_factory.mktemp("store") / "runs.db") as store:
        ids = samples.fill(store)
        for number, text in enumerate(samples.CORPUS):
            store.import_trace(samples.hostile(text, trace_id=f"hostile-{number}"))
        with serving(store, ids) as running:
            yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The system's Chromium."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield opened
        opened.close()


@dataclass
class Watched:
    """A page, and what it asked for from elsewhere or was refused."""

    page: Page
    remote: list[str]
    refused: list[str]


def watch(browser: Browser, *, theme: str = "light") -> Watched:
    """A new page that records every request which does not go to this machine."""
    dark = theme == "dark"
    context = browser.new_context(
        color_scheme="dark" if dark else "light", viewport={"width": 1440, "height": 900}, timezone_id="Europe/Oslo"
    )
    context.set_default_timeout(SECONDS * 1000)
    watched = Watched(context.new_page(), [], [])

    def note(request: Request) -> None:
        if not re.match(r"http://127\.0\.0\.1:|data:|blob:", request.url):
            watched.remote.append(request.url)

    context.on("request", note)
    watched.page.on(
        "websocket", lambda socket: watched.remote.extend([] if "//127.0.0.1:" in socket.url else [socket.url])
    )
    watched.page.on(
        "console", lambda message: watched.refused.append(message.text) if "Content Security" in message.text else None
    )
    return watched


def elsewhere(page: Page) -> list[str]:
    """What the page links to or shows that does not come from this machine."""
    found: list[str] = page.evaluate(
        """() => [...document.querySelectorAll("[href], [src]")]
          .map((node) => new URL(node.href ?? node.src, location.href))
          .filter((url) => url.origin !== location.origin && !["data:", "blob:"].includes(url.protocol))
          .map(String)"""
    )
    return found


@pytest.fixture
def watched(browser: Browser) -> Iterator[Watched]:
    """A page in the light theme."""
    opened = watch(browser)
    yield opened
    opened.page.context.close()


@pytest.fixture
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots go: ``TRACER_SCREENSHOTS``, or a temporary folder."""
    given = os.environ.get("TRACER_SCREENSHOTS")
    folder = Path(given) if given else tmp_path_factory.getbasetemp() / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
