"""Traces for the app's tests: real agents on the scripted engine, long ones, and one full of hostile text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from tracer.agents.cot import ChainOfThought
from tracer.agents.react import ReAct
from tracer.agents.scripted import ScriptedEngine
from tracer.agents.self_consistency import SelfConsistency
from tracer.agents.tools import bundled
from tracer.agents.tree_of_thoughts import TreeOfThoughts, TreeSettings
from tracer.store import Arrays, Store
from tracer.trace.recorder import Recorder
from tracer.trace.trace import (
    AgentInfo,
    Call,
    Completion,
    Document,
    Edge,
    ModelInfo,
    Outcome,
    Sampling,
    Segment,
    Step,
    Task,
    Trace,
)

REMOTE = "http://example.invalid"
CORPUS = (
    f'<script>fetch("{REMOTE}/script")</script>',
    f"![image]({REMOTE}/x.png)",
    f'<img src="{REMOTE}/y.png" onerror="fetch(\'{REMOTE}/error\')">',
    f'<iframe src="{REMOTE}/frame"></iframe>',
    f"[link]({REMOTE}/link) :material/home: :red[red] $x^2$",
    f'"><style>@import url({REMOTE}/style.css)</style>',
    f"javascript:fetch('{REMOTE}/js')",
    f"{REMOTE}/plain.png",
)
"""Texts that would load something from elsewhere, or look like more than text, if they were not shown as text."""


def cot() -> Trace:
    """A right answer in two steps."""
    engine = ScriptedEngine(["First, 3 + 4 = 7. Then we are done.\n", " 7."])
    return ChainOfThought(engine).run("What is 3+4?", reference="7")


def cot_sc() -> Trace:
    """Three branches, one of them wrong."""
    replies = ["So 3 + 4 = 7. The answer is 7.", "It is 8. The answer is 8.", "The answer is 7.0"]
    return SelfConsistency(ScriptedEngine(replies), n=3).run("What is three plus four?", reference="7")


def react(*, reference: str | None = "7") -> Trace:
    """A tool call, then an answer."""
    replies = [" I must compute.\nAction 1: calculator[3+4]\n", " Hm, it is 7.", " finish[7]\n"]
    return ReAct(ScriptedEngine(replies), tools=bundled(["calculator"])).run("Add 3 and 4.", reference=reference)


def tot() -> Trace:
    """A tree with pruned paths."""

    def reply(prompt: str) -> str:
        left = prompt.split("Numbers: ")[-1].split("\n")[0]
        if prompt.rstrip().endswith("Possible next steps:"):
            proposals = {
                "4 4 6 8": "4 + 8 = 12 (left: 4 6 12)\n4 + 4 = 9 (left: 9 6 8)\nfoo",
                "4 6 12": "6 - 4 = 2 (left: 2 12)",
                "2 12": "2 * 12 = 24 (left: 24)\n2 + 12 = 14 (left: 14)",
            }
            return proposals.get(left, "none")
        if prompt.rstrip().endswith("Answer:"):
            return " (6 - 4) * (4 + 8) = 24"
        return "sure" if prompt.rstrip().endswith("24") or len(left.split()) > 1 else "impossible"

    settings = TreeSettings(search="bfs", judgements=1, breadth=2)
    return TreeOfThoughts(ScriptedEngine(reply), settings=settings).run("4 4 6 8")


def failed() -> Trace:
    """A run that ended with an error after one step."""
    trace = cot()
    return trace.model_copy(
        update={"id": "failed-run", "status": "failed", "error": "the server died", "outcome": Outcome()}
    )


def long(steps: int = 1000) -> Trace:
    """A trace of many steps."""
    return Trace(
        id="long-run",
        name="long",
        created_at=datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC),
        status="completed",
        agent=AgentInfo(kind="external"),
        model=ModelInfo(name="elsewhere"),
        task=Task(question="How long is it?"),
        steps=[
            Step(id=f"s{number}", kind="thought", text=f"Thought number {number}, and so on for some words more.")
            for number in range(1, steps + 1)
        ],
        outcome=Outcome(answer="long"),
    )


def hostile(text: str, *, trace_id: str = "hostile") -> Trace:
    """A trace with ``text`` in every field that can hold text."""
    completion = Completion(token_ids=[5, 6], logprobs=[-0.5, -1.25], text=text, finish_reason="stop", stop_reason=text)
    return Trace(
        id=trace_id,
        name=text,
        created_at=datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC),
        status="failed",
        agent=AgentInfo(kind="external", parameters={text: text}),
        model=ModelInfo(name=text, dtype=text, tokenizer_sha256=text, engine=text, engine_version=text),
        task=Task(question=text, reference=text, documents=[Document(id=text, title=text, text=text)]),
        calls=[
            Call(
                id=text,
                prompt_token_ids=[1, 2],
                segments=[Segment(start=0, end=2, kind="question", step_id=f"q{text}")],
                sampling=Sampling(stop=[text]),
                completions=[completion],
                started_at=datetime(2025, 1, 2, 3, 4, 6, tzinfo=UTC),
                seconds=0.5,
                error=text,
            )
        ],
        steps=[
            Step(id=f"q{text}", kind="question", text=text),
            Step(
                id=f"a{text}",
                kind="thought",
                text=text,
                parents=[f"q{text}"],
                branch=text,
                score=1.0,
                pruned=True,
                call_id=text,
                completion=0,
                start=0,
                end=2,
                error=text,
                data={text: text},
            ),
        ],
        edges=[Edge(source=f"q{text}", target=f"a{text}", kind="next")],
        outcome=Outcome(answer=text, correct=False, details={text: text}),
        explanations=[_hostile_explanation(text)],
        probes=[judgement(f"a{text}", name=text, position=text, text=text, flags=[text], held_out={text: text})],
        error=text,
    )


def _hostile_explanation(text: str) -> dict[str, Any]:
    sources: list[dict[str, Any]] = [
        {"id": text, "kind": "question", "step_id": f"q{text}", "call_id": text, "start": 0, "end": 2},
        {"id": f"other {text}", "kind": text, "step_id": None, "call_id": text, "start": 0, "end": 2},
    ]
    made: dict[str, Any] = explanation(
        [f"a{text}"], sources, [[1.0, -0.5]], method=text, unit=text, parameters={text: text}
    )
    return made


def explanation(targets: list[str], sources: list[dict[str, Any]], values: list[list[float]], **more: Any) -> Any:
    """An explanation as a trace carries it."""
    return {"method": "made_up", "unit": "nats", "targets": targets, "sources": sources, "values": values, **more}


def judgement(step_id: str, **more: Any) -> Any:
    """What a probe says of a step, as a trace carries it."""
    known = {
        "name": "made up",
        "layer": 3,
        "position": "last",
        "score": 1.0,
        "probability": 0.8,
        "low": 0.7,
        "high": 0.9,
    }
    return {"step_id": step_id, "baselines": {"mean_logprob": -0.1}, **known, **more}


def faithful(target: str, *, better: bool) -> Any:
    """What was measured about the scores of one target."""
    worth = {
        "sources": 4, "lds": 0.5, "top_k_drop": 2.0, "k": 1, "deletion": 0.25, "insertion": 0.5, "deletion_rank": 1.0,
        "gap": 1.0, "random_gap": 0.0, "random_spread": 0.2 if better else 2.0,
        "passes": 9,
    }  # fmt: skip
    return {"targets": {target: worth}, "agreement": {}}


EXPLAINED = Path(__file__).with_name("explained") / "copied_from_the_exemplar.json"
"""Made with the demo weights by ``tracer explain examples/traces/copied_from_the_exemplar.json --methods
attention_resolvent,grad_x_input,alti_logit,leave_one_out --targets "s2,s3,s5,s6,s6#*" --out FILE``."""
ANSWER = "s6"


def add_explained(store: Store) -> Trace:
    """Import the explained run, with the scores of its tokens."""
    trace = Trace.load(EXPLAINED)
    store.import_trace(trace)
    store.arrays.adopt(Arrays.beside(EXPLAINED), trace.id)
    return trace


def long_explained(steps: int = 1000) -> Trace:
    """Many steps that the model wrote, each with tokens, what it read of all earlier ones, and a probe's score."""
    plain = long(steps)
    names = [step.id for step in plain.steps]
    numbers = np.random.default_rng(0).normal(size=(steps, steps)).round(4) * np.tri(steps, k=-1)
    sources = [{"id": f"x{name}", "kind": "thought", "step_id": name} for name in names]
    return plain.model_copy(
        update={
            "id": "long-explained",
            "calls": [_call(f"c{name}", prompt=8, completion=12) for name in names],
            "steps": [
                step.model_copy(update={"call_id": f"c{step.id}", "completion": 0, "start": 0, "end": 12})
                for step in plain.steps
            ],
            "explanations": [explanation(names, sources, numbers.tolist())],
            "probes": [judgement(name) for name in names],
        }
    )


