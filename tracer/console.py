"""What the command line shows: live progress on standard error, results on standard output."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from tracer.engines.base import TokenChunk
from tracer.trace.events import CallFinished, CallStarted, Event, RunFinished, RunStarted, StepAdded
from tracer.trace.trace import Trace

PIPE_WIDTH = 160
"""Columns when the output is no terminal and nobody set COLUMNS."""


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False, soft_wrap=not stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_WIDTH
    return console


out = _console(stderr=False)
err = _console(stderr=True)

KIND_STYLES = {
    "question": "bold",
    "document": "dim",
    "thought": "default",
    "action": "cyan",
    "observation": "blue",
    "evaluation": "magenta",
    "vote": "magenta",
    "answer": "bold green",
    "error": "bold red",
}


def one_line(text: str, width: int) -> str:
    """A text on one line of at most ``width`` characters, without control characters."""
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return flat if len(flat) <= width else f"{flat[: width - 1]}…"


def cell(text: str, width: int) -> Text:
    """A text of a trace on one line, for a table: rich would read markup in a plain one."""
    return Text(one_line(text, width))


def safe_text(text: str) -> str:
    """A text of several lines that cannot move the cursor or change colours."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text.expandtabs(4))


class StageProgress:
    """A bar for slow work: fetching, converting, starting a server, explaining.

    Takes whatever has ``stage``, ``done``, ``total`` and ``unit``, or a plain text.
    """

    def __init__(self) -> None:
        self._bytes = _bar(BarColumn(), DownloadColumn())
        self._counted = _bar(BarColumn(), MofNCompleteColumn())
        self._words = _bar()
        self._stage: str | None = None
        self._task: Any = None
        self._shown: Progress | None = None

    def __call__(self, progress: object) -> None:
        """Show how far something has come."""
        stage = str(getattr(progress, "stage", progress))
        total = getattr(progress, "total", 0) or None
        counted = self._bytes if getattr(progress, "unit", "") == "bytes" else self._counted
        widget = counted if total else self._words
        if stage != self._stage or widget is not self._shown:
            self.stop()
            self._stage, self._shown = stage, widget
            self._task = widget.add_task(one_line(stage, 100), total=total)
            if err.is_terminal:
                widget.start()
            else:
                err.print(Text(one_line(stage, 200)), soft_wrap=True)
        widget.update(self._task, total=total, completed=getattr(progress, "done", 0))

    def stop(self) -> None:
        """Take the bar away."""
        if self._shown is not None:
            if err.is_terminal:
                self._shown.stop()
            for task in list(self._shown.task_ids):
                self._shown.remove_task(task)
            self._shown = None
            self._stage = None


def _bar(*columns: ProgressColumn) -> Progress:
    words = TextColumn("{task.description}", markup=False)
    return Progress(SpinnerColumn(), words, *columns, TimeElapsedColumn(), console=err, transient=True)


@contextmanager
def stages() -> Iterator[StageProgress]:
    """A `StageProgress` that is gone at the end of the block."""
    progress = StageProgress()
    try:
        yield progress
    finally:
        progress.stop()


class RunView:
    """Steps of one run as they arrive, and below them what the model is writing.

    Args:
        quiet: Show nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._tail = ""
        self._tokens = 0
        self._began = time.perf_counter()
        self._lock = threading.Lock()
        self._live = Live(console=err, transient=True, refresh_per_second=8)

    @property
    def wants_tokens(self) -> bool:
        """Whether streaming is worth its cost: only where somebody watches."""
        return err.is_terminal and not self._quiet

    def __enter__(self) -> RunView:
        if self.wants_tokens:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.wants_tokens:
            self._live.stop()

    def on_event(self, event: Event) -> None:
        """Show an event."""
        if self._quiet:
            return
        with self._lock:
            if isinstance(event, StepAdded):
                step = event.step
                branch = f" {step.branch}" if step.branch else ""
                line = Text(f"{step.id:>4} ", style="dim")
                line.append(f"{step.kind}{branch}: ", style=KIND_STYLES.get(step.kind, "default"))
                line.append(one_line(step.text, 160), style="dim" if step.pruned else "default")
                if step.error:
                    line.append(f"  [{one_line(step.error, 80)}]", style="red")
                err.print(line)
            elif isinstance(event, CallStarted | CallFinished):
                self._tail = ""
            self._refresh()

    def on_tokens(self, chunk: TokenChunk) -> None:
        """Show tokens as they arrive; of several completions, the first one's."""
        with self._lock:
            self._tokens += len(chunk.token_ids)
            if chunk.prompt == 0 and chunk.completion == 0:
                self._tail = (self._tail + chunk.text)[-400:]
            self._refresh()

    def _refresh(self) -> None:
        if self.wants_tokens:
            speed = self._tokens / max(time.perf_counter() - self._began, 1e-9)
            status = Text(f"{self._tokens} tokens, {speed:.0f}/s  ", style="dim")
            status.append(one_line(self._tail, 400)[-120:], style="italic")
            self._live.update(status)


