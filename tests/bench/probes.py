"""Truth probes: what reading hidden states costs over the passes that are run anyway, and what the probes are worth."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from platformdirs import user_cache_dir

from tests.bench.accuracy import DATA
from tests.bench.report import Row, median_row
from tests.explain.probes.truthful_model import direction_probe
from tracer.engines import models
from tracer.engines.loading import fast_dtype, load_weights
from tracer.explain.probes.activations import extract, tokenise
from tracer.explain.probes.saved import STEPS, probe_path
from tracer.explain.probes.score import Read, Reading, score_places
from tracer.explain.probes.statements import generate
from tracer.explain.probes.train import FACTS_PER_TOPIC, PREFIX
from tracer.explain.probes.workbench import Workbench
from tracer.replay.forward import Wanted, replay
from tracer.replay.model import Replica, identity_of
from tracer.replay.recorded import Recorded
from tracer.store.probe_reports import read_report, write_report
from tracer.trace.probe_report import Estimate, Evaluation, FirstErrors, ProbeReport, StepEvaluation, Transfer
from tracer.trace.trace import Trace

PROJECT = Path(__file__).parents[2]
TRACES = Path(__file__).with_name("traces")
THREADS = 2
RUNS = 5
BATCH = 64
"""Statements of one bare pass; larger and smaller ones are slower."""
SHOWN = ("logistic_l2", "steps", "answer_logprob", "mean_logprob", "asking the model", "most common place", "chance")
"""Whose finding of first wrong steps is kept: the best probes, the best baselines, and what knows nothing."""
T = TypeVar("T")


def measure() -> Iterator[Row]:
    """All rows about what probes cost."""
    torch.set_num_threads(THREADS)
    yield from extraction()
    yield scores_on_top()
    yield training()


def measure_worth() -> Iterator[Row]:
    """All rows about what probes are worth, or none where the data is not at hand.

    Interrupted work goes on where it was, unless the code that it measures has changed.
    """
    if not DATA.is_dir():
        print(f"skipped: the benchmark data is not at {DATA}")
        return
    torch.set_num_threads(THREADS)
    published = Workbench("demo", data=DATA / "truth")
    report = _kept("published", lambda: published.evaluate(["statements"]))
    if report.statements is not None:
        yield from _statement_rows(report.statements, "published statements")
    bench = Workbench("demo")
    report = _kept("own", lambda: bench.evaluate(["statements"]))
    if report.statements is None:
        return
    yield from _statement_rows(report.statements, "statements of our own")
    layer = report.statements.chosen_layer
    report = _kept("steps", lambda: _with_step_probe(bench).evaluate(["steps"], layer=layer))
    if report.steps is not None:
        yield from _step_rows(report.steps)
    report = _kept(
        "mistakes",
        lambda: _with_step_probe(bench).evaluate(["mistakes"], layer=layer, mistakes=DATA / "mistakes"),
    )
    if report.mistakes is not None:
        yield from _mistake_rows(report.mistakes)


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


def _kept(name: str, work: Callable[[], ProbeReport]) -> ProbeReport:
    """A report that was made before by the same code, or a new one; probes that are made on the way stay there too."""
    code = hashlib.sha256()
    for package in ("explain/probes", "replay"):
        for file in sorted((PROJECT / "tracer" / package).rglob("*.py")):
            code.update(file.read_bytes())
    folder = Path(user_cache_dir("tracer-bench")) / "probes" / code.hexdigest()[:12]
    path = folder / f"{name}.report.json"
    if not path.is_file():
        with _probes_in(folder):
            write_report(path, work())
    return read_report(path)


def _with_step_probe(bench: Workbench) -> Workbench:
    """The same with the probe of steps at hand, so that it is made once."""
    path = probe_path(bench.identity, STEPS)
    if not path.is_file():
        bench.train(["steps"])[0].save(path)
    return bench


@contextmanager
def _probes_in(folder: Path) -> Iterator[None]:
    """Probes of this code, not those that a person made."""
    before = os.environ.get("TRACER_PROBES")
    os.environ["TRACER_PROBES"] = str(folder)
    try:
        yield
    finally:
        del os.environ["TRACER_PROBES"]
        if before is not None:
            os.environ["TRACER_PROBES"] = before


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
