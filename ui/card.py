"""The evidence card: everything known of a selected step, or of a part of the prompt that a step read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import streamlit as st

from tracer.explain.methods import METHODS
from tracer.token_texts import TokenTexts
from tracer.trace.probes import ProbeBaselines, ProbeScore
from tracer.trace.trace import Call, Step
from ui import elements, jobs, palette, payload, state
from ui.components import source_list
from ui.components.mount import event_value
from ui.components.source_list import Source
from ui.evidence import Evidence, Part, Reading, Trust, disagreement, flag_sentences, interval, mean_logprob

SOURCES = "sources"
LINKS = "step_links"
METHOD_CHOICE = "card_method"
ALL_SOURCES = "card_all_sources"
FIRST_SOURCES = 6
DEFAULT_METHODS = ("attention_resolvent", "grad_x_input")
TARGETS = ("this step", "the answer", "all steps")
TRUSTED = ("the answer", "all steps", "nothing")
_TRUSTED_NAMES = {"the answer": "answer", "all steps": "all", "nothing": "none"}
PAGES = Path(__file__).parent
TOKEN_COLUMNS = {
    "position": st.column_config.NumberColumn("position", width=60),
    "token": st.column_config.TextColumn("token"),
    "id": st.column_config.NumberColumn("id", format="%d", width=60),
    "logprob": st.column_config.NumberColumn("log-probability", format="%.4f"),
    "probability": st.column_config.ProgressColumn("probability", min_value=0.0, max_value=1.0, format="%.3f"),
}
LINK_COLUMNS = {
    "direction": st.column_config.TextColumn("direction", width=70),
    "relation": st.column_config.TextColumn("relation", width=80),
    "step": st.column_config.NumberColumn("#", width=45),
    "kind": st.column_config.TextColumn("kind", width=110),
    "text": st.column_config.TextColumn("text", width=300),
}
SENTENCE_COLUMNS = {
    "sentence": st.column_config.TextColumn("sentence", width=300),
    "true": st.column_config.ProgressColumn("true", min_value=0.0, max_value=1.0, format="%.2f"),
    "low": st.column_config.NumberColumn("from", format="%.2f"),
    "high": st.column_config.NumberColumn("to", format="%.2f"),
    "logprob": st.column_config.NumberColumn("log-probability", format="%.2f"),
}


@dataclass(frozen=True, slots=True)
class Shown:
    """A run as the page shows it.

    Args:
        evidence: What is known of it.
        texts: What turns its ids into text, where that is here.
        why_not: Why it is not.
        part_texts: What each part of the prompt says, or how many tokens it has.
    """

    evidence: Evidence
    texts: TokenTexts | None
    why_not: str
    part_texts: Sequence[str]

    def number(self, step_id: str) -> int:
        """Number of a step in the trace, from 1."""
        return self.evidence.numbers[step_id]


def part_texts(evidence: Evidence, texts: TokenTexts | None) -> list[str]:
    """What each part of the prompts says, or how many tokens it has where its text cannot be had."""
    found: list[str] = []
    for part in evidence.parts:
        if texts is None:
            found.append(payload.count(part.end - part.start, "token"))
        else:
            found.append("".join(texts.texts(evidence.part_ids(part))[part.start :]))
    return found


def go(name: str | int) -> None:
    """Select a step by its id, or a part of the prompt by its number."""
    if isinstance(name, int):
        state.select_part(name)
    else:
        state.select_step(name)


def draw(shown: Shown, selected: Step | Part) -> None:
    """Draw the card of what is selected."""
    if isinstance(selected, Part):
        _part(shown, selected)
        return
    step, evidence = selected, shown.evidence
    st.subheader(f"Step {shown.number(step.id):,d}: {palette.kind_name(step.kind)}")
    _neighbours(shown, step)
    elements.long_text(step.text)
    _facts(step)
    call = evidence.call_of(step)
    _reading(shown, step, written=call is not None)
    _truth(shown, step)
    if call is None:
        st.caption("The model did not write this step.")
    else:
        _tokens(shown, step, call)
    _relations(shown, step)
    if call is not None:
        _call(call)
    if step.data:
        with st.expander("Data"):
            st.json(step.data)


def _part(shown: Shown, part: Part) -> None:
    st.subheader(f"Prompt: {palette.source_name(part.kind)}")
    st.caption(f"Part {part.number:,d} of the prompt, {part.end - part.start:,d} tokens. It shows no step.")
    if shown.texts is None:
        _no_texts(shown)
        ids = shown.evidence.part_ids(part)[part.start :]
        elements.long_text(" ".join(map(str, ids)))
    else:
        elements.long_text(shown.part_texts[part.number - 1])
    method = state.method(shown.evidence.methods)
    readers = [] if method is None else shown.evidence.readers(method, part.number)
    if readers:
        st.caption("Steps that read it, most first")
        _source_list(shown, readers, method, key=f"{SOURCES}_readers", through=False)


def _no_texts(shown: Shown) -> None:
    st.caption("Token ids only; their texts are not known here:")
    st.text(payload.one_line(shown.why_not, limit=400))


def _neighbours(shown: Shown, step: Step) -> None:
    steps, number = shown.evidence.trace.steps, shown.number(step.id)
    back, on = st.columns(2)
    first, last = number == 1, number == len(steps)
    before = steps[number - 1 if first else number - 2].id
    after = steps[number - 1 if last else number].id
    back.button("Previous", on_click=go, args=(before,), disabled=first, width="stretch")
    on.button("Next", on_click=go, args=(after,), disabled=last, width="stretch")


def _facts(step: Step) -> None:
    if step.error is not None:
        elements.fact("Error", payload.one_line(step.error, limit=2000))
    if step.pruned:
        st.caption("The agent gave this step up (pruned).")
    if step.score is not None:
        elements.fact("Score", f"{step.score:.4g}")
    if step.branch is not None:
        elements.fact("Branch", payload.one_line(step.branch))


def _reading(shown: Shown, step: Step, *, written: bool) -> None:
    """What the step read, how far that can be trusted, and what can be done about it."""
    evidence = shown.evidence
    if not written:
        method = state.method(evidence.methods)
        readers = [] if method is None else evidence.readers(method, step.id)
        if readers:
            st.markdown("**Read by**")
            _source_list(shown, readers[:FIRST_SOURCES], method, key=f"{SOURCES}_readers", through=False)
        return
    st.markdown("**What it read**")
    if evidence.unreadable:
        st.caption(f"Explanations that cannot be read, by another program or damaged: {evidence.unreadable:,d}.")
    if not evidence.methods:
        st.info("This run was not explained yet: nothing is known of what its steps read.")
        _explain(shown, step)
        return
    method = _method_choice(evidence)
    if step.id not in evidence.targets(method):
        st.info("This step was not explained by this method.")
        _explain(shown, step, label=False)
        return
    readings = evidence.readings(method, step.id)
    through = any(item.through is not None for item in readings)
    if not readings:
        st.caption("It read nothing but its own tokens.")
    few = readings[:FIRST_SOURCES]
    if len(readings) > len(few) and st.session_state.get(ALL_SOURCES):
        few = readings
    _source_list(shown, few, method, key=SOURCES, through=through)
    if len(readings) > FIRST_SOURCES:
        st.toggle(f"All {len(readings):,d} sources", key=ALL_SOURCES)
    _trust(shown, step, method)
    _actions(shown, step)


def _method_choice(evidence: Evidence) -> str:
    """Which method's scores are shown; the URL decides."""
    current = state.method(evidence.methods) or evidence.methods[0]
    st.session_state[METHOD_CHOICE] = current

    def chosen() -> None:
        state.select_method(st.session_state[METHOD_CHOICE])

    st.selectbox("Method", evidence.methods, key=METHOD_CHOICE, on_change=chosen, label_visibility="collapsed")
    explanation = evidence.explanation(current)
    known = METHODS.get(current)
    st.text(
        payload.one_line(f"{known.summary if known else 'another program’s method'} ({explanation.unit})", limit=240)
    )
    return current


