"""One run: its outcome, its steps in order, and everything recorded about the selected step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

import streamlit as st

from tracer.errors import TraceNotFoundError
from tracer.trace.trace import Call, Step, Trace
from ui import elements, palette, payload, state

PAGE_SIZE = 200
REFRESH_SECONDS = 2
LIST_HEIGHT = 700
LIST = "steps_list"
LINKS = "step_links"
Numbered = Sequence[tuple[int, Step]]
LIST_COLUMNS = {
    "step": st.column_config.NumberColumn("#", width=45),
    "kind": st.column_config.TextColumn("kind", width=115),
    "branch": st.column_config.TextColumn("branch", width=60),
    "pruned": st.column_config.TextColumn("pruned", width=65),
    "score": st.column_config.NumberColumn("score", width=60, format="%.4g"),
    "text": st.column_config.TextColumn("text", width=480),
    "error": st.column_config.TextColumn("error", width=160),
}
TOKEN_COLUMNS = {
    "position": st.column_config.NumberColumn("position"),
    "id": st.column_config.NumberColumn("id", format="%d"),
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


def main() -> None:
    """Draw the page."""
    run = state.run_id()
    if run is None:
        st.title("Trace")
        st.info("No run is open. Choose one on the Runs page.")
        st.page_link(state.RUNS_PAGE, label="Runs", icon=":material/list:")
        return
    with elements.failures("This run cannot be shown."):
        try:
            running = state.store().summary(run).status == "running"
        except TraceNotFoundError:
            st.page_link(state.RUNS_PAGE, label="All runs", icon=":material/arrow_back:")
            raise
    st.fragment(_view, run_every=REFRESH_SECONDS if running else None)(run, running)


def _view(run: str, polling: bool) -> None:
    with elements.failures("This run cannot be shown."):
        summary = state.store().summary(run)
        trace = state.load(summary)
    if polling and summary.status != "running":
        st.rerun()
    _header(trace, seconds=summary.seconds)
    if not trace.steps:
        st.info("This run has no steps yet.")
        return
    left, right = st.columns([3, 2], gap="medium")
    selected = state.step_of(trace)
    if selected is None and state.has_step():
        right.warning("The link names a step that this run does not have; the first step is shown.")
    selected = selected or trace.steps[0]
    with left:
        _steps(trace, selected)
    with right:
        _detail(trace, selected)


def _header(trace: Trace, *, seconds: float | None) -> None:
    elements.fact("Question", payload.one_line(trace.task.question, limit=2000))
    answer, correct, status, agent, model, size, took = st.columns([4, 2, 2, 2, 4, 4, 2])
    with answer:
        elements.fact("Answer", payload.one_line(trace.outcome.answer) or "none")
    with correct:
        elements.fact("Answer was", palette.correct_name(trace.outcome.correct))
    with status:
        elements.fact("Status", palette.status_name(trace.status))
    with agent:
        elements.fact("Agent", palette.agent_name(trace.agent.kind))
    with model:
        elements.fact("Model", payload.one_line(f"{trace.model.name} on {trace.model.engine}", limit=120))
    with size:
        elements.fact("Size", payload.size(trace))
    with took:
        elements.fact("Took", "unknown" if seconds is None else f"{seconds:.1f} s")
    if trace.status == "running":
        st.info(palette.status_sentence(trace.status))
    elif trace.status != "completed":
        st.warning(palette.status_sentence(trace.status))
    if trace.error is not None:
        st.text(payload.one_line(trace.error, limit=2000))
    _about(trace)


def _about(trace: Trace) -> None:
    details, download = st.columns([5, 1])
    with details.expander("Identity, parameters and outcome"):
        st.json(
            {
                "id": trace.id,
                "created_at": payload.local_time(trace.created_at, state.zone()),
                "reference": trace.task.reference,
                "documents": [document.title for document in trace.task.documents],
                "model": trace.model.model_dump(),
                "agent": trace.agent.model_dump(),
                "outcome": trace.outcome.model_dump(),
            }
        )
    download.download_button(
        "Download JSON",
        trace.to_json,
        file_name=file_name(trace.id),
        mime="application/json",
        on_click="ignore",
        width="stretch",
    )


def file_name(trace_id: str) -> str:
    """A file name made of an id that may come from an imported file."""
    return (re.sub(r"[^A-Za-z0-9._-]+", "_", trace_id).strip("._")[:80] or "trace") + ".json"


def visible(trace: Trace, *, kinds: Sequence[str], branch: str | None) -> list[tuple[int, Step]]:
    """The steps that the filters let through, with their numbers in the trace, from 1."""
    return [
        (number, step)
        for number, step in enumerate(trace.steps, 1)
        if (not kinds or palette.kind_label(step.kind) in kinds) and (branch is None or step.branch == branch)
    ]


def _steps(trace: Trace, selected: Step) -> None:
    _step_filters(trace)
    shown = visible(trace, kinds=state.kinds(), branch=state.branch())
    if not shown:
        st.info("No step matches these filters.")
        return
    row = next((index for index, (_, step) in enumerate(shown) if step.id == selected.id), None)
    turned = state.steps_offset()
    offset = (
        (row or 0) // PAGE_SIZE * PAGE_SIZE
        if turned is None
        else min(turned, (len(shown) - 1) // PAGE_SIZE * PAGE_SIZE)
    )
    page = shown[offset : offset + PAGE_SIZE]
    _pager(offset, len(page), total=len(shown))
    here = row - offset if row is not None and offset <= row < offset + len(page) else None
    _mark(here)
    table = payload.steps_table(page)
    colours = palette.colours_of(palette.KINDS, state.theme())
    st.dataframe(
        table.style.map(lambda name: f"color: {colours[name]}", subset=["kind"]),
        key=LIST,
        hide_index=True,
        column_config=LIST_COLUMNS,
        column_order=payload.used_columns(trace),
        height=min(38 + 35 * len(page), LIST_HEIGHT),
        placeholder="",
        on_select=partial(_choose, LIST, [step.id for _, step in page], here),
        selection_mode=["single-row", "single-cell"],
        alt="Steps in the order in which they were recorded",
    )


def _mark(row: int | None) -> None:
    """Show a row as selected; the cell that was clicked stays selected too, so that the arrow keys go on from it."""
    cells = st.session_state.get(LIST, {}).get("selection", {}).get("cells") or ()
    kept = [cell for cell in cells if cell[0] == row]
    st.session_state[LIST] = {"selection": {"rows": [] if row is None else [row], "cells": kept}}


def _step_filters(trace: Trace) -> None:
    def restart() -> None:
        state.set_steps_offset(None)

    present = {palette.kind_label(step.kind) for step in trace.steps}
    kinds = [look.label for look in (*palette.KINDS.values(), palette.OTHER) if look.label in present]
    branches = sorted({step.branch for step in trace.steps if step.branch is not None})
    left, right = st.columns([3, 2])
    left.multiselect("Kinds", kinds, key=state.KINDS, placeholder="all", on_change=restart)
    if branches:
        right.selectbox("Branch", branches, index=None, key=state.BRANCH, placeholder="all", on_change=restart)


def _pager(offset: int, shown: int, *, total: int) -> None:
    if total <= PAGE_SIZE:
        return
    text, back, on = st.columns([4, 1, 1], vertical_alignment="bottom")
    text.caption(f"Steps {offset + 1:,d} to {offset + shown:,d} of {total:,d}.")
    turn, last = state.set_steps_offset, offset + shown >= total
    back.button("Earlier", on_click=turn, args=(offset - PAGE_SIZE,), disabled=offset == 0, width="stretch")
    on.button("Later", on_click=turn, args=(offset + PAGE_SIZE,), disabled=last, width="stretch")


def _choose(key: str, step_ids: Sequence[str], before: int | None) -> None:
    row = elements.clicked_row(st.session_state[key], before=before)
    if row is not None and row < len(step_ids):
        state.select_step(step_ids[row])


def _detail(trace: Trace, step: Step) -> None:
    numbered = {found.id: (number, found) for number, found in enumerate(trace.steps, 1)}
    number = numbered[step.id][0]
    st.subheader(f"Step {number:,d}: {palette.kind_name(step.kind)}")
    _neighbours(trace, number)
    elements.long_text(step.text)
    if step.error is not None:
        elements.fact("Error", payload.one_line(step.error, limit=2000))
    if step.pruned:
        st.caption("The agent gave this step up (pruned).")
    if step.score is not None:
        elements.fact("Score", f"{step.score:.4g}")
    if step.branch is not None:
        elements.fact("Branch", payload.one_line(step.branch))
    _relations(trace, step, numbered)
    call = next((found for found in trace.calls if found.id == step.call_id), None)
    if call is None:
        st.caption("The model did not write this step.")
    else:
        _tokens(step, call)
        _call(call)
    if step.data:
        with st.expander("Data"):
            st.json(step.data)


def _neighbours(trace: Trace, number: int) -> None:
    """Buttons to the steps before and after a step, which is given by its number from 1."""
    back, on = st.columns(2)
    first, last = number == 1, number == len(trace.steps)
    before = trace.steps[number - 1 if first else number - 2].id
    after = trace.steps[number - 1 if last else number].id
    back.button("Previous", on_click=_go, args=(before,), disabled=first, width="stretch")
    on.button("Next", on_click=_go, args=(after,), disabled=last, width="stretch")


def _go(step_id: str) -> None:
    state.set_steps_offset(None)
    state.select_step(step_id)


def _relations(trace: Trace, step: Step, numbered: dict[str, tuple[int, Step]]) -> None:
    found = [link for link in payload.links(trace, step) if link.step_id in numbered]
    if not found:
        return
    st.caption("Comes from and leads to")
    st.session_state[LINKS] = {"selection": {"rows": []}}
    st.dataframe(
        payload.links_table(found, numbered),
        key=LINKS,
        hide_index=True,
        column_config=LINK_COLUMNS,
        height=min(38 + 35 * len(found), 213),
        on_select=partial(_choose, LINKS, [link.step_id for link in found], None),
        selection_mode=["single-row", "single-cell"],
        alt="Steps that this one comes from or leads to",
    )


def _tokens(step: Step, call: Call) -> None:
    if step.completion is None or step.start is None or step.end is None:
        st.caption("The tokens of this step were not recorded.")
        return
    completion = call.completions[step.completion]
    table = payload.tokens_table(completion, start=step.start, end=step.end)
    with st.expander("Tokens", expanded=True):
        if not completion.logprobs:
            st.caption("The engine gave no log-probabilities.")
        else:
            total = table["logprob"].sum()
            st.caption(f"{len(table):,d} tokens, log-probability {total:.2f} nats in all.")
        st.dataframe(table, hide_index=True, column_config=TOKEN_COLUMNS, height=min(38 + 35 * len(table), 318))


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


if __name__ == "__main__":
    main()
