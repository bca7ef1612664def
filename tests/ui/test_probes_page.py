"""The probes page without a browser: what a model's probes are worth, said as far as the numbers prove it."""

from __future__ import annotations

from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from tests.ui import samples
from tests.ui.opened import open_page
from tests.ui.probed import RELIABILITY, evaluation, keep, mapped, measured, probe, report, scored, worth
from tracer.store import Store
from tracer.trace.layer_map import layer_maps
from tracer.trace.probe_report import ProbeReport
from ui import probing, state


def labels(at: AppTest) -> set[str]:
    """What buttons say."""
    return {button.label for button in at.button}


def test_without_probes_it_offers_to_make_them(store: Store) -> None:
    at = open_page(state.PROBES_PAGE)
    assert "no truth probes yet" in at.info[0].value
    assert "Make the truth probes" in labels(at)


def test_a_run_whose_model_has_no_probe_offers_to_make_one(store: Store) -> None:
    keep(ProbeReport(probes=(probe(0.75),)), weights="cd" * 32)
    trace = scored()
    store.import_trace(trace)
    at = open_page(state.PROBES_PAGE, run=trace.id)
    assert "no truth probe for the model of this run" in at.info[0].value
    assert at.selectbox[0].value is None


def test_an_unscored_run_offers_to_score_it(store: Store) -> None:
    keep(ProbeReport(probes=(probe(0.75),)))
    trace = samples.cot()
    trace.model.name = "demo"
    store.import_trace(trace)
    at = open_page(state.PROBES_PAGE, run=trace.id)
    assert any("not scored yet" in item.value for item in at.info)
    assert "Score the steps" in labels(at)


def test_the_evidence_card_offers_what_is_missing(store: Store) -> None:
    trace = samples.cot()
    trace.model.name = "demo"
    store.import_trace(trace)
    at = open_page(state.TRACE_PAGE, run=trace.id, step="s3")
    assert any("No truth probe was made for the model" in item.value for item in at.info)
    assert "Make the truth probes" in labels(at) and "Score it" not in labels(at)
    keep(ProbeReport(probes=(probe(0.75),)))
    at = open_page(state.TRACE_PAGE, run=trace.id, step="s3")
    assert any("not scored by a truth probe yet" in item.value for item in at.info)
    assert "Score it" in labels(at) and "Make the truth probes" not in labels(at)


def test_scores_of_whole_steps_stand_beside_their_baselines(store: Store) -> None:
    keep(ProbeReport(probes=(probe(0.75),)))
    trace = scored()
    store.import_trace(trace)
    table = open_page(state.PROBES_PAGE, run=trace.id).dataframe[0].value
    assert list(table["step"]) == [2]
    row = table.iloc[0]
    assert (row["probability"], row["low"], row["high"], row["logprob"], row["token"]) == (0.25, 0.125, 0.5, -0.5, 7)


def test_a_probe_that_beats_everything_is_said_to(store: Store) -> None:
    keep(ProbeReport(probes=(probe(0.75),)))
    at = open_page(state.PROBES_PAGE)
    assert any("Better than every baseline" in item.value for item in at.success)
    assert not at.warning


def test_a_probe_that_does_not_is_said_to_prove_little(store: Store) -> None:
    keep(ProbeReport(probes=(probe(0.65),)))
    at = open_page(state.PROBES_PAGE)
    assert "prove little" in at.warning[0].value
    assert "TF-IDF of the text" in [element.value for element in at.text]


@pytest.mark.parametrize(
    ("auroc", "rivals", "better", "rival"),
    [
        (0.75, [0.6], True, None),
        (0.64, [0.6], False, "baseline 0"),
        (0.54, [], False, "chance"),
        (0.56, [0.3], True, None),
        (None, [0.6], False, "chance"),
        (0.75, [0.6, 0.9, None], False, "baseline 1"),
    ],
)
def test_a_verdict_goes_by_the_interval(
    auroc: float | None, rivals: list[float | None], better: bool, rival: str | None
) -> None:
    others = [measured(f"baseline {number}", value) for number, value in enumerate(rivals)]
    assert probing.verdict(measured("probe", auroc), others) == (better, rival)


@pytest.mark.parametrize(("over", "adds", "good"), [(0.1, 0.1, 2), (0.01, 0.1, 1), (0.01, 0.0, 0)])
def test_a_probe_of_steps_is_compared_with_logprobs(store: Store, over: float, adds: float, good: int) -> None:
    keep(ProbeReport(probes=(probe(0.75, on_steps=worth(over=over, adds=adds)),)))
    at = open_page(state.PROBES_PAGE)
    said = [item.value for item in at.success if "tells right" in item.value or "adds to" in item.value]
    assert len(said) == good
    assert len(at.warning) == 2 - good


def test_an_evaluation_is_drawn_whole(store: Store) -> None:
    keep(report())
    at = open_page(state.PROBES_PAGE)
    # Held out, reliability; layers, kinds, polarity, reliability, topics; steps; first mistakes.
    assert len(at.get("vega_lite_chart")) == 9
    assert any("its own steps tell nothing" in item.value for item in at.caption)
    assert "a note on what was left out" in [element.value for element in at.text]