def _source_list(shown: Shown, readings: Sequence[Reading], method: str | None, *, key: str, through: bool) -> None:
    signed = method is not None and shown.evidence.explanation(method).signed
    sources = [_source(shown, reading) for reading in readings]
    names = [reading.step_id if reading.step_id is not None else reading.part for reading in readings]
    source_list.source_list(sources, signed=signed, through=through, key=key, on_open=partial(_open, key, names))


def _open(key: str, names: Sequence[str | int | None]) -> None:
    row = event_value(key, source_list.OPEN)
    if isinstance(row, int) and 0 <= row < len(names):
        name = names[row]
        if name is not None:
            go(name)


def _source(shown: Shown, reading: Reading) -> Source:
    if reading.step_id is not None:
        step = shown.evidence.steps[reading.step_id]
        return Source(reading, f"step {shown.number(step.id)}", payload.one_line(step.text, limit=120))
    if reading.part is not None:
        return Source(reading, "in the prompt", payload.one_line(shown.part_texts[reading.part - 1], limit=120))
    return Source(reading, "", "all of it" if reading.kind == "template" else "where attention rests")


def _trust(shown: Shown, step: Step, method: str) -> None:
    """How far the scores can be trusted, in a sentence and in numbers."""
    trust = shown.evidence.trust(method, step.id)
    if trust.better is None:
        st.warning(
            "How far these scores can be trusted was not measured: nothing shows so far that they say what the "
            "model relied on."
        )
        _measure(shown, step, method)
        return
    if trust.better:
        st.success(
            f"Taking away what this method ranks first costs the model more than random removals do (z = {trust.z:.1f} "
            f"over {len(trust.measured):,d} measured steps)."
        )
    else:
        st.warning(
            f"On this trace the method is not shown to be better than random (z = {trust.z:.1f} over "
            f"{len(trust.measured):,d} measured steps): do not take its ranking for what the model relied on."
        )
    _worth(shown, step, method, trust)


