"""What the pages show and do, without a browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from tests.ui import samples
from tests.ui.opened import APP, captions, open_page
from tracer.engines.models import ResolvedModel
from tracer.jobs.parameters import ExplainParameters
from tracer.store import Store
from tracer.trace.explanation import Explanation
from tracer.trace.trace import Step, Trace
from ui import state
from ui.card_reading import as_explained


def app() -> AppTest:
    """The app on its first page, not yet run."""
    return AppTest.from_file(str(APP), default_timeout=60)


def run_page() -> AppTest:
    """The first page."""
    at = app().run()
    assert not at.exception
    return at


def trace_page(**query: str) -> AppTest:
    """A trace, as a link would open it."""
    return open_page(state.TRACE_PAGE, **query)


def components(at: AppTest, name: str) -> list[dict[str, Any]]:
    """What is sent to the components of that name, in the order of the page."""
    found = [element.proto for element in at.get("bidi_component")]
    return [json.loads(proto.json) for proto in found if proto.component_name == f"tracer_{name}"]


def step_map(at: AppTest) -> dict[str, Any]:
    """What is sent to the step map."""
    return components(at, "step_map")[0]


def texts(at: AppTest) -> list[str]:
    """Everything shown as plain text."""
    return [element.value for element in at.text]


def test_an_empty_store_says_what_to_do(store: Store) -> None:
    at = run_page()
    assert "no runs yet" in at.info[0].value
    assert "make demo" in at.code[0].value


def test_runs_are_listed(store: Store) -> None:
    ids = samples.fill(store)
    at = run_page()
    assert len(at.dataframe[0].value) == len(ids)


def test_filters_narrow_the_list(store: Store) -> None:
    samples.fill(store)
    at = run_page()
    at.selectbox(key=state.AGENT).select("cot").run()
    assert set(at.dataframe[0].value["agent"]) == {"CoT"}
    at.selectbox(key=state.STATUS).select("failed").run()
    assert list(at.dataframe[0].value["status"]) == ["! failed"]


def test_the_outcome_can_be_filtered(store: Store) -> None:
    store.import_trace(samples.react(reference="7"))
    store.import_trace(samples.react(reference="8"))
    at = run_page()
    at.selectbox(key=state.CORRECT).select(False).run()
    assert list(at.dataframe[0].value["correct"]) == ["✗ wrong"]


def test_search_looks_into_steps(store: Store) -> None:
    samples.fill(store)
    at = run_page()
    at.text_input(key=state.SEARCH).set_value('"thought number 777"').run()
    assert list(at.dataframe[0].value["model"]) == ["elsewhere"]


def test_a_search_without_hits_can_be_cleared(store: Store) -> None:
    samples.fill(store)
    at = run_page()
    at.text_input(key=state.SEARCH).set_value("zebra").run()
    assert "No run matches" in at.info[0].value
    next(button for button in at.button if button.label == "Clear the filters").click().run()
    assert len(at.dataframe[0].value) == 6


def test_runs_come_in_pages(store: Store) -> None:
    for number in range(103):
        store.import_trace(samples.long(1).model_copy(update={"id": f"run-{number}"}))
    at = run_page()
    assert len(at.dataframe[0].value) == 100
    next(button for button in at.button if button.label == "Older").click().run()
    assert len(at.dataframe[0].value) == 3
    assert "Runs 101 to 103 of 103" in at.caption[0].value


def test_a_broken_store_is_one_sentence(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.db"
    broken.write_text("this is not a database at all")
    monkeypatch.setenv("TRACER_STORE", str(broken))
    at = run_page()
    assert at.error[0].value == "The store cannot be read."
    assert "not a tracer store" in texts(at)[0]


def upload(at: AppTest, content: bytes) -> AppTest:
    """Drop a file on the runs page."""
    at.file_uploader[0].upload("trace.json", content, "application/json")
    return at.run()


def test_a_dropped_trace_is_imported(store: Store) -> None:
    trace = samples.cot()
    at = upload(run_page(), trace.to_json().encode())
    assert at.success[0].value == "The trace was imported."
    assert store.load(trace.id).to_json() == trace.to_json()


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"{", "invalid JSON"), (b"\xff\xfe\x00", "invalid JSON"), (b'{"schema_version": "9.0"}', "upgrade tracer")],
)
def test_a_file_that_is_no_trace_is_refused(store: Store, content: bytes, expected: str) -> None:
    at = upload(run_page(), content)
    assert at.error[0].value == "The trace was not imported."
    assert any(expected in text for text in texts(at))
    assert store.count() == 0


def test_a_trace_that_is_there_already_can_be_copied(store: Store) -> None:
    trace = samples.cot()
    store.import_trace(trace)
    at = upload(run_page(), trace.to_json().encode())
    assert store.count() == 1
    next(button for button in at.button if button.label == "Import it under a new id").click().run()
    assert store.count() == 2
    assert at.success


def test_a_trace_page_without_a_run_points_to_the_runs(store: Store) -> None:
    assert "No run is open" in trace_page().info[0].value


@pytest.mark.parametrize("run", ["nothing", "a" * 300, "\x00", "'; DROP TABLE traces; --"])
def test_a_link_to_no_run_is_a_sentence(store: Store, run: str) -> None:
    at = trace_page(run=run)
    assert at.error or at.info
    assert not at.dataframe


@pytest.mark.parametrize("index", range(4))
def test_every_agents_trace_is_shown(store: Store, index: int) -> None:
    trace = samples.all_agents()[index]
    store.import_trace(trace)
    at = trace_page(run=trace.id)
    assert step_map(at)["text"].count("") == 0
    assert len([number for number in step_map(at)["number"] if number]) == len(trace.steps)
    assert trace.task.question in texts(at)
    assert trace.outcome.answer in texts(at)
    assert "✓ right" in texts(at)


def test_a_link_to_a_step_shows_it(store: Store) -> None:
    trace = samples.react()
    store.import_trace(trace)
    step = next(step for step in trace.steps if step.kind == "observation")
    at = trace_page(run=trace.id, step=step.id)
    assert "observation" in at.subheader[0].value
    assert at.code[0].value == step.text


def test_a_link_to_an_unknown_step_says_so(store: Store) -> None:
    trace = samples.cot()
    store.import_trace(trace)
    at = trace_page(run=trace.id, step="s99")
    assert "does not have" in at.warning[0].value
    assert "question" in at.subheader[0].value


def test_next_and_previous_go_through_the_steps(store: Store) -> None:
    trace = samples.cot()
    store.import_trace(trace)
    at = trace_page(run=trace.id)
    next(button for button in at.button if button.label == "Next").click().run()
    assert at.query_params["step"] == trace.steps[1].id
    next(button for button in at.button if button.label == "Previous").click().run()
    assert at.query_params["step"] == trace.steps[0].id


def test_steps_can_be_filtered(store: Store) -> None:
    trace = samples.cot_sc()
    store.import_trace(trace)
    at = trace_page(run=trace.id)
    at.selectbox(key=state.BRANCH).select("b2").run()
    shown = step_map(at)
    assert shown["number"] == ["4", "5"] and shown["groups"][0]["label"] == "Branch b2: 2 steps, votes 8"
    at.multiselect(key=state.KINDS).select("answer").run()
    assert step_map(at)["text"] == ["The answer is 8."]


def test_tokens_of_the_step_are_shown(store: Store) -> None:
    trace = samples.cot()
    store.import_trace(trace)
    step = next(step for step in trace.steps if step.call_id is not None)
    at = trace_page(run=trace.id, step=step.id)
    tables = [frame.value for frame in at.dataframe]
    assert step.start is not None and step.end is not None
    assert any(
        list(table.columns[:2]) == ["position", "id"] and len(table) == step.end - step.start for table in tables
    )


def test_a_failed_run_says_why(store: Store) -> None:
    store.import_trace(samples.failed())
    at = trace_page(run="failed-run")
    assert "failed" in at.warning[0].value
    assert "the server died" in texts(at)


def test_a_run_under_way_is_followed_and_then_ends(store: Store) -> None:
    with samples.running(store) as run:
        at = trace_page(run=run.trace_id)
        assert "under way" in at.info[0].value
        run.step("thought", "Not yet.")
        at.run()
        assert step_map(at)["text"] == ["Are we there yet?", "Not yet."]
    at.run()
    assert not at.info


def test_a_long_trace_is_one_small_list(store: Store) -> None:
    store.import_trace(samples.long())
    at = trace_page(run="long-run", step="s777")
    assert len(step_map(at)["text"]) == 1000
    assert components(at, "relay")[0]["select"] == 776
    assert len(json.dumps(step_map(at))) < 200_000
    assert len(at.main.children) < 60


def test_a_trace_without_steps_is_shown(store: Store) -> None:
    store.import_trace(samples.long(0))
    assert any("no steps" in info.value for info in trace_page(run="long-run").info)


@pytest.mark.parametrize("text", samples.CORPUS)
def test_hostile_text_stays_text(store: Store, text: str) -> None:
    store.import_trace(samples.hostile(text))
    runs, trace = run_page(), trace_page(run="hostile", step=f"a{text}")
    for at in (runs, trace):
        rendered = [*at.markdown, *at.caption, *at.title, *at.subheader, *at.error, *at.warning, *at.info, *at.success]
        labels = [widget.label for widget in (*at.button, *at.selectbox, *at.multiselect, *at.expander)]
        assert not [value for value in [element.value for element in rendered] + labels if "example" in value]
    assert text in texts(trace)


def test_an_imported_trace_survives_being_shown(store: Store) -> None:
    """The pages share the loaded trace, so drawing it must not change it."""
    trace = samples.tot()
    store.import_trace(trace)
    trace_page(run=trace.id)
    assert Trace.from_json(trace.to_json()) == store.load(trace.id)


def button(at: AppTest, label: str) -> Any:
    """The button of that label."""
    return next(found for found in at.button if found.label == label)


def test_the_copied_answer_leads_to_the_exemplar(store: Store) -> None:
    """The story of the main job: the answer's sources, and what the prompt's exemplar says."""
    trace = samples.add_explained(store)
    at = trace_page(run=trace.id, step=samples.ANSWER, method="attention_resolvent")
    listed = components(at, "source_list")[0]
    first = listed["rows"][0]
    assert listed["looks"][first["look"]]["label"] == "exemplar" and first["open"]
    shown = step_map(at)
    exemplar = next(number for number, kind in enumerate(shown["kind"]) if shown["looks"][kind]["label"] == "exemplar")
    assert shown["number"][exemplar] == "" and shown["fallback"] == shown["number"].index("6")
    at = trace_page(run=trace.id, part="5", method="attention_resolvent")
    assert "exemplar" in at.subheader[0].value
    assert components(at, "relay")[0]["select"] == exemplar


@pytest.mark.model
def test_the_exemplar_can_be_read(store: Store, demo_model: ResolvedModel) -> None:
    trace = samples.add_explained(store)
    at = trace_page(run=trace.id, step=samples.ANSWER, method="attention_resolvent")
    assert "answer is Norway" in components(at, "source_list")[0]["rows"][0]["text"]
    at = trace_page(run=trace.id, part="5")
    assert "She was born in Oslo, Norway." in at.code[0].value


def test_without_its_tokenizer_a_part_is_shown_as_ids(store: Store) -> None:
    trace = samples.add_explained(store)
    unknown = trace.model_copy(update={"id": "unknown", "model": trace.model.model_copy(update={"name": "no/model"})})
    store.import_trace(unknown)
    at = trace_page(run="unknown", part="5")
    assert at.code[0].value.split() == [str(found) for found in trace.calls[0].prompt_token_ids[86:241]]
    assert any("tracer models fetch no/model" in text for text in texts(at))


def test_the_method_is_in_the_url(store: Store) -> None:
    trace = samples.add_explained(store)
    at = trace_page(run=trace.id, step=samples.ANSWER)
    assert at.selectbox(key="card_method").value == "leave_one_out"
    at.selectbox(key="card_method").select("alti_logit").run()
    assert at.query_params["method"] == "alti_logit"
    assert step_map(at)["method"].startswith("alti_logit")
    at = trace_page(run=trace.id, step=samples.ANSWER, method="nothing")
    assert at.selectbox(key="card_method").value == "leave_one_out"


def test_a_method_that_is_not_better_than_random_says_so(store: Store) -> None:
    trace = samples.add_explained(store)
    at = trace_page(run=trace.id, step=samples.ANSWER)
    assert any("is not shown to be better than random" in found.value for found in at.warning)
    assert "+0.86" in texts(at)


def explained(store: Store, **faithfulness: Any) -> Trace:
    """Import a run with a made-up explanation of its last two steps."""
    trace = samples.cot()
    sources = [{"id": "x0", "kind": "question", "step_id": "s1"}, {"id": "x1", "kind": "thought", "step_id": "s2"}]
    document = samples.explanation(
        ["s2", "s3"], sources, [[1.0, 0.0], [3.0, -1.0]], method="grad_x_input", **faithfulness
    )
    done = trace.model_copy(update={"explanations": [document]})
    store.import_trace(done)
    return done


def test_what_was_not_measured_says_so_and_offers_it(store: Store) -> None:
    trace = explained(store)
    at = trace_page(run=trace.id, step="s3")
    assert any("was not measured" in found.value for found in at.warning)
    assert button(at, "Measure it")
    rows = components(at, "source_list")[0]["rows"]
    assert [(row["share"], row["sign"], row["where"]) for row in rows] == [(0.75, 1, "step 1"), (0.25, -1, "step 2")]


@pytest.mark.parametrize(("mark", "words"), [("forced", "another model"), ("retokenised", "Tokenised again")])
def test_scores_of_something_else_than_what_ran_are_marked_on_every_page(store: Store, mark: str, words: str) -> None:
    trace = explained(store, faithfulness=samples.faithful("s3", better=True), parity={mark: True})
    for name in (state.TRACE_PAGE, state.GRAPH_PAGE, state.COMPARE_PAGE):
        at = open_page(name, run=trace.id, step="s3", method="grad_x_input")
        assert any(words in found.value for found in at.error), name


def test_measuring_goes_on_with_the_explanation_that_is_shown(store: Store) -> None:
    trace = explained(store, target_function="contrast", foil=9, seed=4, chunk_tokens=8, parity={"forced": True})
    (document,) = trace.explanations
    explanation = Explanation.read({**document, "replica": {"name": "other", "dtype": "bfloat16"}})
    asked = ExplainParameters.model_validate({"trace": trace.id, "targets": ["s3"], **as_explained(explanation)})
    assert (asked.methods, asked.parameters) == (["grad_x_input"], {"grad_x_input": explanation.parameters})
    assert (asked.target_function, asked.foil, asked.seed, asked.chunk_tokens) == ("contrast", 9, 4, 8)
    assert (asked.replica, asked.dtype, asked.force) == ("other", "bfloat16", True)
    assert any("contrast with token 9" in text for text in texts(trace_page(run=trace.id, step="s3")))


def test_citations_are_numbers_behind_the_text_with_the_documents_below(store: Store) -> None:
    trace = samples.react()
    *_, seen, answer = (step for step in trace.steps if step.kind in ("observation", "answer"))
    trace = trace.model_copy(update={"explanations": [mirage(seen, answer)]})
    store.import_trace(trace)
    at = trace_page(run=trace.id, step=answer.id)
    assert any(block.value == "In Rome[1]." for block in at.code)
    table = next(frame.value for frame in at.dataframe if "cited" in frame.value)
    assert (table["number"][0], table["cited"][0], table["share"][0]) == (1, True, 1.0)
    assert "KL divergence of 4 nats" in captions(at)
    assert any("was not measured" in found.value for found in at.warning)


def mirage(seen: Step, answer: Step) -> Any:
    """What MIRAGE would have found: one word of the answer goes back to the observation."""
    tokens = [
        {"index": 0, "token_id": 1, "text": "In", "kl": 0.1, "kept": False},
        {"index": 1, "token_id": 2, "text": " Rome", "kl": 4.0, "kept": True, "sources": {"x0": 2.0}},
        {"index": 2, "token_id": 3, "text": ".", "kl": 0.1, "kept": False},
    ]
    return samples.explanation(
        [answer.id],
        [{"id": "x0", "kind": "observation", "step_id": seen.id}],
        [[2.0]],
        method="mirage",
        details={answer.id: {"context": ["x0"], "tokens": tokens}},
    )


def test_a_step_that_read_documents_can_be_cited(store: Store) -> None:
    trace = samples.react()
    store.import_trace(trace)
    answer = next(step for step in trace.steps if step.kind == "answer")
    at = trace_page(run=trace.id, step=answer.id)
    assert button(at, "Cite")


def test_a_measured_method_that_is_better_says_so(store: Store) -> None:
    trace = explained(store, faithfulness=samples.faithful("s3", better=True))
    at = trace_page(run=trace.id, step="s3")
    assert any("costs the model more than random removals" in found.value for found in at.success)
    at = trace_page(run=trace.id, step="s2")
    assert any("Not measured for this step" in found.value for found in at.caption) and "step 3" in texts(at)


def test_a_step_that_was_read_names_its_readers(store: Store) -> None:
    trace = explained(store)
    at = trace_page(run=trace.id, step="s1")
    assert any("Read by" in found.value for found in at.markdown)
    assert [row["where"] for row in components(at, "source_list")[0]["rows"]] == ["step 2", "step 3"]


def test_a_run_that_was_not_explained_offers_it(store: Store) -> None:
    trace = samples.cot()
    store.import_trace(trace)
    at = trace_page(run=trace.id, step="s3")
    assert any("not explained yet" in found.value for found in at.info)
    assert any("No truth probe was made" in found.value for found in at.info)
    assert button(at, "Explain") and button(at, "Make the truth probes")
    assert at.multiselect(key="explain_methods").value == ["at2", "two_hop"]
    assert button(at, "Explain this run")


def test_new_explanations_are_shown_without_a_restart(store: Store) -> None:
    trace = samples.cot()
    store.import_trace(trace)
    at = trace_page(run=trace.id, step="s3")
    sources = [{"id": "x0", "kind": "question", "step_id": "s1"}]
    store.put_document(trace.id, "explanation", key="k", document=samples.explanation(["s3"], sources, [[1.0]]))
    at.run()
    assert components(at, "source_list")[0]["rows"][0]["where"] == "step 1"


def test_truth_stands_beside_its_baselines(store: Store) -> None:
    trace = samples.cot()
    worth = {"accuracy": [0.9, 0.8, 0.95], "steps": {"auroc": [0.6, 0.5, 0.7], "best_baseline": "mean_logprob",
             "best_baseline_auroc": [0.65, 0.6, 0.7]}}  # fmt: skip
    score = samples.judgement(
        "s3", probability=0.2, low=0.1, high=0.3, flags=["not_better_than_logprob", "brand_new"], held_out=worth
    )
    store.import_trace(trace.model_copy(update={"probes": [score]}))
    at = trace_page(run=trace.id, step="s3")
    shown = texts(at)
    assert {"0.20", "0.10 to 0.30", "-0.10"} <= set(shown)
    assert any("takes it for false" in found.value for found in at.warning)
    assert any("not shown to be better than the log-probability" in text for text in shown)
    assert "! brand_new" in shown
    assert any("accuracy 0.90 [0.80 0.95]" in text for text in shown)
    assert any("AUROC 0.60 [0.50 0.70], mean_logprob alone 0.65" in text for text in shown)
    assert step_map(at)["truth"][step_map(at)["number"].index("3")] == [20, 10, 30]


def test_a_tree_folds_what_it_gave_up(store: Store) -> None:
    trace = samples.tot()
    store.import_trace(trace)
    shown = step_map(trace_page(run=trace.id))
    folded = [group["label"] for group in shown["groups"] if group["folded"]]
    assert folded[1:] == ["Given up: steps 3 to 4", "Given up: step 13, (6 - 4) * (4 + 8) = 24"]
    assert max(shown["depth"]) == 2


def tokens_page(**query: str) -> AppTest:
    """The tokens of a run, as a link would open them."""
    return open_page(state.TOKENS_PAGE, **query)


def test_tokens_of_the_answers_call_are_shown(store: Store) -> None:
    trace = samples.add_explained(store)
    at = tokens_page(run=trace.id, method="grad_x_input")
    [data], [news] = components(at, "token_map"), components(at, "relay")
    assert len(data["texts"]) == 501 and len(data["logprobs"]) == 34
    assert news["grain"] == "token" and news["pin"] is None
    assert not any("only the scores of the step as a whole" in found.value for found in at.caption)
    assert any("is not shown to be better than random" in found.value for found in at.warning)


def test_a_link_pins_a_token(store: Store) -> None:
    trace = samples.add_explained(store)
    link = {"run": trace.id, "step": "s6", "method": "grad_x_input"}
    at = tokens_page(**link, **{"token": "5", "grain": "word"})
    news = components(at, "relay")[0]
    assert news["grain"] == "word" and news["pin"]["asked"] == [496, 497]
    at = tokens_page(**link, **{"token": "500", "grain": "letters"})
    news = components(at, "relay")[0]
    assert news["grain"] == "token" and news["pin"] is None


def test_steps_without_token_scores_say_so_and_offer_them(store: Store) -> None:
    trace = samples.add_explained(store)
    at = tokens_page(run=trace.id, step="s5", method="grad_x_input")
    assert any("Of step 5 only the scores of the step as a whole" in found.value for found in at.caption)
    assert button(at, "Explain every token of it")


def test_lost_token_scores_are_a_sentence(store: Store) -> None:
    trace = samples.add_explained(store)
    store.arrays.delete(trace.id)
    at = tokens_page(run=trace.id)
    assert any("cannot be shown" in found.value for found in at.warning)
    assert any("explain the trace again" in text for text in texts(at))
    assert len(components(at, "token_map")[0]["texts"]) == 501


@pytest.mark.parametrize("index", range(4))
def test_every_agents_tokens_are_shown(store: Store, index: int) -> None:
    trace = samples.all_agents()[index]
    store.import_trace(trace)
    at = tokens_page(run=trace.id)
    assert components(at, "token_map")[0]["runs"][-1][4] == "written"
    assert any("not explained yet" in found.value for found in at.info)


def test_a_call_that_no_step_was_cut_from_can_be_chosen(store: Store) -> None:
    trace = samples.cot()
    extra = trace.calls[0].model_copy(update={"id": "unused"})
    store.import_trace(trace.model_copy(update={"calls": [extra, *trace.calls]}))
    at = tokens_page(run=trace.id)
    [chosen] = [box for box in at.selectbox if box.label == "Call"]
    assert "no step" in chosen.options[0] and chosen.value
    chosen.set_value(0).run()
    assert at.query_params["call"] == "1" and "step" not in at.query_params
    [chosen] = [box for box in at.selectbox if box.label == "Call"]
    assert chosen.value == 0
    chosen.set_value(1).run()
    assert "call" not in at.query_params and at.query_params["step"]
    at = tokens_page(run=trace.id, call="99")
    assert next(box for box in at.selectbox if box.label == "Call").value


def test_a_run_without_tokens_says_so(store: Store) -> None:
    store.import_trace(samples.long(3))
    assert any("no tokens to show" in found.value for found in tokens_page(run="long-run").info)
    assert any("No run is open" in found.value for found in tokens_page().info)


@pytest.mark.parametrize("text", samples.CORPUS)
def test_hostile_text_stays_text_among_tokens(store: Store, text: str) -> None:
    store.import_trace(samples.hostile(text))
    at = tokens_page(run="hostile", method=text)
    rendered = [*at.markdown, *at.caption, *at.title, *at.subheader, *at.error, *at.warning, *at.info, *at.success]
    labels = [widget.label for widget in (*at.button, *at.selectbox, *at.multiselect, *at.expander)]
    assert not [value for value in [element.value for element in rendered] + labels if "example" in value]
