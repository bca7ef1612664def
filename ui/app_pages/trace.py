"""One run: its outcome, its steps in order with what was read, and the evidence about the selected one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

import streamlit as st

from tracer.trace.trace import Step, Trace
from ui import card, elements, jobs, opened, palette, payload, state
from ui.components import step_map
from ui.components.mount import event_value
from ui.components.step_map import Row
from ui.evidence import Evidence, Part
from ui.shown import Shown, go

REFRESH_SECONDS = 2
MAP = "step_map"


def main() -> None:
    """Draw the page."""
    if state.run_id() is None:
        st.title("Trace")
    summary = opened.summary_or_stop()
    running = summary.status == "running"
    st.fragment(_view, run_every=REFRESH_SECONDS if running else None)(summary.id, running)


def _view(run: str, polling: bool) -> None:
    with elements.failures("This run cannot be shown."):
        summary = state.store().summary(run)
        evidence = state.evidence(summary)
        trace = evidence.trace
    if polling and summary.status != "running":
        st.rerun()
    _header(trace, seconds=summary.seconds)
    if not trace.steps:
        st.info("This run has no steps yet.")
        return
    if not evidence.methods and any(evidence.call_of(step) for step in trace.steps) and trace.status != "running":
        st.info(
            "Nothing is known yet of what its steps read. To find out, the run is replayed through a copy of its model."
        )
        jobs.start_button("Explain this run", "explain", {"trace": trace.id}, key="explain_run")
    shown = Shown.of(evidence)
    left, right = st.columns([3, 2], gap="medium")
    part = state.part_of(evidence.parts)
    step = state.step_of(trace)
    if step is None and part is None and state.has_step():
        right.warning("The link names a step that this run does not have; the first step is shown.")
    selected: Step | Part = step or part or trace.steps[0]
    with left:
        _steps(shown, selected)
    with right:
        card.draw(shown, selected)


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
    with details, elements.folded("Identity, parameters and outcome", "about_run") as is_open:
        if is_open:
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


def map_rows(evidence: Evidence, part_texts: Sequence[str], *, kinds: Sequence[str], branch: str | None) -> list[Row]:
    """The lines of the map: the prompt's parts first, where nothing is filtered, then the steps."""
    parts = [] if kinds or branch is not None else evidence.parts
    rows = [Row(None, part, part.number, part_texts[part.number - 1]) for part in parts]
    return rows + [
        Row(step, None, number, step.text) for number, step in visible(evidence.trace, kinds=kinds, branch=branch)
    ]


def _steps(shown: Shown, selected: Step | Part) -> None:
    evidence = shown.evidence
    _step_filters(evidence.trace)
    rows = map_rows(evidence, shown.part_texts, kinds=state.kinds(), branch=state.branch())
    if not rows:
        st.info("No step matches these filters.")
        return
    step_map.step_map(
        evidence,
        rows,
        method=state.method(evidence.methods),
        selected=selected.id if isinstance(selected, Step) else selected.number,
        key=MAP,
        query=state.looked_for(evidence.trace.id),
        on_open=partial(_open, [row.name for row in rows]),
        on_find=partial(_find, evidence.trace.id),
    )


def _open(names: Sequence[str | int]) -> None:
    row = event_value(MAP, step_map.OPEN)
    if isinstance(row, int) and 0 <= row < len(names):
        go(names[row])


def _find(trace_id: str) -> None:
    query = event_value(MAP, step_map.FIND)
    if isinstance(query, str):
        state.look_for(trace_id, query)


def _step_filters(trace: Trace) -> None:
    present = {palette.kind_label(step.kind) for step in trace.steps}
    kinds = [look.label for look in (*palette.KINDS.values(), palette.OTHER) if look.label in present]
    branches = sorted({step.branch for step in trace.steps if step.branch is not None})
    left, right = st.columns([3, 2])
    left.multiselect("Kinds", kinds, key=state.KINDS, placeholder="all")
    if branches:
        right.selectbox("Branch", branches, index=None, key=state.BRANCH, placeholder="all")


if __name__ == "__main__":
    main()
