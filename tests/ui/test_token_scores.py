"""Scores of tokens: where they belong, what is sent of them, and how several are taken together."""

from __future__ import annotations

import base64
import struct

import numpy as np
import pytest

from tests.ui import samples
from tracer.store import Store
from tracer.trace.explanation import Explanation
from ui.components import token_map
from ui.evidence import Evidence
from ui.token_scores import Span, Target, Written, pack, peak, runs, targets, written, written_in


@pytest.fixture
def explained(store: Store) -> Evidence:
    """The run whose wrong answer was copied from the prompt's exemplar."""
    return Evidence(store.load(samples.add_explained(store).id))


def arrays(store: Store, evidence: Evidence, method: str) -> dict[str, np.ndarray]:
    """Token scores of a method."""
    explanation = evidence.explanation(method)
    assert explanation.key is not None and explanation.arrays is not None
    return store.arrays.read(evidence.trace.id, explanation.key, explanation.arrays)


def test_tokens_of_a_completion_belong_to_its_steps(explained: Evidence) -> None:
    item = written(explained.trace)[1]
    found = runs(explained.trace, item)
    assert [run.kind for run in found[-3:]] == ["template", "thought", "answer"]
    assert [(run.start, run.end) for run in found][-2:] == [(467, 491), (491, 501)]
    assert found[0].start == 0 and all(one.end == other.start for one, other in zip(found, found[1:], strict=False))
    assert found[-1].end == len(item.token_ids)
    assert item.steps(explained.trace) == ["s5", "s6"]


def test_what_a_completion_has_beside_its_steps_is_not_lost() -> None:
    trace = samples.hostile("x")
    assert [run[:3] for run in runs(trace, written(trace)[0])] == [(0, 2, "question"), (2, 4, "thought")]
    step = trace.steps[1].model_copy(update={"start": 1})
    cut = trace.model_copy(update={"steps": [trace.steps[0], step]})
    assert [run[:3] for run in runs(cut, written(cut)[0])] == [
        (0, 2, "question"),
        (2, 3, "template"),
        (3, 4, "thought"),
    ]


def test_a_step_that_was_read_is_found_where_it_was_read(explained: Evidence) -> None:
    found = written(explained.trace)
    steps = explained.steps
    assert [written_in(found, steps[name]) for name in ("s1", "s2", "s4", "s6")] == [0, 0, 1, 1]


def test_token_scores_add_up_to_those_of_the_sources(store: Store, explained: Evidence) -> None:
    """The explanation's own values are sums over the same tokens."""
    item = written(explained.trace)[1]
    for method in explained.methods:
        found = {target.name: target for target in targets(explained, item, method, arrays(store, explained, method))}
        assert list(found)[:2] == ["s5", "s6"] and len(found) == 12
        for name, target in found.items():
            readings = {reading.step_id or reading.part: reading for reading in explained.readings(method, name)}
            for run in runs(explained.trace, item):
                thing = explained.name_of(item.call.id, run.start, run.step_id)
                if thing is not None and thing in readings and run.end <= target.start:
                    value = float(target.values[run.start : run.end].sum())
                    assert value == pytest.approx(readings[thing].value, rel=1e-3, abs=1e-5)


def test_only_one_target(store: Store, explained: Evidence) -> None:
    item = written(explained.trace)[1]
    scores = arrays(store, explained, "alti_logit")
    assert [target.name for target in targets(explained, item, "alti_logit", scores, only="s6")] == ["s6"]


def unpack(text: str) -> list[tuple[int, int, bool, float, float, dict[int, int]]]:
    """What the component reads."""
    content, at, found = base64.b64decode(text), 0, []
    while at < len(content):
        start, end, token, largest, left, count = struct.unpack_from("<HHBffB", content, at)
        at += struct.calcsize("<HHBffB")
        pairs = [struct.unpack_from("<Hb", content, at + 3 * number) for number in range(count)]
        at += 3 * count
        found.append((start, end, bool(token), largest, left, dict(pairs)))
    return found


def test_the_largest_are_packed_and_the_rest_is_told() -> None:
    values = np.zeros(100, dtype=np.float32)
    values[[3, 50, 70]] = [4.0, -2.0, 1.0]
    values[80:90] = 0.1
    [(start, end, token, largest, left, pairs)] = unpack(pack([Target("s2#4", 99, 100, values)], top=3))
    assert (start, end, token, largest) == (99, 100, True, 4.0)
    assert pairs == {3: 127, 50: -64, 70: 32}
    assert left == pytest.approx(1.0 / 8.0)
    assert unpack(pack([Target("s2", 0, 3, np.zeros(3, dtype=np.float32))])) == [(0, 3, False, 0.0, 0.0, {})]


def test_what_is_sent_of_a_thousand_tokens(store: Store) -> None:
    """The issue's measure: 138 kB for 1,000 tokens."""
    evidence = Evidence(store.load(samples.add_wide(store)))
    item = written(evidence.trace)[0]
    found = targets(evidence, item, "made_up", arrays(store, evidence, "made_up"))
    assert len(found) == 1001
    assert 100_000 < len(pack(found)) < 160_000
    data = token_map.map_data(evidence.trace, item, texts=["word "] * 2000, found=found, signed=True)
    assert len(data["texts"]) == 2000 and data["runs"][-1][4] == "written"


def span(start: int, end: int, *, signed: bool = True) -> Span:
    """Some tokens of a made-up completion of 6 tokens behind a prompt of 4."""
    tokens = [
        Target(
            f"s2#{number}",
            4 + number,
            5 + number,
            np.arange(5 + number, dtype=np.float32) * (4 + number > np.arange(5 + number)),
        )
        for number in range(3)
    ]
    step = Target("s3", 7, 10, np.array([1, 2, 3, 4, 0, 0, 0, 0, 0, 0], dtype=np.float32))
    return Span([step, *tokens], start, end, signed)


def test_signed_scores_of_a_span_are_added_up() -> None:
    assert span(4, 7).values.tolist() == [0, 3, 6, 9, 0, 0, 0]
    assert span(4, 5).values.tolist() == [0, 1, 2, 3, 0]
    assert span(5, 7).values.tolist() == [0, 2, 4, 6, 8, 0, 0]


def test_others_are_averaged() -> None:
    assert span(4, 7, signed=False).values.tolist() == [0, 1, 2, 3, 0, 0, 0]


def test_where_only_steps_are_known_the_step_is_shown() -> None:
    found = span(8, 9)
    assert found.of_steps and found.bounds == (7, 10)
    assert found.values.tolist() == [1, 2, 3, 4, 0, 0, 0, 0, 0, 0]
    assert np.frombuffer(base64.b64decode(found.packed()), dtype=np.int8).tolist() == [32, 64, 95, 127, *[0] * 6]
    assert not span(0, 3).members


def test_passages() -> None:
    values = np.zeros(60, dtype=np.float32)
    values[40] = -1.0
    assert peak(values, 20, 60) in range(37, 44)
    assert peak(np.ones(60, dtype=np.float32), 20, 60) is None
    assert peak(np.zeros(60, dtype=np.float32), 20, 60) is None
    assert peak(values, 38, 42) is None


def test_a_completion_is_a_prompt_and_what_follows(explained: Evidence) -> None:
    item = Written(explained.trace.calls[0], 0)
    assert item.prompt == 272 and len(item.token_ids) == 303
    assert isinstance(explained.explanation("alti_logit"), Explanation)
