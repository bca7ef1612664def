"""The two engines against each other: greedy decoding in float32, token for token."""

import pytest

from tracer.engines.local import LocalEngine
from tracer.engines.models import ResolvedModel
from tracer.engines.vllm import VllmEngine
from tracer.tasks import load_tasks
from tracer.trace.segments import Message, Piece, render_chat
from tracer.trace.trace import Sampling, StructuredOutput

pytestmark = [pytest.mark.vllm, pytest.mark.model]

LOGPROB_TOLERANCE = 1e-3
"""Largest difference of a log-probability in float32 (ENVIRONMENT.md: measured 2.9e-5)."""


@pytest.fixture(scope="module")
def local_engine(demo_model: ResolvedModel) -> LocalEngine:
    return LocalEngine(demo_model, dtype="float32")


@pytest.fixture(scope="module")
def prompts(local_engine: LocalEngine) -> list[list[int]]:
    questions = [task.question for task in load_tasks("word")[:4]]
    return [
        render_chat([Message("user", [Piece(question, "question")])], local_engine.tokenizer).token_ids
        for question in questions
    ]


def test_greedy_tokens_and_their_log_probabilities_agree(
    local_engine: LocalEngine, vllm_engine: VllmEngine, prompts: list[list[int]]
) -> None:
    sampling = Sampling(max_tokens=48)
    ours = local_engine.generate(prompts, sampling)
    theirs = vllm_engine.generate(prompts, sampling)
    for (own,), (other,) in zip(ours, theirs, strict=True):
        assert own.token_ids == other.token_ids
        assert (own.text, own.finish_reason, own.stop_reason) == (other.text, other.finish_reason, other.stop_reason)
        assert own.logprobs == pytest.approx(other.logprobs, abs=LOGPROB_TOLERANCE)


def test_stop_strings_end_both_at_the_same_token(
    local_engine: LocalEngine, vllm_engine: VllmEngine, prompts: list[list[int]]
) -> None:
    sampling = Sampling(max_tokens=64, stop=["he total", ".\n"])
    ours = [row[0] for row in local_engine.generate(prompts, sampling)]
    theirs = [row[0] for row in vllm_engine.generate(prompts, sampling)]
    assert [own.token_ids for own in ours] == [other.token_ids for other in theirs]
    assert [own.stop_reason for own in ours] == [other.stop_reason for other in theirs]
    assert any(own.stop_reason for own in ours)


def test_choices_agree(local_engine: LocalEngine, vllm_engine: VllmEngine, prompts: list[list[int]]) -> None:
    choice = StructuredOutput(kind="choice", value=["sure", "likely", "impossible"])
    sampling = Sampling(max_tokens=8, structured=choice)
    ours = [row[0].text for row in local_engine.generate(prompts, sampling)]
    assert ours == [row[0].text for row in vllm_engine.generate(prompts, sampling)]
    assert set(ours) <= {"sure", "likely", "impossible"}


def test_scores_agree(local_engine: LocalEngine, vllm_engine: VllmEngine, prompts: list[list[int]]) -> None:
    # What the model would write itself: tokens that it finds absurd (log-probability -11) differ by up to 1.1e-3.
    continuations = [row[0].token_ids[:12] for row in vllm_engine.generate(prompts[:2], Sampling(max_tokens=12))]
    ours = local_engine.score(prompts[:2], continuations)
    theirs = vllm_engine.score(prompts[:2], continuations)
    for own, other in zip(ours, theirs, strict=True):
        assert own == pytest.approx(other, abs=LOGPROB_TOLERANCE)
