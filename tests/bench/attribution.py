"""Gradient attribution against inseq and captum, and against the floor: a bare loop over plain backward passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from tests.bench.peers.environment import run_peer
from tests.bench.report import Row, agreement_row, median_row
from tracer.engines import models
from tracer.explain.attribution.gradient import run
from tracer.explain.attribution.objective import objective
from tracer.explain.base import Context, Finding
from tracer.explain.methods import request
from tracer.replay.forward import Wanted, replay
from tracer.replay.model import Replica
from tracer.replay.recorded import Recorded, Target
from tracer.trace.trace import Trace

TRACES = Path(__file__).with_name("traces")
POINTS = 16
KINDS = ("captum_ig", "captum_ig64")
BASELINE = 220
"""The token that integrated gradients start from where it is not zero: in this tokenizer a space."""
STEPS_COMPARED = 1
NOTE = "demo, fp32, same recorded trace"
T = TypeVar("T")
THREADS = 2


def measure() -> Iterator[Row]:
    """All rows about gradients."""
    torch.set_num_threads(THREADS)
    recorded = Recorded(Trace.load(TRACES / "six_steps.json"))
    replica = Replica.load("demo")
    _ours(replica, recorded, "grad_x_input")  # warms up
    yield over_floor(replica, recorded)
    yield from over_inseq(replica, recorded)
    yield prefix_tree(replica)


def over_floor(replica: Replica, recorded: Recorded) -> Row:
    """Ours over one plain forward pass with a graph and one plain backward pass for each step."""
    ratios: list[float] = []
    for _ in range(3):
        ours, _ = _timed(lambda: _ours(replica, recorded, "grad_x_input"))
        floor, _ = _timed(lambda: _floor(recorded))
        ratios.append(ours / floor)
    note = "demo, fp32, a recorded CoT run of 6 steps and 260 tokens; the loop uses transformers' own SDPA attention"
    return median_row("gradient x input of all steps over a bare loop", ratios, goal=1.15, unit="x", note=note)


def over_inseq(replica: Replica, recorded: Recorded) -> Iterator[Row]:
    """Agreement with inseq and captum, and how much faster."""
    targets = recorded.targets
    # inseq reads text: the second call's tokens would come out otherwise, for the agent appended ids to ids.
    readable = [target for target in targets if target.sequence == 0]
    compared = sorted(readable, key=lambda target: target.end - target.start)[:STEPS_COMPARED]
    shortest = compared[0]
    tasks = [_task(recorded, target, "input_x_gradient") for target in compared]
    tasks += [_task(recorded, shortest, "saliency")]
    tasks += [_task(recorded, shortest, kind, baseline) for kind in KINDS for baseline in (None, BASELINE)]
    some = recorded.tokens_of(targets[2])[::24]
    tasks += [_task(recorded, target, "integrated_gradients") for target in some]
    seconds, theirs = run_peer("inseq", "inseq_peer.py", models.resolve("demo").path, tasks, threads=THREADS)
    ours_seconds, found = _timed(lambda: _ours(replica, recorded, "grad_x_input", "grad_l1", "grad_l2"))
    path_seconds, path = _timed(lambda: _ours(replica, recorded, "integrated_gradients"))
    from_token = _ours(replica, recorded, "integrated_gradients", targets=[shortest], baseline=BASELINE)
    worst = max(
        _distance(found["grad_x_input", target.step_id], theirs[f"input_x_gradient {target.step_id}"].sum(-1))
        for target in compared
    )
    yield agreement_row("gradient x input, inseq", worst, 1e-5, note=NOTE)
    # L1 and L2 are norms of the whole step's gradient: inseq's are summed before the norm is taken.
    gradient = theirs[f"saliency {shortest.step_id}"]
    yield agreement_row(
        "gradient L1, inseq", _distance(found["grad_l1", shortest.step_id], np.abs(gradient).sum(-1)), 1e-5, note=NOTE
    )
    norms = np.sqrt(np.square(gradient).sum(-1))
    yield agreement_row("gradient L2, inseq", _distance(found["grad_l2", shortest.step_id], norms), 1e-5, note=NOTE)
    own = (from_token["integrated_gradients", shortest.step_id], path["integrated_gradients", shortest.step_id])
    for start, found_path in zip((BASELINE, None), own, strict=True):
        single, double = (theirs[f"{kind} {shortest.step_id}{_from(start)}"].sum(-1) for kind in KINDS)
        yield agreement_row(
            f"integrated gradients from {'zero' if start is None else 'a token'}, captum",
            _distance(found_path, single),
            1e-4,
            note=f"{NOTE}; from captum in float64, ours is {_distance(found_path, double):.1e} away and captum in fp32 "
            f"{np.abs(single - double).max() / np.abs(double).max():.1e}",
        )
    written = sum(target.end - target.start for target in targets)
    tokens = sum(target.end - target.start for target in compared)
    per_token = written / tokens * sum(seconds[f"input_x_gradient {target.step_id}"] for target in compared)
    yield median_row(
        "gradient x input of all steps: times faster than inseq, token by token",
        [per_token / ours_seconds],
        goal=20,
        unit="x",
        better="higher",
        note=f"same aggregated numbers, fp32, {THREADS} threads; inseq extrapolated from {tokens} tokens, the "
        f"shortest step, to {written}: {per_token:.0f} s",
    )
    measured = [seconds[f"integrated_gradients {target.step_id}"] for target in some]
    yield median_row(
        f"integrated gradients, {POINTS} points, all steps: times faster than inseq",
        [float(np.mean(measured)) * written / path_seconds],
        goal=15,
        unit="x",
        better="higher",
        note=f"inseq extrapolated from {len(some)} measured tokens of step {targets[2].step_id} to {written}",
    )


def prefix_tree(replica: Replica) -> Row:
    """Tokens that a replay of 16 samples of one prompt computes, over the unique tokens of their prefix tree."""
    trace = Trace.load(TRACES / "sixteen_samples.json")
    recorded = Recorded(trace)
    found = replay(replica, recorded.tree, Wanted(scored=recorded.scored))
    unique = {bytes(item.token_ids[: end + 1]) for item in recorded.sequences for end in range(len(item.token_ids))}
    total = sum(len(item.token_ids) for item in recorded.sequences)
    return median_row(
        "replay of CoT-SC n=16: tokens computed over unique tokens",
        [found.tokens / len(unique)],
        goal=1.0,
        unit="x",
        note=f"{found.tokens} tokens in place of {total}",
    )


def _ours(
    replica: Replica,
    recorded: Recorded,
    *names: str,
    targets: Sequence[Target] | None = None,
    baseline: str | int = "zero",
) -> dict[tuple[str, str], Finding]:
    path = {"points": POINTS, "baseline": baseline}
    requests = [request(name, path if name == "integrated_gradients" else None) for name in names]
    found = run(Context(replica, recorded), requests, targets or recorded.targets)
    return {(item.request.method.name, item.target.step_id): item for item in found}


_plain: list[Any] = []


def _floor(recorded: Recorded) -> None:
    """What anybody would write: the longest sequence once with a graph, then one gradient for each step."""
    if not _plain:
        from tracer.engines.loading import load_weights

        folder = models.resolve("demo").path
        _plain.append(load_weights(folder, dtype="float32", device=torch.device("cpu")))
    model = _plain[0]
    longest = max(recorded.sequences, key=lambda item: len(item.token_ids))
    ids = torch.as_tensor(longest.token_ids)
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
    hidden = model.model(inputs_embeds=inputs[None], use_cache=False).last_hidden_state[0]
    for target in recorded.targets:
        logits = model.lm_head(hidden[target.start - 1 : target.end - 1])
        value = objective(logits, ids[target.start : target.end], function="logprob", foil=None).sum()
        [gradient] = torch.autograd.grad(value, inputs, retain_graph=True)
        (gradient * inputs).sum(-1)


def _from(baseline: int | None) -> str:
    return "" if baseline is None else f" from {baseline}"


def _task(recorded: Recorded, target: Target, kind: str, baseline: int | None = None) -> dict[str, Any]:
    sequence = recorded.sequences[target.sequence]
    return {
        "name": f"{kind} {target.step_id}{_from(baseline)}",
        "kind": kind,
        "ids": sequence.token_ids.tolist(),
        "prompt": sequence.prompt,
        "start": target.start,
        "end": target.end,
        "points": POINTS,
        "baseline": baseline,
    }


def _distance(found: Finding, theirs: np.ndarray) -> float:
    """Largest difference relative to the largest value."""
    return float(np.abs(found.scores[:-1] - theirs).max() / np.abs(theirs).max())


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result
