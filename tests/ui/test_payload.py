"""Tables for the browser: what they hold and how large they get."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest

from tests.ui import samples
from tracer.store import Store
from tracer.trace.trace import Completion
from ui import payload


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, ""), ("", ""), ("a\n\n  b\tc", "a b c"), ("x" * 5, "xxxxx"), ("x" * 6, "xxxx…"), ("a " * 50, "a a …")],
)
def test_one_line(text: str | None, expected: str) -> None:
    assert payload.one_line(text, limit=5) == expected


def test_a_long_text_says_how_much_is_missing() -> None:
    shown, missing = payload.shortened("x" * (payload.TEXT_CHARACTERS + 7))
    assert len(shown) == payload.TEXT_CHARACTERS
    assert missing == 7


def test_times_are_local() -> None:
    moment = datetime(2025, 7, 1, 12, 0, tzinfo=UTC)
    assert payload.local_time(moment, ZoneInfo("Europe/Oslo")) == "2025-07-01 14:00:00"


def test_the_last_representable_time_is_shown() -> None:
    assert payload.local_time(datetime.max.replace(tzinfo=UTC), timezone(timedelta(hours=14))).startswith("9999-12-31")


def test_runs_table(store: Store) -> None:
    samples.fill(store)
    table = payload.runs_table(store.list(), UTC)
    assert tuple(table.columns) == payload.RUN_COLUMNS
    by_agent = table[table["status"] == "completed"].set_index("agent")
    assert list(by_agent.loc[["CoT", "CoT-SC", "ToT", "ReAct"], "correct"]) == ["✓ right"] * 4
    assert by_agent.loc["external", "steps"] == 1000
    assert by_agent["seconds"].isna().to_dict()["external"]


def test_an_empty_table_has_its_columns() -> None:
    assert tuple(payload.runs_table([], UTC).columns) == payload.RUN_COLUMNS
    assert tuple(payload.steps_table([]).columns) == payload.STEP_COLUMNS


def test_tokens_sum_to_the_steps_logprob() -> None:
    trace = samples.cot()
    step = next(step for step in trace.steps if step.call_id is not None)
    assert step.call_id is not None and step.completion is not None and step.start is not None and step.end is not None
    completion = trace.call(step.call_id).completions[step.completion]
    table = payload.tokens_table(completion, start=step.start, end=step.end)
    assert list(table["id"]) == completion.token_ids[step.start : step.end]
    assert table["logprob"].sum() == pytest.approx(sum(completion.logprobs[step.start : step.end]))
    assert table["probability"].between(0, 1).all()


def test_tokens_without_logprobs() -> None:
    completion = Completion(token_ids=[1, 2, 3], logprobs=[], text="abc", finish_reason="stop")
    table = payload.tokens_table(completion, start=1, end=3)
    assert list(table["position"]) == [1, 2]
    assert table["logprob"].isna().all()


def test_segments_cover_the_prompt() -> None:
    call = samples.react().calls[-1]
    assert payload.segments_table(call)["tokens"].sum() == len(call.prompt_token_ids)


def test_links_name_every_edge_once() -> None:
    trace = samples.tot()
    found = [payload.links(trace, step) for step in trace.steps]
    assert sum(link.direction == "from" for links in found for link in links) == len(trace.edges)
    assert sum(link.direction == "to" for links in found for link in links) == len(trace.edges)


def test_a_link_to_a_step_that_was_never_recorded_is_left_out() -> None:
    trace = samples.long(1)
    table = payload.links_table([payload.Link("to", "next", "s9")], {"s1": (1, trace.steps[0])})
    assert table.empty


def test_size_in_words() -> None:
    assert payload.size(samples.long(1)) == "1 step, 0 calls, 0 tokens"
