"""A model whose true attribution is known: its answer depends on one token of one document."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cache
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.explain.planted import random_ids, small_trace
from tests.tiny_models import VOCABULARY
from tracer.trace.trace import Call, Completion, Sampling, Segment, Step, Trace

NEEDLE, ANSWER, ASKING = 90, 91, 8
"""In `needle_model`, the answer is likely where the needle was read, and unlikely otherwise."""


def needle_model() -> Any:
    """A one-layer model with small random weights whose heads carry the needle to the answer.

    One dimension of the residual stream is 1 for the token that asks and one for the needle only. The heads ask with
    the first for the second, in the pair of dimensions that rotary positions turn slowest, and what they find points to
    the answer's row of the unembedding.
    """
    configuration = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    kind: Any = LlamaForCausalLM
    model = kind(configuration).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        embedding = model.model.embed_tokens.weight
        embedding[:, :3] = 0.0
        embedding[ASKING, 0] = 1.0
        embedding[NEEDLE, 1] = 1.0
        attention = model.model.layers[0].self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight.zero_()
        attention.o_proj.weight.zero_()
        for first in (0, 16):
            slow = first + 7  # of eight pairs, the last one turns by a few ten-thousandths of a radian per position
            attention.q_proj.weight[slow, 0] = 6.0
            attention.k_proj.weight[slow, 1] = 6.0
            attention.v_proj.weight[first, 1] = 1.0
            attention.o_proj.weight[2, first] = 1.0
        model.lm_head.weight[:, 2] = 0.0
        model.lm_head.weight[ANSWER, 2] = 1.0
    return model


def needle_trace(*, documents: int = 6, length: int = 8, hidden_in: int = 3) -> Trace:
    """A prompt of documents ``d0``, ``d1`` ..., one of which holds the needle, and the answer that it leads to."""
    texts = [random_ids(length, seed=100 + number) for number in range(documents)]
    texts = [[token if token not in (NEEDLE, ANSWER, ASKING) else 5 for token in text] for text in texts]
    texts[hidden_in][length // 2] = NEEDLE
    steps = [Step(id=f"d{number}", kind="document", text="a document") for number in range(documents)]
    segments = [Segment(start=0, end=1, kind="template")]
    for number in range(documents):
        start = 1 + number * length
        segments.append(Segment(start=start, end=start + length, kind="document", step_id=f"d{number}"))
    end = 1 + documents * length
    prompt = [1, *(token for text in texts for token in text), 7, ASKING]
    segments.append(Segment(start=end, end=end + 2, kind="instruction"))
    call = Call(
        id="c1",
        prompt_token_ids=prompt,
        segments=segments,
        sampling=Sampling(),
        completions=[
            Completion(token_ids=[ANSWER], logprobs=[_recorded(tuple(prompt))], text="x", finish_reason="stop")
        ],
        started_at=datetime(2026, 1, 1, tzinfo=UTC),
        seconds=0.0,
    )
    answer = Step(id="a", kind="answer", text="x", call_id="c1", completion=0, start=0, end=1)
    base = small_trace([[3, 4, 5]], [[[6, 7]]])
    return base.model_copy(update={"calls": [call], "steps": [*steps, answer]})


@cache
def _recorded(prompt: tuple[int, ...]) -> float:
    """The log-probability that the model gave its answer."""
    with torch.no_grad():
        logits = needle_model()(torch.tensor([prompt]), use_cache=False).logits[0, -1]
    return float(logits.log_softmax(-1)[ANSWER])
