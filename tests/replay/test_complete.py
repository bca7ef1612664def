"""Greedy continuations against a plain loop over transformers' own eager passes."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from tests.tiny_models import FAMILIES, VOCABULARY, tiny_model
from tracer.errors import CancelledError, PromptTooLongError
from tracer.replay.complete import complete
from tracer.replay.model import Replica

RANDOM = np.random.default_rng(9)
COMMON = RANDOM.integers(3, VOCABULARY, 10)
# One prompt ends inside another one, and one comes twice.
PROMPTS = [
    np.concatenate([COMMON, RANDOM.integers(3, VOCABULARY, 6)]),
    COMMON,
    RANDOM.integers(3, VOCABULARY, 3),
    COMMON[:4],
    COMMON,
]
NEW = 5


@pytest.mark.parametrize("family", FAMILIES)
def test_it_writes_what_a_plain_loop_writes(family: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    expected = []
    for prompt in PROMPTS:
        ids = prompt.tolist()
        for _ in range(NEW):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    assert complete(Replica(tiny_model(family)), PROMPTS, max_tokens=NEW) == expected


def test_a_continuation_ends_where_it_is_enough() -> None:
    replica = Replica(tiny_model("llama"))
    whole = complete(replica, PROMPTS, max_tokens=NEW)
    stop = whole[0][1]
    expected = [full[: full.index(stop) + 1] if stop in full else full for full in whole]
    assert len(expected[0]) < NEW
    passed: list[int] = []
    replica.layers[0].register_forward_hook(lambda _m, inputs, _o: passed.append(inputs[0].shape[1]))
    assert complete(replica, PROMPTS, max_tokens=NEW, enough=lambda ids: ids[-1] == stop) == expected
    unique = len({tuple(prompt[: end + 1]) for prompt in PROMPTS for end in range(len(prompt))})
    assert sum(passed) == unique + sum(len(own) - 1 for own in expected)


def test_shared_prompts_are_computed_once() -> None:
    replica = Replica(tiny_model("llama"))
    passed: list[int] = []
    replica.layers[0].register_forward_hook(lambda _m, inputs, _o: passed.append(inputs[0].shape[1]))
    complete(replica, PROMPTS, max_tokens=NEW)
    unique = len({tuple(prompt[: end + 1]) for prompt in PROMPTS for end in range(len(prompt))})
    assert sum(passed) == unique + (NEW - 1) * len(PROMPTS)


def test_limits() -> None:
    replica = Replica(tiny_model("llama"), context_length=18)
    assert complete(replica, [], max_tokens=3) == []
    assert complete(replica, PROMPTS[:2], max_tokens=0) == [[], []]
    assert len(complete(replica, PROMPTS[:1], max_tokens=2)[0]) == 2
    with pytest.raises(PromptTooLongError, match="16 tokens and 3 more"):
        complete(replica, PROMPTS, max_tokens=3)
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(CancelledError):
        complete(replica, PROMPTS[:1], max_tokens=1, cancel=cancel)
