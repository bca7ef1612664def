"""The graph page without a browser."""

from __future__ import annotations

import pytest
from streamlit.testing.v1 import AppTest

from tests.ui import explained, samples
from tests.ui.opened import captions, open_page
from tracer.store import Store
from tracer.trace.trace import Trace
from ui import palette, state
from ui.app_pages import graph as page
from ui.components import graph
from ui.evidence import Evidence
from ui.influence import Influences
from ui.neighbourhood import Structure, neighbourhood


def edges(at: AppTest) -> list[tuple[int, int, str]]:
    """The table of edges, by the numbers of the steps."""
    table = at.dataframe[0].value
    ends = ([int(name.split()[0]) for name in table[side]] for side in ("from", "to"))
    return list(zip(*ends, table["relation"], strict=True))


def test_without_a_run_it_says_where_they_are(store: Store) -> None:
    assert "No run is open" in open_page(state.GRAPH_PAGE).info[0].value


def test_an_unexplained_run_shows_its_structure_and_offers_the_button(store: Store) -> None:
    trace = samples.tot()
    store.import_trace(trace)
    at = open_page(state.GRAPH_PAGE, run=trace.id, step=trace.steps[1].id)
    assert "Nothing says yet" in at.info[0].value
    assert any(button.label == "Explain all steps" for button in at.button)
    assert {kind for _, _, kind in edges(at)} == {"branch", "next", "evaluates"}


def test_influences_have_weights_and_say_what_they_are_worth(store: Store) -> None:
    trace = explained.react()
    store.import_trace(trace)
    at = open_page(state.GRAPH_PAGE, run=trace.id, step=trace.steps[5].id)
    table = at.dataframe[0].value
    read = table[(table["relation"] == "influences") & (table["to"] == "6 = answer")]
    weights = dict(zip(read["from"], read["weight"], strict=True))
    assert weights == pytest.approx({"1 ? question": 0.25, "4 ← observation": -0.75, "5 … thought": 1.0})
    assert "Better than random" in captions(at)


def test_a_method_that_is_not_better_than_random_is_said_to_be_so(store: Store) -> None:
    trace = explained.react()
    ids = [step.id for step in trace.steps]
    trace.explanations[0]["faithfulness"] = explained.measured({ids[5]: 0.1}, better=False)
    store.import_trace(trace)
    assert "not shown to be better than random" in open_page(state.GRAPH_PAGE, run=trace.id).warning[0].value


def test_an_unmeasured_method_is_said_to_be_so(store: Store) -> None:
    trace = explained.react()
    trace.explanations[0]["faithfulness"] = None
    store.import_trace(trace)
    assert "Not measured" in open_page(state.GRAPH_PAGE, run=trace.id).warning[0].value


def test_everything_chosen_is_in_the_url(store: Store) -> None:
    trace = explained.react()
    store.import_trace(trace)
    at = open_page(state.GRAPH_PAGE, run=trace.id, step=trace.steps[2].id)
    at.selectbox(key=page.CONTROL[state.HOPS]).select(3).run()
    at.selectbox(key=page.CONTROL[state.DIRECTION]).select("in").run()
    at.slider(key=page.CONTROL[state.MINIMUM]).set_value(0.5).run()
    at.selectbox(key=page.CONTROL[state.METHOD]).select(page.STRUCTURE_ONLY).run()
    next(button for button in at.button if button.label == "Pin").click().run()
    assert not at.exception
    chosen = {name: at.query_params[name] for name in ("hops", "dir", "min", "method", "pins")}
    assert chosen == {
        "hops": "3",
        "dir": "in",
        "min": "0.5",
        "method": page.STRUCTURE_ONLY,
        "pins": trace.steps[2].id,
    }
    assert {kind for _, _, kind in edges(at)} <= {"next", "observes"}


def test_a_link_decides_what_is_shown(store: Store) -> None:
    trace = explained.react()
    store.import_trace(trace)
    at = open_page(
        state.GRAPH_PAGE,
        run=trace.id,
        step=trace.steps[5].id,
        hops="2",
        dir="in",
        min="0.9",
        pins=f"nothing,{trace.steps[1].id}",
    )
    assert at.selectbox(key=page.CONTROL[state.HOPS]).value == 2
    assert at.selectbox(key=page.CONTROL[state.DIRECTION]).value == "in"
    assert at.slider(key=page.CONTROL[state.MINIMUM]).value == 0.9
    assert "4 steps and 4 edges" in captions(at)


