"""The runs in the store: filter, search, open one, compare two, delete, import."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import streamlit as st

from tracer.errors import TraceNotFoundError, TracerError
from tracer.store import Store, TraceFilter, TraceSummary
from tracer.trace.trace import MAX_FILE_BYTES, Trace
from ui import elements, palette, payload, state

PAGE_SIZE = 100
RECENT_FOR_MODELS = 200
REFRESH_SECONDS = 2
NAMED = 8
"""Runs that are named before they are deleted."""
TABLE = "runs_table"
UPLOAD = "runs_upload"
COMMANDS = 'tracer run cot "What is 17 * 23?"\nmake demo'
COLUMNS = {
    "when": st.column_config.TextColumn("when", width=140),
    "agent": st.column_config.TextColumn("agent", width=70),
    "model": st.column_config.TextColumn("model", width=95),
    "question": st.column_config.TextColumn("question", width=215),
    "status": st.column_config.TextColumn("status", width=95),
    "answer": st.column_config.TextColumn("answer", width=105),
    "correct": st.column_config.TextColumn("correct", width=80),
    "steps": st.column_config.NumberColumn("steps", width=55, format="localized"),
    "tokens": st.column_config.NumberColumn("tokens", width=65, format="localized"),
    "seconds": st.column_config.NumberColumn("seconds", width=65, format="%.1f"),
    "methods": st.column_config.TextColumn("explained by", width=160),
    "explained": st.column_config.NumberColumn("explained in s", width=95, format="%.1f"),
}


def main() -> None:
    """Draw the page."""
    linked = state.run_id()
    if linked is not None:
        state.open_run(linked)
    title, new = st.columns([6, 1], vertical_alignment="bottom")
    title.title("Runs")
    with elements.failures("The store cannot be read."):
        store = state.store()
        empty = not store.list(limit=1)
        if not empty:
            new.page_link(state.NEW_RUN_PAGE, label="New run", icon=":material/add:")
            _filters(store)
            running = store.count(TraceFilter(status="running")) > 0
            # Asked for here, so that a page without running runs costs nothing while it is open.
            st.fragment(_table, run_every=REFRESH_SECONDS if running else None)(running)
    if empty:
        st.info("There are no runs yet. Start one here or on the command line, or drop an exported trace below.")
        st.page_link(state.NEW_RUN_PAGE, label="New run", icon=":material/add:")
        st.code(COMMANDS, language=None)
    if state.runs_to_delete():
        # Not in the fragment above: when that is drawn again, it would take the question away.
        _confirm()
    _import()


def _filters(store: Store) -> None:
    def restart() -> None:
        state.set_runs_offset(0)

    search, task, agent, model, status, correct = st.columns([4, 3, 2, 3, 2, 2])
    search.text_input(
        "Search",
        key=state.SEARCH,
        placeholder="words in any step",
        on_change=restart,
        persist_state="session",
        help="Finds runs with a step that has all these words; put a phrase in quotation marks.",
    )
    task.text_input(
        "Task",
        key=state.TASK,
        placeholder="part of the question",
        on_change=restart,
        persist_state="session",
    )
    agent.selectbox(
        "Agent",
        palette.AGENTS,
        index=None,
        key=state.AGENT,
        format_func=palette.agent_name,
        placeholder="all",
        on_change=restart,
        persist_state="session",
    )
    names = {run.model for run in store.list(limit=RECENT_FOR_MODELS)}
    chosen = state.run_filter().model
    model.selectbox(
        "Model",
        sorted(names | ({chosen} if chosen else set())),
        index=None,
        key=state.MODEL,
        placeholder="all; pick or type a name",
        accept_new_options=True,
        on_change=restart,
        persist_state="session",
    )
    status.selectbox(
        "Status",
        palette.STATUSES,
        index=None,
        key=state.STATUS,
        format_func=palette.status_name,
        placeholder="all",
        on_change=restart,
        persist_state="session",
    )
    correct.selectbox(
        "Answer was",
        palette.OUTCOMES,
        index=None,
        key=state.CORRECT,
        format_func=palette.correct_name,
        placeholder="all",
        on_change=restart,
        persist_state="session",
    )


def _table(polling: bool) -> None:
    with elements.failures("The runs cannot be read."):
        store = state.store()
        if polling and not store.count(TraceFilter(status="running")):
            st.rerun()
        wanted = state.run_filter()
        total = store.count(wanted)
        offset = min(state.runs_offset(), max(0, total - 1) // PAGE_SIZE * PAGE_SIZE)
        found = store.list(wanted, limit=PAGE_SIZE, offset=offset)
    if not found:
        st.info("No run matches these filters.")
        st.button("Clear the filters", on_click=state.clear_filters)
        return
    _bar(offset, found, total=total, polling=polling)
    ids = [run.id for run in found]
    # By their ids, since their rows move down when another run begins.
    rows = [row for row, trace_id in enumerate(ids) if trace_id in state.selected_runs()]
    # A new table: one whose ticks are taken away from outside lets the next click go by.
    key = f"{TABLE}_{state.times_unticked()}"
    st.session_state[key] = {"selection": {"rows": rows, "cells": []}}
    with st.container(key=TABLE):
        st.dataframe(
            payload.runs_table(found, state.zone()),
            key=key,
            hide_index=True,
            column_config=COLUMNS,
            height=min(38 + 35 * len(found), 640),
            placeholder="",
            on_select=partial(_choose, key, ids),
            selection_mode=["multi-row", "single-cell"],
            alt="Runs, newest first",
        )
    clicked = state.clicked_run()
    if clicked is not None:
        state.open_run(clicked)


def _choose(key: str, ids: Sequence[str]) -> None:
    """A click into a row opens the run; its marker ticks it."""
    selection = st.session_state[key]["selection"]
    cells = selection.get("cells") or ()
    if cells and cells[0][0] < len(ids):
        state.click_run(ids[cells[0][0]])
    state.select_runs([ids[row] for row in selection.get("rows") or () if row < len(ids)])


def _bar(offset: int, found: Sequence[TraceSummary], *, total: int, polling: bool) -> None:
    """What can be done with the runs that are ticked, and turning pages; always there, so that the table stays put."""
    selected = [run for run in found if run.id in state.selected_runs()]
    compare, delete, none, _, back, on, refresh = st.columns([2, 2, 2, 3, 2, 2, 2], vertical_alignment="bottom")
    if compare.button("Compare", disabled=len(selected) != 2, width="stretch", help="Two runs, side by side."):
        earlier, later = sorted(selected, key=lambda run: run.created_at)
        state.compare_runs(earlier.id, later.id)
    if delete.button("Delete", disabled=not selected, width="stretch"):
        state.set_runs_to_delete([run.id for run in selected])
        st.rerun()
    none.button("Tick none", on_click=state.untick_runs, disabled=not selected, width="stretch")
    turn = state.set_runs_offset
    if total > PAGE_SIZE:
        back.button("Newer", on_click=turn, args=(offset - PAGE_SIZE,), disabled=offset == 0, width="stretch")
        last = offset + len(found) >= total
        on.button("Older", on_click=turn, args=(offset + PAGE_SIZE,), disabled=last, width="stretch")
    if not polling:
        refresh.button("Refresh", width="stretch")
    # Right above the table, whose own buttons appear at the end of this line.
    st.caption(
        f"Runs {offset + 1:,d} to {offset + len(found):,d} of {total:,d}, newest first. Click a run to open it; tick "
        f"two to compare them ({len(selected):,d} ticked)."
    )


def _keep() -> None:
    state.set_runs_to_delete(())


@st.dialog("Delete runs?", on_dismiss=_keep)
def _confirm() -> None:
    """Ask before runs are deleted; one that is under way is left alone."""
    store = state.store()
    found: list[TraceSummary] = []
    for trace_id in state.runs_to_delete():
        try:
            found.append(store.summary(trace_id))
        except TraceNotFoundError:
            continue
    there = [run for run in found if run.status != "running"]
    if len(there) < len(found):
        st.warning("A run that is under way is kept; cancel it first.")
    for run in there[:NAMED]:
        st.text(f"{palette.agent_name(run.agent)}: {payload.one_line(run.question, limit=90)}")
    if len(there) > NAMED:
        st.caption(f"and {len(there) - NAMED:,d} more")
    st.caption("Their explanations and probe scores go with them. This cannot be undone.")
    delete, keep = st.columns(2)
    keep.button("Keep them", on_click=_keep, width="stretch", key="keep_runs")
    if delete.button("Delete them", disabled=not there, width="stretch", key="delete_runs"):
        with elements.failures("They were not deleted."):
            for run in there:
                store.delete(run.id)
        _keep()
        state.untick_runs()
        st.rerun()


def _import() -> None:
    file = st.file_uploader("Import a trace", type="json", key=UPLOAD, max_upload_size=MAX_FILE_BYTES >> 20)
    if file is None:
        return
    if state.import_result(file.file_id) is None:
        with st.spinner("Reading the trace"):
            store_upload(file.file_id, file.getvalue(), copy=False)
        st.rerun()
    outcome, text = state.import_result(file.file_id) or ("failed", "")
    if outcome == "ok":
        st.success("The trace was imported.")
        if st.button("Open it"):
            state.open_run(text)
        return
    st.error("The trace was not imported.")
    st.text(text)
    if st.button("Import it under a new id"):
        store_upload(file.file_id, file.getvalue(), copy=True)
        st.rerun()


def store_upload(file_id: str, content: bytes, *, copy: bool) -> None:
    """Import an uploaded file, and keep what came of it in the session."""
    try:
        trace = Trace.from_json(content)
        done = state.store().import_trace(trace, on_conflict="new_id" if copy else "error")
    except TracerError as error:
        state.set_import_result(file_id, "failed", str(error))
    else:
        state.set_import_result(file_id, "ok", done)


if __name__ == "__main__":
    main()
