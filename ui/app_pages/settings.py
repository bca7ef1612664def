"""What is installed and how to mend it, engines, models, the store, and the jobs of late."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pandas as pd
import streamlit as st

from tracer import doctor
from tracer.errors import TracerError
from tracer.jobs import Job
from tracer.store import TraceFilter
from ui import elements, jobs, palette, payload, state
from ui.app_pages.new_run import DTYPES, model_names

JOBS_SHOWN = 30
POLL_SECONDS = 2
JOBS_TABLE = "jobs_table"
_CHOSEN = "jobs_chosen"
CUES = {"ok": "✓", "missing": "–", "broken": "✗"}
JOB_COLUMNS = {
    "when": st.column_config.TextColumn("when", width=150),
    "what": st.column_config.TextColumn("what", width=190),
    "status": st.column_config.TextColumn("status", width=110),
    "seconds": st.column_config.NumberColumn("seconds", width=80, format="%.0f"),
    "about": st.column_config.TextColumn("about", width=330),
    "error": st.column_config.TextColumn("error", width=420),
}


def main() -> None:
    """Draw the page."""
    st.title("Settings")
    left, right = st.columns(2, gap="large")
    with left:
        _installation()
        _store()
    with right:
        _engines()
        _models()
    _jobs()


@st.cache_resource(ttl=20, show_spinner=False)
def _examined(store: str) -> list[doctor.Finding]:
    return doctor.examine(store)


def _forget() -> None:
    _examined.clear()
    model_names.clear()


def _installation() -> None:
    title, again = st.columns([4, 1], vertical_alignment="bottom")
    title.subheader("Installation")
    again.button("Look again", on_click=_forget, width="stretch")
    with st.spinner("Looking at this installation"):
        findings = _examined(state.store_location())
    for finding in findings:
        with st.container(gap=None):
            st.text(f"{CUES[finding.state]} {finding.what}: {finding.detail}")
            if finding.remedy:
                st.text(f"    → {finding.remedy}")
    st.caption("✓ works, – is done without, ✗ must be mended.")


def _engines() -> None:
    st.subheader("vLLM")
    try:
        servers = doctor.servers()
    except TracerError as error:
        st.error("The servers of this machine cannot be listed.")
        st.text(str(error))
        return
    if not servers:
        st.caption("No server is running. A run with the engine auto starts one, or loads the model by itself.")
    for server in servers:
        with st.container(border=True):
            st.text(f"{server.model} ({server.dtype}, {server.context:,d} tokens) at {server.url}: {server.health}")
            st.caption("Its log")
            st.text(server.log)
            jobs.start_button("Stop it", "serve_stop", {"server": server.id}, f"stop_{server.id}")
    with st.expander("Start a server", expanded=not servers):
        _start_server()


def _start_server() -> None:
    model, dtype = st.columns(2)
    name = model.selectbox("Model", model_names(), key="serve_model", accept_new_options=True)
    precision = dtype.selectbox("Precision", DTYPES, index=None, key="serve_dtype", placeholder="what suits")
    context, idle = st.columns(2)
    length = context.number_input("Tokens of context", min_value=16, value=4096, step=1024, key="serve_length")
    minutes = idle.number_input(
        "Idle minutes", min_value=0, value=60, step=10, key="serve_idle", help="After so many it ends; 0 for never."
    )
    given = {"model": name or "demo", "dtype": precision, "max_model_len": length, "idle_minutes": minutes}
    jobs.start_button("Start vLLM", "serve_start", given, "serve_start")


def _models() -> None:
    st.subheader("Models")
    try:
        found = doctor.models()
    except TracerError as error:
        st.error("The models of this machine cannot be listed.")
        st.text(str(error))
        found = []
    table = pd.DataFrame(
        [
            (model.name, f"{model.size_bytes / 1e9:.2f} GB" if model.fetched else "not fetched", model.source)
            for model in found
        ],
        columns=["name", "size", "from"],
    )
    st.dataframe(table, hide_index=True, height=min(38 + 35 * max(len(table), 1), 213), alt="Models on this machine")
    missing = any(model.name == "demo" and not model.fetched for model in found)
    name = st.text_input(
        "Fetch a model",
        value="demo" if missing else "",
        key="fetch_name",
        placeholder="demo, a hub id such as org/name, or a GGUF file",
    )
    if name.strip():
        jobs.start_button("Fetch", "fetch_model", {"name": name.strip()}, "fetch")


def _store() -> None:
    st.subheader("Store")
    with elements.failures("The store cannot be read."):
        store = state.store()
        elements.fact("Where", store.where)
        counts = {status: store.count(TraceFilter(status=status)) for status in palette.STATUSES}
        parts = [f"{number:,d} {status}" for status, number in counts.items() if number]
        elements.fact("Runs", ", ".join(parts) or "none yet")
        elements.fact("Token scores", str(store.arrays.root))
        elements.fact("Jobs", str(state.jobs().folder))
    st.caption("TRACER_STORE names another store before the app is started.")


def _jobs() -> None:
    st.subheader("Jobs")
    found = state.jobs().list(limit=JOBS_SHOWN)
    if not found:
        st.caption("Nothing was started from the app yet. A new run, an explanation or a fetched model shows up here.")
        st.page_link(state.NEW_RUN_PAGE, label="New run", icon=":material/add:")
        return
    working = any(not job.is_over for job in found)
    st.fragment(_jobs_table, run_every=POLL_SECONDS if working else None)(working)
    chosen = state.job()
    if chosen is None:
        st.caption("Click a job to see its log.")
        return
    jobs.show_job(chosen, key="chosen")
    _job_links(chosen)


def _jobs_table(polling: bool) -> None:
    found = state.jobs().list(limit=JOBS_SHOWN)
    if polling and all(job.is_over for job in found):
        st.rerun(scope="app")
    if st.session_state.pop(_CHOSEN, False):
        st.rerun(scope="app")
    st.session_state[JOBS_TABLE] = {"selection": {"rows": [], "cells": []}}
    st.dataframe(
        jobs_frame(found),
        key=JOBS_TABLE,
        hide_index=True,
        column_config=JOB_COLUMNS,
        height=min(38 + 35 * len(found), 388),
        placeholder="",
        on_select=partial(_choose_job, [job.id for job in found]),
        selection_mode=["single-row", "single-cell"],
        alt="Jobs, newest first",
    )


def jobs_frame(found: Sequence[Job]) -> pd.DataFrame:
    """One row a job, with the columns ``JOB_COLUMNS``."""
    zone = state.zone()
    rows = [
        (
            payload.local_time(job.created_at, zone),
            palette.job_name(job.kind),
            palette.job_status_name(job.status),
            job.seconds,
            about(job),
            payload.one_line(job.error),
        )
        for job in found
    ]
    return pd.DataFrame(rows, columns=list(JOB_COLUMNS)).astype({"seconds": "float64"})


def about(job: Job) -> str:
    """What a job works on, in one line."""
    names = ("question", "trace", "name", "model", "server")
    given = next((job.parameters[name] for name in names if job.parameters.get(name)), "")
    return payload.one_line(str(given))


def _choose_job(ids: Sequence[str]) -> None:
    row = elements.clicked_row(st.session_state[JOBS_TABLE])
    if row is not None and row < len(ids):
        state.select_job(ids[row])
        st.session_state[_CHOSEN] = True


def _job_links(job: Job) -> None:
    trace, remove, _ = st.columns([1, 1, 4], vertical_alignment="bottom")
    if job.trace_id is not None:
        trace.page_link(state.TRACE_PAGE, label="Open the trace", query_params={state.RUN: job.trace_id})
    if job.is_over and remove.button(
        "Remove this job", help="Its log goes; runs and explanations stay.", key="remove_job"
    ):
        with elements.failures("It was not removed."):
            state.jobs().remove(job.id)
        state.select_job(None)
        st.rerun()


if __name__ == "__main__":
    main()