class BoardView:
    """Several runs at once, a line each: what the demo shows."""

    def __init__(self) -> None:
        self._rows: dict[str, list[str]] = {}
        self._lock = threading.Lock()
        self._live = Live(console=err, refresh_per_second=4, transient=True)

    def __enter__(self) -> BoardView:
        if err.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if err.is_terminal:
            self._live.stop()

    def listener(self, agent: str, title: str) -> Callable[[Event], None]:
        """A listener for the events of one run."""
        key = f"{agent} {title}"
        self._rows[key] = [agent, title, "waiting", "", ""]
        steps = 0
        tokens = 0

        def on_event(event: Event) -> None:
            nonlocal steps, tokens
            text = None
            if isinstance(event, RunStarted):
                state = "running"
            elif isinstance(event, StepAdded):
                steps += 1
                state = "running"
                text = f"{event.step.kind}: {one_line(event.step.text, 60)}"
            elif isinstance(event, CallFinished):
                tokens += sum(len(completion.token_ids) for completion in event.completions)
                state = "running"
            elif isinstance(event, RunFinished):
                state = event.status
                text = f"answer: {one_line(event.outcome.answer or 'none', 60)}"
                if not err.is_terminal:
                    line = f"{agent:6} {one_line(title, 60)}: {state}, {steps} steps, {tokens} tokens, {text}"
                    err.print(Text(line), soft_wrap=True)
            else:
                return
            with self._lock:
                row = self._rows[key]
                row[2], row[3], row[4] = state, f"{steps} steps, {tokens} tokens", text or row[4]
                if err.is_terminal:
                    self._live.update(self._table())

        return on_event

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for name in ("agent", "task", "status", "so far", "latest"):
            table.add_column(name, no_wrap=True, overflow="ellipsis")
        for agent, title, state, size, latest in self._rows.values():
            table.add_row(agent, Text(one_line(title, 40)), state, size, Text(latest))
        return table


def summary_table(traces: list[Trace], *, title: str | None = None) -> Table:
    """Traces, a line each."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in ("id", "agent", "task", "answer", "right", "steps", "tokens", "status"):
        justify: Any = "right" if name in ("steps", "tokens") else "left"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=name == "id")
    for trace in traces:
        table.add_row(
            cell(trace.id, 60),
            cell(trace.agent.kind, 20),
            cell(trace.task.question, 48),
            cell(trace.outcome.answer or "-", 28),
            verdict(trace.outcome.correct),
            str(len(trace.steps)),
            str(sum(len(c.token_ids) for call in trace.calls for c in call.completions)),
            cell(trace.status, 20),
        )
    return table


def verdict(correct: bool | None) -> str:
    """Right, wrong or unknown, in a word."""
    return {True: "yes", False: "no", None: "?"}[correct]


def print_trace(trace: Trace) -> None:
    """A trace for reading: its header and every step."""
    out.print(Text(one_line(f"{trace.id}  {trace.agent.kind}  {trace.status}", 200), style="bold"))
    model = trace.model
    out.print(cell(f"model {model.name} ({model.dtype or 'dtype unknown'}) on {model.engine}", 300))
    for step in trace.steps:
        where = f" {step.branch}" if step.branch else ""
        line = Text(f"{one_line(step.id, 40):>5} ", style="dim")
        line.append(one_line(f"{step.kind}{where}", 80), style=KIND_STYLES.get(step.kind, "default"))
        if step.pruned:
            line.append(" (pruned)", style="dim")
        if step.score is not None:
            line.append(f" score {step.score:g}", style="dim")
        if step.start is not None and step.end is not None:
            place = one_line(f"{step.call_id}[{step.completion}] tokens {step.start}-{step.end}", 100)
            line.append(f"  {place}", style="dim")
        out.print(line)
        for text in safe_text(step.text).splitlines():
            out.print(Text(f"      {text}"))
        if step.error:
            out.print(Text(f"      {one_line(step.error, 300)}", style="red"))
    outcome = trace.outcome
    out.print(
        Text(f"answer: {one_line(outcome.answer or 'none', 300)}  (right: {verdict(outcome.correct)})", style="bold")
    )
    for name, value in outcome.details.items():
        out.print(Text(f"  {one_line(name, 40)}: {one_line(str(value), 200)}", style="dim"))
    if trace.error:
        out.print(Text(f"error: {one_line(trace.error, 300)}", style="red"))


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, so that a run ends in good order; a second Ctrl-C interrupts at once."""
    cancel = threading.Event()

    def handle(number: int, _: FrameType | None) -> None:
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()
        err.print("stopping (press Ctrl-C again to stop at once)")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield cancel
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
