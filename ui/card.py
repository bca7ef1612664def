"""The evidence card: everything known of a selected step, or of a part of the prompt that a step read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import streamlit as st

from tracer.trace.trace import Call, Step
from ui import elements, palette, payload, state
from ui.card_citations import draw_citations
from ui.card_reading import SOURCES, draw_reading, draw_sources
from ui.card_truth import draw_truth
from ui.evidence import Part
from ui.shown import Shown, go

LINKS = "step_links"
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
    draw_reading(shown, step, written=call is not None)
    if call is not None:
        draw_citations(shown, step)
    draw_truth(shown, step)
    if call is None:
        st.caption("The model did not write this step.")
    else:
        _tokens(shown, step, call)
    _relations(shown, step)
    if call is not None:
        _call(call)
    if step.data:
        with elements.folded("Data", "card_data") as is_open:
            if is_open:
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
        draw_sources(shown, readers, method, key=f"{SOURCES}_readers", through=False)


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


def _tokens(shown: Shown, step: Step, call: Call) -> None:
    if step.completion is None or step.start is None or step.end is None:
        st.caption("The tokens of this step were not recorded.")
        return
    with elements.folded("Tokens", "card_tokens", expanded=True) as is_open:
        if is_open:
            _tokens_table(shown, call, step.completion, step.start, step.end)


def _tokens_table(shown: Shown, call: Call, number: int, start: int, end: int) -> None:
    completion = call.completions[number]
    texts = None
    if shown.texts is not None:
        whole = shown.texts.texts([*call.prompt_token_ids, *completion.token_ids])
        texts = whole[len(call.prompt_token_ids) :][start:end]
    else:
        _no_texts(shown)
    table = payload.tokens_table(completion, start=start, end=end, texts=texts)
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
    with elements.folded("Comes from and leads to", "card_links") as is_open:
        if not is_open:
            return
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
    with elements.folded("Call", "card_call") as is_open:
        if not is_open:
            return
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
