"""The runs in the store: filter, search, import, open one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import streamlit as st

from tracer.errors import TracerError
from tracer.store import Store, TraceFilter
from tracer.trace.trace import MAX_FILE_BYTES, Trace
from ui import elements, palette, payload, state

PAGE_SIZE = 100
RECENT_FOR_MODELS = 200
REFRESH_SECONDS = 2
TABLE = "runs_table"
UPLOAD = "runs_upload"
COMMANDS = 'tracer run cot "What is 17 * 23?"\nmake demo'
COLUMNS = {
    "when": st.column_config.TextColumn("when", width=150),
    "agent": st.column_config.TextColumn("agent", width=70),
    "model": st.column_config.TextColumn("model", width=140),
    "question": st.column_config.TextColumn("question", width=290),
    "status": st.column_config.TextColumn("status", width=95),
    "answer": st.column_config.TextColumn("answer", width=155),
    "correct": st.column_config.TextColumn("correct", width=80),
    "steps": st.column_config.NumberColumn("steps", width=60, format="localized"),
    "tokens": st.column_config.NumberColumn("tokens", width=75, format="localized"),
    "seconds": st.column_config.NumberColumn("seconds", width=75, format="%.1f"),
}


def main() -> None:
    """Draw the page."""
    linked = state.run_id()
    if linked is not None:
        state.open_run(linked)
    st.title("Runs")
    with elements.failures("The store cannot be read."):
        store = state.store()
        empty = not store.list(limit=1)
        if not empty:
            _filters(store)
            running = store.count(TraceFilter(status="running")) > 0
            # Asked for here, so that a page without running runs costs nothing while it is open.
            st.fragment(_table, run_every=REFRESH_SECONDS if running else None)(running)
    if empty:
        st.info("There are no runs yet. Record one on the command line, or drop an exported trace below.")
        st.code(COMMANDS, language=None)
    _import()


def _filters(store: Store) -> None:
    def restart() -> None:
        state.set_runs_offset(0)

    search, agent, model, status, correct = st.columns([4, 2, 3, 2, 2])
    search.text_input(
        "Search",
        key=state.SEARCH,
        placeholder="words in any step",
        on_change=restart,
        persist_state="session",
        help="Finds runs with a step that has all these words; put a phrase in quotation marks.",
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
    _pager(offset, len(found), total=total, polling=polling)
    event = st.dataframe(
        payload.runs_table(found, state.zone()),
        key=TABLE,
        hide_index=True,
        column_config=COLUMNS,
        height=min(38 + 35 * len(found), 640),
        placeholder="",
        on_select="rerun",
        selection_mode=["single-row", "single-cell"],
        alt="Runs, newest first",
    )
    row = elements.clicked_row(cast("Mapping[str, Any]", event))
    ids = state.runs_shown()
    if row is not None and row < len(ids):
        state.open_run(ids[row])
    state.set_runs_shown([run.id for run in found])


def _pager(offset: int, shown: int, *, total: int, polling: bool) -> None:
    text, back, on, refresh = st.columns([6, 1, 1, 1], vertical_alignment="bottom")
    text.caption(f"Runs {offset + 1:,d} to {offset + shown:,d} of {total:,d}, newest first. Click a run to open it.")
    turn = state.set_runs_offset
    if total > PAGE_SIZE:
        back.button("Newer", on_click=turn, args=(offset - PAGE_SIZE,), disabled=offset == 0, width="stretch")
        last = offset + shown >= total
        on.button("Older", on_click=turn, args=(offset + PAGE_SIZE,), disabled=last, width="stretch")
    if not polling:
        refresh.button("Refresh", width="stretch")


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
