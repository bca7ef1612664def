"""Citations from numbers made by hand, and the text that must survive them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engines.test_local import write_tokenizer
from tests.explain.needle import needle_model, needle_trace
from tracer.engines.tokenizer import load_tokenizer
from tracer.errors import InputError, TraceFormatError, UnknownNameError
from tracer.explain.citations import Unit, cited_answer, joint_references, shared_threshold
from tracer.explain.cited import Citation, CitedAnswer, Rule
from tracer.explain.service import explain
from tracer.replay.model import Replica
from tracer.trace.explanation import Explanation, ExplanationSource
from tracer.trace.trace import AgentInfo, Document, ModelInfo, Step, Task, Trace

TITLES = ("Rome", "Lima", "Oslo")
Row = tuple[str, Sequence[float] | None]
"""A token's text, and what each document contributed where it is kept."""


def made(rows: Sequence[Row], *, kl: Sequence[float] = (), **changes: Any) -> tuple[Trace, Explanation]:
    """A trace with three documents and an explanation of its step ``a`` with that table."""
    steps = [
        Step(id=f"d{number}", kind="document", text=f"\n About {title}.\nMore.", data={"title": title})
        for number, title in enumerate(TITLES)
    ]
    trace = Trace(
        id="made",
        name="made",
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        status="completed",
        agent=AgentInfo(kind="external"),
        model=ModelInfo(name="tiny"),
        task=Task(question="?", documents=[Document(id="x", title="x", text="x")]),
        steps=[*steps, Step(id="a", kind="answer", text="x")],
    )
    tokens = [
        {
            "index": index,
            "token_id": index,
            "text": text,
            "kl": kl[index] if kl else 1.0,
            "kept": values is not None,
            **({} if values is None else {"sources": {f"x{n}": value for n, value in enumerate(values)}}),
        }
        for index, (text, values) in enumerate(rows)
    ]
    explanation = Explanation(
        method="mirage",
        parameters={"deviations": 1.0, "threshold": None},
        targets=["a"],
        sources=[ExplanationSource(id=f"x{n}", kind="document", step_id=f"d{n}") for n in range(3)],
        values=[[0.0, 0.0, 0.0]],
        details={"a": {"context": ["x0", "x1", "x2"], "tokens": tokens}},
    )
    return trace, explanation.model_copy(update=changes)


def cite(rows: Sequence[Row], unit: Unit = "sentence", rule: Rule | None = None, **options: Any) -> CitedAnswer:
    return cited_answer(*made(rows), "a", rule=rule, unit=unit, **options)


@pytest.mark.parametrize(
    ("rule", "values", "chosen"),
    [
        (Rule("top", 0.5), [4.0, 2.0, 1.9], (0, 1)),
        (Rule("top", 1.0), [4.0, 4.0, 3.9], (0, 1)),
        (Rule("top", 0.0), [4.0, 0.0, -1.0], (0,)),
        (Rule("top"), [1.0, 2.0, 0.9], (0, 1)),
        # The largest less 5 % of the range of 20: everything from 9 up.
        (Rule("range"), [10.0, 9.0, 8.9, -10.0], (0, 1)),
        (Rule("range", 1.0), [10.0, 0.5, -10.0], (0, 1)),
        (Rule("range", 0.0), [3.0, 5.0, 5.0], (1, 2)),
        # Nothing that spoke against the answer is cited, however close to the largest.
        (Rule("top", 0.5), [-1.0, -2.0], ()),
        (Rule("range"), [-1.0, -1.0], ()),
        (Rule("range"), [0.0, 0.0], ()),
        (Rule("range"), [7.0], (0,)),
        (Rule("range"), [], ()),
    ],
)
def test_rules(rule: Rule, values: list[float], chosen: tuple[int, ...]) -> None:
    assert rule.chosen(values) == chosen


def test_rules_that_there_are_not() -> None:
    with pytest.raises(UnknownNameError, match="citation rule"):
        Rule("best")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"share of the citation rule is 1\.5"):
        Rule("top", 1.5)
    with pytest.raises(UnknownNameError, match="unit of citations"):
        cite([("a", None)], "letter")  # type: ignore[arg-type]


ROWS: list[Row] = [
    ("It", None),
    (" is", (1.0, 0.0, 0.0)),
    (" Li", (0.0, 5.0, 0.0)),
    ("ma", (3.0, 1.0, 0.0)),
    (".", None),
    (" It", None),
    (" snows", None),
    (" in", (0.0, 0.0, 2.0)),
    (" Oslo", (0.0, 0.0, 2.0)),
    (" and Rome", (0.5, 0.0, -3.0)),
    (".", (0.0, 0.1, 0.2)),
    ("", None),
]


def test_each_token_has_citations_of_its_own() -> None:
    found = cite(ROWS)
    assert found.text == "It is Lima. It snows in Oslo and Rome."
    assert [(found.text[item.start : item.end], item.numbers) for item in found.tokens] == [
        (" is", (1,)), (" Li", (2,)), ("ma", (1,)), (" in", (3,)), (" Oslo", (3,)), (" and Rome", (1,)), (".", (3,)),
    ]  # fmt: skip
    assert found.tokens[2].values == (3.0,)


