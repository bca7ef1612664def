"""Fill a store with many traces, and measure how long it takes to list them.

Run as ``python -m tests.bench.seed_store PATH [--traces N]``: it seeds the store if it is empty and prints a table.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tracer.store import Store, TraceFilter
from tracer.store.rows import Batch, timestamp
from tracer.store.schema import about, events, step_texts, traces
from tracer.store.search import fold, reference, words_of
from tracer.trace.events import unfold
from tracer.trace.trace import (
    AgentInfo,
    Call,
    Completion,
    Edge,
    ModelInfo,
    Outcome,
    Sampling,
    Segment,
    Step,
    Task,
    Trace,
)

AGENTS = ("cot", "cot_sc", "tot", "react")
MODELS = ("demo", "Qwen/Qwen2.5-7B-Instruct", "meta-llama/Llama-3.1-8B-Instruct")
STATUSES = ("completed",) * 17 + ("failed", "cancelled", "interrupted")
RARE_WORD = "zirconium"
"""In one step of every five-hundredth trace."""
COMMON_WORD = "therefore"
"""In one step of every trace."""
_START = datetime(2026, 1, 1, tzinfo=UTC)
_CHUNK = 5000


def seed_store(path: str | Path, *, count: int = 100_000, seed: int = 0) -> None:
    """Write complete traces with calls, steps and search indexes, in bulk.

    Args:
        path: An empty or missing SQLite store.
        count: How many traces.
        seed: Of the random texts.
    """
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randint(3, 9))) for _ in range(4000)]
    variants = [_variant(rng, words, number=number) for number in range(500)]
    with Store(path) as store:
        for first in range(1, count + 1, _CHUNK):
            numbers = range(first, min(first + _CHUNK, count + 1))
            with store._database.write() as connection:
                _write(connection, [_rows(no, rng, words, variants=variants) for no in numbers])


def _sentence(rng: random.Random, words: list[str], *, length: int) -> str:
    return " ".join(rng.choices(words, k=length))


def _variant(rng: random.Random, words: list[str], *, number: int) -> Batch:
    """The events of one trace; its texts are what the full-text index sees."""
    ids = [rng.randrange(150_000) for _ in range(300)]
    done = [rng.randrange(150_000) for _ in range(60)]
    text = _sentence(rng, words, length=40)
    completion = Completion(token_ids=done, logprobs=[-rng.random() for _ in done], text=text, finish_reason="stop")
    call = Call(
        id="c1",
        prompt_token_ids=ids,
        segments=[Segment(start=0, end=len(ids), kind="question")],
        sampling=Sampling(),
        completions=[completion],
        started_at=_START,
        seconds=2.0,
    )
    steps = [Step(id=f"s{index}", kind="thought", text=_sentence(rng, words, length=30)) for index in range(5)]
    steps[2].text += f" {COMMON_WORD}"
    if number == 0:
        steps[3].text += f" {RARE_WORD}"
    trace = Trace(
        id="x",
        name="x",
        created_at=_START,
        status="completed",
        agent=AgentInfo(kind="cot"),
        model=ModelInfo(name="demo"),
        task=Task(question="x"),
        calls=[call],
        steps=steps,
        edges=[Edge(source=f"s{index}", target=f"s{index + 1}", kind="next") for index in range(4)],
        outcome=Outcome(answer="42"),
    )
    return Batch.of(unfold(trace))


def _rows(no: int, rng: random.Random, words: list[str], *, variants: list[Batch]) -> dict[str, Any]:
    batch = variants[no % len(variants)]
    trace_id = f"{rng.getrandbits(128):032x}"
    question = _sentence(rng, words, length=15)
    if no % 1000 == 0:
        question += " the Lira valley bridge"
    created = timestamp(_START + timedelta(seconds=rng.randrange(200 * 86400)))
    summary = {
        "no": no,
        "id": trace_id,
        "name": f"run {no}",
        "created_at": created,
        "updated_at": created + 30,
        "status": rng.choice(STATUSES),
        "agent": rng.choice(AGENTS),
        "model": rng.choice(MODELS),
        "engine": "vllm",
        "answer": "42",
        "correct": rng.choice((True, False, None)),
        "seconds": 30.0,
        "events": batch.delta.events,
        "steps": batch.delta.steps,
        "calls": batch.delta.calls,
        "errors": 0,
        "prompt_tokens": batch.delta.prompt_tokens,
        "completion_tokens": batch.delta.completion_tokens,
    }
    return {
        "summary": summary,
        "about": {"no": no, "question": question, "folded": fold(f"run {no}\n{question}")},
        "events": [{"no": no, "seq": seq, **row} for seq, row in enumerate(batch.rows, start=1)],
        "texts": [{"ref": reference(no, 1 + at), "text": text} for at, text in batch.delta.texts],
    }


def _write(connection: sa.Connection, rows: list[dict[str, Any]]) -> None:
    texts = [text for row in rows for text in row["texts"]]
    connection.execute(traces.insert(), [row["summary"] for row in rows])
    connection.execute(about.insert(), [row["about"] for row in rows])
    connection.execute(events.insert(), [event for row in rows for event in row["events"]])
    connection.execute(step_texts.insert(), texts)
    connection.execute(
        sa.text("INSERT INTO step_fts(rowid, text) VALUES (:ref, :text)"),
        [{"ref": text["ref"], "text": words_of(text["text"])} for text in texts],
    )
    connection.execute(
        sa.text("INSERT INTO about_fts(rowid, text) VALUES (:no, :folded)"),
        [{"no": row["about"]["no"], "folded": row["about"]["folded"]} for row in rows],
    )


LISTINGS: dict[str, TraceFilter] = {
    "no filter": TraceFilter(),
    "agent and status": TraceFilter(agent="react", status="failed"),
    "agent, status, model, wrong": TraceFilter(agent="tot", status="completed", model="demo", correct=False),
    "status that none has": TraceFilter(status="running"),
    "model": TraceFilter(model="demo"),
    "model that none has": TraceFilter(model="none"),
    "wrong answers": TraceFilter(correct=False),
    "created in one day": TraceFilter(since=_START + timedelta(days=50), until=_START + timedelta(days=51)),
    "question, rare part": TraceFilter(about="lira valley"),
    "question, part of every tenth or so": TraceFilter(about="abc"),
    "question, part of all": TraceFilter(about="run"),
    "question, two letters": TraceFilter(about="ab"),
    "question, part of none": TraceFilter(about="no such part"),
    "text, rare word": TraceFilter(text=RARE_WORD),
    "text, word of every trace": TraceFilter(text=COMMON_WORD),
    "text, two words": TraceFilter(text=f"{COMMON_WORD} {RARE_WORD}"),
    "text, word of none": TraceFilter(text="nosuchword"),
    "text, rare word, agent and status": TraceFilter(text=RARE_WORD, agent="cot", status="completed"),
    "text, rare word, most frequent status": TraceFilter(text=RARE_WORD, status="completed"),
    "question, rare part, most frequent status": TraceFilter(about="lira valley", status="completed"),
    "text, word of every trace, agent and status": TraceFilter(text=COMMON_WORD, agent="cot", status="failed"),
}


def time_listings(path: str | Path, *, runs: int = 7, limit: int = 50) -> dict[str, list[float]]:
    """Seconds that each listing of `LISTINGS` takes, once for each run after a first one."""
    with Store(path) as store:
        return {name: _times(store, wanted, runs=runs, limit=limit) for name, wanted in LISTINGS.items()}


def _times(store: Store, wanted: TraceFilter, *, runs: int, limit: int) -> list[float]:
    return [_seconds(lambda: store.list(wanted, limit=limit)) for _ in range(runs + 1)][1:]


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    """Seed and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--traces", type=int, default=100_000)
    arguments = parser.parse_args()
    if not arguments.path.exists():
        took = _seconds(lambda: seed_store(arguments.path, count=arguments.traces))
        print(f"seeded {arguments.traces} traces in {took:.0f} s, {arguments.path.stat().st_size / 2**20:.0f} MiB")
    timings = time_listings(arguments.path)
    with Store(arguments.path) as store:
        for name, wanted in LISTINGS.items():
            counting = _seconds(lambda wanted=wanted: store.count(wanted))  # type: ignore[misc]
            middle, worst = statistics.median(timings[name]) * 1e3, max(timings[name]) * 1e3
            print(
                f"{name:45} {middle:7.1f} ms  worst {worst:7.1f} ms  {store.count(wanted):7} in {counting * 1e3:.0f} ms"
            )


if __name__ == "__main__":
    main()
