"""What pages about one run have in common: finding it, saying what it is, and reading its explanations."""

from __future__ import annotations

import streamlit as st

from tracer.errors import TraceFormatError, TraceNotFoundError
from tracer.store import TraceSummary
from tracer.trace.explanation import Explanation
from tracer.trace.faithfulness import faithfulness_of
from tracer.trace.trace import Trace
from ui import elements, palette, payload, state


def summary_or_stop() -> TraceSummary:
    """The summary of the run in the URL; without one the page ends with where to find some."""
    run = state.run_id()
    if run is None:
        st.info("No run is open. Choose one on the Runs page.")
        st.page_link(state.RUNS_PAGE, label="Runs", icon=":material/list:")
        st.stop()
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


def explanations(trace: Trace) -> dict[str, Explanation]:
    """The newest explanation of a run by each method, those of steps that can be read; kept between reruns."""
    version = [
        (document.get("key"), len(str(document.get("targets"))), len(str(document.get("faithfulness"))))
        for document in trace.explanations
    ]
    return _explanations(state.store().where, trace.id, str(version), trace)


@st.cache_resource(max_entries=8, show_spinner=False)
def _explanations(where: str, trace_id: str, version: str, _trace: Trace) -> dict[str, Explanation]:
    found: dict[str, Explanation] = {}
    for document in _trace.explanations:
        try:
            explanation = Explanation.read(document)
        except TraceFormatError:
            continue
        if explanation.targets:
            found.pop(explanation.method, None)
            found[explanation.method] = explanation
    return found


def best_first(found: dict[str, Explanation]) -> list[str]:
    """Names of methods, those first whose scores were shown to be better than chance, by their mean LDS."""

    def worth(name: str) -> tuple[bool, float]:
        known = faithfulness_of(found[name])
        if known is None:
            return False, -2.0
        scores = [item.lds for item in known.targets.values() if item.lds is not None]
        return known.better_than_random is True, sum(scores) / len(scores) if scores else -1.0

    return sorted(found, key=worth, reverse=True)