def test_without_an_evaluation_it_says_how_to_get_one(store: Store) -> None:
    keep(ProbeReport(probes=(probe(0.75),)))
    at = open_page(state.PROBES_PAGE)
    assert any("not compared" in item.value for item in at.info)
    assert "Compare kinds of probes" in labels(at)


def test_tables_hold_the_reports_numbers() -> None:
    found = evaluation()
    layers = probing.layers_table(found).set_index(["series", "x"])
    assert layers.loc[("ttpd", 1), "y"] == 0.75 and layers.loc[("ttpd", 1), "low"] == pytest.approx(0.7)
    topics = probing.topics_table(found).pivot(index="row", columns="column", values="value")
    assert topics.loc["elements", "ttpd"] == 0.75 and topics.loc["cities", "shuffled labels"] == 0.5
    points = probing.projection_table(found)
    assert list(points["what"]) == ["true", "false"] and list(points["kind"]) == ["affirmative", "negated"]
    assert list(probing.reliability_table(RELIABILITY)["share"]) == [0.5, 1.0]
    held = probing.held_out_table(probe(0.75)).set_index("name")
    assert list(held["group"]) == [probing.PROBE, probing.BASELINE, probing.CONTROL]
    assert held.loc["logistic_l2", "value"] == 0.75
    assert "length" not in set(probing.steps_worth_table(worth(over=0, adds=0))["name"])


def test_the_report_of_a_run_is_that_of_its_weights(store: Store) -> None:
    own = keep(ProbeReport(created_at="2026-01-01T00:00:00+00:00"))
    other = keep(ProbeReport(created_at="2026-02-01T00:00:00+00:00"), weights="cd" * 32)
    assert probing.report_for(scored(), [other, own]) == own
    assert probing.report_for(scored("ef" * 32), [other, own]) is None
    named = samples.cot()
    named.model.name = "demo"
    assert probing.report_for(named, [other, own]) == other


def test_a_broken_report_is_passed_over(store: Store, tmp_path: Path) -> None:
    keep(ProbeReport(probes=(probe(0.75),)))
    (tmp_path / "probes" / "x.report.json").write_text("{")
    assert len(open_page(state.PROBES_PAGE).selectbox[0].options) == 1


def test_layers_by_token_are_drawn_with_what_each_layer_is_worth(store: Store) -> None:
    trace = mapped()
    store.import_trace(trace)
    at = open_page(state.PROBES_PAGE, run=trace.id)
    assert any("best layer is 1 with a held-out AUROC of 0.75" in item.value for item in at.caption)
    assert len(at.get("vega_lite_chart")) == 2
    own = layer_maps(trace)[trace.steps[-1].id]
    table = probing.layer_map_table(own, ["a", "a", "b", "c"][: len(own.values[0])])
    assert table["token"].nunique() == len(own.values[0])
    assert set(table.loc[table["layer"] == 1, "value"]) == {-1.25}


def test_without_a_map_it_says_how_to_get_one(store: Store) -> None:
    trace = scored()
    store.import_trace(trace)
    assert "Read all layers" in labels(open_page(state.PROBES_PAGE, run=trace.id))


def test_a_step_that_was_not_read_can_be(store: Store) -> None:
    trace = mapped()
    store.import_trace(trace)
    at = open_page(state.PROBES_PAGE, run=trace.id, step=trace.steps[1].id)
    assert any("selected step was not read" in item.value for item in at.caption)
    assert "Read all layers" in labels(at)


@pytest.mark.parametrize("changes", [{"start": 10_000}, {"call_id": "nothing"}, {"completion": 9}])
def test_a_map_of_other_tokens_is_a_sentence(store: Store, changes: dict[str, object]) -> None:
    trace = mapped(**changes)
    store.import_trace(trace)
    assert any("cannot be shown" in item.value for item in open_page(state.PROBES_PAGE, run=trace.id).error)


def test_values_out_of_the_probes_range_are_said_to_be_so(store: Store) -> None:
    trace = mapped()
    count = len(layer_maps(trace)[trace.steps[-1].id].values[0])
    near = layer_maps(trace)[trace.steps[-1].id]
    far = near.model_copy(update={"values": [[0.5] * count, [-20.0] * count]})
    assert (probing.map_width(near), probing.share_far(near)) == (probing.FAR, 0.0)
    assert (probing.map_width(far), probing.share_far(far)) == (20.0, 0.5)
    store.import_trace(trace.model_copy(update={"probes": [far.model_dump(mode="json")]}))
    assert any(
        "unlike what the probes learnt from" in item.value
        for item in open_page(state.PROBES_PAGE, run=trace.id).warning
    )


@pytest.mark.parametrize(("auroc", "warned"), [(0.75, False), (0.53, True)])
def test_an_accuracy_at_chance_is_said_to_be_so(store: Store, auroc: float, warned: bool) -> None:
    keep(ProbeReport(probes=(probe(auroc),)))
    at = open_page(state.PROBES_PAGE)
    assert any("not shown to be above chance" in item.value for item in at.warning) == warned
    expected = f"accuracy {auroc - 0.02:.3f} [{auroc - 0.07:.3f}, {auroc + 0.03:.3f}], AUROC {auroc:.3f}"
    assert any(element.value.startswith(expected) for element in at.text)
