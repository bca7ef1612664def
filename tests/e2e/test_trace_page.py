"""The trace page and the tokens page in a real browser: the story of the copied answer, keyboard, links, budgets."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.e2e.conftest import SECONDS, Server, Watched, elsewhere, watch
from tests.ui import samples
from tracer.engines.models import ResolvedModel
from tracer.trace.trace import Trace

pytestmark = pytest.mark.browser
expect.set_options(timeout=SECONDS * 1000)


@pytest.fixture(scope="module")
def explained(server: Server) -> Iterator[Trace]:
    """The run whose wrong answer was copied from the exemplar, explained, in the app's store."""
    yield samples.add_explained(server.store)


def row(page: Page, name: str) -> Locator:
    """A line of the step map by the beginning of what a screen reader says of it."""
    return page.get_by_role("treeitem", name=re.compile(f"^{name}"))


def sources(page: Page) -> Locator:
    """What the selected step read."""
    return page.get_by_role("list", name="What the step read, most first").get_by_role("button")


def open_trace(page: Page, server: Server, query: str) -> None:
    """Follow a link to a run."""
    page.goto(f"{server.url}/trace?{query}")
    page.get_by_role("treeitem").first.wait_for()


def received(page: Page) -> list[int]:
    """Sizes of what comes over the socket from now on, as it comes."""
    sizes: list[int] = []
    page.on("websocket", lambda socket: socket.on("framereceived", lambda payload: sizes.append(len(payload))))
    return sizes


@pytest.mark.model
def test_the_copied_answer_is_seen_in_three_clicks(
    server: Server, watched: Watched, explained: Trace, demo_model: ResolvedModel
) -> None:
    """Issue 6: the main job's wrong answer was copied from the exemplar."""
    page = watched.page
    page.goto(server.url)
    page.get_by_role("textbox", name="Search").fill("Maelin Torvask")
    page.get_by_role("textbox", name="Search").press("Enter")
    expect(page.get_by_text("Runs 1 to 1 of 1,")).to_be_visible()
    table = page.locator(".st-key-runs_table").get_by_test_id("stDataFrame")
    table.locator("canvas").first.wait_for()
    table.click(position={"x": 400, "y": 38 + 35 / 2})
    row(page, "step 6, answer").click()
    expect(page.get_by_role("heading", name="Step 6: = answer")).to_be_visible()
    exemplar = sources(page).filter(has_text="exemplar")
    expect(exemplar).to_contain_text("Norway")
    exemplar.click()
    expect(page.get_by_role("heading", name="Prompt: « exemplar")).to_be_visible()
    expect(page.get_by_test_id("stCode").first).to_contain_text("She was born in Oslo, Norway.")
    assert re.search(r"[?&]part=5", page.url) and "step=" not in page.url
    expect(row(page, "prompt, exemplar")).to_have_attribute("aria-selected", "true")
    assert watched.remote == watched.refused == []


def test_a_link_has_step_and_method(server: Server, watched: Watched, explained: Trace) -> None:
    page = watched.page
    open_trace(page, server, f"run={explained.id}&step=s6&method=attention_resolvent")
    for _ in range(2):
        expect(page.get_by_role("heading", name="Step 6: = answer")).to_be_visible()
        expect(row(page, "step 6,")).to_have_attribute("aria-selected", "true")
        expect(sources(page).first).to_contain_text("exemplar")
        page.reload()
    page.get_by_role("combobox", name="Method").click()
    page.get_by_role("option", name="leave_one_out").click()
    expect(sources(page).first).to_contain_text("step 5")
    page.wait_for_url(re.compile("method=leave_one_out"))
    sources(page).first.click()
    expect(page.get_by_role("heading", name="Step 5:")).to_be_visible()
    expect(row(page, "step 5,")).to_have_attribute("aria-selected", "true")


