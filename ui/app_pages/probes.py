"""Truth probes: what they are worth on a model, and what they say about the steps of the open run."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from tracer.errors import TracerError
from tracer.store.probe_reports import list_reports
from tracer.trace.layer_map import layer_maps
from tracer.trace.probe_report import Evaluation, FirstErrors, ProbeReport, ProbeSummary, StepEvaluation, StepWorth
from tracer.trace.trace import Trace
from ui import charts, elements, opened, palette, payload, probing, state
from ui.jobs import start_button

MODEL = "probes_model"
METHOD = "probes_method"
SCORED_BY = "probes_scored_by"
MAPPED = "probes_mapped"
MOSTLY = 0.25
"""Share of values out of the probes' range from which on the page says so."""
DEFAULT_MODEL = "demo"
AUROC = "AUROC: how often a true one scores above a false one"
SCORE_COLUMNS = {
    "step": st.column_config.NumberColumn("#", width=45),
    "kind": st.column_config.TextColumn("kind", width=115),
    "text": st.column_config.TextColumn("text", width=380),
    "probability": st.column_config.ProgressColumn("true", min_value=0.0, max_value=1.0, format="%.2f", width=110),
    "low": st.column_config.NumberColumn("from", width=55, format="%.2f"),
    "high": st.column_config.NumberColumn("to", width=55, format="%.2f"),
    "logprob": st.column_config.NumberColumn("mean log p", width=85, format="%.2f"),
    "p_true": st.column_config.NumberColumn("P(True)", width=65, format="%.2f"),
    "token": st.column_config.NumberColumn("token read", width=80),
    "doubts": st.column_config.NumberColumn("doubts", width=60),
}


def main() -> None:
    """Draw the page."""
    st.title("Probes")
    trace = _opened()
    reports = list_reports()
    report = _choice(trace, reports)
    if trace is not None:
        st.header("What they say about this run", divider="gray")
        _scores(trace, has_probes=report is not None and bool(report.probes))
        _layers(trace)
    if report is None:
        return
    st.header("What the saved probes are worth", divider="gray")
    if not report.probes:
        st.info("This model was evaluated, but no probe is kept for it.")
        _train(str(report.model.get("name") or DEFAULT_MODEL))
    for probe in report.probes:
        _probe(probe)
    _evaluation(report)


def _opened() -> Trace | None:
    """The run in the URL; the page is of use without one too."""
    run = state.run_id()
    if run is None:
        st.caption("No run is open; what is known of models' probes is shown.")
        return None
    try:
        trace = state.load(state.store().summary(run))
    except TracerError as error:
        st.error("This run cannot be shown.")
        st.text(str(error))
        return None
    opened.headline(trace)
    return trace


def _choice(trace: Trace | None, reports: list[ProbeReport]) -> ProbeReport | None:
    """The report on the open run's model, or on another that is chosen."""
    own = probing.report_for(trace, reports) if trace is not None else None
    if trace is not None and own is None:
        st.info("There is no truth probe for the model of this run yet. Making one takes some minutes.")
        _train(trace.model.name)
    if not reports:
        if trace is None:
            st.info("There are no truth probes yet. Making those of the demo model takes some minutes.")
            _train(DEFAULT_MODEL)
        return None
    names = {number: probing.report_name(report) for number, report in enumerate(reports)}
    first = reports.index(own) if own is not None else None
    chosen = st.selectbox(
        "Model",
        list(names),
        index=first if trace is not None else 0,
        key=MODEL,
        format_func=lambda number: names[number],
        placeholder="choose a model",
    )
    return None if chosen is None else reports[chosen]


def _train(model: str) -> None:
    start_button("Make the truth probes", "probe_train", {"model": model}, key="probes_train")


def _scores(trace: Trace, *, has_probes: bool) -> None:
    names = probing.probe_names(trace)
    if not names:
        if has_probes:
            st.info("The steps of this run were not scored yet.")
            parameters = {"trace": trace.id, "methods": [], "probes": ["truth"]}
            start_button("Score the steps", "explain", parameters, key="probes_score")
        else:
            st.caption("Nothing was scored: there is no probe.")
        return
    name = st.selectbox("Probe", names, key=SCORED_BY) if len(names) > 1 else names[0]
    frame = probing.scores_table(trace, name)
    st.dataframe(
        frame,
        hide_index=True,
        column_config=SCORE_COLUMNS,
        height=min(38 + 35 * max(len(frame), 1), 400),
        alt="Steps with the probability that the model takes them for true, and what else is known of their tokens",
        placeholder="",
    )
    st.caption(
        "true: probability that the model takes the step for true, with its 95% band; log p and P(True) know nothing "
        "of the probe. Doubts are spelt out on the Trace page. A saved probe reads one layer, at the token given here."
    )


