"""Ablation against captum, and against the plain loop of one forward pass for each ablation."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from datetime import UTC, datetime

import numpy as np
import torch

from tests.bench.attention import timed
from tests.bench.attribution import THREADS, TRACES
from tests.bench.peers.environment import run_peer
from tests.bench.report import Row, agreement_row, median_row
from tests.explain.planted import small_trace
from tracer.engines import models
from tracer.explain.attribution.ablation import random_masks, run
from tracer.explain.base import Context
from tracer.explain.methods import request
from tracer.explain.removal import Masks, Removal
from tracer.replay.attention import BACKEND
from tracer.replay.model import Replica
from tracer.replay.recorded import Recorded
from tracer.trace.trace import Call, Completion, Sampling, Segment, Step, Trace

PROMPT, ANSWER = 300, 60
DOCUMENTS, LENGTH = 6, 45
ABLATIONS = 64
ROUNDS = 3
STEP = "s4"
"""A step that read six sources: as many as Shapley values are exact for."""
KINDS = "document"


def measure() -> Iterator[Row]:
    """ContextCite's ablations against the plain loop, then agreement with captum."""
    torch.set_num_threads(THREADS)
    replica = Replica.load("demo")
    name = f"ContextCite, {ABLATIONS} ablations, a {PROMPT}-token prompt and {ANSWER}-token answer"
    for chunk, sources, goal in ((None, "", 2.0), (LENGTH // 2 + 1, ", documents cut in halves", None)):
        recorded = Recorded(documents_trace(), chunk_tokens=chunk)
        yield over_plain_loop(f"{name}{sources}: times faster than the plain loop", replica, recorded, goal)
    yield from over_captum(replica, Recorded(Trace.load(TRACES / "six_steps.json")))


def documents_trace() -> Trace:
    """Six documents, a question and an answer: the ids of a recorded prompt with eight exemplars and its completion."""
    story = Trace.load(TRACES / "sixteen_samples.json").calls[0]
    end = 1 + DOCUMENTS * LENGTH
    prompt = [*story.prompt_token_ids[:end], *story.prompt_token_ids[end - PROMPT :]]
    answer = story.completions[0].token_ids[:ANSWER]
    if (len(prompt), len(answer)) != (PROMPT, ANSWER):
        raise AssertionError("the recorded trace is shorter than it was")
    segments = [Segment(start=0, end=1, kind="template")]
    for number in range(DOCUMENTS):
        start = 1 + number * LENGTH
        segments.append(Segment(start=start, end=start + LENGTH, kind="document", step_id=f"d{number}"))
    segments.append(Segment(start=end, end=PROMPT, kind="question"))
    call = Call(
        id="c1",
        prompt_token_ids=prompt,
        segments=segments,
        sampling=Sampling(),
        completions=[Completion(token_ids=answer, logprobs=[-1.0] * ANSWER, text="x", finish_reason="length")],
        started_at=datetime(2026, 1, 1, tzinfo=UTC),
        seconds=0.0,
    )
    steps = [Step(id=f"d{number}", kind="document", text="a document") for number in range(DOCUMENTS)]
    written = Step(id="a", kind="answer", text="x", call_id="c1", completion=0, start=0, end=ANSWER)
    base = small_trace([[3, 4, 5]], [[[6, 7]]])
    return base.model_copy(update={"calls": [call], "steps": [*steps, written]})


def over_captum(replica: Replica, recorded: Recorded) -> Iterator[Row]:
    """Leave-one-out and exact Shapley values against captum's feature ablation and Shapley values."""
    target = recorded.target(STEP)
    removal = Removal(Context(replica, recorded), target)
    parts = [[recorded.sources[unit].start, recorded.sources[unit].end] for unit in removal.units]
    ids = recorded.sequences[target.sequence].token_ids[: target.end].tolist()
    kinds = {"leave_one_out": "leave-one-out", "shapley": "exact Shapley values"}
    tasks = [{"name": kind, "kind": kind, "ids": ids, "parts": parts, "start": target.start} for kind in kinds]
    seconds, theirs = run_peer("inseq", "captum_peer.py", models.resolve("demo").path, tasks, threads=THREADS)
    found = run(Context(replica, recorded), [request(kind) for kind in kinds], [target])
    for finding, (kind, name) in zip(found, kinds.items(), strict=True):
        own = removal.of_units(recorded.aggregate(target, finding.scores))
        distance = float(np.abs(own - theirs[kind]).max() / np.abs(theirs[kind]).max())
        note = (
            f"demo, fp32, a recorded step of {target.end - target.start} tokens and its {len(parts)} sources; largest "
            f"value {np.abs(theirs[kind]).max():.1f} nats; captum took {seconds[kind]:.0f} s"
        )
        yield agreement_row(f"{name}, captum", distance, 1e-5, note=note)


def over_plain_loop(name: str, replica: Replica, recorded: Recorded, goal: float | None) -> Row:
    """Paired rounds of the same masks: over the prefix tree, and one whole forward pass for each."""
    [target] = recorded.targets
    masks = random_masks(ABLATIONS, len(_removal(replica, recorded).units), seed=0)
    values: dict[str, np.ndarray] = {}

    def ours() -> None:
        values["ours"] = _removal(replica, recorded).values(masks)

    def plain() -> None:
        values["plain"] = plain_loop(replica, _removal(replica, recorded), masks)

    # One mask each warms up.
    _removal(replica, recorded).values(masks[:1])
    plain_loop(replica, _removal(replica, recorded), masks[:1])
    pairs = [(timed(ours), timed(plain)) for _ in range(ROUNDS)]
    if (worst := float(np.abs(values["ours"] - values["plain"]).max())) > 1e-3:
        raise AssertionError(f"the two differ by {worst} nats")
    medians = [statistics.median(times) for times in zip(*pairs, strict=True)]
    different = len(np.unique(masks, axis=0))
    return median_row(
        name,
        [whole / part for part, whole in pairs],
        goal=goal,
        unit="x",
        better="higher",
        note=f"demo, fp32, {THREADS} threads, {masks.shape[1]} sources, {different} of the masks different; medians "
        f"{medians[0]:.1f} s and {medians[1]:.1f} s; log-probabilities within {worst:.1g} nats",
    )


def _removal(replica: Replica, recorded: Recorded) -> Removal:
    return Removal(Context(replica, recorded), recorded.targets[0], kinds=frozenset({KINDS}))


@torch.inference_mode()
def plain_loop(replica: Replica, removal: Removal, masks: Masks) -> np.ndarray:
    """What anybody would write: shorten, run the model on it, read the answer off its logits; ``(masks,)``."""
    written = removal.target.end - removal.target.start
    found: list[float] = []
    replica.model.set_attn_implementation("sdpa")
    try:
        for mask in masks:
            ids = torch.as_tensor(removal.shortened(mask)[0])
            logits = replica.model(ids[None]).logits[0, -written - 1 : -1]
            # Not log_softmax: over so many tokens its float32 sums are off by about 5e-6 each, always the same way.
            chosen = logits.gather(-1, ids[-written:, None])[:, 0] - logits.logsumexp(-1)
            found.append(float(chosen.double().sum()))
    finally:
        replica.model.set_attn_implementation(BACKEND)
    return np.array(found)
