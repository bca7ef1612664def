"""Extraction against transformers' own hidden states, and what is kept of it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny_models import FAMILIES, LAYERS, VOCABULARY, WIDTH, tiny_model
from tracer.agents.scripted import ScriptedTokenizer
from tracer.errors import CancelledError, InputError, PromptTooLongError, StoreError, UnknownNameError
from tracer.explain.probes.activations import extract, model_sha256, sinks, tokenise
from tracer.replay.model import Replica

TEXTS = [
    "the city of Paris is in France",
    "the city of Paris is not in France",
    "two is less than three",
    "the city of Rome is in Italy",
    "the city of Paris is in France",
    "two",
]


def replica(family: str = "llama", **arguments: Any) -> Replica:
    return Replica(tiny_model(family, **arguments), tokenizer=ScriptedTokenizer())


def eager(family: str, sequences: list[Any]) -> list[Any]:
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return [model(torch.as_tensor(ids)[None], output_hidden_states=True).hidden_states for ids in sequences]


@pytest.mark.parametrize("batch_tokens", [1, 12, 8192])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_transformers_gives_for_each_text_alone(family: str, batch_tokens: int) -> None:
    own = replica(family)
    found = extract(own, TEXTS, batch_tokens=batch_tokens)
    assert found.values.shape == (len(TEXTS), LAYERS, WIDTH)
    assert found.layers == tuple(range(LAYERS))
    expected = eager(family, tokenise(own, TEXTS))
    for row, states in zip(found.values, expected, strict=True):
        # The library's last entry comes after the final norm.
        for layer in range(LAYERS - 1):
            assert row[layer] == pytest.approx(states[layer + 1][0, -1].numpy(), abs=1e-4)
        normed = own.final_norm(torch.from_numpy(row[-1])).detach().numpy()
        assert normed == pytest.approx(states[LAYERS][0, -1].numpy(), abs=1e-4)
    assert np.array_equal(found.values[0], found.values[4])


def test_layers_can_be_chosen() -> None:
    own = replica()
    every, some = extract(own, TEXTS), extract(own, TEXTS, layers=[2, 0])
    assert some.layers == (2, 0)
    assert np.array_equal(some.values, every.values[:, [2, 0]])
    assert np.array_equal(some.at(0), every.at(0))
    with pytest.raises(UnknownNameError, match="layer of these activations '1'"):
        some.at(1)
    for wrong in ([], [0, 0], [LAYERS], [-1]):
        with pytest.raises(InputError, match="layers must be different numbers from 0 to 2"):
            extract(own, TEXTS, layers=wrong)


def test_texts_begin_with_what_the_tokenizer_puts_before_them() -> None:
    class Begins(ScriptedTokenizer):
        @property
        def start_token_ids(self) -> tuple[int, ...]:
            return (VOCABULARY - 1,)

    own = Replica(tiny_model("llama"), tokenizer=Begins())
    sequences = tokenise(own, TEXTS)
    assert all(ids[0] == VOCABULARY - 1 for ids in sequences)
    states = eager("llama", sequences)
    assert extract(own, TEXTS).values[3, 1] == pytest.approx(states[3][2][0, -1].numpy(), abs=1e-4)


class Passes:
    """Counts the tokens that go through a replica."""

    def __init__(self, own: Replica) -> None:
        self.tokens = 0
        own.layers[0].register_forward_hook(self)

    def __call__(self, _module: object, inputs: Any, _output: object) -> None:
        self.tokens += inputs[0].shape[1]


def test_shared_beginnings_and_equal_texts_are_computed_once() -> None:
    own = replica()
    passes = Passes(own)
    extract(own, TEXTS)
    sequences = tokenise(own, TEXTS)
    assert passes.tokens == len({tuple(ids[: end + 1]) for ids in sequences for end in range(len(ids))})


def test_finished_batches_are_not_computed_again(tmp_path: Path) -> None:
    own = replica()
    cancel = threading.Event()
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        cancel.set()

    with pytest.raises(CancelledError):
        extract(own, TEXTS, batch_tokens=14, folder=tmp_path, progress=progress, cancel=cancel)
    assert len(seen) == 1
    assert seen[0][1] == len(TEXTS)
    passes = Passes(own)
    whole = extract(own, TEXTS, batch_tokens=14, folder=tmp_path)
    rest = passes.tokens
    passes.tokens = 0
    again = extract(own, TEXTS, batch_tokens=14, folder=tmp_path)
    assert passes.tokens == 0
    everything = extract(own, TEXTS, batch_tokens=14)
    assert 0 < rest < passes.tokens
    assert np.array_equal(whole.values, everything.values)
    assert np.array_equal(again.values, everything.values)


def test_a_file_that_was_changed_is_made_again(tmp_path: Path) -> None:
    own = replica()
    expected = extract(own, TEXTS, folder=tmp_path).values
    (file,) = tmp_path.rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    for broken in (bytes(content), content[:100], b""):
        file.write_bytes(broken)
        passes = Passes(own)
        assert np.array_equal(extract(own, TEXTS, folder=tmp_path).values, expected)
        assert passes.tokens > 0


def test_other_weights_texts_or_layers_have_files_of_their_own(tmp_path: Path) -> None:
    first, second = replica(), replica(seed=1)
    assert model_sha256(first) != model_sha256(second)
    one = extract(first, TEXTS, folder=tmp_path)
    other = extract(second, TEXTS, folder=tmp_path)
    assert not np.allclose(one.values, other.values)
    extract(first, TEXTS[:-1], folder=tmp_path)
    assert extract(first, TEXTS, layers=[1], folder=tmp_path).values.shape == (len(TEXTS), 1, WIDTH)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4


def test_half_precision_is_kept_as_it_is(tmp_path: Path) -> None:
    half = Replica(tiny_model("llama").to(torch.bfloat16), tokenizer=ScriptedTokenizer())
    found = extract(half, TEXTS, folder=tmp_path)
    assert found.values.dtype == np.float32
    assert np.array_equal(extract(half, TEXTS, folder=tmp_path).values, found.values)
    full = extract(replica(), TEXTS).values
    assert np.abs(found.values - full).max() < 0.1 * np.abs(full).max()


def test_sinks_are_far_longer_than_the_rest() -> None:
    values = np.random.default_rng(0).normal(size=(50, 2, 16)).astype(np.float32)
    values[7, 1] *= 20
    found = sinks(values)
    assert found[7].tolist() == [False, True]
    assert found.sum() == 1
    # Where most are sinks, only the norm of ordinary ones tells.
    medians = np.median(np.linalg.norm(values, axis=-1), axis=0).astype(np.float32)
    assert sinks(20 * values[:5], medians).all()
    assert not sinks(20 * values[:5]).any()


def test_input_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        extract(Replica(tiny_model("llama")), TEXTS)
    with pytest.raises(InputError, match="no statement"):
        extract(replica(), [])
    with pytest.raises(InputError, match="statement 2 is empty"):
        extract(replica(), ["a", ""])
    with pytest.raises(PromptTooLongError):
        extract(replica(), ["a " * 200])
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StoreError, match="cannot keep activations"):
        extract(replica(), TEXTS, folder=blocked)
