"""The graph around a step: what it comes from, what it leads to, and what it read according to one method."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import pandas as pd
import streamlit as st

from tracer.store import TraceSummary
from tracer.trace.explanation import Explanation
from tracer.trace.faithfulness import faithfulness_of
from tracer.trace.trace import Step, Trace
from ui import elements, opened, palette, payload, state, trust
from ui.components import graph
from ui.components.mount import event_value
from ui.evidence import Evidence, Part
from ui.influence import Influences
from ui.jobs import start_button
from ui.neighbourhood import DIRECTIONS, HOPS, Neighbourhood, Structure, neighbourhood
from ui.shown import part_texts

REFRESH_SECONDS = 2
GRAPH = "graph"
STRUCTURE_ONLY = "structure only"
CONTROL = {name: f"graph_{name}" for name in (state.METHOD, state.HOPS, state.DIRECTION, state.MINIMUM)}
DIRECTION_NAMES = {"in": "what it came from", "out": "what it led to", "both": "both"}
COLUMNS = {
    "from": st.column_config.TextColumn("from", width=105),
    "to": st.column_config.TextColumn("to", width=105),
    "relation": st.column_config.TextColumn("relation", width=80),
    "weight": st.column_config.NumberColumn("weight", width=65, format="%+.3g"),
    "share": st.column_config.NumberColumn("strength", width=65, format="percent"),
}


def main() -> None:
    """Draw the page."""
    st.title("Graph")
    running = opened.summary_or_stop().status == "running"
    st.fragment(_view, run_every=REFRESH_SECONDS if running else None)()


def _view() -> None:
    summary = opened.summary_or_stop()
    with elements.failures("This run cannot be shown."):
        evidence = state.evidence(summary)
    trace = evidence.trace
    opened.headline(trace)
    if not trace.steps:
        st.info("This run has no steps yet.")
        return
    named = graph.Names(trace.steps, evidence.parts, part_texts(evidence, state.texts_of(trace)[0]))
    asked = _thing(named, event_value(GRAPH, "open"))
    if asked is not None:
        _open(trace, asked)
    selected: Step | Part | None = state.step_of(trace) or state.part_of(evidence.parts)
    if selected is None and state.has_step():
        st.warning("The link names a step that this run does not have; the last step is shown.")
    selected = selected or trace.steps[-1]
    explanation = _controls(evidence)
    structure, influences = _edges(summary, evidence, explanation)
    pins = {place for place, step in enumerate(trace.steps) if step.id in state.pins(trace.steps)}
    centre = named.place(selected)
    shown = neighbourhood(
        structure,
        influences,
        centre,
        hops=state.hops(),
        direction=state.direction(),
        minimum=state.minimum(),
        pins=pins,
    )
    left, right = st.columns([7, 3], gap="medium")
    with left:
        _said(shown)
        unit = explanation.unit if explanation is not None else ""
        data = graph.graph_data(named, shown, centre, unit=unit, pins=pins, theme=state.theme())
        graph.draw(
            data, key=GRAPH, on_select=partial(_selected, named), on_pin=partial(_pinned, named), on_open=_nothing
        )
        if explanation is not None:
            _trust(explanation, selected)
        elif not evidence.methods:
            _missing(trace)
    with right:
        _card(named, trace, centre, pinned=centre in pins)
        _relations(named, shown, centre)


def _controls(evidence: Evidence) -> Explanation | None:
    """The choices above the graph, all of which are in the URL; returns the chosen method's explanation."""
    names = evidence.methods
    chosen = state.method((*names, STRUCTURE_ONLY)) or STRUCTURE_ONLY
    method, hops, direction, minimum = st.columns([3, 2, 3, 3], vertical_alignment="bottom")
    _choice(state.METHOD, chosen)
    method.selectbox(
        "Influence by", [*names, STRUCTURE_ONLY], key=CONTROL[state.METHOD], on_change=_put, args=(state.METHOD,)
    )
    _choice(state.HOPS, state.hops())
    hops.selectbox("Hops", HOPS, key=CONTROL[state.HOPS], on_change=_put, args=(state.HOPS,))
    _choice(state.DIRECTION, state.direction())
    direction.selectbox(
        "Follow edges to",
        DIRECTIONS,
        key=CONTROL[state.DIRECTION],
        format_func=_direction_name,
        on_change=_put,
        args=(state.DIRECTION,),
    )
    _choice(state.MINIMUM, state.minimum())
    minimum.slider(
        "Least strength of an influence",
        0.0,
        1.0,
        step=0.05,
        key=CONTROL[state.MINIMUM],
        on_change=_put,
        args=(state.MINIMUM,),
        disabled=chosen == STRUCTURE_ONLY,
        help="Its absolute weight as a share of the strongest one on the same step.",
    )
    return evidence.explanation(chosen) if chosen in names else None


def _direction_name(direction: str) -> str:
    return DIRECTION_NAMES[direction]


def _choice(name: str, value: object) -> None:
    # The URL decides; a widget would otherwise keep what it showed for another link.
    st.session_state[CONTROL[name]] = value


def _put(name: str) -> None:
    value: Any = st.session_state[CONTROL[name]]
    state.put(name, f"{value:g}" if isinstance(value, float) else str(value))


