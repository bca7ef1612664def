"""What pages about one run have in common: finding it, and saying what it is."""

from __future__ import annotations

import streamlit as st

from tracer.errors import TraceNotFoundError
from tracer.store import TraceSummary
from tracer.trace.trace import Trace
from ui import elements, palette, payload, state


def run_or_stop() -> str:
    """The id of the run in the URL; without one the page ends with where to find some."""
    run = state.run_id()
    if run is None:
        st.info("No run is open. Choose one on the Runs page.")
        st.page_link(state.RUNS_PAGE, label="Runs", icon=":material/list:")
        st.stop()
    return run


def summary_or_stop() -> TraceSummary:
    """The summary of the run in the URL; without one, or if there is no such run, the page ends."""
    run = run_or_stop()
    with elements.failures("This run cannot be shown."):
        try:
            return state.store().summary(run)
        except TraceNotFoundError:
            st.page_link(state.RUNS_PAGE, label="All runs", icon=":material/arrow_back:")
            raise


def headline(trace: Trace) -> None:
    """Question, answer and outcome in one row."""
    question, answer, correct, agent, model = st.columns([5, 3, 2, 2, 3])
    with question:
        elements.fact("Question", payload.one_line(trace.task.question, limit=400))
    with answer:
        elements.fact("Answer", payload.one_line(trace.outcome.answer) or "none")
    with correct:
        elements.fact("Answer was", palette.correct_name(trace.outcome.correct))
    with agent:
        elements.fact("Agent", palette.agent_name(trace.agent.kind))
    with model:
        elements.fact("Model", payload.one_line(trace.model.name, limit=60))
