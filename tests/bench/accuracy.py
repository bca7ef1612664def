"""Accuracy of the demo model, with how often its replies could not be read or were cut off."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from platformdirs import user_cache_dir

from tests.bench.report import Row
from tracer.agents.cot import ChainOfThought
from tracer.agents.self_consistency import SelfConsistency
from tracer.agents.tree_of_thoughts import TreeOfThoughts, TreeSettings
from tracer.engines.connect import connect
from tracer.trace.answers import is_correct
from tracer.trace.trace import Trace

DATA = Path(__file__).parents[3] / "shared" / "data"
QUESTIONS = 50
GAMES = 5
WORKERS = 8


def measure() -> Iterator[Row]:
    """All rows, or none where the data is not at hand."""
    if not DATA.is_dir():
        print(f"skipped: the benchmark data is not at {DATA}")
        return
    engine = connect("vllm", model="demo", dtype="float32")
    cot = ChainOfThought(engine, max_tokens=320, answer_type="number")
    yield from _gsm8k("CoT zero-shot", lambda question: cot.run(question), chains=1)
    tree = TreeOfThoughts(engine, problem="game24", settings=TreeSettings(breadth=5))
    yield from _game24(tree)
    many = SelfConsistency(engine, n=8, max_tokens=320, answer_type="number")
    yield from _gsm8k("CoT-SC few-shot n=8", lambda question: many.run(question), chains=8)
    engine.close()


def wilson(right: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson 1927)."""
    z = 1.959964
    share = right / total
    centre = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return round((centre - half) / (1 + z * z / total), 4), round((centre + half) / (1 + z * z / total), 4)


def _gsm8k(name: str, run: Callable[[str], Trace], *, chains: int) -> Iterator[Row]:
    with (DATA / "gsm8k" / "test_first400.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(QUESTIONS), strict=False)]
    traces = _resumable(name, run, [row["question"] for row in rows], workers=WORKERS)
    references = [row["answer"].rsplit("####", 1)[1].strip() for row in rows]
    right = sum(
        is_correct(trace.outcome.answer, reference) is True for trace, reference in zip(traces, references, strict=True)
    )
    label = f"{name}, GSM8K first {QUESTIONS}"
    yield _share(f"{label}: accuracy", right, QUESTIONS, better="higher")
    completions = [trace.calls[0].completions for trace in traces]
    cut = sum(completion.finish_reason == "length" for row in completions for completion in row)
    yield _share(f"{label}: truncated chains", cut, QUESTIONS * chains)
    unread = sum(int(str(trace.outcome.details.get("no_answer", 0))) for trace in traces)
    yield _share(f"{label}: chains without a readable answer", unread, QUESTIONS * chains)


def _game24(tree: TreeOfThoughts) -> Iterator[Row]:
    with (DATA / "game24" / "24.csv").open(encoding="utf-8") as file:
        puzzles = [row["Puzzles"] for row in csv.DictReader(file)]
    # The first five of the ranks that the paper uses.
    chosen = puzzles[900 : 900 + GAMES]
    traces = _resumable("ToT", tree.run, chosen, workers=GAMES)
    label = f"ToT b=5, Game of 24, ranks 901-{900 + GAMES}"
    right = sum(trace.outcome.correct is True for trace in traces)
    yield _share(f"{label}: solved", right, GAMES, better="higher")
    oracle = sum(trace.outcome.details.get("any_kept_correct") is True for trace in traces)
    yield _share(f"{label}: any kept leaf solves it", oracle, GAMES, better="higher")
    thoughts = [step for trace in traces for step in trace.steps if step.kind == "thought"]
    yield _share(
        f"{label}: thoughts that cannot be used", sum(step.error is not None for step in thoughts), len(thoughts)
    )
    completions = [completion for trace in traces for call in trace.calls for completion in call.completions]
    cut = sum(completion.finish_reason == "length" for completion in completions)
    yield _share(f"{label}: truncated replies", cut, len(completions))


def _resumable(name: str, run: Callable[[str], Trace], questions: list[str], *, workers: int) -> list[Trace]:
    """Run all questions; what an interrupted benchmark has finished is kept until all of them are."""
    folder = Path(user_cache_dir("tracer-bench")) / "accuracy" / re.sub(r"\W+", "-", name)
    folder.mkdir(parents=True, exist_ok=True)

    def one(question: str) -> Trace:
        path = folder / f"{hashlib.sha256(question.encode()).hexdigest()[:16]}.json"
        if not path.is_file():
            run(question).save(path)
        return Trace.load(path)

    with ThreadPoolExecutor(workers) as pool:
        traces = list(pool.map(one, questions))
    shutil.rmtree(folder)
    return traces


def _share(name: str, count: int, total: int, *, better: str = "lower") -> Row:
    return Row(
        name,
        round(count / total, 4),
        None,
        "higher" if better == "higher" else "lower",
        "share",
        wilson(count, total),
        total,
        f"{count} of {total}; demo model, fp32; the spread is a 95 % Wilson interval",
    )
