"""Two runs beside each other, and how far a run's explanations can be trusted, without a browser."""

from __future__ import annotations

import pytest

from tests.ui import explained, samples
from tests.ui.opened import captions, open_page
from tracer.store import Store
from tracer.trace.trace import Trace
from ui import state, trust
from ui.app_pages import compare as page
from ui.evidence import Evidence
from ui.trust import Judged


def judged(trace: Trace) -> Judged:
    """What is known of a trace's explanations."""
    evidence = Evidence(trace)
    return Judged.of({name: evidence.explanation(name) for name in evidence.methods})


def test_without_a_run_it_says_where_they_are(store: Store) -> None:
    assert "No run is open" in open_page(state.COMPARE_PAGE).info[0].value


def test_alone_it_says_how_to_get_another_run(store: Store) -> None:
    trace = samples.cot()
    store.import_trace(trace)
    at = open_page(state.COMPARE_PAGE, run=trace.id)
    assert "no other run" in at.info[0].value
    assert "not explained yet" in at.info[1].value
    assert any(button.label == "Explain the answer and measure" for button in at.button)


def test_two_runs_stand_side_by_side(store: Store) -> None:
    first, second = samples.cot(), samples.failed()
    second.steps[1].text = "Second, 3 + 4 = 8. "
    ids = [store.import_trace(trace) for trace in (first, second)]
    at = open_page(state.COMPARE_PAGE, run=ids[0], **{"with": ids[1]})
    facts = at.dataframe[0].value.set_index("what")
    assert list(facts.loc["answer"]) == ["7", "none", "≠"]
    assert list(facts.loc["question"])[2] == "="
    steps = at.dataframe[1].value
    assert list(steps["difference"]) == ["= same", "≠ text", "= same", "= same"]
    assert "first differ in row 2" in captions(at)
    assert "- First," in at.code[-1].value and "+ Second," in at.code[-1].value
    assert "- 7." in at.code[-1].value and "+ 8." in at.code[-1].value
    assert steps["first_logprob"].notna().any()


def test_a_second_run_is_chosen_and_put_in_the_url(store: Store) -> None:
    first, second = samples.cot(), samples.react()
    ids = [store.import_trace(trace) for trace in (first, second)]
    at = open_page(state.COMPARE_PAGE, run=ids[0])
    assert at.selectbox(key=page.PICKER).value is None
    at.selectbox(key=page.PICKER).select(ids[1]).run()
    assert not at.exception
    assert at.query_params["with"] == ids[1]
    assert len(at.dataframe) >= 2


def test_a_second_run_that_is_not_there_is_a_sentence(store: Store) -> None:
    ids = [store.import_trace(trace) for trace in (samples.cot(), samples.react())]
    at = open_page(state.COMPARE_PAGE, run=ids[0], **{"with": "nothing"})
    assert "not there" in at.warning[0].value


def test_a_run_compared_with_itself_offers_others(store: Store) -> None:
    trace = samples.cot()
    store.import_trace(trace)
    store.import_trace(samples.react())
    assert open_page(state.COMPARE_PAGE, run=trace.id, **{"with": trace.id}).selectbox(key=page.PICKER).value is None


def test_a_long_comparison_comes_in_pages(store: Store) -> None:
    first, second = samples.long(250), samples.long(250).model_copy(update={"id": "other"})
    for trace in (first, second):
        store.import_trace(trace)
    at = open_page(state.COMPARE_PAGE, run="long-run", **{"with": "other"})
    assert len(at.dataframe[1].value) == page.PAGE_SIZE
    assert at.success[0].value == "The steps of both runs are the same."
    next(button for button in at.button if button.label == "Later").click().run()
    assert at.dataframe[1].value["first"].iloc[0] == page.PAGE_SIZE + 1


def test_the_verdict_names_methods_in_sentences(store: Store) -> None:
    trace = explained.judged()
    store.import_trace(trace)
    at = open_page(state.COMPARE_PAGE, run=trace.id)
    assert "not shown to be better than a random order" in at.warning[0].value
    assert "Not measured" in at.warning[1].value
    assert {"attention", "alti"} <= {element.value for element in at.text}
    assert any(button.label == "Measure the answer's explanations" for button in at.button)


def test_all_methods_better_than_random_is_said_too(store: Store) -> None:
    trace = explained.react()
    store.import_trace(trace)
    assert any("All methods" in item.value for item in open_page(state.COMPARE_PAGE, run=trace.id).success)


def test_methods_have_means_of_what_was_measured_and_their_cost() -> None:
    table = trust.method_table(judged(explained.judged())).set_index("method")
    assert list(table.index)[0] == "grad_x_input"
    good = table.loc["grad_x_input"]
    assert (good["lds"], good["targets"], good["seconds"], good["backward"]) == (pytest.approx(0.7), 2, 2.5, 4)
    assert table.loc["attention", "lds"] == pytest.approx(-0.2)
    assert list(table["verdict"]) == [trust.BETTER, trust.NOT_BETTER, trust.UNMEASURED]


def test_agreement_is_a_square_with_ones_on_its_diagonal() -> None:
    table = trust.agreement_table(judged(explained.judged())).pivot(index="row", columns="column", values="value")
    assert table.to_numpy().tolist() == [[1.0, 0.5], [0.5, 1.0]]


def test_curves_stand_beside_random_orders(store: Store) -> None:
    trace = explained.judged()
    target = trace.steps[5].id
    curves = judged(trace).curves(target)
    assert list(curves) == ["grad_x_input"]
    table = trust.curve_table(curves["grad_x_input"], "deletion").pivot(index="x", columns="series", values="y")
    assert list(table["this method"]) == [-1.0, -4.0, -6.0]
    assert list(table["random orders"]) == [-1.0, -2.0, -6.0]
    store.import_trace(trace)
    at = open_page(state.COMPARE_PAGE, run=trace.id)
    assert at.selectbox(key=page.CURVES_METHOD).options == ["grad_x_input"]
    assert len(at.get("vega_lite_chart")) == 4


def test_where_curves_were_not_kept_their_areas_are_shown(store: Store) -> None:
    trace = explained.judged()
    for document in trace.explanations:
        for target in ((document["faithfulness"] or {}).get("targets") or {}).values():  # type: ignore[union-attr]
            target["curves"] = None  # type: ignore[call-overload,index]
    store.import_trace(trace)
    at = open_page(state.COMPARE_PAGE, run=trace.id)
    assert "were not kept" in captions(at)
    assert len(at.get("vega_lite_chart")) == 3
    table = trust.area_table(judged(trace), trace.steps[5].id)
    assert set(zip(table["name"], table["group"], table["value"], strict=True)) >= {
        ("attention", "deletion", 0.5),
        ("grad_x_input", "insertion", 0.25),
    }


def test_the_random_baseline_is_named_as_such() -> None:
    trace = explained.react()
    ids = [step.id for step in trace.steps]
    document = explained.explanation({ids[5]: {ids[0]: 1.0}}, method="random", key="e")
    document["faithfulness"] = explained.measured({ids[5]: 0.0}, better=False)
    found = judged(trace.model_copy(update={"explanations": [*trace.explanations, document]}))
    assert found.not_better == []
    assert list(trust.method_table(found)["verdict"]) == [trust.BETTER, trust.BASELINE]


def test_a_faithfulness_of_another_program_counts_as_unmeasured() -> None:
    trace = explained.react()
    trace.explanations[0]["faithfulness"] = {"targets": {"s6": {"fidelity": 1.0}}}
    assert judged(trace).unmeasured == [explained.METHOD]