def _layers(trace: Trace) -> None:
    """Layer by token, for the steps that it was read for."""
    st.subheader("Layer by token")
    maps = layer_maps(trace)
    if not maps:
        st.caption("Probes of all layers were not read at the tokens of this run yet.")
        _map(trace, "answer")
        return
    selected = state.step_of(trace)
    if selected is not None and selected.id not in maps and selected.call_id is not None:
        st.caption("The selected step was not read; another one is shown.")
        _map(trace, [selected.id])
    order = list(maps)
    numbers = {step.id: number for number, step in enumerate(trace.steps, 1)}
    chosen = st.selectbox(
        "Step",
        order,
        index=order.index(selected.id) if selected is not None and selected.id in maps else len(order) - 1,
        key=MAPPED,
        format_func=lambda step_id: f"{numbers[step_id]} {palette.kind_name(trace.step(step_id).kind)}",
    )
    found = maps[chosen]
    with elements.failures("This map cannot be shown."):
        ids, before = probing.token_ids(trace, found)
    texts, why = state.texts_of(trace)
    if texts is None:
        st.caption("The texts of tokens are not known, so their ids are shown.")
        st.text(payload.one_line(why, limit=300))
        names = [str(token) for token in ids[before:]]
    else:
        names = [payload.visible_token(text) for text in texts.texts(ids)[before:]]
    frame = probing.layer_map_table(found, names)
    st.altair_chart(
        charts.layer_token_map(frame, theme=state.theme(), form="+.2f", widest=probing.map_width(found)),
        alt="What a probe of each layer says at each token of the step: purple false, orange true",
    )
    if probing.share_far(found) > MOSTLY:
        st.warning(
            f"{probing.share_far(found):.0%} of these values are further from the boundary than statements ever are: "
            "these tokens are unlike what the probes learnt from, so compare them with each other, not with zero."
        )
    best = max(range(len(found.layers)), key=lambda place: found.held_out[place])
    st.caption(
        "Above zero means true, in spreads of the training statements. The best layer is "
        f"{found.layers[best]:d} with a held-out AUROC of {found.held_out[best]:.2f}; 0.5 is chance, and a layer that "
        "is worth no more says nothing here."
    )
    st.altair_chart(
        charts.lines(
            probing.layer_worth_table(found), theme=state.theme(), x="layer", y="held-out AUROC", ticks=1, rule=0.5
        ),
        alt="Held-out AUROC of each layer's probe; the dashed line is chance",
    )
    elements.fact("Held out", payload.one_line(found.protocol, limit=300))
    with st.expander("Numbers of the map"):
        _numbers(frame)


def _map(trace: Trace, steps: str | list[str]) -> None:
    start_button("Read all layers", "probe_map", {"trace": trace.id, "steps": steps}, key="probes_map")


def _probe(probe: ProbeSummary) -> None:
    st.subheader("The probe of statements" if probe.name == "statements" else "The probe of steps")
    learnt = f"learnt from {probe.rows:,d} examples: {probe.source}"
    made = f"{probe.kind}, layer {probe.layer}, {probe.position} token, {learnt}"
    elements.fact("Made of", payload.one_line(made, limit=300))
    held = probe.held_out
    elements.fact("On what it has not seen", probing.in_numbers(held.overall))
    if held.overall.accuracy.low <= probing.CHANCE:
        st.warning("Its accuracy is not shown to be above chance.")
    found = probing.verdict(held.overall, (*held.baselines, *held.controls))
    _said(found)
    left, right = st.columns([3, 2], gap="large")
    with left:
        frame = probing.held_out_table(probe)
        st.altair_chart(charts.bars(frame, theme=state.theme(), x=AUROC, rule=0.5), alt="Held-out AUROC with intervals")
        elements.fact("Held out", payload.one_line(held.protocol, limit=400))
        if held.parts:
            with st.expander("By part"):
                _numbers(probing.parts_table(probe))
    with right:
        st.caption(f"Reliability; expected calibration error {probe.reliability.ece:.3f}")
        _reliability(probing.reliability_table(probe.reliability))
    if probe.on_steps is not None:
        _steps_worth(probe.on_steps)


def _said(found: probing.Verdict) -> None:
    """What a comparison proves; names of baselines come from files, so they are shown as text."""
    if found.better:
        st.success("Better than every baseline and control beyond its interval.")
        return
    st.warning(
        "Not shown to be better than what knows nothing of the probe; its scores prove little. The best of these:"
    )
    st.text(payload.one_line(found.rival, limit=100))


def _steps_worth(worth: StepWorth) -> None:
    st.caption(f"On {worth.rows:,d} reasoning steps that it has not seen, {worth.wrong:,d} of them wrong")
    if worth.beats_logprob:
        st.success("It tells right from wrong steps better than log-probabilities do, beyond the interval.")
    else:
        st.warning("It is not shown to tell right from wrong steps better than log-probabilities do.")
    if worth.adds_to_stack:
        st.success("It adds to all baselines together.")
    else:
        st.warning("It adds nothing that is shown to all baselines together.")
    frame = probing.steps_worth_table(worth)
    with st.expander("Beside each baseline", expanded=True):
        st.altair_chart(charts.bars(frame, theme=state.theme(), x=AUROC, rule=0.5), alt="AUROC on reasoning steps")
        elements.fact("Held out", payload.one_line(worth.protocol, limit=400))