@pytest.mark.parametrize(
    "query",
    [{"hops": "9"}, {"hops": "x"}, {"dir": "up"}, {"min": "nan"}, {"min": "-1"}, {"min": "1e99"}, {"method": "no"}],
)
def test_a_link_that_makes_no_sense_shows_the_default(store: Store, query: dict[str, str]) -> None:
    trace = explained.react()
    store.import_trace(trace)
    at = open_page(state.GRAPH_PAGE, run=trace.id, **query)
    assert at.selectbox(key=page.CONTROL[state.HOPS]).value == state.DEFAULT_HOPS
    assert at.selectbox(key=page.CONTROL[state.DIRECTION]).value == "both"
    assert at.slider(key=page.CONTROL[state.MINIMUM]).value == state.DEFAULT_MINIMUM


def test_an_unknown_step_says_so(store: Store) -> None:
    trace = explained.react()
    store.import_trace(trace)
    at = open_page(state.GRAPH_PAGE, run=trace.id, step="s99")
    assert "does not have" in at.warning[0].value
    assert "Step 6" in at.subheader[0].value


def test_a_pin_of_any_id_survives_the_url(store: Store) -> None:
    trace = explained.small([("a", "b", "next")], steps="ab")
    odd = "a,b %2C ü"
    renamed = [trace.steps[0].model_copy(update={"id": odd}), trace.steps[1]]
    trace = trace.model_copy(update={"steps": renamed, "edges": []})
    store.import_trace(trace)
    at = open_page(state.GRAPH_PAGE, run=trace.id, step=odd)
    next(button for button in at.button if button.label == "Pin").click().run()
    assert any(button.label == "Unpin" for button in at.button)


def test_what_is_left_out_is_counted(store: Store) -> None:
    trace = explained.chain(200)
    store.import_trace(trace)
    at = open_page(state.GRAPH_PAGE, run=trace.id, step="s100", hops="1", min="0")
    assert "150 more steps are within these hops" in captions(at)


def data_of(trace: Trace, centre: int, *, pins: tuple[int, ...] = ()) -> graph.GraphData:
    """What the browser gets for the structure around a step."""
    shown = neighbourhood(Structure.of(trace), None, centre, hops=3, direction="both", pins=pins)
    return graph.graph_data(names_of(Evidence(trace)), shown, centre, unit="", pins=pins, theme="light")


def names_of(evidence: Evidence) -> graph.Names:
    """Names of a trace's steps and parts, the texts of these unknown."""
    return graph.Names(evidence.trace.steps, evidence.parts, ["?" for _ in evidence.parts])


def test_boxes_do_not_overlap() -> None:
    nodes = data_of(samples.tot(), 1)["nodes"]
    assert len(nodes) > 10
    for number, a in enumerate(nodes):
        for b in nodes[number + 1 :]:
            assert abs(a["x"] - b["x"]) >= graph.BOX_WIDTH or abs(a["y"] - b["y"]) >= graph.BOX_HEIGHT


def test_boxes_say_what_they_are_to_a_screen_reader() -> None:
    trace = samples.tot()
    data = data_of(trace, 1, pins=(12,))
    labels = [node["label"] for node in data["nodes"]]
    assert labels[data["centre"]].startswith("Step 2, thought, selected: ")
    assert any(", pruned, " in label for label in labels)
    assert data["nodes"][0]["colour"] == palette.KINDS["question"].light


def test_the_data_of_fifty_steps_are_small() -> None:
    trace = explained.chain(60)
    evidence = Evidence(trace)
    found = Influences.of(evidence, evidence.explanation(explained.METHOD))
    shown = neighbourhood(Structure.of(trace), found, 30, hops=3, direction="both")
    data = graph.graph_data(names_of(evidence), shown, 30, unit="nats", pins=(), theme="dark")
    assert len(data["nodes"]) == 50
    assert len(str(data)) < 60_000
