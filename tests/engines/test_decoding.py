"""Choosing tokens, stop strings and constraints."""

from __future__ import annotations

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tracer.engines.decoding import (
    Grammar,
    StopMatcher,
    TokenText,
    choose,
    filtered_probabilities,
    grammar_tokenizer,
    row_generator,
)
from tracer.errors import EngineResponseError, InputError
from tracer.trace.trace import Sampling, StructuredOutput


@pytest.fixture(scope="module")
def backend() -> Tokenizer:
    """Byte-level, one token a byte, and ``<end>`` as token 256."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def brute_force(logits: list[float], sampling: Sampling) -> list[float]:
    """The filtered distribution by its definition, one token at a time; assumes distinct logits."""
    weights = torch.tensor(logits, dtype=torch.float64).div(sampling.temperature).softmax(0).tolist()
    order = sorted(range(len(weights)), key=lambda index: -weights[index])
    if sampling.top_k:
        order = order[: sampling.top_k]
    total = sum(weights[index] for index in order)
    kept: list[int] = []
    mass = 0.0
    for index in order:
        if mass >= sampling.top_p < 1:
            break
        kept.append(index)
        mass += weights[index] / total
    left = sum(weights[index] for index in kept)
    return [weights[index] / left if index in kept else 0.0 for index in range(len(weights))]


@pytest.mark.parametrize("size", [7, 50, 3000])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.6), (0, 0.999), (20, 0.8), (1, 0.5), (9999, 0.9)]
)
def test_filters_agree_with_their_definition(size: int, temperature: float, top_k: int, top_p: float) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    logits = torch.randn(3, size, generator=torch.Generator().manual_seed(size)) * 2
    got = filtered_probabilities(logits, sampling)
    got = got / got.sum(dim=-1, keepdim=True)
    for row in range(3):
        expected = torch.tensor(brute_force(logits[row].tolist(), sampling), dtype=torch.float64)
        # Float32 logits bound the agreement; which tokens are left must agree exactly.
        assert torch.allclose(got[row], expected, atol=1e-6)
        assert torch.equal(got[row] > 0, expected > 0)


def test_tied_tokens_are_kept_together() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    kept = filtered_probabilities(logits, Sampling(temperature=1.0, top_k=2)) > 0
    assert kept.tolist() == [[True, True, True, False]]


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.2, 0.05])
    rows = 20_000
    logits = probabilities.log().expand(rows, -1)
    chosen, _ = choose(logits, Sampling(temperature=1.0), [row_generator(3, 0, row) for row in range(rows)])
    counts = torch.bincount(torch.tensor(chosen), minlength=4)
    expected = probabilities * rows
    # Chi-square with 3 degrees of freedom: above 16.27 once in a thousand seeds.
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.27


def test_a_row_draws_the_same_whatever_its_neighbours() -> None:
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(temperature=1.0, top_p=0.9)
    together, _ = choose(logits, sampling, [row_generator(7, 0, row) for row in range(4)])
    alone = [choose(logits[row : row + 1], sampling, [row_generator(7, 0, row)])[0][0] for row in range(4)]
    assert together == alone


def test_rows_of_one_request_draw_differently() -> None:
    draws = {
        float(torch.rand(1, generator=row_generator(seed, prompt, sample)))
        for seed in (0, 1)
        for prompt in range(3)
        for sample in range(3)
    }
    assert len(draws) == 18


def test_a_tiny_temperature_is_greedy() -> None:
    logits = torch.tensor([[0.0, 1.0, 0.5]])
    assert choose(logits, Sampling(temperature=1e-30), [row_generator(0, 0, 0)])[0] == [1]


def test_logprobs_are_taken_before_temperature_and_filters() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    _, logprobs = choose(logits, Sampling(temperature=0.5, top_k=1), [row_generator(0, 0, 0)])
    assert logprobs == pytest.approx([float(logits[0].log_softmax(0)[1])], abs=1e-6)


def test_values_that_are_no_numbers_are_an_error() -> None:
    with pytest.raises(EngineResponseError, match="float32 or bfloat16"):
        choose(torch.full((1, 4), torch.nan), Sampling(), [row_generator(0, 0, 0)])


@given(
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
    pieces=st.lists(st.text("ab\nc", max_size=5), max_size=12),
)
def test_stop_strings_are_found_where_they_are_first_complete(stops: list[str], pieces: list[str]) -> None:
    matcher = StopMatcher(stops)
    text = ""
    for piece in pieces:
        text += piece
        found = matcher.push(piece)
        ends = [(text.index(stop) + len(stop), order) for order, stop in enumerate(stops) if stop in text]
        if ends:
            assert found == stops[min(ends)[1]]
            return
        assert found is None


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InputError, match="stop string is empty"):
        StopMatcher(["x", ""])


@given(text=st.text(max_size=20))
def test_text_arrives_whole_and_without_broken_characters(text: str, backend: Tokenizer) -> None:
    stream = TokenText(backend)
    parts = [stream.push(token_id) for token_id in backend.encode(text).ids]
    assert "".join(parts) == text


def allowed_texts(backend: Tokenizer, kind: str, value: JsonValue, start: str = "") -> set[str]:
    """Which characters may follow ``start``; ``<end>`` where the text may end."""
    tokenizer = grammar_tokenizer(backend, 300, [256])
    output = StructuredOutput.model_validate({"kind": kind, "value": value})
    row = Grammar(output, tokenizer).row()
    for token_id in backend.encode(start).ids:
        assert row.allowed(300)[token_id], f"{start!r} is not allowed"
        row.push(token_id)
    ids = row.allowed(300).nonzero()[:, 0].tolist()
    return {str(backend.id_to_token(index)) for index in ids}


def test_a_regex_allows_what_can_still_match(backend: Tokenizer) -> None:
    assert allowed_texts(backend, "regex", "(ab|ac)d?") == {"a"}
    assert allowed_texts(backend, "regex", "(ab|ac)d?", "a") == {"b", "c"}
    assert allowed_texts(backend, "regex", "(ab|ac)d?", "ab") == {"d", "<end>"}


def test_a_choice_may_begin_another(backend: Tokenizer) -> None:
    assert allowed_texts(backend, "choice", ["1", "10"], "1") == {"0", "<end>"}


def test_choices_may_contain_any_character(backend: Tokenizer) -> None:
    for choice in ('say "x"', "back\\slash", "two\nlines", "ünïcode 🙂", "a|b (c) [d] /e/"):
        assert allowed_texts(backend, "choice", [choice, "other"], choice) == {"<end>"}


def test_json_may_be_compact_or_spaced(backend: Tokenizer) -> None:
    schema: JsonValue = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    for text in ('{"a":true', '{ "a" :\n true'):
        assert "}" in allowed_texts(backend, "json_schema", schema, text)
    assert allowed_texts(backend, "json_schema", json.dumps(schema), '{"a":t') == {"r"}


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("regex", "(", "unclosed group"),
        ("regex", 3, "must be a string"),
        ("json_schema", {"type": "nonsense"}, "nonsense"),
        ("json_schema", "{", "JSON schema cannot be used"),
        ("json_schema", True, "must be an object"),
        ("json_schema", {"$ref": "https://example.org/schema"}, "JSON schema cannot be used"),
        ("choice", [], "at least one"),
        ("choice", ["a", ""], "at least one"),
        ("choice", "abc", "list of strings"),
    ],
)
def test_an_unusable_constraint_is_one_clear_line(
    backend: Tokenizer, kind: str, value: JsonValue, message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        allowed_texts(backend, kind, value)
    assert "\n" not in str(caught.value)
