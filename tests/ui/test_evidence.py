"""What explanations and probes are read as."""

from __future__ import annotations

import math

import pytest

from tests.ui import samples
from tracer.trace.graph import build_graph
from tracer.trace.probes import SENTENCES, ProbeScore
from tracer.trace.trace import Trace
from ui.evidence import Evidence, disagreement, flag_sentences, interval, mean_logprob


@pytest.fixture(scope="module")
def explained() -> Evidence:
    """The run whose wrong answer was copied from the prompt's exemplar."""
    return Evidence(Trace.load(samples.EXPLAINED))


def test_the_method_whose_scores_fit_best_is_first(explained: Evidence) -> None:
    assert set(explained.methods) == {"leave_one_out", "attention_resolvent", "alti_logit", "grad_x_input"}
    fits = []
    for method in explained.methods:
        worth = explained.trust(method, samples.ANSWER).worth
        assert worth is not None and worth.lds is not None
        fits.append(worth.lds)
    assert fits == sorted(fits, reverse=True) and fits[0] > fits[-1]


def test_shares_of_a_step_add_up_and_leave_itself_out(explained: Evidence) -> None:
    for method in explained.methods:
        for target in explained.targets(method):
            readings = explained.readings(method, target)
            assert math.isclose(sum(item.share for item in readings), 1.0, rel_tol=1e-9)
            assert target not in [item.step_id for item in readings]


def test_values_are_those_of_the_traces_own_graph(explained: Evidence) -> None:
    """`build_graph` adds up the same sources by another way."""
    for method in explained.methods:
        graph = build_graph(explained.trace, influence=method)
        for target in explained.targets(method):
            weights = {
                source: data["weight"]
                for source, _, key, data in graph.in_edges(target, keys=True, data=True)
                if key == "influences"
            }
            found = {item.step_id: item.value for item in explained.readings(method, target) if item.step_id}
            assert {name: value for name, value in found.items() if value} == pytest.approx(weights)


def test_what_says_nothing_stands_at_the_end(explained: Evidence) -> None:
    kinds = [item.kind for item in explained.readings("attention_resolvent", samples.ANSWER)]
    assert kinds[0] == "exemplar" and set(kinds[-2:]) == {"template", "sink"}


def test_shares_through_steps_are_the_stored_ones(explained: Evidence) -> None:
    stored = explained.explanation("leave_one_out").through[samples.ANSWER]
    readings = explained.readings("leave_one_out", samples.ANSWER)
    exemplar = next(item for item in readings if item.kind == "exemplar")
    assert exemplar.through is not None and exemplar.through > 5 * exemplar.share
    own = [source.id for source in explained.explanation("leave_one_out").sources if source.step_id == samples.ANSWER]
    whole = sum(value for name, value in stored.items() if name not in own)
    assert math.isclose(sum(item.through or 0.0 for item in readings), whole, rel_tol=1e-6)
    assert all(item.through is None for item in explained.readings("leave_one_out", "s5"))


def test_parts_of_the_prompt_are_there_once(explained: Evidence) -> None:
    kinds = [part.kind for part in explained.parts]
    assert kinds == ["system", "instruction", "tools", "instruction", "exemplar", "instruction"]
    assert {part.call_id for part in explained.parts} == {"c1"}
    exemplar = explained.parts[4]
    assert len(explained.part_ids(exemplar)) == exemplar.end == 241


def test_who_read_the_exemplar(explained: Evidence) -> None:
    readers = explained.readers("leave_one_out", 5)
    assert {item.step_id for item in readers} == {"s2", "s3", "s5", "s6"}
    for item in readers:
        of_step = explained.readings("leave_one_out", item.step_id or "")
        assert item.share == pytest.approx(next(other.share for other in of_step if other.part == 5))
    assert explained.readers("leave_one_out", "s6") == []


def test_single_tokens_are_targets_of_their_own(explained: Evidence) -> None:
    assert sorted(explained.token_targets("grad_x_input", samples.ANSWER)) == list(range(10))
    assert explained.token_targets("grad_x_input", "s5") == {}
    assert samples.ANSWER + "#5" not in explained.targets("grad_x_input")
    assert explained.readings("grad_x_input", samples.ANSWER + "#5")


