"""Figures of the vLLM engine: what recording costs, what batching saves, what the prefix cache saves."""

from __future__ import annotations

import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from tests.bench.report import Row, median_row
from tracer.agents.base import Budget, Run, ask
from tracer.agents.cot import ChainOfThought
from tracer.agents.react import ReAct
from tracer.agents.react_text import TextDialogue
from tracer.agents.self_consistency import SelfConsistency
from tracer.agents.tools import bundled, run_tool
from tracer.engines.connect import connect
from tracer.engines.vllm import VllmEngine
from tracer.store import Store
from tracer.tasks import documents_folder, load_tasks
from tracer.trace.recorder import Recorder
from tracer.trace.trace import AgentInfo, Call, Task, Trace

PAIRS = 3


def measure() -> Iterator[Row]:
    """All rows that need a vLLM server."""
    engine = connect("vllm", model="demo", dtype="float32")
    assert isinstance(engine, VllmEngine)
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "bench.db") as store:
        yield recording_overhead(engine, store)
        yield self_consistency(engine, store)
        yield prefix_cache(engine)
    engine.close()


def raw(engine: VllmEngine, calls: list[Call]) -> float:
    """Send the same requests with a bare HTTP client, one after the other; seconds."""
    with httpx.Client(base_url=engine.url, timeout=600) as client:
        began = time.perf_counter()
        for call in calls:
            sampling = call.sampling
            body = {
                "model": engine.info.name,
                "prompt": call.prompt_token_ids,
                "max_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "n": sampling.n,
                "seed": sampling.seed,
                "stop": sampling.stop or None,
                "include_stop_str_in_output": True,
                "repetition_penalty": 1.0,
                "top_k": -1,
                "logprobs": 0,
                "return_token_ids": True,
            }
            client.post("/v1/completions", json=body).raise_for_status()
        return time.perf_counter() - began


def paired(engine: VllmEngine, work: Callable[[], Trace]) -> list[float]:
    """Ratios of an agent's wall time to that of its bare requests, in pairs, after a first pair that is not counted."""
    ratios: list[float] = []
    for _ in range(PAIRS + 1):
        began = time.perf_counter()
        trace = work()
        seconds = time.perf_counter() - began
        ratios.append(seconds / raw(engine, trace.calls))
    return ratios[1:]


def recording_overhead(engine: VllmEngine, store: Store) -> Row:
    """A greedy chain of thought, recorded in a store, over its bare requests."""
    task = load_tasks("word")[0]
    agent = ChainOfThought(engine, max_tokens=64)
    ratios = paired(engine, lambda: agent.run(task.question, store=store))
    return median_row(
        "recording overhead: CoT over its bare requests", ratios, goal=1.05, unit="x", note="pairs, same vLLM, fp32"
    )


def self_consistency(engine: VllmEngine, store: Store) -> Row:
    """Sixteen chains, recorded and voted on, over one bare request with n=16."""
    task = load_tasks("word")[1]
    agent = SelfConsistency(engine, n=16, max_tokens=64)
    ratios = paired(engine, lambda: agent.run(task.question, store=store))
    return median_row("CoT-SC n=16 over one bare request with n=16", ratios, goal=1.15, unit="x", note="pairs, fp32")


def prefix_cache(engine: VllmEngine) -> Row:
    """Six rounds of ReAct: prompt tokens computed by the server over tokens of the final transcript."""
    values = [
        _react_rounds(engine, f"{task.question} (reference {time.time_ns()})") for task in load_tasks("multihop")[:3]
    ]
    return median_row(
        "ReAct, 6 rounds: prompt tokens computed over tokens in the transcript",
        values,
        goal=1.3,
        unit="x",
        note="the server's own counters; every run has a first line of its own, so nothing is cached",
    )


def _react_rounds(engine: VllmEngine, question: str) -> float:
    tools = bundled(["search"], documents_folder())
    agent = ReAct(engine, tools=tools, budget=Budget(steps=6))
    # A first line of its own keeps the exemplars of one run from being served from another run's cache.
    agent.prompt = agent.prompt.model_copy(update={"system": f"{question[-24:]} {agent.prompt.system}"})
    recorder = Recorder(AgentInfo(kind="react"), engine.info, task=Task(question=question))
    run = Run(engine, recorder, agent.budget, grade=lambda _: None, cancel=threading.Event())
    before = _counters(engine)
    with recorder:
        step, documents = ask(run, recorder.trace.task)
        dialogue = TextDialogue(agent, run, step, documents)
        for _ in range(6):
            action, made = dialogue.next_action()
            # The agent would stop at "finish"; six rounds are measured whatever the model wants.
            query = str(action.arguments) if action is not None else "river"
            dialogue.observe(run_tool(tools[0], query or "river", max_chars=600), made)
    after = _counters(engine)
    computed = (after[0] - before[0]) - (after[1] - before[1])
    last = recorder.trace.calls[-1]
    return computed / (len(last.prompt_token_ids) + len(last.completions[0].token_ids))


def _counters(engine: VllmEngine) -> tuple[float, float]:
    """Prompt tokens looked up in the prefix cache and found there, since the server started."""
    text = httpx.get(f"{engine.url}/metrics", timeout=30).text
    found: list[float] = []
    for name in ("prefix_cache_queries", "prefix_cache_hits"):
        values = re.findall(rf"^vllm:{name}(?:_total)?{{[^}}]*}} ([0-9.e+]+)$", text, re.MULTILINE)
        found.append(sum(map(float, values)))
    return found[0], found[1]