def test_the_step_map_by_keyboard(server: Server, watched: Watched) -> None:
    page = watched.page
    open_trace(page, server, f"run={server.ids[1]}&step=s1")
    tree = page.get_by_role("tree", name="Steps")
    group = row(page, "Branch b2")
    expect(group).to_have_attribute("aria-expanded", "false")
    page.get_by_role("heading", name="Step 1:").click()
    page.keyboard.press("/")
    page.keyboard.type("it is 8")
    expect(page.get_by_role("treeitem", name=re.compile("^step "))).to_have_count(1)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Step 4: … thought")).to_be_visible()
    page.keyboard.press("/")
    page.keyboard.press("Escape")
    expect(tree).to_be_focused()
    expect(group).to_have_attribute("aria-expanded", "true")
    page.keyboard.press("ArrowLeft")
    expect(group).to_have_attribute("aria-expanded", "false")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Step 5: = answer")).to_be_visible()
    page.get_by_role("button", name="Next").click()
    expect(row(page, "step 6,")).to_have_attribute("aria-selected", "true")


def test_words_are_found_in_what_the_lines_leave_out(server: Server, watched: Watched) -> None:
    page = watched.page
    whole = samples.long(3)
    deep = whole.steps[1].model_copy(
        update={"text": "At the surface. " + "Deeper and deeper. " * 200 + "The wreck\nlies here."}
    )
    steps = [whole.steps[0], deep, whole.steps[2]]
    server.store.import_trace(whole.model_copy(update={"id": "deep-run", "steps": steps}))
    open_trace(page, server, "run=deep-run")
    page.get_by_role("heading", name="Step 1:").click()
    page.keyboard.press("/")
    page.keyboard.type("wreck lies")
    expect(page.get_by_role("treeitem", name=re.compile("^step "))).to_have_count(1)
    expect(page.get_by_role("status").filter(has_text="1 of 3")).to_have_text("1 of 3")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Step 2: … thought")).to_be_visible()
    box = page.get_by_role("searchbox", name="Find in these steps")
    expect(box).to_have_value("wreck lies")
    box.fill("")
    box.fill("wreck lies")
    expect(page.get_by_role("status").filter(has_text="1 of 3")).to_have_text("1 of 3")


def test_hostile_text_in_every_component(server: Server, watched: Watched) -> None:
    page = watched.page
    page.goto(f"{server.url}/tokens?run=hostile-0")
    expect(page.locator(".tokens .token").first).to_be_visible()
    for number, text in enumerate(samples.CORPUS):
        open_trace(page, server, f"run=hostile-{number}")
        row(page, "Given up: step 2").click()
        row(page, "step 2,").click()
        expect(page.get_by_role("heading", name="Step 2:")).to_be_visible()
        expect(sources(page).first).to_contain_text(text)
        expect(row(page, "step 2,")).to_contain_text(text)
        assert elsewhere(page) == []
    page.wait_for_timeout(300)
    assert watched.remote == watched.refused == []


def test_a_thousand_explained_steps(server: Server, watched: Watched) -> None:
    """Issue 6: first view under 2.5 s, click to card under 400 ms, under 400 kB over the socket."""
    page = watched.page
    server.store.import_trace(samples.long_explained())
    sizes = received(page)
    figures: dict[str, float] = {}
    # Once to warm up: reading a run from the store for the first time is the store's to measure.
    for name in ("cold", "warm"):
        sizes.clear()
        began = time.perf_counter()
        open_trace(page, server, "run=long-explained&step=s500")
        expect(page.get_by_role("heading", name="Step 500:")).to_be_visible()
        expect(sources(page).first).to_be_visible()
        figures[f"first view of 1,000 steps, {name}, s"] = round(time.perf_counter() - began, 2)
        page.wait_for_timeout(500)
        figures[f"over the socket, {name}, bytes"] = sum(sizes)
    sizes.clear()
    figures["click to card, ms"] = min(clicked(page, number) for number in (498, 503, 501))
    page.wait_for_timeout(300)
    figures["over the socket, three clicks, bytes"] = sum(sizes)
    print(json.dumps(figures))
    assert 0 < figures["over the socket, warm, bytes"] < 400_000
    assert figures["over the socket, three clicks, bytes"] < 200_000


