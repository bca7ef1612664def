"""What a step cites, as the evidence card shows it: its text with numbers, and the documents behind them."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from tracer.errors import TracerError
from tracer.explain.citations import cited_answers
from tracer.explain.cited import CitedAnswer
from tracer.trace.trace import Step
from ui import elements, jobs, palette, payload, trust
from ui.card_reading import explain_parameters, trust_sentence
from ui.shown import Shown

METHOD = "mirage"
CITABLE = ("document", "observation")
COLUMNS = {
    "number": st.column_config.NumberColumn("#", width=40),
    "share": st.column_config.ProgressColumn("share", min_value=0.0, max_value=1.0, format="percent", width=90),
    "cited": st.column_config.CheckboxColumn("cited", width=60),
    "kind": st.column_config.TextColumn("kind", width=90),
    "title": st.column_config.TextColumn("title", width=300),
}


def draw_citations(shown: Shown, step: Step) -> None:
    """What a step that the model wrote cites, in a trace that holds anything to cite."""
    if not any(other.kind in CITABLE for other in shown.evidence.trace.steps):
        return
    known = METHOD in shown.evidence.methods and step.id in shown.evidence.targets(METHOD)
    with elements.folded("Citations", "card_citations", expanded=known or step.kind == "answer") as is_open:
        if is_open:
            _citations(shown, step, known=known)


def _citations(shown: Shown, step: Step, *, known: bool) -> None:
    evidence = shown.evidence
    if not known:
        st.caption(
            "Which of its words depend on the documents and observations, and on which of them, was not found out yet."
        )
        parameters = explain_parameters(shown, [METHOD], [step.id], faithfulness="all", probes=[])
        jobs.start_button("Cite", "explain", parameters, key="card_cite")
        return
    explanation = evidence.explanation(METHOD)
    # All steps together: one that owes little to the documents beside the others cites nothing.
    steps = [target for target in explanation.targets if target in evidence.steps]
    try:
        answers = {answer.step_id: answer for answer in cited_answers(evidence.trace, explanation, steps)}
    except TracerError as error:
        st.caption("There are no citations of this step:")
        st.text(payload.one_line(str(error), limit=400))
        return
    answer = answers.get(step.id)
    if answer is None:
        st.caption("It read no document and no observation.")
        return
    elements.doubts(trust.doubts(explanation))
    elements.long_text(answer.marked())
    if answer.brackets() != "[]":
        st.caption("Numbers in square brackets are the model's own words.")
    st.dataframe(
        references(answer),
        hide_index=True,
        column_config=COLUMNS,
        alt="Documents and observations that could be cited, with their share in all that was contributed",
    )
    st.caption(
        f"The most that they changed what one token was likely to be: KL divergence of {answer.changed:.2g} nats. "
        "Where that is little, citations say little."
    )
    trust_sentence(evidence, METHOD)


def references(answer: CitedAnswer) -> pd.DataFrame:
    """What could be cited, one row each, with the columns of ``COLUMNS``."""
    rows = [
        (item.number, item.share, item.cited, palette.source_name(item.kind), payload.one_line(item.title, limit=160))
        for item in answer.references
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))
