"""Truth probes: what reading hidden states costs over the passes that are run anyway, and what the probes are worth."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from tests.bench.accuracy import DATA
from tests.bench.report import Row, median_row
from tests.explain.probes.truthful_model import direction_probe
from tracer.engines import models
from tracer.engines.loading import fast_dtype, load_weights
from tracer.explain.probes.activations import extract, tokenise
from tracer.explain.probes.score import Read, Reading, score_places
from tracer.explain.probes.statements import generate
from tracer.explain.probes.train import FACTS_PER_TOPIC, PREFIX
from tracer.explain.probes.workbench import Sizes, Workbench
from tracer.replay.forward import Wanted, replay
from tracer.replay.model import Replica, identity_of
from tracer.replay.recorded import Recorded
from tracer.trace.probe_report import Estimate, Evaluation, FirstErrors, StepEvaluation, Transfer
from tracer.trace.trace import Trace

TRACES = Path(__file__).with_name("traces")
THREADS = 2
RUNS = 5
BATCH = 64
"""Statements of one bare pass; larger and smaller ones are slower."""
SHOWN = ("logistic_l2", "steps", "answer_logprob", "mean_logprob", "asking the model", "most common place", "chance")
"""Whose finding of first wrong steps is kept: the best probes, the best baselines, and what knows nothing."""
T = TypeVar("T")


def measure() -> Iterator[Row]:
    """All rows about truth probes."""
    torch.set_num_threads(THREADS)
    yield from extraction()
    yield scores_on_top()
    yield training()
    yield from worth()


def extraction() -> Iterator[Row]:
    """Hidden states of the default probe's statements over a plain padded pass of the same."""
    dtype = fast_dtype()
    replica = Replica.load("demo", dtype=dtype)
    texts = [PREFIX + item.text for item in generate(per_topic=FACTS_PER_TOPIC)]
    sequences = tokenise(replica, texts)
    bare = load_weights(models.resolve("demo").path, dtype=dtype, device=torch.device("cpu")).model
    _bare(bare, sequences[:BATCH])
    extract(replica, texts[:BATCH])
    ours, theirs = _alternating(lambda: extract(replica, texts), lambda: _bare(bare, sequences))
    ratios = [own / other for own, other in zip(ours, theirs, strict=True)]
    note = f"demo, {dtype}, {len(texts)} statements; the bare pass sorts by length, pads to {BATCH} and keeps nothing"
    yield median_row("hidden states of statements over a bare batched pass", ratios, goal=1.15, unit="x", note=note)
    speeds = [len(texts) / seconds for seconds in ours]
    yield median_row(
        "hidden states of statements, all layers", speeds, goal=None, unit="statements/s", better="higher", note=note
    )


def scores_on_top() -> Row:
    """A replay that is scored by a probe for every layer, over the replay alone."""
    recorded = Recorded(Trace.load(TRACES / "six_steps.json"))
    replica = Replica.load("demo")
    identity = identity_of(replica)
    probes = [
        direction_probe(identity, replica.width, name=f"layer {layer}", layer=layer, position=position)
        for layer in range(len(replica.layers))
        for position in ("last", "answer")
    ]

    def scored() -> int:
        reading = Reading.of(recorded, probes, replica.tokenizer)
        replayed = replay(replica, recorded.tree, reading.wanted(recorded))
        read = Read.of(reading, recorded, replayed, replica=identity, parity=None)
        return len(score_places(recorded, reading, read, probes))

    def alone() -> None:
        replay(replica, recorded.tree, Wanted(scored=recorded.scored))

    alone()
    count = scored()
    ours, theirs = _alternating(scored, alone)
    return median_row(
        "probe scores of all steps at all layers on top of a replay, over the replay alone",
        [own / other for own, other in zip(ours, theirs, strict=True)],
        goal=1.1,
        unit="x",
        note=f"demo, fp32, {len(recorded.tree)} tokens; {count} scores by {len(probes)} probes",
    )


