"""Splitting chains of thought."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer.agents.scripted import ScriptedTokenizer
from tracer.trace.segments import Decoded
from tracer.trace.steps import split_text, split_tokens, token_range


def parts(text: str) -> list[str]:
    return [text[span.start : span.end].strip() for span in split_text(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Mr. Ito has 3.5 kg, e.g. of rice. He eats.", ["Mr. Ito has 3.5 kg, e.g. of rice.", "He eats."]),
        ("J. Smith wrote it. Good.", ["J. Smith wrote it.", "Good."]),
        ('He said "No." Then he left.', ['He said "No."', "Then he left."]),
        ("1. Add: 3 + 4 = 7.\n2. Stop. Now.\n", ["1. Add: 3 + 4 = 7.", "2. Stop. Now."]),
        ("- a. B\n- c\n* d", ["- a. B", "- c", "* d"]),
        ("Step 1: do it. Well.\nStep 2: rest.", ["Step 1: do it. Well.", "Step 2: rest."]),
        ("Total = 3 * 4\n= 12\nSo 12.", ["Total = 3 * 4", "= 12", "So 12."]),
        ("See:\n```py\na = 1\n\nb = 2. C\n```\nDone.", ["See:", "```py\na = 1\n\nb = 2. C\n```", "Done."]),
        ("```\nnever closed. Still\ncode", ["```\nnever closed. Still\ncode"]),
        ("\\[\nx = 1.\n\\]\nYes.", ["\\[\nx = 1.\n\\]", "Yes."]),
        ("# Title\nText. More.", ["# Title", "Text.", "More."]),
        ("wait... then go. Ok.", ["wait... then go.", "Ok."]),
        ("今日は。明日も。", ["今日は。", "明日も。"]),
        ("a line\nbroken in two. Next.", ["a line\nbroken in two.", "Next."]),
        ("one paragraph\n\nanother", ["one paragraph", "another"]),
    ],
)
def test_steps_are_what_a_person_would_call_steps(text: str, expected: list[str]) -> None:
    assert parts(text) == expected


prose = st.text(alphabet=st.sampled_from("aB1 .!?\n=-`#*(\\[]$é。\t"), max_size=120)


@given(prose)
def test_ranges_follow_each_other_and_cover_the_text(text: str) -> None:
    spans = split_text(text)
    assert "".join(text[span.start : span.end] for span in spans) == text
    assert all(text[span.start : span.end].strip() for span in spans) or not text.strip()


@given(prose)
def test_token_ranges_partition_the_tokens_and_hold_the_text(text: str) -> None:
    tokenizer = ScriptedTokenizer()
    ids = [*tokenizer.encode(text).token_ids, *tokenizer.eos_token_ids]
    steps = split_tokens(tokenizer.decode(ids))
    assert steps[0].start == 0 and steps[-1].end == len(ids)
    assert all(left.end == right.start for left, right in zip(steps, steps[1:], strict=False))
    for step in steps:
        assert tokenizer.decode(ids[step.start : step.end]).text.strip() == step.text


def test_a_token_that_straddles_two_sentences_goes_to_one() -> None:
    decoded = Decoded("Go. Now", [2, 4, 7])  # "Go", ". ", "Now"
    assert [(step.start, step.end, step.text) for step in split_tokens(decoded)] == [(0, 2, "Go."), (2, 3, "Now")]


def test_no_tokens_no_steps() -> None:
    assert split_tokens(Decoded("", [])) == []


def test_range_of_characters_as_tokens() -> None:
    decoded = Decoded("ab cd ef", [2, 5, 8])
    assert token_range(decoded, 3, 5) == (1, 2)
    assert token_range(decoded, 0, 8) == (0, 3)
    assert token_range(decoded, 4, 4) == (3, 3)