def _evaluation(report: ProbeReport) -> None:
    st.header("What kinds of probes are worth on this model", divider="gray")
    if report.statements is None:
        st.info(
            "Kinds of probes were not compared on this model yet: by layer, by topic, beside controls. It takes long."
        )
        parameters = {"model": str(report.model.get("name") or DEFAULT_MODEL)}
        start_button("Compare kinds of probes", "probe_evaluate", parameters, key="probes_evaluate")
    else:
        _statements(report.statements)
    if report.steps is not None:
        _transfer(report.steps)
    if report.mistakes is not None:
        _mistakes(report.mistakes)


def _statements(found: Evaluation) -> None:
    theme = state.theme()
    st.caption(
        f"{found.statements:,d} statements of {len(found.topics):,d} topics, each left out in turn, {found.repeats:,d} "
        "draws of training rows; intervals are 95%, over entities."
    )
    best = probing.best_method(found)
    _said(probing.verdict(best, found.controls))
    left, right = st.columns(2, gap="large")
    with left:
        st.subheader("Accuracy by layer")
        frame = probing.layers_table(found)
        if frame.empty:
            st.caption("Layers were not swept.")
        else:
            st.altair_chart(
                charts.lines(frame, theme=theme, x="layer", y="accuracy", ticks=1, band=True, rule=0.5),
                alt="Accuracy on topics that were left out, by layer and method, with 95% intervals",
            )
            st.caption(f"Over all topics the best layer is {found.chosen_layer:,d}; the dashed line is chance.")
            with st.expander("Numbers by layer"):
                _numbers(frame)
    with right:
        st.subheader("Kinds beside controls")
        frame = probing.methods_table(found)
        st.altair_chart(charts.bars(frame, theme=theme, x=AUROC, rule=0.5), alt="AUROC by method with intervals")
    left, right = st.columns(2, gap="large")
    with left:
        st.subheader("Truth against polarity")
        frame = probing.projection_table(found)
        if frame.empty:
            st.caption("There were no negated statements, so there is no polarity.")
        else:
            st.altair_chart(
                charts.scatter(frame, theme=theme, x="truth direction", y="polarity-sensitive direction"),
                alt="Statements on the truth direction and on the polarity-sensitive one, by label and polarity",
            )
            st.caption("Each statement on directions of the other topics. Where truth is linear, true is to the right.")
    with right:
        st.subheader("Reliability")
        pictures = {picture.method: picture for picture in found.pictures}
        method = st.selectbox("Method", list(pictures), key=METHOD)
        shown = pictures[method].reliability
        _reliability(probing.reliability_table(shown))
        st.caption(f"Expected calibration error {shown.ece:.3f} on topics that the calibration has not seen.")
    st.subheader("Accuracy by topic and method")
    st.altair_chart(
        charts.heat_map(probing.topics_table(found), theme=theme, low=0, high=1, form=".2f"),
        alt="Matrix of accuracies by topic and method; the numbers are in the cells",
    )
    st.caption("Purple is below chance and orange above; each topic is judged by probes of the others.")
    for note in found.notes:
        st.text(payload.one_line(note, limit=400))


def _transfer(found: StepEvaluation) -> None:
    st.subheader("On reasoning steps")
    for steps in (found.own, found.made_up):
        if steps is None:
            st.caption("The model was nearly always right, or nearly always wrong: its own steps tell nothing.")
            continue
        elements.fact("Steps", payload.one_line(steps.steps, limit=300))
        st.caption(f"{steps.rows:,d} steps, {steps.wrong:,d} of them wrong")
        frame = probing.transfer_table(steps)
        st.altair_chart(charts.bars(frame, theme=state.theme(), x=AUROC, rule=0.5), alt="AUROC on reasoning steps")


def _mistakes(found: FirstErrors) -> None:
    st.subheader("The first wrong step of a chain")
    elements.fact("How it was judged", payload.one_line(found.protocol, limit=400))
    for task in found.tasks:
        elements.fact("Task", payload.one_line(task.task, limit=100))
        st.caption(f"{task.chains:,d} chains, {task.with_mistake:,d} with a mistake")
        frame = probing.mistakes_table(task)
        st.altair_chart(
            charts.bars(frame, theme=state.theme(), x="share of chains judged rightly"),
            alt="Share of chains for which each method names the first wrong step",
        )


def _reliability(frame: pd.DataFrame) -> None:
    st.altair_chart(
        charts.reliability(frame, theme=state.theme(), x="probability that was given", y="share that is true"),
        alt="Share of true statements over the probability that they were given; the dashed line is perfect",
    )


def _numbers(frame: pd.DataFrame) -> None:
    st.dataframe(frame, hide_index=True, alt="The numbers of the chart", placeholder="")


if __name__ == "__main__":
    main()