def test_a_sentence_cites_by_the_sum_over_its_tokens() -> None:
    found = cite(ROWS)
    # Sums of the sentences: (4, 6, 0) and (0.5, 0.1, 1.2).
    assert found.marked() == "It is Lima[2]. It snows in Oslo and Rome[3]."
    assert found.citations[0] == Citation(0, 10, (2,), (6.0,))
    assert found.citations[1].values == pytest.approx((1.2,))
    both = cite(ROWS, rule=Rule("top", 0.4))
    assert both.marked() == "It is Lima[1][2]. It snows in Oslo and Rome[1][3]."
    assert both.citations[0].values == (4.0, 6.0)


def test_words_are_whole_and_neighbours_that_cite_the_same_are_one() -> None:
    found = cite(ROWS, "word")
    # "Lima" is (3, 6, 0); "in" and "Oslo" are one citation; a full stop belongs to its word.
    assert found.marked() == "It is[1] Lima[2]. It snows in Oslo[3] and Rome[1]."
    assert [found.text[item.start : item.end] for item in found.citations] == ["is", "Lima", "in Oslo", "Rome"]
    assert found.citations[2].values == (4.0,)


def test_references_are_numbered_as_in_the_prompt_and_share_the_whole() -> None:
    found = cite(ROWS)
    assert [(item.number, item.title, item.kind, item.step_id) for item in found.references] == [
        (1, "Rome", "document", "d0"), (2, "Lima", "document", "d1"), (3, "Oslo", "document", "d2"),
    ]  # fmt: skip
    # Sums over the answer: 4.5, 6.1 and 1.2.
    assert [item.share for item in found.references] == pytest.approx([4.5 / 11.8, 6.1 / 11.8, 1.2 / 11.8])
    assert [item.cited for item in found.references] == [False, True, True]
    nothing = cite([("x", (-1.0, -1.0, 0.0))])
    assert [item.share for item in nothing.references] == [0.0, 0.0, 0.0]
    assert nothing.marked() == "x"
    joint = joint_references([found, nothing, cite([("x", (11.8, 0.0, 0.0))])])
    assert [item.share for item in joint] == pytest.approx([16.3 / 23.6, 6.1 / 23.6, 1.2 / 23.6])
    assert [item.cited for item in joint] == [True, True, True]


def test_chunks_of_a_document_are_one_reference() -> None:
    trace, explanation = made([("x", (1.0, 1.5, 1.0))])
    sources = [
        source.model_copy(update={"step_id": "d1" if source.id == "x1" else "d0"}) for source in explanation.sources
    ]
    found = cited_answer(trace, explanation.model_copy(update={"sources": sources}), "a")
    assert [(item.number, item.title, item.value) for item in found.references] == [(1, "Rome", 2.0), (2, "Lima", 1.5)]
    assert found.marked() == "x[1]"


def test_titles_of_what_has_none() -> None:
    trace, explanation = made([("x", (1.0, 0.0, 0.0))])
    trace.steps[0].data = {}
    sources = [*explanation.sources[:2], explanation.sources[2].model_copy(update={"step_id": None})]
    found = cited_answer(trace, explanation.model_copy(update={"sources": sources}), "a")
    assert [item.title for item in found.references] == ["About Rome.", "Lima", ""]


def test_the_end_of_an_answer_is_not_what_the_context_changed() -> None:
    found = cited_answer(*made([("Rome", (1.0, 0.0, 0.0)), ("", None)], kl=[0.01, 7.0]), "a")
    assert found.changed == 0.01


def test_little_changed_tokens_can_be_left_out() -> None:
    rows: list[Row] = [("Rome", (1.0, 0.0, 0.0)), (" Lima", (0.0, 1.0, 0.0))]
    trace, explanation = made(rows, kl=[0.3, 4.0])
    assert cited_answer(trace, explanation, "a", unit="word").marked() == "Rome[1] Lima[2]"
    found = cited_answer(trace, explanation, "a", unit="word", least=0.5)
    assert found.marked() == "Rome Lima[2]"
    assert len(found.tokens) == 1
    assert found.changed == 4.0


def test_the_threshold_of_several_steps_is_that_of_their_tokens_together() -> None:
    _, explanation = made([("a", None), ("b", None), ("", None)], kl=[1.0, 3.0, 50.0])
    details = {**explanation.details, "b": made([("c", None), ("d", None)], kl=[0.0, 0.0])[1].details["a"]}
    both = explanation.model_copy(update={"targets": ["a", "b"], "values": [[0.0] * 3] * 2, "details": details})
    # 1, 3, 0, 0: mean 1, standard deviation sqrt(6 / 4); a token without text does not count.
    assert shared_threshold(both, ["a", "b"]) == pytest.approx(1 + 1.5**0.5)
    fixed = both.model_copy(update={"parameters": {"deviations": 1.0, "threshold": 0.1}})
    assert shared_threshold(fixed, ["a", "b"]) == 0.0