def clicked(page: Page, number: int) -> float:
    """Milliseconds from a click on a step until the browser has drawn its card, measured in the browser."""
    row(page, f"step {number},").scroll_into_view_if_needed()
    page.evaluate(
        """(number) => {
          window.drawn = new Promise((done) => {
            addEventListener("pointerdown", () => {
              const began = performance.now();
              const look = () => {
                const heads = [...document.querySelectorAll("h3")];
                const shown = heads.some((node) => node.textContent.startsWith(`Step ${number}:`));
                if (shown) requestAnimationFrame(() => done(performance.now() - began));
                else requestAnimationFrame(look);
              };
              look();
            }, { once: true, capture: true });
          });
        }""",
        number,
    )
    row(page, f"step {number},").click()
    return round(float(page.evaluate("() => window.drawn")))


def test_two_thousand_tokens(server: Server, watched: Watched) -> None:
    """Issue 6: a hover frame under 50 ms; sources of 1,000 tokens in about 138 kB."""
    page = watched.page
    samples.add_wide(server.store)
    sizes = received(page)
    page.goto(f"{server.url}/tokens?run=wide")
    target = page.locator('.token[data-t="1500"]')
    expect(target).to_be_visible()
    expect(page.locator(".token.target")).to_have_count(1000)
    page.wait_for_timeout(500)
    over = sum(sizes)
    frames = page.evaluate(
        """async () => {
          const place = [...document.querySelectorAll("*")].find((node) => node.shadowRoot?.querySelector(".tokens"));
          const tokens = [...place.shadowRoot.querySelectorAll(".token.target")];
          const frame = () => new Promise((done) => requestAnimationFrame(done));
          const times = [];
          for (let number = 0; number < 40; number += 1) {
            await frame();
            const began = performance.now();
            const hover = new PointerEvent("pointerover", { bubbles: true, composed: true });
            tokens[(number * 37) % tokens.length].dispatchEvent(hover);
            place.shadowRoot.querySelector(".tokens").getBoundingClientRect();
            await frame();
            times.push(performance.now() - began);
          }
          return times.sort((one, other) => one - other);
        }"""
    )
    print(
        json.dumps(
            {
                "2,000 tokens, bytes over the socket": over,
                "hover frame, median ms": round(frames[20], 1),
                "hover frame, 95th percentile ms": round(frames[37], 1),
            }
        )
    )
    assert over < 400_000
    target.click()
    expect(page.locator(".status")).to_contain_text("Pinned: token")
    page.wait_for_url(re.compile("token=500"))
    first, last = page.locator('.token[data-t="1500"]'), page.locator('.token[data-t="1510"]')
    first.scroll_into_view_if_needed()
    first.hover()
    page.mouse.down()
    last.hover()
    page.mouse.up()
    expect(page.locator(".status")).to_contain_text("Pinned: 11 tokens")
    expect(page.locator(".token.reader")).to_have_count(11)
    page.get_by_role("combobox", name="Taken together").click()
    page.get_by_role("option", name="segment").click()
    expect(page.locator(".chip")).to_have_count(2)
    assert watched.remote == watched.refused == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_screenshots_of_the_evidence(
    server: Server, browser: Browser, shots: Path, explained: Trace, theme: str
) -> None:
    watched = watch(browser, theme=theme)
    page = watched.page
    page.set_viewport_size({"width": 1440, "height": 1300})
    open_trace(page, server, f"run={explained.id}&step=s6&method=attention_resolvent")
    expect(sources(page).first).to_contain_text("exemplar")
    page.screenshot(path=shots / f"evidence-{theme}.png")
    page.goto(f"{server.url}/tokens?run={explained.id}&step=s6&token=5&grain=word&method=grad_x_input")
    expect(page.locator(".status")).to_contain_text("Pinned")
    page.locator('.token[data-t="230"]').scroll_into_view_if_needed()
    page.wait_for_timeout(300)
    page.screenshot(path=shots / f"tokens-{theme}.png")
    page.context.close()