def _edges(
    summary: TraceSummary, evidence: Evidence, explanation: Explanation | None
) -> tuple[Structure, Influences | None]:
    version = f"{state.store().where} {summary.id} {summary.status} {summary.updated_at.isoformat()}"
    structure = _structure(version, evidence.trace)
    if explanation is None:
        return structure, None
    return structure, _influences(f"{version} {explanation.method}", evidence, explanation)


@st.cache_resource(max_entries=8, show_spinner=False)
def _structure(version: str, _trace: Trace) -> Structure:
    return Structure.of(_trace)


@st.cache_resource(max_entries=16, show_spinner=False)
def _influences(version: str, _evidence: Evidence, _explanation: Explanation) -> Influences:
    return Influences.of(_evidence, _explanation)


def _said(shown: Neighbourhood) -> None:
    """How much is shown, and how much is not."""
    st.caption(
        f"{len(shown.places):,d} steps and {len(shown.relations):,d} edges are shown. "
        f"{shown.left_out:,d} more steps are within these hops; the nearest are shown. "
        f"{shown.influences_left_out:,d} weaker influences among the shown steps are left out."
        if shown.left_out or shown.influences_left_out
        else f"{len(shown.places):,d} steps and {len(shown.relations):,d} edges: all that is within these hops."
    )


def _thing(named: graph.Names, place: object) -> Step | Part | None:
    """What a browser means by a place, if there is such a one."""
    known = isinstance(place, int) and 0 <= place < len(named.steps) + len(named.parts)
    return named.thing(place) if known and isinstance(place, int) else None


def _selected(named: graph.Names) -> None:
    thing = _thing(named, event_value(GRAPH, "select"))
    if isinstance(thing, Step):
        state.select_step(thing.id)
    elif thing is not None:
        state.select_part(thing.number)


def _pinned(named: graph.Names, step: Step | None = None) -> None:
    """Pin a step, or let it go if it was pinned."""
    thing = step or _thing(named, event_value(GRAPH, "pin"))
    if isinstance(thing, Step):
        before = state.pins(named.steps)
        state.set_pins(pin for pin in (*before, thing.id) if pin != thing.id or thing.id not in before)


def _nothing() -> None:
    """What is asked for is opened while the page is drawn, where going to another page is allowed."""


def _open(trace: Trace, thing: Step | Part) -> NoReturn:
    name, value = (state.STEP, thing.id) if isinstance(thing, Step) else (state.PART, str(thing.number))
    state.open_at(trace.id, name, value)


def _missing(trace: Trace) -> None:
    st.info("Nothing says yet what the steps of this run read. Explain them to see influences as edges.")
    start_button("Explain all steps", "explain", {"trace": trace.id, "targets": "all"}, key="graph_explain")


def _trust(explanation: Explanation, selected: Step | Part) -> None:
    """What the drawn weights are worth, in a sentence."""
    signed = "− lowers, + raises the target" if explanation.signed else "not signed"
    about = (explanation.method, explanation.unit or "no unit", trust.function_name(explanation), signed)
    elements.fact("Weights", payload.one_line(", ".join(filter(None, about))))
    if isinstance(selected, Step) and selected.id not in explanation.targets:
        st.caption("The selected step was not explained by this method, so no influence leads to it here.")
    elements.doubts(trust.doubts(explanation))
    known = faithfulness_of(explanation)
    if known is None:
        st.warning("Not measured: nothing shows so far that these weights say what the model relied on.")
    elif known.better_than_random is not True:
        st.warning("On this run these weights are not shown to be better than random.")
    else:
        scores = [item.lds for item in known.targets.values() if item.lds is not None]
        mean = sum(scores) / max(len(scores), 1)
        st.caption(
            f"Better than random on this run over {len(known.targets):,d} measured targets; mean LDS {mean:.2f} "
            "(1 is perfect, 0 is chance)."
        )


def _card(named: graph.Names, trace: Trace, place: int, *, pinned: bool) -> None:
    thing = named.thing(place)
    if isinstance(thing, Step):
        st.subheader(f"Step {place + 1:,d}: {palette.kind_name(thing.kind)}")
    else:
        st.subheader(f"Prompt: {palette.source_name(thing.kind)}")
    open_it, pin = st.columns(2)
    if open_it.button("Open on the Trace page", key="graph_open", width="stretch"):
        _open(trace, thing)
    if isinstance(thing, Step):
        toggle: Callable[[], None] = partial(_pinned, named, thing)
        pin.button("Unpin" if pinned else "Pin", key="graph_pin", on_click=toggle, width="stretch")
    elements.long_text(named.text(place))


def _relations(named: graph.Names, shown: Neighbourhood, centre: int) -> None:
    """The same as the graph as a table, for those who cannot see it and for exact numbers."""
    rows = [
        (
            named.short(item.source),
            named.short(item.target),
            ", ".join(kind.replace("_", " ") for kind in item.kinds),
            item.weight,
            None if item.weight is None else item.strength,
        )
        for item in sorted(shown.relations, key=lambda item: centre not in (item.source, item.target))
    ]
    st.caption("Edges, those of the selected step first")
    table = pd.DataFrame(rows, columns=list(COLUMNS)).astype({"weight": "float64", "share": "float64"})
    st.dataframe(
        table,
        hide_index=True,
        column_config=COLUMNS,
        height=min(38 + 35 * len(rows), 360),
        alt="Edges of the graph, those of the selected step first",
        placeholder="",
    )


if __name__ == "__main__":
    main()
