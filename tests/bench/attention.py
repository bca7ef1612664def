"""What attention methods cost over a plain forward pass of the same tokens: time and memory."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch

from tests.bench.report import Row, median_row
from tests.explain.planted import small_trace
from tracer.explain.attribution import attention
from tracer.explain.base import Context
from tracer.explain.methods import METHODS, request
from tracer.replay.attention import BACKEND
from tracer.replay.model import Replica
from tracer.replay.recorded import Recorded
from tracer.trace.trace import Trace

NAMES = [name for name, method in METHODS.items() if method.family == "attention"]
TOKENS = 1_000
LONG = 4_000
STEPS = 6
COMPLETION = 240


def measure() -> Iterator[Row]:
    """Time at 1,000 tokens and memory at 4,000."""
    yield from seconds()
    yield from memory()


def seconds() -> Iterator[Row]:
    """Pairs of a plain forward pass and all methods on the same tokens."""
    replica = Replica.load("demo")
    recorded = long_trace(TOKENS)
    plain_pass(replica, recorded)
    plain: list[float] = []
    ours: list[float] = []
    for _ in range(3):
        plain.append(timed(lambda: plain_pass(replica, recorded)))
        ours.append(timed(lambda: _explain(replica, recorded)))
    ratios = [whole / part for whole, part in zip(ours, plain, strict=True)]
    note = (
        f"{len(NAMES)} methods at once, {STEPS} steps of {COMPLETION // STEPS} tokens, fp32, "
        f"{torch.get_num_threads()} threads; medians {statistics.median(ours):.2f} s and "
        f"{statistics.median(plain):.2f} s"
    )
    yield median_row(
        f"attention methods, all steps, {TOKENS:,} tokens, over one plain forward pass",
        ratios,
        goal=2,
        unit="x",
        note=note,
    )


def memory() -> Iterator[Row]:
    """Peak memory of all methods less that of a plain forward pass, each in a process of its own."""
    extra = [(_peak("explain") - _peak("plain")) / 2**30 for _ in range(3)]
    kept = 24 * 14 * LONG**2 * 4 / 2**30
    yield median_row(
        f"attention methods: extra peak memory at {LONG:,} tokens over a plain forward pass",
        extra,
        goal=1.5,
        unit="GiB",
        note=f"all attention weights in float32 would take {kept:.0f} GiB",
    )


def long_trace(tokens: int) -> Recorded:
    """A trace of one call of so many tokens: a recorded story, again and again."""
    story = Trace.load("examples/traces/copied_from_the_exemplar.json").calls[-1].prompt_token_ids
    ids = (story * (tokens // len(story) + 1))[:tokens]
    prompt = tokens - COMPLETION
    return Recorded(small_trace([ids[:prompt]], [[ids[prompt:]]], steps=STEPS))


@torch.inference_mode()
def plain_pass(replica: Replica, recorded: Recorded) -> None:
    """The bare model with PyTorch's attention kernel on the longest sequence, without logits."""
    ids = torch.as_tensor(max((item.token_ids for item in recorded.sequences), key=len))[None]
    replica.model.set_attn_implementation("sdpa")
    try:
        replica.model.base_model(input_ids=ids, use_cache=False)
    finally:
        replica.model.set_attn_implementation(BACKEND)


def _explain(replica: Replica, recorded: Recorded) -> None:
    context = Context(replica, recorded)
    found = list(attention.run(context, [request(name) for name in NAMES], recorded.targets))
    if len(found) != len(NAMES) * STEPS:
        raise AssertionError(f"{len(found)} findings")


def timed(action: Callable[[], None]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _peak(what: str) -> int:
    """Most bytes in memory while one of the two runs in a new process."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.bench.attention", what]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def _child(what: str) -> None:
    import resource
    from pathlib import Path

    replica, recorded = Replica.load("demo"), long_trace(LONG)
    # Forget the peak of loading, which is higher than that of a forward pass.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    {"plain": plain_pass, "explain": _explain}[what](replica, recorded)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    _child(sys.argv[1])
