"""The graph, probes and compare pages in a real browser."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.e2e.conftest import SECONDS, Server, Watched, watch
from tests.ui import explained, probed, samples

pytestmark = pytest.mark.browser
expect.set_options(timeout=SECONDS * 1000)


@pytest.fixture(scope="module", autouse=True)
def probes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A report on the probes of one model, and one full of hostile text; the server is started after this."""
    folder = tmp_path_factory.mktemp("probes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACER_PROBES", str(folder))
        probed.keep(probed.report())
        probed.keep(probed.hostile(), weights="cd" * 32)
        yield


@pytest.fixture(scope="module", autouse=True)
def runs(probes: None, server: Server) -> None:
    """Explained runs beside the plain ones."""
    for trace, name in (
        (explained.react(), "explained"),
        (explained.judged(), "judged"),
        (explained.chain(1000), "long-explained"),
        (explained.hostile(), "hostile-explained"),
        (probed.mapped().model_copy(update={"probes": probed.scored().probes + probed.mapped().probes}), "mapped"),
    ):
        server.store.import_trace(trace.model_copy(update={"id": name}))


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


def drawn(page: Page, count: int) -> None:
    """Wait until so many charts are drawn."""
    expect(page.get_by_test_id("stVegaLiteChart").locator("canvas, svg.marks").nth(count - 1)).to_be_visible()


def test_hostile_text_loads_nothing_on_any_of_these_pages(server: Server, watched: Watched) -> None:
    """One run whose steps, methods, units, probes and model are called by every text of the corpus."""
    page = watched.page
    open_graph(page, server, "hostile-explained", "&hops=3&min=0")
    shown = " ".join(page.locator(".graph .node .text").all_text_contents())
    assert all(text[:20] in shown for text in samples.CORPUS)
    page.goto(f"{server.url}/compare?run=hostile-explained&with=hostile-1")
    drawn(page, 4)
    page.goto(f"{server.url}/probes?run=hostile-explained")
    expect(page.get_by_role("heading", name="What they say about this run")).to_be_visible()
    page.get_by_role("combobox", name="Model").click()
    page.get_by_role("option", name=re.compile("cdcdcdcd")).click()
    drawn(page, 8)
    page.wait_for_timeout(500)
    assert watched.remote == watched.refused == []
    assert page.locator('[src*="example.invalid"], [href*="example.invalid"]').count() == 0


def test_two_runs_are_compared_by_hand(server: Server, watched: Watched) -> None:
    page = watched.page
    page.goto(f"{server.url}/compare?run=explained")
    page.get_by_role("combobox", name="Second run").click()
    page.get_by_role("option", name=re.compile("same question")).first.click()
    page.wait_for_url(re.compile("with="))
    expect(page.get_by_text("The steps of both runs are the same.")).to_be_visible()
    drawn(page, 2)
    assert watched.remote == watched.refused == []


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
    page.screenshot(path=shots / f"graph-{theme}.png")
    # Streamlit scrolls inside the page, so that a long page needs a tall window.
    page.set_viewport_size({"width": 1440, "height": 2300})
    for name, query, charts in (("compare", "run=judged&with=explained", 4), ("probes", "run=mapped", 11)):
        page.goto(f"{server.url}/{name}?{query}")
        drawn(page, charts)
        page.wait_for_timeout(1000)
        page.screenshot(path=shots / f"{name}-{theme}.png")
    assert watched.remote == watched.refused == []
    page.context.close()
