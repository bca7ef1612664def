"""What decomposition costs over a plain forward pass of the same tokens."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch

from tests.bench.attention import plain_pass, timed
from tests.bench.attribution import THREADS, TRACES
from tests.bench.report import Row, median_row
from tracer.explain.attribution import decomposition
from tracer.explain.base import Context
from tracer.explain.methods import request
from tracer.replay.model import Replica
from tracer.replay.recorded import Recorded
from tracer.trace.trace import Trace

PAIRS = 3
_GOALS = {"span": 3.0, "alti": None, "alti_logit": None}


def measure() -> Iterator[Row]:
    """Pairs of a plain forward pass over the longest call and a method for all steps."""
    torch.set_num_threads(THREADS)
    recorded = Recorded(Trace.load(TRACES / "six_steps.json"))
    replica = Replica.load("demo")
    plain_pass(replica, recorded)
    for name, goal in _GOALS.items():
        _explain(replica, recorded, name)
        pairs = [
            (timed(lambda: _explain(replica, recorded, name)), timed(lambda: plain_pass(replica, recorded)))  # noqa: B023
            for _ in range(PAIRS)
        ]
        ours, plain = (statistics.median(times) for times in zip(*pairs, strict=True))
        yield median_row(
            f"{name} of all steps over one plain forward pass",
            [whole / part for whole, part in pairs],
            goal=goal,
            unit="x",
            note=f"demo, fp32, {THREADS} threads, a recorded CoT run of {len(recorded.targets)} steps and "
            f"{len(recorded.tree)} tokens; medians {ours:.2f} s and {plain:.2f} s",
        )


def _explain(replica: Replica, recorded: Recorded, name: str) -> None:
    found = list(decomposition.run(Context(replica, recorded), [request(name)], recorded.targets))
    if len(found) != len(recorded.targets):
        raise AssertionError(f"{len(found)} findings")
