"""Small traces made by hand, for tests of methods."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np

from tests.tiny_models import VOCABULARY
from tracer.trace.trace import AgentInfo, Call, Completion, ModelInfo, Sampling, Segment, Step, Task, Trace


def small_trace(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    *,
    steps: int = 2,
) -> Trace:
    """A trace with one call for each prompt.

    The first token of a prompt is template, its first half instruction, its second half a document ``d``; every
    completion is cut into ``steps`` thoughts of about equal length, and the last one of the last call is the answer.
    """
    found = [Step(id="d", kind="document", text="a document")]
    calls: list[Call] = []
    for number, (prompt, texts) in enumerate(zip(prompts, completions, strict=True)):
        half = max(2, len(prompt) // 2)
        segments = [
            Segment(start=0, end=1, kind="template"),
            Segment(start=1, end=half, kind="instruction"),
            Segment(start=half, end=len(prompt), kind="document", step_id="d"),
        ]
        calls.append(
            Call(
                id=f"c{number + 1}",
                prompt_token_ids=list(prompt),
                segments=[segment for segment in segments if segment.end > segment.start],
                sampling=Sampling(),
                completions=[
                    Completion(token_ids=list(ids), logprobs=[-1.0] * len(ids), text="x", finish_reason="stop")
                    for ids in texts
                ],
                started_at=datetime(2026, 1, 1, tzinfo=UTC),
                seconds=0.0,
            )
        )
        for index, ids in enumerate(texts):
            bounds = np.linspace(0, len(ids), steps + 1).round().astype(int).tolist()
            for start, end in zip(bounds, bounds[1:], strict=False):
                found.append(
                    Step(
                        id=f"s{len(found)}",
                        kind="thought",
                        text="a thought",
                        call_id=calls[-1].id,
                        completion=index,
                        start=start,
                        end=end,
                    )
                )
    found[-1] = found[-1].model_copy(update={"kind": "answer"})
    return Trace(
        id="small",
        name="small",
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        status="completed",
        agent=AgentInfo(kind="external"),
        model=ModelInfo(name="tiny", dtype="float32"),
        task=Task(question="?"),
        calls=calls,
        steps=found,
    )


def random_ids(count: int, *, seed: int) -> list[int]:
    """Token ids other than the special ones."""
    return [int(token) for token in np.random.default_rng(seed).integers(3, VOCABULARY, count)]