def test_the_models_own_numbers_are_told_apart() -> None:
    assert cite([("Rome [2]", (1.0, 0.0, 0.0))]).marked() == "Rome [2]⟦1⟧"
    assert cite([("Rome [2] ⟦3⟧", (1.0, 0.0, 0.0))]).marked() == "Rome [2] ⟦3⟧⁅1⁆"
    assert cite([("[x] Rome", (1.0, 0.0, 0.0))]).marked() == "[x] Rome[1]"


def test_what_is_known_of_the_scores_comes_along() -> None:
    assert cite(ROWS).trust.measured is None
    assert cite(ROWS).trust.better_than_random is None
    measured = {
        "sources": 3, "lds": 0.5, "top_k_drop": 1.0, "k": 1, "deletion": 0.1, "insertion": 0.2, "deletion_rank": 1.0,
        "gap": 2.0, "random_gap": 0.0, "random_spread": 0.5, "passes": 9,
    }  # fmt: skip
    trace, explanation = made(ROWS, faithfulness={"targets": {"a": measured}}, parity={"forced": True})
    trust = cited_answer(trace, explanation, "a").trust
    assert trust.measured is not None
    assert trust.measured.lds == 0.5
    assert trust.better_than_random
    assert trust.z == pytest.approx(2 / (0.25 * 7 / 6) ** 0.5)
    assert (trust.forced, trust.retokenised) == (True, False)
    document = cited_answer(trace, explanation, "a").to_document()
    assert document["marked"] == "It is Lima[2]. It snows in Oslo and Rome[3]."
    assert document["trust"]["measured"]["lds"] == 0.5  # type: ignore[index, call-overload]


def test_explanations_that_cannot_be_used() -> None:
    trace, explanation = made(ROWS)
    with pytest.raises(UnknownNameError, match="target of mirage 'b'"):
        cited_answer(trace, explanation, "b")
    with pytest.raises(InputError, match="by mirage, and this one is by flow"):
        cited_answer(trace, explanation.model_copy(update={"method": "flow", "details": {}}), "a")
    for change, message in (
        ({"context": [], "tokens": []}, "read no document or observation"),
        ({"context": ["x9"], "tokens": []}, "names the source 'x9'"),
        ({"context": ["x0"], "tokens": [{"text": 3}]}, "explain the trace again"),
        ({"context": ["x0"], "tokens": [{"text": None, "kl": 1.0, "kept": False}]}, "no tokenizer"),
    ):
        changed = explanation.model_copy(update={"details": {"a": change}})
        with pytest.raises((InputError, TraceFormatError), match=message):
            cited_answer(trace, changed, "a")


TEXTS = st.text(st.sampled_from("ab .,!?\n[]12é日⟦⟧"), max_size=5)
CONTRIBUTIONS = st.none() | st.tuples(*[st.floats(-3, 3) for _ in TITLES])


@given(st.lists(st.tuples(TEXTS, CONTRIBUTIONS), max_size=30), st.sampled_from(["word", "sentence"]))
def test_the_text_without_its_markers_is_the_text(rows: list[Row], unit: Unit) -> None:
    found = cite(rows, unit)
    text = "".join(text for text, _ in rows)
    assert found.text == text
    assert "".join(part for part, _ in found.parts()) == text
    assert [numbers for _, numbers in found.parts() if numbers] == [item.numbers for item in found.citations]
    pair = found.brackets()
    if not re.search(rf"\{pair[0]}\d+\{pair[1]}", text):
        assert re.sub(rf"(?:\{pair[0]}[123]\{pair[1]})", "", found.marked()) == text
    ends = [(item.start, item.end) for item in found.citations]
    assert all(start <= end for start, end in ends)
    assert all(before[1] <= after[0] for before, after in zip(ends, ends[1:], strict=False))
    # Whatever is cited was contributed by a kept token.
    for item in found.citations:
        assert all(value > 0 for value in item.values)
        assert set(item.numbers) <= {1, 2, 3}


def test_a_planted_document_is_cited(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    replica = Replica(needle_model(), tokenizer=load_tokenizer(tmp_path))
    for hidden_in in (0, 3, 5):
        trace = needle_trace(hidden_in=hidden_in)
        report = explain(trace, methods=["mirage"], replica=replica, force=True, probes=[])
        answer = cited_answer(report.trace, report.explanation("mirage"), "a")
        assert [item.number for item in answer.references if item.cited] == [hidden_in + 1]
        assert answer.references[hidden_in].share > 0.8
        assert answer.marked() == f"{answer.text}[{hidden_in + 1}]"
        assert answer.trust.measured is not None
        assert answer.trust.measured.lds is not None


@pytest.mark.model
def test_a_real_answer_cites_the_document_that_it_was_read_from() -> None:
    file = Path(__file__).parents[2] / "examples" / "traces" / "rag" / "rag-currency.json"
    trace = Trace.load(file)
    report = explain(trace, methods=["mirage"], targets="answer", probes=[], faithfulness="none")
    [step_id] = report.targets
    answer = cited_answer(report.trace, report.explanation("mirage"), step_id)
    assert "dorrin" in answer.text
    assert [item.title for item in answer.references if item.cited] == ["Quesmere"]
    assert max(answer.references, key=lambda item: item.share).title == "Quesmere"