def test_trust_is_per_step_and_pooled(explained: Evidence) -> None:
    measured = explained.trust("leave_one_out", samples.ANSWER)
    assert measured.worth is not None and measured.better is False and measured.z == pytest.approx(1.6, abs=0.1)
    other = explained.trust("leave_one_out", "s5")
    assert other.worth is None and other.measured == (samples.ANSWER,)


def test_what_was_not_measured_is_not_better() -> None:
    trace = samples.react()
    bare = samples.explanation(["s2"], [{"id": "x", "step_id": "s1"}], [[1.0]])
    measured = {**bare, "method": "measured", "faithfulness": samples.faithful("s2", better=True)}
    odd = {**bare, "method": "odd", "faithfulness": {"targets": {"s2": {"lds": "high"}}, "better_than_random": True}}
    evidence = Evidence(trace.model_copy(update={"explanations": [bare, odd, measured]}))
    assert evidence.trust("made_up", "s2").better is None
    assert evidence.trust("odd", "s2").better is None
    assert evidence.trust("measured", "s2").better is True
    assert evidence.methods[0] == "measured"


def test_what_cannot_be_read_is_counted_and_the_newest_counts() -> None:
    trace = samples.react()
    old = samples.explanation(["s2"], [{"id": "x", "step_id": "s1"}], [[1.0]])
    new = {**old, "values": [[2.0]]}
    ragged = {**old, "values": [[1.0, 2.0]]}
    evidence = Evidence(trace.model_copy(update={"explanations": [old, {"method": "other"}, ragged, new]}))
    assert evidence.unreadable == 2
    assert evidence.methods == ("made_up",)
    assert evidence.readings("made_up", "s2")[0].value == 2.0
    assert Evidence(trace).methods == ()


def test_the_answer_of_a_vote_is_what_was_voted_for() -> None:
    assert Evidence(samples.cot_sc()).answers == ("s3", "s6")
    assert Evidence(samples.react()).answers == (samples.react().steps[-1].id,)
    assert Evidence(samples.long(3)).answers == ()


def test_influences_are_the_largest_and_relative() -> None:
    trace = samples.long_explained(40)
    evidence = Evidence(trace)
    rows: dict[str | int, int] = {step.id: number for number, step in enumerate(trace.steps)}
    found = evidence.influences("made_up", rows=rows, top=5)
    assert len(found) == 40
    pairs = found[30]
    values = evidence.explanation("made_up").row("s31")
    best = sorted(range(30), key=lambda at: -abs(values[at]))[:5]
    assert [row for row, _ in pairs] == best
    assert abs(pairs[0][1]) == 1.0
    assert pairs[1][1] == pytest.approx(values[best[1]] / abs(values[best[0]]))


@pytest.mark.parametrize(
    ("logprob", "low", "high", "expected"),
    [
        (-0.1, 0.1, 0.4, "false"),
        (-0.1, 0.1, 0.6, None),
        (-0.1, 0.7, 0.9, None),
        (-2.0, 0.6, 0.9, "true"),
        (-2.0, 0.1, 0.4, None),
        (None, 0.1, 0.4, None),
    ],
)
def test_probe_and_logprob_disagree(logprob: float | None, low: float, high: float, expected: str | None) -> None:
    document = samples.judgement("s1", low=low, high=high, baselines={"mean_logprob": logprob})
    assert disagreement(ProbeScore.read(document)) == expected


def test_a_probe_that_learnt_the_text_has_no_opinion() -> None:
    document = samples.judgement("s1", probability=None, low=None, high=None, score=None, flags=["seen_in_training"])
    score = ProbeScore.read(document)
    assert disagreement(score) is None
    assert flag_sentences(score) == [SENTENCES["seen_in_training"]]
    assert flag_sentences(ProbeScore.read(samples.judgement("s1", flags=["unheard of"]))) == ["unheard of"]


def test_small_readings() -> None:
    assert interval([0.5, 0.25, 1]) == (0.5, 0.25, 1.0)
    assert interval([0.5, "x", 1]) is interval(None) is interval([1, 2]) is None
    assert mean_logprob([]) is None and mean_logprob([-1.0, -2.0]) == -1.5