def training() -> Row:
    """`tracer probe train` with nothing but defaults, without what starting Python takes."""
    began = time.perf_counter()
    Workbench("demo").train()
    seconds = time.perf_counter() - began
    return median_row(
        "both default probes of the demo model",
        [seconds],
        goal=120,
        unit="s",
        note=f"{fast_dtype()}, {THREADS} threads; loading the weights included, hidden states may be cached",
    )


def worth() -> Iterator[Row]:
    """What probes are worth on what they have not seen, or nothing where the data is not at hand."""
    if not DATA.is_dir():
        print(f"skipped: the benchmark data is not at {DATA}")
        return
    published = Workbench("demo", data=DATA / "truth").evaluate(["statements"])
    if published.statements is not None:
        yield from _statement_rows(published.statements, "published statements")
    bench = Workbench("demo")
    own = bench.evaluate(["statements", "steps", "mistakes"], sizes=Sizes(), mistakes=DATA / "mistakes")
    if own.statements is not None:
        yield from _statement_rows(own.statements, "statements of our own")
    if own.steps is not None:
        yield from _step_rows(own.steps)
    if own.mistakes is not None:
        yield from _mistake_rows(own.mistakes)


def _statement_rows(found: Evaluation, what: str) -> Iterator[Row]:
    for item in (*found.methods, *found.controls):
        area = "" if item.auroc is None else f"; AUROC {_text(item.auroc)}"
        yield _row(
            f"{item.name}, {what}: accuracy on topics left out",
            item.accuracy,
            "share",
            f"{found.statements} statements of {len(found.topics)} topics, {found.repeats} repeats, sd over them "
            f"{item.accuracy_sd:.3f}; layer {found.layer_choice}, over all topics {found.chosen_layer}{area}",
            found.repeats,
        )


def _step_rows(found: StepEvaluation) -> Iterator[Row]:
    for name, part in (("own", found.own), ("made-up", found.made_up)):
        if part is not None:
            yield from _transfer_rows(part, name)


def _transfer_rows(part: Transfer, name: str) -> Iterator[Row]:
    for measured in (*(item.probe for item in part.probes), *part.baselines, part.probes[0].stack):
        if measured.auroc is not None:
            yield _row(
                f"{measured.name}: AUROC on {name} reasoning steps",
                measured.auroc,
                "AUROC",
                f"{part.steps}: {part.rows}, {part.wrong} of them wrong",
                1,
            )


def _mistake_rows(found: FirstErrors) -> Iterator[Row]:
    for task in found.tasks:
        for item in task.methods:
            if item.name in SHOWN:
                note = f"{task.chains} chains, {task.with_mistake} with a mistake; {found.protocol}"
                yield _row(f"first wrong step of {task.task} found by {item.name}", item.overall, "share", note, 1)


def _row(name: str, value: Estimate, unit: str, note: str, runs: int) -> Row:
    spread = (round(value.low, 4), round(value.high, 4))
    return Row(name, round(value.value, 4), None, "higher", unit, spread, runs, f"{note}; 95 % interval")


def _text(value: Estimate) -> str:
    return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"


@torch.inference_mode()
def _bare(model: Any, sequences: Sequence[np.ndarray]) -> None:
    """What anybody would write: sorted by length, padded, masked; the head is left out."""
    ordered = sorted(sequences, key=len)
    for start in range(0, len(ordered), BATCH):
        batch = ordered[start : start + BATCH]
        ids = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(batch):
            ids[row, : len(sequence)] = torch.as_tensor(sequence)
            mask[row, : len(sequence)] = 1
        model(input_ids=ids, attention_mask=mask, use_cache=False)


def _alternating(first: Callable[[], T], second: Callable[[], object]) -> tuple[list[float], list[float]]:
    """Seconds of two pieces of work that take turns, so that what else the machine does hits both."""
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(RUNS):
        for work, seconds in ((first, ours), (second, theirs)):
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
    return ours, theirs