def _call(name: str, *, prompt: int, completion: int) -> Call:
    return Call(
        id=name,
        prompt_token_ids=list(range(prompt)),
        segments=[Segment(start=0, end=prompt, kind="instruction")],
        sampling=Sampling(),
        completions=[
            Completion(
                token_ids=list(range(completion)), logprobs=[-0.25] * completion, text="words", finish_reason="stop"
            )
        ],
        started_at=datetime(2025, 1, 2, 3, 4, 6, tzinfo=UTC),
        seconds=0.5,
    )


def add_wide(store: Store, tokens: int = 2000) -> str:
    """Import a run of one call, half of it written, with the sources of every token that was; returns its id."""
    prompt, wrote = tokens // 2, tokens - tokens // 2
    key = "ab" * 32
    names = [f"s2#{number}" for number in range(wrote)]
    generator = np.random.default_rng(0)
    rows = {name: generator.normal(size=prompt + number + 1) ** 3 for number, name in enumerate(names)}
    rows["s2"] = np.array([*np.sum([row[:prompt] for row in rows.values()], axis=0), *[0.0] * wrote])
    file = store.arrays.write("wide", key, {name: row.astype(np.float32) for name, row in rows.items()})
    sources = [{"id": "x0", "kind": "question", "step_id": "s1", "call_id": "c1", "start": 0, "end": prompt}]
    values = [[float(row[:prompt].sum())] for row in [rows["s2"], *(rows[name] for name in names)]]
    call = _call("c1", prompt=prompt, completion=wrote)
    return store.import_trace(
        Trace(
            id="wide",
            name="wide",
            created_at=datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC),
            status="completed",
            agent=AgentInfo(kind="cot"),
            model=ModelInfo(name="elsewhere"),
            task=Task(question="How wide is it?"),
            calls=[call.model_copy(update={"segments": [Segment(start=0, end=prompt, kind="question", step_id="s1")]})],
            steps=[
                Step(id="s1", kind="question", text="How wide is it?"),
                Step(id="s2", kind="answer", text="words", call_id="c1", completion=0, start=0, end=wrote),
            ],
            explanations=[
                explanation(["s2", *names], sources, values, key=key, arrays=file.model_dump(mode="json"), signed=True)
            ],
            outcome=Outcome(answer="words"),
        )
    )


def all_agents() -> list[Trace]:
    """One trace of every agent."""
    return [cot(), cot_sc(), tot(), react()]


def fill(store: Store) -> list[str]:
    """Import one trace of every agent, a failed and a long one; returns their ids."""
    return [store.import_trace(trace) for trace in (*all_agents(), failed(), long())]


@contextmanager
def running(store: Store) -> Iterator[Recorder]:
    """A run under way in this process, ended when the block is left."""
    task = Task(question="Are we there yet?")
    with Recorder(AgentInfo(kind="cot"), ModelInfo(name="scripted"), task=task, sinks=[store]) as run:
        run.step("question", task.question)
        yield run
