"""The app in a real browser, against a real server."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.e2e.conftest import SECONDS, Server, Watched, elsewhere, watch
from tests.ui import samples
from tracer.trace.trace import Trace

pytestmark = pytest.mark.browser
HEADER = 38
ROW = 35
expect.set_options(timeout=SECONDS * 1000)


def table(page: Page) -> Locator:
    """The table of runs, drawn; by its key, since others may be drawn before it."""
    found = page.locator(".st-key-runs_table").get_by_test_id("stDataFrame")
    found.locator("canvas").first.wait_for()
    return found


def click_row(page: Page, row: int) -> None:
    """Click into a row of the main table, away from its marker."""
    table(page).click(position={"x": 400, "y": HEADER + ROW * row + ROW / 2})


def cell(page: Page, row: int, column: int) -> str:
    """A cell's text, from the table's accessible twin; row 0 holds the column names, column 0 the markers."""
    return (
        table(page)
        .locator(f'[role="row"][aria-rowindex="{row + 1}"]')
        .locator(f'[aria-colindex="{column + 1}"]')
        .inner_text()
    )


def step_row(page: Page, number: int) -> Locator:
    """A step in the step map."""
    return page.get_by_role("treeitem", name=re.compile(rf"^step {number},"))


def open_menu(page: Page, name: str, option: Locator) -> None:
    """Open a menu until an option shows: a page that is still being drawn closes it again."""
    for _ in range(4):
        page.get_by_role("combobox", name=name).click()
        try:
            expect(option).to_be_visible(timeout=5000)
        except AssertionError:
            page.keyboard.press("Escape")
        else:
            return
    page.get_by_role("combobox", name=name).click()
    expect(option).to_be_visible()


def open_trace(page: Page, server: Server, trace_id: str, *, step: str | None = None) -> None:
    """Follow a link to a run."""
    page.goto(f"{server.url}/trace?run={trace_id}" + (f"&step={step}" if step else ""))
    page.get_by_role("treeitem").first.wait_for()
    expect(page.get_by_role("heading", name="Step")).to_be_visible()


def test_runs_are_shown_and_one_opens(server: Server, watched: Watched) -> None:
    page = watched.page
    page.goto(server.url)
    table(page)
    expect(page.get_by_text(re.compile(r"Runs 1 to \d+ of"))).to_be_visible()
    click_row(page, 1)
    page.wait_for_url(re.compile("/trace[?]run="))
    expect(page.get_by_text("Add 3 and 4.").first).to_be_visible()
    assert watched.remote == watched.refused == []


def test_going_back_to_the_runs_does_not_reopen_the_run(server: Server, watched: Watched) -> None:
    page = watched.page
    page.goto(server.url)
    click_row(page, 0)
    page.wait_for_url(re.compile("/trace"))
    page.get_by_role("link", name="Runs").click()
    expect(page.get_by_role("heading", name="Runs")).to_be_visible()
    table(page)
    page.wait_for_timeout(1000)
    assert "/trace" not in page.url


def test_search_finds_text_in_steps(server: Server, watched: Watched) -> None:
    page = watched.page
    page.goto(server.url)
    page.get_by_role("textbox", name="Search").fill("calculator")
    page.get_by_role("textbox", name="Search").press("Enter")
    expect(page.get_by_text("Runs 1 to 1 of 1,")).to_be_visible()
    click_row(page, 0)
    page.wait_for_url(re.compile("/trace"))
    expect(page.get_by_text("ReAct").first).to_be_visible()


def test_a_link_opens_a_step_and_survives_a_reload(server: Server, watched: Watched) -> None:
    page = watched.page
    open_trace(page, server, "long-run", step="s777")
    for _ in range(2):
        expect(page.get_by_role("heading", name="Step 777: … thought")).to_be_visible()
        expect(page.get_by_text("Thought number 777, and so on").first).to_be_visible()
        page.reload()


def test_a_click_and_the_arrow_keys_select_steps(server: Server, watched: Watched) -> None:
    page = watched.page
    open_trace(page, server, server.ids[3])
    step_row(page, 3).click()
    expect(page.get_by_role("heading", name="Step 3:")).to_be_visible()
    assert "step=s3" in page.url
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Step 4:")).to_be_visible()
    page.get_by_role("button", name="Previous").click()
    expect(page.get_by_role("heading", name="Step 3:")).to_be_visible()


@pytest.mark.parametrize("number", range(len(samples.CORPUS)))
def test_hostile_text_loads_nothing(server: Server, watched: Watched, number: int) -> None:
    page, text = watched.page, samples.CORPUS[number]
    page.goto(server.url)
    open_menu(page, "Model", page.get_by_role("option").first)
    page.keyboard.press("Escape")
    open_trace(page, server, f"hostile-{number}")
    # Before anything else opens: a menu closes when the page scrolls under it.
    open_menu(page, "Branch", page.get_by_role("option", name=text))
    page.keyboard.press("Escape")
    page.get_by_role("treeitem", name="Given up: step 2").click()
    step_row(page, 2).click()
    expect(page.get_by_role("heading", name="Step 2:")).to_be_visible()
    expect(step_row(page, 2)).to_contain_text(text)
    for name in ("Identity, parameters and outcome", "Call", "Data"):
        page.get_by_text(name, exact=True).first.click()
    expect(page.get_by_test_id("stCode").first).to_contain_text(text)
    page.wait_for_timeout(500)
    assert watched.remote == watched.refused == []
    assert elsewhere(page) == []


def test_the_download_is_the_trace(server: Server, watched: Watched) -> None:
    page = watched.page
    open_trace(page, server, server.ids[0])
    with page.expect_download() as download:
        page.get_by_role("button", name="Download JSON").click()
    assert Trace.load(download.value.path()) == server.store.load(server.ids[0])


def test_a_dropped_file_is_imported_and_opened(server: Server, watched: Watched, tmp_path: Path) -> None:
    page = watched.page
    trace = samples.cot().model_copy(update={"id": "dropped"})
    page.goto(server.url)
    page.locator('input[type="file"]').set_input_files(trace.save(tmp_path / "dropped.json"))
    page.get_by_role("button", name="Open it").click()
    page.wait_for_url(re.compile("run=dropped"))
    server.store.delete("dropped")


def test_a_run_under_way_grows_on_the_page(server: Server, watched: Watched) -> None:
    page = watched.page
    with samples.running(server.store) as run:
        open_trace(page, server, run.trace_id)
        expect(page.get_by_text("1 step, 0 calls")).to_be_visible()
        run.step("thought", "Halfway.")
        expect(page.get_by_text("2 steps, 0 calls")).to_be_visible()
        run.finish(answer="yes")
    expect(page.get_by_text("completed", exact=True)).to_be_visible()
    server.store.delete(run.trace_id)


def test_headers(server: Server) -> None:
    with urllib.request.urlopen(server.url) as response:  # noqa: S310
        headers = response.headers
    assert "img-src 'self' data: blob:" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


def test_another_host_name_is_refused(server: Server) -> None:
    request = urllib.request.Request(server.url, headers={"Host": "rebound.example"})  # noqa: S310
    with pytest.raises(urllib.error.HTTPError, match="400") as caught:
        urllib.request.urlopen(request)  # noqa: S310
    caught.value.close()


def test_a_taken_port_is_said_and_ctrl_c_ends_it_cleanly(server: Server, tmp_path: Path) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    code = f"from ui.serve import serve; raise SystemExit(serve({port}, store={str(tmp_path / 'other.db')!r}))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert f"Port {port} is taken" in process.stdout.readline()
        assert "http://127.0.0.1:" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 0
        assert (process.stdout.read(), process.stderr.read()) == ("", "")


def test_a_long_trace_sends_little(server: Server, watched: Watched) -> None:
    """Issue 6's budget of 400 kB for the first view of a 1,000-step trace, over the socket."""
    received: list[int] = []
    watched.page.on(
        "websocket", lambda socket: socket.on("framereceived", lambda payload: received.append(len(payload)))
    )
    open_trace(watched.page, server, "long-run")
    watched.page.wait_for_timeout(500)
    print(json.dumps({"1,000-step trace, bytes over the socket": sum(received)}))
    assert 0 < sum(received) < 400_000


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_screenshots(server: Server, browser: Browser, shots: Path, theme: str) -> None:
    watched = watch(browser, theme=theme)
    page = watched.page
    page.goto(server.url)
    table(page)
    page.wait_for_timeout(1000)
    page.screenshot(path=shots / f"runs-{theme}.png")
    for name, trace_id in (("tot", server.ids[2]), ("react", server.ids[3])):
        open_trace(page, server, trace_id)
        steps = server.store.load(trace_id).steps
        number = max(at for at, step in enumerate(steps, 1) if step.start is not None and not step.pruned)
        step_row(page, number).click()
        expect(page.get_by_role("heading", name=f"Step {number}:")).to_be_visible()
        expect(page.get_by_text("log-probability").first).to_be_visible()
        time.sleep(1)
        page.screenshot(path=shots / f"trace-{name}-{theme}.png", full_page=True)
    background = page.evaluate("getComputedStyle(document.querySelector('.stApp')).backgroundColor")
    dark = sum(int(part) for part in re.findall(r"\d+", background)[:3]) < 3 * 128
    assert dark == (theme == "dark")
    page.context.close()
