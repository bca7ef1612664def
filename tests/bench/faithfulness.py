"""Which method deserves to be the default: faithfulness and cost on bundled traces, all methods measured alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from platformdirs import user_cache_dir

from tests.bench.report import Row
from tracer.explain.estimate import Estimate
from tracer.explain.leaderboard import CHANCE, DEFAULT_FIELD, Board, Standing, leaderboard
from tracer.explain.methods import DEFAULT_METHODS
from tracer.replay.model import Replica
from tracer.store import Store
from tracer.trace.trace import Trace

PROJECT = Path(__file__).parents[2]
RAG = PROJECT / "examples" / "traces" / "rag"
REASONING = (
    PROJECT / "examples" / "traces" / "copied_from_the_exemplar.json",
    Path(__file__).with_name("traces") / "six_steps.json",
)
RIVALS = ("contextcite", "attention", "grad_x_input")
ABLATIONS = 32
THREADS = 2


def measure() -> Iterator[Row]:
    """All rows about faithfulness; the boards themselves are written beside this module, for the README's table."""
    torch.set_num_threads(THREADS)
    replica = Replica.load("demo")
    rag = _board([Trace.load(file) for file in sorted(RAG.glob("*.json"))], replica, "rag")
    yield from _rows(rag, "RAG")
    yield _default_row(rag)
    reasoning = _board([Trace.load(file) for file in REASONING], replica, "reasoning")
    yield from _rows(reasoning, "reasoning")


def _board(traces: list[Trace], replica: Replica, name: str) -> Board:
    """Interrupted work goes on, unless the code that it measures has changed."""
    code = hashlib.sha256()
    for package in ("explain", "replay"):
        for file in sorted((PROJECT / "tracer" / package).rglob("*.py")):
            code.update(file.read_bytes())
    folder = Path(user_cache_dir("tracer-bench")) / "faithfulness"
    folder.mkdir(parents=True, exist_ok=True)
    with Store(folder / f"{name}-{code.hexdigest()[:12]}.db") as store:
        for trace in traces:
            store.import_trace(trace, on_conflict="skip")
        board = leaderboard(
            traces,
            methods=DEFAULT_FIELD,
            parameters={"contextcite": {"ablations": ABLATIONS}},
            replica=replica,
            store=store,
        )
    table = [item.to_document() for item in board.standings]
    Path(__file__).with_name(f"faithfulness_{name}.json").write_text(json.dumps(table, indent=1) + "\n")
    return board


def _rows(board: Board, where: str) -> Iterator[Row]:
    for item in board.standings:
        if item.lds is None:
            continue
        label = "better than random" if item.better_than_random else "not shown to be better than random"
        yield Row(
            f"LDS of {item.method} on {where} traces",
            round(item.lds.mean, 4),
            None,
            "higher",
            "rank correlation",
            _ends(item.lds),
            item.targets,
            f"{label} (z {item.z:.1f}); {item.passes:.1f} forward passes, {item.seconds:.1f} s a target; 95 % interval "
            "over traces",
        )


def _ends(found: Estimate) -> tuple[float, float]:
    return round(found.mean if found.low is None else found.low, 4), round(found.high or found.mean, 4)


def _default_row(board: Board) -> Row:
    """The default's LDS for its cost over the best of its rivals; all run at their own cost in the same session."""
    by_name = {item.method: item for item in board.standings}
    default = by_name[DEFAULT_METHODS[0]]
    best = max((by_name[name] for name in RIVALS), key=_worth)
    return Row(
        "the default method's LDS per forward pass over the best of ContextCite-32, attention, gradient x input",
        round(_worth(default) / _worth(best), 4),
        1.0,
        "higher",
        "x",
        (round(_worth(default) / _worth(best), 4),) * 2,
        default.targets,
        f"{default.method} {_worth(default):.2f} and {best.method} {_worth(best):.2f} LDS per pass; LDS "
        f"{0 if default.lds is None else default.lds.mean:.2f} and {0 if best.lds is None else best.lds.mean:.2f}",
    )


def _worth(item: Standing) -> float:
    """LDS per pass; chance is worth nothing."""
    return (item.lds_per_pass or 0.0) if item.better_than_random and item.method != CHANCE else 0.0
