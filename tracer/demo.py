"""The demo: all four agents on bundled tasks, side by side, so that the server's batches are full."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from tracer.agents.build import AgentOptions, build_agent
from tracer.console import BoardView, err
from tracer.engines.base import Engine
from tracer.errors import CancelledError, TracerError
from tracer.store import Store, TraceFilter
from tracer.tasks import BundledTask, TaskKind, load_tasks
from tracer.trace.trace import Trace

WORKERS = 6
STORY_TASK = "multihop-birthplace"
STORY_PROMPT = "react-one-shot"
"""Together: a run that searches rightly and then copies its answer from the prompt's exemplar."""


@dataclass(frozen=True, slots=True)
class DemoRun:
    """One agent on one bundled task."""

    options: AgentOptions
    task: BundledTask

    @property
    def name(self) -> str:
        """How the run is found again in the store."""
        variant = f" {self.options.prompt or self.options.style}" if self.options.kind == "react" else ""
        return f"demo {self.options.kind}{variant}: {self.task.id}"


def plan(*, every: bool = False) -> list[DemoRun]:
    """The runs of the demo, the longest kinds first.

    Args:
        every: All bundled tasks of each kind, not just a few.
    """

    def chosen(kind: TaskKind, few: int) -> Iterator[BundledTask]:
        tasks = load_tasks(kind)
        # The story comes first whatever the order of the file.
        tasks.sort(key=lambda task: task.id != STORY_TASK)
        yield from tasks if every else tasks[:few]

    runs = [DemoRun(AgentOptions(kind="tot"), task) for task in chosen("game24", 1)]
    runs += [DemoRun(AgentOptions(kind="cot-sc", n=8), task) for task in chosen("word", 2)]
    story = next(chosen("multihop", 1))
    runs.append(DemoRun(AgentOptions(kind="react", docs=story.documents, prompt=STORY_PROMPT), story))
    runs += [DemoRun(AgentOptions(kind="react", docs=task.documents), task) for task in chosen("multihop", 3)]
    runs += [
        DemoRun(AgentOptions(kind="react", docs=task.documents, style="native"), task) for task in chosen("multihop", 1)
    ]
    runs += [DemoRun(AgentOptions(kind="cot"), task) for task in chosen("word", 3)]
    return runs


def story_of(traces: Iterable[Trace]) -> Trace | None:
    """The run whose wrong answer was copied from the exemplar, if it is among these and completed."""
    name = next(run.name for run in plan() if run.options.prompt == STORY_PROMPT)
    return next((trace for trace in traces if trace.name == name and trace.status == "completed"), None)


def run_demo(
    engine: Engine,
    store: Store,
    *,
    every: bool = False,
    fresh: bool = False,
    cancel: threading.Event | None = None,
) -> list[Trace]:
    """Run what is not in the store yet, several runs at a time, with live progress.

    Args:
        engine: What runs the model.
        store: Where the runs go.
        every: All bundled tasks.
        fresh: Run again what is stored.
        cancel: Stops all runs once set.

    Returns:
        The traces of all runs of the demo, stored ones included, in the order of the plan.

    Raises:
        CancelledError: ``cancel`` was set.
        TracerError: Every run failed; the first error.
    """
    stop = cancel or threading.Event()
    runs = plan(every=every)
    traces: dict[str, Trace] = {} if fresh else _stored(store, engine, runs)
    if traces:
        err.print(f"{len(traces)} of {len(runs)} runs are in the store already; --fresh runs them again")
    errors: list[TracerError] = []
    with BoardView() as board, ThreadPoolExecutor(WORKERS) as pool:
        futures = {pool.submit(_work(engine, store, run, board, stop)): run for run in runs if run.name not in traces}
        for future in as_completed(futures):
            try:
                traces[futures[future].name] = future.result()
            except TracerError as error:
                errors.append(error)
                if error.trace is not None:
                    traces[futures[future].name] = error.trace
    if stop.is_set():
        raise CancelledError("the demo was stopped; `tracer list` shows what was recorded")
    for failure in errors:
        err.print(f"a run failed: {failure}", markup=False)
    if errors and len(errors) == len(futures):
        raise errors[0]
    return [traces[run.name] for run in runs if run.name in traces]


def _work(engine: Engine, store: Store, run: DemoRun, board: BoardView, stop: threading.Event) -> Callable[[], Trace]:
    listener = board.listener(run.options.kind, run.task.question)

    def work() -> Trace:
        if stop.is_set():
            raise CancelledError("the demo was stopped")
        agent = build_agent(engine, run.options)
        return agent.run(
            run.task.question,
            reference=run.task.reference,
            name=run.name,
            store=store,
            on_event=listener,
            cancel=stop,
        )

    return work


def _stored(store: Store, engine: Engine, runs: list[DemoRun]) -> dict[str, Trace]:
    """The newest completed run of each part of the demo with this model."""
    wanted = {run.name for run in runs}
    found: dict[str, Trace] = {}
    for row in store.list(TraceFilter(about="demo ", status="completed", model=engine.info.name), limit=1000):
        if row.name in wanted and row.name not in found:
            found[row.name] = store.load(row.id)
    return found
