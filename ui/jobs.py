"""A job as a page shows it: what it is doing, a button that stops it, how it ended; and a button that starts one.

What a job says comes from models and files, so it is shown as text.
"""

from __future__ import annotations

from collections.abc import Mapping

import streamlit as st

from tracer.errors import InputError, TracerError
from tracer.jobs import Job
from ui import palette, payload, state

POLL_SECONDS = 1
LOG_CHARACTERS = 6_000
"""Of a log that is sent again every second while a job is at work."""


def show_job(job: Job, *, key: str = "") -> None:
    """Show a job; while it is at work it is followed, and at its end the whole page is drawn again.

    Args:
        job: The job.
        key: Tells two places on a page that show the same job apart.
    """
    st.fragment(_follow, run_every=None if job.is_over else POLL_SECONDS)(job.id, not job.is_over, key)


def start_button(label: str, kind: str, parameters: Mapping[str, object], key: str) -> Job | None:
    """A button that starts a job, or the job itself while it is at work.

    Args:
        label: What the button says; markdown, so a constant.
        kind: What the job does.
        parameters: What it takes.
        key: Of the button.

    Returns:
        The newest job of that kind and parameters, if there is one.
    """
    try:
        job = state.jobs().latest(kind, parameters)
        if job is not None and not job.is_over:
            show_job(job, key=key)
            return job
        if st.button(label, key=key):
            job = state.jobs().start(kind, parameters)
            state.set_started_job(key, job.id)
            st.rerun()
    except TracerError as error:
        st.error("This cannot be started.")
        st.text(str(error))
        return None
    if job is not None and job.status != "completed" and state.started_job(key) == job.id:
        show_job(job, key=key)
    return job


def _follow(job_id: str, polling: bool, key: str) -> None:
    try:
        job = state.jobs().get(job_id)
    except InputError as error:
        st.text(str(error))
        return
    if polling and job.is_over:
        st.rerun(scope="app")
    draw_job(job, key=key)


def draw_job(job: Job, *, key: str = "") -> None:
    """Draw a job as it is, once; inside a fragment that follows it."""
    with st.container(border=True):
        left, right = st.columns([5, 1], vertical_alignment="center")
        left.text(headline(job))
        if not job.is_over:
            with right:
                _stop(job, key)
            if job.fraction is not None:
                st.progress(job.fraction)
            if job.live_text:
                st.caption("The model is writing")
                st.code(job.live_text, language=None, wrap_lines=True)
        elif job.status == "failed":
            st.error(palette.job_sentence(job.status))
        elif job.status != "completed":
            st.warning(palette.job_sentence(job.status))
        if job.error is not None:
            st.text(job.error)
        log = job.log
        if log:
            with st.expander("Log"):
                st.code(log if job.is_over else log[-LOG_CHARACTERS:], language=None, wrap_lines=True)


def headline(job: Job) -> str:
    """What a job is, how it is, and how far."""
    parts = [palette.job_name(job.kind), palette.job_status_name(job.status)]
    if job.stopping:
        parts.append("stopping")
    elif not job.is_over and job.stage:
        parts.append(payload.one_line(job.stage, limit=120))
    if not job.is_over and job.total > 0:
        parts.append(_amount(job))
    if not job.is_over and job.tokens:
        parts.append(payload.count(job.tokens, "token"))
    if job.seconds is not None:
        parts.append(f"{job.seconds:.0f} s")
    return " · ".join(parts)


def _amount(job: Job) -> str:
    if job.unit == "bytes":
        return f"{job.done / 1e6:,.0f} of {job.total / 1e6:,.0f} MB"
    # A unit in work counts once it is done.
    return f"{int(job.done):,} of {job.total:,.0f} {payload.one_line(job.unit, limit=20)}".rstrip()


def _stop(job: Job, key: str) -> None:
    jobs = state.jobs()
    if job.stopping:
        st.button(
            "Stop at once",
            key=f"kill_{key}_{job.id}",
            on_click=jobs.cancel,
            args=(job.id,),
            kwargs={"at_once": True},
            help="Ends the process without waiting for what it is in the middle of.",
            width="stretch",
        )
    else:
        st.button("Cancel", key=f"cancel_{key}_{job.id}", on_click=jobs.cancel, args=(job.id,), width="stretch")
