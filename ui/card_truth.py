"""Whether the model took a step for true, as the evidence card shows it: probes beside what is known without them."""

from __future__ import annotations

import streamlit as st

from tracer.store.probe_reports import list_reports
from tracer.trace.probes import ProbeBaselines, ProbeScore
from tracer.trace.trace import Step
from ui import elements, jobs, payload, probing
from ui.card_reading import explain_parameters
from ui.evidence import disagreement, flag_sentences, interval, mean_logprob
from ui.shown import Shown

SENTENCE_COLUMNS = {
    "sentence": st.column_config.TextColumn("sentence", width=300),
    "true": st.column_config.ProgressColumn("true", min_value=0.0, max_value=1.0, format="%.2f"),
    "low": st.column_config.NumberColumn("from", format="%.2f"),
    "high": st.column_config.NumberColumn("to", format="%.2f"),
    "logprob": st.column_config.NumberColumn("log-probability", format="%.2f"),
}


def draw_truth(shown: Shown, step: Step) -> None:
    """What probes say of the step, beside what is known without them."""
    evidence = shown.evidence
    scores = evidence.truth(step.id)
    if evidence.call_of(step) is None and not scores:
        return
    st.markdown("**Did the model take it for true?**")
    if not scores:
        logprob = mean_logprob(evidence.logprobs(step))
        if logprob is not None:
            _baselines(ProbeBaselines(mean_logprob=logprob, min_logprob=min(evidence.logprobs(step))))
        _offer(shown)
        return
    for place, score in enumerate(scores):
        _score(shown, score, place)


def _offer(shown: Shown) -> None:
    """A way to a score: with the probes of the run's model, or to these where there are none."""
    trace = shown.evidence.trace
    report = probing.report_for(trace, list_reports())
    if not shown.evidence.has_truth and (report is None or not report.probes):
        st.info("No truth probe was made for the model of this run yet. Making one takes some minutes, once.")
        jobs.start_button("Make the truth probes", "probe_train", {"model": trace.model.name}, key="card_train")
        return
    st.info(
        "No truth probe scored this step."
        if shown.evidence.has_truth
        else "This run was not scored by a truth probe yet."
    )
    parameters = explain_parameters(shown, [], "all", faithfulness="none", probes=["truth"])
    jobs.start_button("Score it", "explain", parameters, key="card_probe")


def _score(shown: Shown, score: ProbeScore, place: int) -> None:
    st.text(payload.one_line(f"Probe {score.name}, layer {score.layer}, {score.position} token", limit=120))
    if score.probability is None or score.low is None or score.high is None:
        st.caption("Not scored.")
    else:
        value, band = st.columns([1, 2], vertical_alignment="bottom")
        with value:
            elements.fact("Takes it for true", f"{score.probability:.2f}")
        with band:
            elements.fact("95% band", f"{score.low:.2f} to {score.high:.2f}")
        st.progress(min(1.0, max(0.0, score.probability)))
    _baselines(score.baselines)
    opinion = disagreement(score)
    if opinion == "false":
        st.warning("They disagree: the model wrote this without hesitation, but the probe takes it for false.")
    elif opinion == "true":
        st.warning("They disagree: the model hesitated over this, but the probe takes it for true.")
    _held_out(score)
    for sentence in flag_sentences(score):
        st.text(f"! {payload.one_line(sentence, limit=240)}")
    sentences = shown.evidence.sentences(score.step_id, score.name)
    if len(sentences) > 1:
        with elements.folded("Sentence by sentence", f"card_sentences_{place}") as is_open:
            if is_open:
                st.dataframe(payload.sentences_table(sentences), hide_index=True, column_config=SENTENCE_COLUMNS)


def _baselines(baselines: ProbeBaselines) -> None:
    """What is known without a probe."""
    mean, least, entropy, agree, asked = st.columns(5)
    if baselines.mean_logprob is not None:
        with mean:
            elements.fact("Log p, mean", f"{baselines.mean_logprob:.2f}")
    if baselines.min_logprob is not None:
        with least:
            elements.fact("Log p, least", f"{baselines.min_logprob:.2f}")
    if baselines.entropy is not None:
        with entropy:
            elements.fact("Entropy", f"{baselines.entropy:.2f}")
    if baselines.agreement is not None:
        with agree:
            elements.fact("Agreement", f"{baselines.agreement:.2f}")
    if baselines.p_true is not None:
        with asked:
            elements.fact("P(True)", f"{baselines.p_true:.2f}")


def _held_out(score: ProbeScore) -> None:
    """What the probe is worth on texts that had no part in it."""
    accuracy, area = interval(score.held_out.get("accuracy")), interval(score.held_out.get("auroc"))
    parts: list[str] = []
    if accuracy is not None:
        parts.append(f"accuracy {accuracy[0]:.2f} [{accuracy[1]:.2f} {accuracy[2]:.2f}]")
    if area is not None:
        parts.append(f"AUROC {area[0]:.2f} [{area[1]:.2f} {area[2]:.2f}]")
    st.text(f"On held-out texts: {', '.join(parts)}" if parts else "Nothing is known of it on held-out texts.")
    steps = score.held_out.get("steps")
    if isinstance(steps, dict):
        own, other = interval(steps.get("auroc")), interval(steps.get("best_baseline_auroc"))
        if own is not None and other is not None:
            name = payload.one_line(str(steps.get("best_baseline")), limit=40)
            st.text(f"On held-out steps: AUROC {own[0]:.2f} [{own[1]:.2f} {own[2]:.2f}], {name} alone {other[0]:.2f}")
