"""The graph, probes and compare pages in a real browser."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.e2e.conftest import SECONDS, Server, Watched, watch
from tests.ui import explained, samples

pytestmark = pytest.mark.browser
expect.set_options(timeout=SECONDS * 1000)


@pytest.fixture(scope="module", autouse=True)
def runs(server: Server) -> None:
    """Explained runs beside the plain ones."""
    server.store.import_trace(explained.react().model_copy(update={"id": "explained"}))
    server.store.import_trace(explained.chain(1000).model_copy(update={"id": "long-explained"}))


def node(page: Page, number: int) -> Locator:
    """The box of a step in the graph."""
    return page.get_by_role("button", name=re.compile(f"^Step {number}, "))


def open_graph(page: Page, server: Server, trace_id: str, query: str = "") -> None:
    """Follow a link to a graph, until it is drawn."""
    page.goto(f"{server.url}/graph?run={trace_id}{query}")
    expect(page.locator(".graph .node").first).to_be_visible()


def test_a_click_selects_and_a_double_click_opens(server: Server, watched: Watched) -> None:
    page = watched.page
    open_graph(page, server, "explained")
    node(page, 5).click()
    page.wait_for_url(re.compile("step="))
    expect(page.get_by_role("heading", name="Step 5:")).to_be_visible()
    expect(page.locator(".node.centre")).to_have_attribute("aria-label", re.compile("^Step 5, thought, selected"))
    node(page, 6).dblclick()
    page.wait_for_url(re.compile("/trace[?]"))
    assert "step=s6" in page.url
    assert watched.remote == watched.refused == []


def test_the_keyboard_alone_is_enough(server: Server, watched: Watched) -> None:
    page = watched.page
    open_graph(page, server, "explained", "&step=s6&hops=2")
    node(page, 6).focus()
    page.keyboard.press("ArrowLeft")
    expect(node(page, 5)).to_be_focused()
    page.keyboard.press("p")
    page.wait_for_url(re.compile("pins=s5"))
    page.keyboard.press("Space")
    page.wait_for_url(re.compile("step=s5"))
    expect(node(page, 5)).to_be_focused()
    before = page.locator(".graph svg.canvas > g").get_attribute("transform")
    page.keyboard.press("+")
    assert page.locator(".graph svg.canvas > g").get_attribute("transform") != before
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("/trace[?]"))


def test_hostile_text_in_the_graph_loads_nothing(server: Server, watched: Watched) -> None:
    page = watched.page
    for number, text in enumerate(samples.CORPUS):
        open_graph(page, server, f"hostile-{number}")
        assert text[:20] in page.locator(".graph .node .text").first.inner_html().replace("&lt;", "<").replace(
            "&gt;", ">"
        )
    assert watched.remote == watched.refused == []
    assert page.locator('[src*="example.invalid"], [href*="example.invalid"]').count() == 0


def test_a_long_trace_is_drawn_soon_and_sends_little(server: Server, watched: Watched) -> None:
    page = watched.page
    received: list[int] = []
    page.on("websocket", lambda socket: socket.on("framereceived", lambda payload: received.append(len(payload))))
    page.goto(server.url)
    page.wait_for_timeout(500)
    began = time.perf_counter()
    open_graph(page, server, "long-explained", "&step=s500&min=0.05")
    took = time.perf_counter() - began
    sent = sum(received)
    received.clear()
    began = time.perf_counter()
    node(page, 500).click()
    expect(page.get_by_role("heading", name="Step 500:")).to_be_visible()
    expect(page.locator(".node.centre")).to_have_attribute("aria-label", re.compile("^Step 500,"))
    print(
        json.dumps(
            {
                "graph of a 1,000-step trace, seconds": round(took, 2),
                "bytes over the socket": sent,
                "click to the next graph, seconds": round(time.perf_counter() - began, 2),
                "bytes a click": sum(received),
            }
        )
    )
    assert page.locator(".graph .node").count() <= 50
    assert 0 < sent < 400_000


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_screenshots(server: Server, browser: Browser, shots: Path, theme: str) -> None:
    watched = watch(browser, theme=theme)
    page = watched.page
    open_graph(page, server, "explained", "&step=s6&hops=2")
    page.wait_for_timeout(1000)
    page.screenshot(path=shots / f"graph-{theme}.png", full_page=True)
    assert watched.remote == watched.refused == []
    page.context.close()