def _worth(shown: Shown, step: Step, method: str, trust: Trust) -> None:
    if trust.worth is None:
        numbers = [shown.number(name) for name in trust.measured if name in shown.evidence.steps]
        st.caption("Not measured for this step, but for these:")
        st.text(", ".join(f"step {number}" for number in numbers))
        _measure(shown, step, method)
        return
    worth = trust.worth
    fit, drop, deletion, insertion = st.columns(4)
    with fit:
        elements.fact("LDS", "unknown" if worth.lds is None else f"{worth.lds:+.2f}")
    with drop:
        elements.fact(f"Without top {worth.k:d} of {worth.sources:d}", f"{-worth.top_k_drop:+.2f} nats")
    with deletion:
        elements.fact("Deletion vs random", f"{worth.deletion:+.2f} nats")
    with insertion:
        elements.fact("Insertion vs random", f"{worth.insertion:+.2f} nats")


def _measure(shown: Shown, step: Step, method: str) -> None:
    answers = shown.evidence.answers
    trusted = "answer" if step.id in answers else "all"
    jobs.start_button(
        "Measure it",
        "explain",
        _parameters(shown, [method], [step.id], faithfulness=trusted, probes=[]),
        key="card_measure",
    )


def _parameters(
    shown: Shown, methods: Sequence[str], targets: str | Sequence[str], *, faithfulness: str, probes: list[str] | None
) -> dict[str, object]:
    found: dict[str, object] = {
        "trace": shown.evidence.trace.id,
        "methods": list(methods),
        "targets": targets if isinstance(targets, str) else list(targets),
        "faithfulness": faithfulness,
    }
    return found if probes is None else {**found, "probes": probes}


def _actions(shown: Shown, step: Step) -> None:
    explain, *links = st.columns([2, 1, 1], vertical_alignment="center")
    with explain, st.popover("Explain more", width="stretch"):
        _explain(shown, step)
    query = {state.RUN: shown.evidence.trace.id, state.STEP: step.id}
    method = state.method(shown.evidence.methods)
    if method is not None:
        query[state.METHOD] = method
    if (PAGES / state.TOKENS_PAGE).exists():
        links[0].page_link(state.TOKENS_PAGE, label="Tokens", icon=":material/text_fields:", query_params=query)
    if (PAGES / state.GRAPH_PAGE).exists():
        links[1].page_link(state.GRAPH_PAGE, label="Graph", icon=":material/account_tree:", query_params=query)


def _explain(shown: Shown, step: Step, *, label: bool = True) -> None:
    """What to compute and the button that starts it."""
    if label:
        st.caption("The recorded tokens are replayed through a copy of the weights on this machine.")
    missing = [name for name in DEFAULT_METHODS if name not in shown.evidence.methods]
    methods = st.multiselect("Methods", list(METHODS), default=missing or list(DEFAULT_METHODS), key="explain_methods")
    targets = st.selectbox("What to explain", TARGETS, key="explain_targets")
    trusted = st.selectbox("Measure how far the scores can be trusted, for", TRUSTED, key="explain_trusted")
    chosen = {"this step": [step.id], "the answer": "answer"}.get(targets, "all")
    if not methods:
        st.caption("Choose at least one method.")
        return
    jobs.start_button(
        "Explain",
        "explain",
        _parameters(shown, methods, chosen, faithfulness=_TRUSTED_NAMES[trusted], probes=None),
        key="card_explain",
    )


