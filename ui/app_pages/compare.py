"""Two runs step by step, and how far the explanations of one can be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import pandas as pd
import streamlit as st

from tracer.errors import TraceNotFoundError
from tracer.explain.methods import METHODS
from tracer.store import TraceSummary
from tracer.trace.trace import Trace
from ui import charts, comparison, elements, opened, palette, payload, state, trust
from ui.alignment import Pair, align, word_changes
from ui.jobs import start_button
from ui.trust import Judged

PICKER = "compare_with"
PAIRS = "compare_pairs"
CURVES_METHOD, CURVES_TARGET = "compare_method", "compare_target"
CANDIDATES = 300
PAGE_SIZE = 100
LOGPROB = "%.2f"
STEP_COLUMNS = {
    "difference": st.column_config.TextColumn("difference", width=95),
    "first": st.column_config.NumberColumn("first #", width=55),
    "second": st.column_config.NumberColumn("second #", width=65),
    "kind": st.column_config.TextColumn("kind", width=110),
    "branch": st.column_config.TextColumn("branch", width=55),
    "first_text": st.column_config.TextColumn("first", width=300),
    "second_text": st.column_config.TextColumn("second", width=300),
    "first_logprob": st.column_config.NumberColumn("log p first", width=75, format=LOGPROB),
    "second_logprob": st.column_config.NumberColumn("log p second", width=85, format=LOGPROB),
    "first_truth": st.column_config.NumberColumn("truth first", width=75, format=LOGPROB),
    "second_truth": st.column_config.NumberColumn("truth second", width=85, format=LOGPROB),
}
FACT_COLUMNS = {
    "what": st.column_config.TextColumn("what", width=150),
    "first": st.column_config.TextColumn("first run", width=430),
    "second": st.column_config.TextColumn("second run", width=430),
    "equal": st.column_config.TextColumn("equal", width=50),
}
METHOD_COLUMNS = {
    "method": st.column_config.TextColumn("method", width=190),
    "verdict": st.column_config.TextColumn("against random", width=150),
    "targets": st.column_config.NumberColumn("targets", width=60),
    "lds": st.column_config.NumberColumn("LDS", width=60, format="%.2f"),
    "top_k_drop": st.column_config.NumberColumn("top-k drop, nats", width=110, format="%.2f"),
    "deletion": st.column_config.NumberColumn("deletion, nats", width=95, format="%+.2f"),
    "insertion": st.column_config.NumberColumn("insertion, nats", width=95, format="%+.2f"),
    "z": st.column_config.NumberColumn("z", width=55, format="%.1f"),
    "seconds": st.column_config.NumberColumn("seconds", width=70, format="%.1f"),
    "forward": st.column_config.NumberColumn("tokens forward", width=100, format="localized"),
    "backward": st.column_config.NumberColumn("backward passes", width=110, format="localized"),
}


def main() -> None:
    """Draw the page."""
    st.title("Compare and trust")
    summary = opened.summary_or_stop()
    with elements.failures("This run cannot be shown."):
        trace = state.load(summary)
        judged = Judged.of(
            {name: state.evidence(summary).explanation(name) for name in state.evidence(summary).methods}
        )
    opened.headline(trace)
    st.header("With another run", divider="gray")
    _compare(summary, trace)
    st.header("How far explanations of this run can be trusted", divider="gray")
    _trust(trace, judged)


def _compare(summary: TraceSummary, trace: Trace) -> None:
    other = _pick(summary)
    if other is None:
        return
    with elements.failures("The second run cannot be shown."):
        second = state.load(other)
    facts = comparison.facts_table(trace, second, (summary, other))
    st.dataframe(
        facts,
        hide_index=True,
        column_config=FACT_COLUMNS,
        height=38 + 35 * min(len(facts), 16),
        alt="What is said of each run as a whole",
    )
    if not trace.steps or not second.steps:
        st.info("One of the runs has no steps yet.")
        return
    _steps(trace, second, _pairs(f"{_version(summary)} {_version(other)}", trace, second))


def _pick(summary: TraceSummary) -> TraceSummary | None:
    """The run to compare with, from the URL or chosen here."""
    with elements.failures("The runs cannot be read."):
        found = {run.id: run for run in state.store().list(limit=CANDIDATES) if run.id != summary.id}
        wanted = state.other_id()
        if wanted is not None and wanted not in found and wanted != summary.id:
            try:
                found[wanted] = state.store().summary(wanted)
            except TraceNotFoundError:
                st.warning("The link names a second run that is not there.")
    if not found:
        st.info("There is no other run to compare with yet. Start one on the New run page, or import a trace.")
        return None
    # Runs of the same question are what one mostly compares with.
    order = sorted(found, key=lambda run: found[run].question != summary.question)

    def name(run_id: str) -> str:
        run = found[run_id]
        when = payload.local_time(run.created_at, state.zone())
        same = "same question" if run.question == summary.question else payload.one_line(run.question, limit=60)
        answer = payload.one_line(run.answer, limit=40) or "no answer"
        return f"{when}, {palette.agent_name(run.agent)}, {answer} ({palette.correct_name(run.correct)}); {same}"

    def put() -> None:
        state.put(state.WITH, st.session_state[PICKER] or "")
        state.set_pairs_offset(0)

    st.session_state[PICKER] = wanted if wanted in found else None
    st.selectbox(
        "Second run", order, key=PICKER, format_func=name, placeholder="choose a run", on_change=put, index=None
    )
    return found.get(wanted or "")


def _version(summary: TraceSummary) -> str:
    return f"{state.store().where} {summary.id} {summary.events} {summary.status}"


@st.cache_resource(max_entries=8, show_spinner="Comparing the runs")
def _pairs(version: str, _first: Trace, _second: Trace) -> list[Pair]:
    return align(_first, _second)


def _steps(first: Trace, second: Trace, pairs: Sequence[Pair]) -> None:
    counted = {change: sum(pair.change == change for pair in pairs) for change in comparison.CHANGES}
    apart = next((number for number, pair in enumerate(pairs) if pair.change != "same"), None)
    st.caption(
        f"{counted['same']:,d} steps are the same, {counted['changed']:,d} have another text, {counted['left']:,d} are "
        f"only in the first run and {counted['right']:,d} only in the second."
    )
    if apart is None:
        st.success("The steps of both runs are the same.")
    else:
        st.caption(f"The runs first differ in row {apart + 1:,d}.")
    probe = comparison.common_probe(first, second)
    offset = min(state.pairs_offset(), (len(pairs) - 1) // PAGE_SIZE * PAGE_SIZE)
    page = pairs[offset : offset + PAGE_SIZE]
    _pager(offset, len(page), total=len(pairs))
    frame = comparison.steps_table(page, comparison.Side(first, probe), comparison.Side(second, probe))
    event = st.dataframe(
        frame,
        key=PAIRS,
        hide_index=True,
        column_config=STEP_COLUMNS,
        column_order=comparison.used_columns(frame),
        height=min(38 + 35 * len(frame), 480),
        on_select="rerun",
        selection_mode=["single-row", "single-cell"],
        alt="Steps of both runs side by side",
        placeholder="",
    )
    row = elements.clicked_row(cast("Mapping[str, Any]", event))
    if row is None or row >= len(page):
        row = min(max((apart or 0) - offset, 0), len(page) - 1)
    _difference(first, second, page[row], probe)


def _pager(offset: int, shown: int, *, total: int) -> None:
    if total <= PAGE_SIZE:
        return
    text, back, on = st.columns([4, 1, 1], vertical_alignment="bottom")
    text.caption(f"Rows {offset + 1:,d} to {offset + shown:,d} of {total:,d}.")
    turn, last = state.set_pairs_offset, offset + shown >= total
    back.button("Earlier", on_click=turn, args=(offset - PAGE_SIZE,), disabled=offset == 0, width="stretch")
    on.button("Later", on_click=turn, args=(offset + PAGE_SIZE,), disabled=last, width="stretch")


def _difference(first: Trace, second: Trace, pair: Pair, probe: str | None) -> None:
    """Both texts of a pair, and which words differ."""
    left, right = st.columns(2)
    with left:
        st.subheader("First run")
        _side(comparison.Side(first, probe), pair.left, key="compare_open_first")
    with right:
        st.subheader("Second run")
        _side(comparison.Side(second, probe), pair.right, key="compare_open_second")
    if pair.change == "changed" and pair.left is not None and pair.right is not None:
        before, _ = payload.shortened(first.steps[pair.left].text)
        after, _ = payload.shortened(second.steps[pair.right].text)
        st.caption("What went (−) and what came (+), word by word")
        changes = "\n".join(f"{sign} {words}" for sign, words in word_changes(before, after))
        st.code(changes, language="diff", wrap_lines=True)


def _side(side: comparison.Side, place: int | None, *, key: str) -> None:
    if place is None:
        st.caption("This run has no such step.")
        return
    step = side.trace.steps[place]
    _, _, logprob, truth = side.cells(place)
    known = [f"log-probability {logprob:.2f} nats a token" if logprob is not None else "log-probability unknown"]
    if truth is not None:
        known.append(f"truth probe {truth:.2f}")
    elements.fact("Step", f"{place + 1:,d} {palette.kind_name(step.kind)}; {', '.join(known)}")
    elements.long_text(step.text)
    if st.button("Open on the Trace page", key=key):
        state.open_at(side.trace.id, state.STEP, step.id)


def _trust(trace: Trace, judged: Judged) -> None:
    if not judged.explanations:
        st.info("This run was not explained yet. Explaining the answer measures how far the methods can be trusted.")
        start_button(
            "Explain the answer and measure",
            "explain",
            {"trace": trace.id, "targets": "answer", "faithfulness": "answer"},
            key="compare_explain",
        )
        return
    _verdict(judged)
    if measurable := [name for name in judged.unmeasured if name in METHODS]:
        start_button(
            "Measure the answer's explanations",
            "explain",
            {"trace": trace.id, "methods": measurable, "targets": "answer", "faithfulness": "answer"},
            key="compare_measure",
        )
    frame = trust.method_table(judged)
    st.dataframe(
        frame,
        hide_index=True,
        column_config=METHOD_COLUMNS,
        height=38 + 35 * min(len(frame), 14),
        alt="Methods with what was measured of their scores, and their cost",
        placeholder="",
    )
    st.caption(
        "LDS: rank correlation of predicted and measured effects on held-out removals, 1 is perfect and 0 chance. "
        "Top-k drop: what the target loses without its top sources. Deletion and insertion: area against random "
        "orders, positive is better. z: both together, in standard deviations of random orders. Methods of one family "
        "share their cost."
    )
    if not judged.faithfulness:
        return
    _lds_and_agreement(trace, judged)
    _curves(trace, judged)


def _verdict(judged: Judged) -> None:
    """What the measures prove, in sentences; names of methods are shown as text."""
    for doubt in dict.fromkeys(doubt for item in judged.explanations.values() for doubt in trust.doubts(item)):
        elements.doubts([doubt])
        doubted = [name for name, item in judged.explanations.items() if doubt in trust.doubts(item)]
        st.text(payload.one_line(", ".join(doubted), limit=2000))
    if judged.not_better:
        st.warning("On this run these methods are not shown to be better than a random order of the sources:")
        st.text(payload.one_line(", ".join(judged.not_better), limit=2000))
    if judged.unmeasured:
        st.warning("Not measured: nothing shows so far that the scores of these methods say what the model relied on:")
        st.text(payload.one_line(", ".join(judged.unmeasured), limit=2000))
    if not judged.not_better and not judged.unmeasured:
        st.success("All methods of this run are better than a random order of the sources.")


def _lds_and_agreement(trace: Trace, judged: Judged) -> None:
    left, right = st.columns(2, gap="large")
    theme = state.theme()
    with left:
        st.subheader("LDS by method and target")
        st.altair_chart(
            charts.heat_map(trust.lds_table(judged, trace), theme=theme, low=-1, high=1, form="+.2f"),
            alt="Matrix of LDS by method and target; the numbers are in the cells",
        )
    with right:
        st.subheader("Agreement of methods")
        if len(judged.faithfulness) < 2:
            st.caption("Only one method was measured, so there is nothing to agree with.")
            return
        st.altair_chart(
            charts.heat_map(trust.agreement_table(judged), theme=theme, low=-1, high=1, form="+.2f"),
            alt="Matrix of Spearman correlations between methods; the numbers are in the cells",
        )
        st.caption("Spearman correlation of the scores of two methods, the mean over the measured targets.")


def _curves(trace: Trace, judged: Judged) -> None:
    st.subheader("Deletion and insertion")
    names = trust.target_names(trace, judged.targets)
    pick_target, pick_method = st.columns(2)
    target = pick_target.selectbox("Target", list(names), format_func=lambda name: names[name], key=CURVES_TARGET)
    curves = judged.curves(target)
    if not curves:
        st.caption(
            "The curves of this target were not kept, only their areas against random orders: positive is better than "
            "random."
        )
        frame = trust.area_table(judged, target)
        st.altair_chart(
            charts.bars(frame, theme=state.theme(), x="area against random orders, nats", rule=0.0),
            alt="Areas of deletion and insertion against random orders by method",
        )
        _numbers(frame)
        return
    method = pick_method.selectbox("Method", list(curves), key=CURVES_METHOD)
    left, right = st.columns(2, gap="large")
    chosen = curves[method or next(iter(curves))]
    with left:
        st.caption("Deletion: the sources that rank highest go first. A faithful method falls faster than random.")
        frame = trust.curve_table(chosen, "deletion")
        st.altair_chart(
            charts.lines(frame, theme=state.theme(), x="share of sources gone", y="log p of the target, nats"),
            alt="Log-probability of the target as sources are taken away, beside random orders",
        )
        _numbers(frame)
    with right:
        st.caption("Insertion: the sources that rank highest come first. A faithful method rises faster than random.")
        frame = trust.curve_table(chosen, "insertion")
        st.altair_chart(
            charts.lines(frame, theme=state.theme(), x="share of sources there", y="log p of the target, nats"),
            alt="Log-probability of the target as sources are added, beside random orders",
        )
        _numbers(frame)


def _numbers(frame: pd.DataFrame) -> None:
    with st.expander("Numbers"):
        st.dataframe(frame, hide_index=True, alt="The numbers of the chart")


if __name__ == "__main__":
    main()
