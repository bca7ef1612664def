"""Head patching against one plain forward pass for each patched head, on the demo model and a recorded ReAct trace."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.bench.report import Row, median_row
from tracer.explain.attribution.patching import run
from tracer.explain.base import Context
from tracer.explain.methods import request
from tracer.replay.model import Replica
from tracer.replay.recorded import Recorded, Target
from tracer.trace.trace import Trace

TRACE = Path(__file__).parents[2] / "examples" / "traces" / "copied_from_the_exemplar.json"
STEPS = ("s2", "s3", "s6")
FAR = 64
"""Tokens of the first hop that reach back to the beginning of the prompt: nearly every row has to run again."""


def measure() -> Iterator[Row]:
    """Head patching as it is by default, and with a first hop that reaches far back."""
    replica = Replica.load("demo")
    recorded = Recorded(Trace.load(TRACE))
    heads = len(replica.layers) * replica.heads
    targets = [recorded.target(step) for step in STEPS]
    lengths = " and ".join(str(length) for length in sorted({target.end - 1 for target in targets}))
    note = (
        f"groups A and B of one step, sinks included; steps {', '.join(STEPS)} at {lengths} tokens. A plain pass is "
        f"timed three times before and three times after and multiplied by {heads}, the number of heads; most of "
        "them are patched twice, for A and for B, and counted once. fp32"
    )
    name = "head patching over one plain forward pass per patched head"
    values = [_ratio(replica, recorded, target, heads, first_hop=8) for target in targets]
    yield median_row(name, values, goal=0.5, unit="x", note=note)
    far = _ratio(replica, recorded, targets[0], heads, first_hop=FAR)
    yield median_row(
        f"{name}, a first hop of {FAR} tokens", [far], goal=0.5, unit="x", note=f"as above, step {STEPS[0]} alone"
    )


def _ratio(replica: Replica, recorded: Recorded, target: Target, heads: int, *, first_hop: int) -> float:
    plain = [_plain(replica, recorded, target) for _ in range(4)][1:]
    context = Context(replica, recorded)
    began = time.perf_counter()
    list(run(context, [request("head_patching", {"first_hop": first_hop})], [target]))
    seconds = time.perf_counter() - began
    plain += [_plain(replica, recorded, target) for _ in range(3)]
    return seconds / (statistics.median(plain) * heads)


@torch.inference_mode()
def _plain(replica: Replica, recorded: Recorded, target: Target) -> float:
    """Seconds of the whole model on the tokens that the target depends on, logits of all positions included."""
    ids = torch.as_tensor(recorded.sequences[target.sequence].token_ids[: target.end - 1])[None]
    began = time.perf_counter()
    replica.model(input_ids=ids, use_cache=False)
    return time.perf_counter() - began