def _truth(shown: Shown, step: Step) -> None:
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
        st.info(
            "No truth probe scored this step." if evidence.has_truth else "This run was not scored by a truth probe."
        )
        jobs.start_button(
            "Score it",
            "explain",
            _parameters(shown, [], "all", faithfulness="none", probes=["truth"]),
            key="card_probe",
        )
        return
    for score in scores:
        _score(shown, score)


def _score(shown: Shown, score: ProbeScore) -> None:
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
        with st.expander("Sentence by sentence"):
            st.dataframe(payload.sentences_table(sentences), hide_index=True, column_config=SENTENCE_COLUMNS)


def _baselines(baselines: ProbeBaselines) -> None:
    """What is known without a probe."""
    mean, least, entropy, agree, asked = st.columns(5)
    with mean:
        elements.fact("Log p, mean", _figure(baselines.mean_logprob))
    with least:
        elements.fact("Log p, least", _figure(baselines.min_logprob))
    with entropy:
        elements.fact("Entropy", _figure(baselines.entropy))
    with agree:
        elements.fact("Agreement", _figure(baselines.agreement))
    with asked:
        elements.fact("P(True)", _figure(baselines.p_true))


def _figure(value: float | None) -> str:
    return "unknown" if value is None or not math.isfinite(value) else f"{value:.2f}"


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


def _tokens(shown: Shown, step: Step, call: Call) -> None:
    if step.completion is None or step.start is None or step.end is None:
        st.caption("The tokens of this step were not recorded.")
        return
    completion = call.completions[step.completion]
    texts = None
    if shown.texts is not None:
        whole = shown.texts.texts([*call.prompt_token_ids, *completion.token_ids])
        texts = whole[len(call.prompt_token_ids) :][step.start : step.end]
    table = payload.tokens_table(completion, start=step.start, end=step.end, texts=texts)
    with st.expander("Tokens", expanded=True):
        if texts is None:
            _no_texts(shown)
        if not completion.logprobs:
            st.caption("The engine gave no log-probabilities.")
        else:
            total = table["logprob"].sum()
            st.caption(f"{len(table):,d} tokens, log-probability {total:.2f} nats in all.")
        st.dataframe(table, hide_index=True, column_config=TOKEN_COLUMNS, height=min(38 + 35 * len(table), 318))


def _relations(shown: Shown, step: Step) -> None:
    trace = shown.evidence.trace
    numbered = {name: (number, shown.evidence.steps[name]) for name, number in shown.evidence.numbers.items()}
    found = [link for link in payload.links(trace, step) if link.step_id in numbered]
    if not found:
        return
    with st.expander("Comes from and leads to"):
        st.session_state[LINKS] = {"selection": {"rows": []}}
        st.dataframe(
            payload.links_table(found, numbered),
            key=LINKS,
            hide_index=True,
            column_config=LINK_COLUMNS,
            height=min(38 + 35 * len(found), 213),
            on_select=partial(_choose_link, [link.step_id for link in found]),
            selection_mode=["single-row", "single-cell"],
            alt="Steps that this one comes from or leads to",
        )


def _choose_link(step_ids: Sequence[str]) -> None:
    row = elements.clicked_row(st.session_state[LINKS])
    if row is not None and row < len(step_ids):
        state.select_step(step_ids[row])


def _call(call: Call) -> None:
    with st.expander("Call"):
        took = "unknown time" if call.seconds is None else f"{call.seconds:.2f} s"
        elements.fact(
            "Call",
            f"{payload.one_line(call.id, limit=80)}, {took}, {payload.count(len(call.completions), 'completion')}",
        )
        if call.error is not None:
            elements.fact("Error", payload.one_line(call.error, limit=2000))
        prompt = payload.count(len(call.prompt_token_ids), "token")
        elements.fact("Prompt", f"{prompt} in {payload.count(len(call.segments), 'segment')}")
        st.dataframe(payload.segments_table(call), hide_index=True, height=min(38 + 35 * len(call.segments), 318))
        st.caption("Sampling")
        st.json(call.sampling.model_dump())
