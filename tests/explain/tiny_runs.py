"""A tiny model on disk, a ReAct run that it wrote as far as log-probabilities can tell, and two small methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.engines.test_local import write_tokenizer
from tracer.engines.tokenizer import load_tokenizer
from tracer.engines.weights.identity import tokenizer_sha256
from tracer.explain import methods
from tracer.explain.base import Context, Family, Finding, Method, Request
from tracer.replay.forward import Scored, Wanted, replay
from tracer.replay.recorded import Target
from tracer.trace.trace import (
    AgentInfo,
    Call,
    Completion,
    Edge,
    ModelInfo,
    Outcome,
    Sampling,
    Segment,
    SegmentKind,
    Step,
    Task,
    Trace,
)

AUTO: Any = transformers.AutoModelForCausalLM
VOCABULARY = 264
Piece = tuple[SegmentKind, str | None, str]

PROMPT: list[Piece] = [("template", None, "> "), ("system", None, "Be brief. "), ("question", "s1", "Where is x? ")]
FIRST: list[Piece] = [("thought", "s2", "Look it up. "), ("action", "s3", "search[x] ")]
SEEN: list[Piece] = [("observation", "s4", "x is in y. ")]
LAST: list[Piece] = [("thought", "s5", "So in y. "), ("answer", "s6", "y.")]


def write_replica(folder: Path, *, seed: int = 0, vocabulary: int = VOCABULARY, context: int = 512) -> Path:
    """A random Llama with a byte-level tokenizer."""
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.3,
        eos_token_id=min(256, vocabulary - 1),
    )
    torch.manual_seed(seed)
    AUTO.from_config(config).save_pretrained(str(folder))
    write_tokenizer(folder)
    return folder


def perturbed(source: Path, folder: Path) -> Path:
    """The same model with other weights in one matrix."""
    model = AUTO.from_pretrained(str(source))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.3)
    model.save_pretrained(str(folder))
    write_tokenizer(folder)
    return folder


def recorded_run(folder: Path, trace_id: str = "run-1") -> Trace:
    """Two calls; log-probabilities are those of transformers itself."""
    model = AUTO.from_pretrained(str(folder), attn_implementation="eager").eval()
    calls = [
        _call("c1", PROMPT, FIRST, folder, model),
        _call("c2", [*PROMPT, *FIRST, *SEEN], LAST, folder, model),
    ]
    steps = [
        Step(id="s1", kind="question", text="Where is x?"),
        *_steps("c1", FIRST),
        Step(id="s4", kind="observation", text="x is in y."),
        *_steps("c2", LAST),
    ]
    for before, step in zip(steps, steps[1:], strict=False):
        step.parents = [before.id]
    return Trace(
        id=trace_id,
        name="a tiny run",
        created_at=datetime(2026, 1, 2, tzinfo=UTC),
        status="completed",
        agent=AgentInfo(kind="react"),
        model=ModelInfo(name=str(folder), dtype="float32", tokenizer_sha256=tokenizer_sha256(folder), engine="local"),
        task=Task(question="Where is x?"),
        calls=calls,
        steps=steps,
        edges=[Edge(source=a.id, target=b.id, kind="next") for a, b in zip(steps, steps[1:], strict=False)],
        outcome=Outcome(answer="y"),
    )


def _call(name: str, prompt: Sequence[Piece], written: Sequence[Piece], folder: Path, model: Any) -> Call:
    tokenizer = load_tokenizer(folder)
    segments: list[Segment] = []
    token_ids: list[int] = []
    for kind, step_id, text in prompt:
        own = tokenizer.encode(text).token_ids
        segments.append(Segment(start=len(token_ids), end=len(token_ids) + len(own), kind=kind, step_id=step_id))
        token_ids += own
    answer = tokenizer.encode("".join(text for *_, text in written)).token_ids
    with torch.no_grad():
        logits = model(torch.tensor([token_ids + answer])).logits[0]
    scores = logits.log_softmax(-1)[len(token_ids) - 1 : -1]
    logprobs = scores[torch.arange(len(answer)), torch.tensor(answer)].tolist()
    return Call(
        id=name,
        prompt_token_ids=token_ids,
        segments=segments,
        sampling=Sampling(),
        completions=[
            Completion(
                token_ids=answer, logprobs=logprobs, text="".join(text for *_, text in written), finish_reason="stop"
            )
        ],
        started_at=datetime(2026, 1, 2, tzinfo=UTC),
        seconds=0.1,
    )


def _steps(call: str, pieces: Sequence[Piece]) -> list[Step]:
    """One token a character, so that places are lengths."""
    found: list[Step] = []
    start = 0
    for kind, step_id, text in pieces:
        assert step_id is not None
        end = start + len(text)
        own = Step(id=step_id, kind=kind, text=text.strip(), call_id=call, completion=0, start=start, end=end)
        found.append(own)
        start = end
    return found


NEAR = Method(
    "near", "near", "one over the distance", "per token", False, "cheap", "this test", {"scale": 1.0}, follows=True
)
SURPRISE = Method("surprise", "surprise", "log-probability of what was read", "nats", True, "cheap", "this test")


class Families:
    """Two methods that are registered for a test, and what they were asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, tuple[str, ...]]] = []
        self.before_target: Callable[[str, str], None] = lambda method, step_id: None
        """Called before a target is worked on: where a test makes something go wrong."""

    def near(self, context: Context, requests: Sequence[Request], targets: Sequence[Target]) -> Iterator[Finding]:
        """Scores that fall with the distance to the target's end."""
        self.asked.append(("near", tuple(target.step_id for target in targets)))
        for number, target in enumerate(targets):
            context.check_cancel()
            self.before_target("near", target.step_id)
            scale = float(str(requests[0].parameters["scale"]))
            scores = (scale / (target.end - np.arange(target.end))).astype(np.float32)
            context.cost.forward_tokens += target.end
            context.report(number + 1, len(targets))
            yield Finding(requests[0], target, scores, {"tokens": target.end})

    def surprise(self, context: Context, requests: Sequence[Request], targets: Sequence[Target]) -> Iterator[Finding]:
        """The replica's own log-probabilities of what could be read."""
        self.asked.append(("surprise", tuple(target.step_id for target in targets)))
        for target in targets:
            context.check_cancel()
            self.before_target("surprise", target.step_id)
            places = context.recorded.tree.sequences[target.sequence][: target.end]
            scored = Scored(places[:-1], context.recorded.tree.token_ids[places[1:]])
            found = replay(context.replica, context.recorded.tree, Wanted(scored=scored)).logprobs
            context.cost.backward_passes += 1
            yield Finding(requests[0], target, np.concatenate([[0.0], found]).astype(np.float32))

    @property
    def computed(self) -> list[tuple[str, str]]:
        """Method and target of all that was asked for."""
        return [(method, target) for method, targets in self.asked for target in targets]


def register(monkeypatch: pytest.MonkeyPatch) -> Families:
    """Add the two methods to those that are known."""
    families = Families()
    own: dict[str, Family] = {"near": families.near, "surprise": families.surprise}
    real = methods.load_family
    monkeypatch.setattr(methods, "METHODS", {**methods.METHODS, "near": NEAR, "surprise": SURPRISE})
    monkeypatch.setattr(methods, "load_family", lambda name: own.get(name) or real(name))
    return families
