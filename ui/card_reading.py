"""What a step read, as the evidence card shows it: ranked sources, how far they can be trusted, what can be done."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import streamlit as st

from tracer.explain.methods import DEFAULT_METHODS, METHODS
from tracer.trace.explanation import Explanation
from tracer.trace.trace import Step
from ui import elements, jobs, payload, state, trust
from ui.components import source_list
from ui.components.mount import event_value
from ui.components.source_list import Source
from ui.evidence import Evidence, Reading, Trust
from ui.shown import Passages, Shown, go

SOURCES = "sources"
METHOD_CHOICE = "card_method"
ALL_SOURCES = "card_all_sources"
FIRST_SOURCES = 6
FEWEST = 2
"""Sources that an order needs."""
TARGETS = ("this step", "the answer", "all steps")
TRUSTED = ("the answer", "all steps", "nothing")
_TRUSTED_NAMES = {"the answer": "answer", "all steps": "all", "nothing": "none"}


def draw_reading(shown: Shown, step: Step, *, written: bool) -> None:
    """What the step read, how far that can be trusted, and what can be done about it."""
    evidence = shown.evidence
    if not written:
        method = state.method(evidence.methods)
        readers = [] if method is None else evidence.readers(method, step.id)
        if readers:
            st.markdown("**Read by**")
            draw_sources(shown, readers[:FIRST_SOURCES], method, key=f"{SOURCES}_readers", through=False)
        return
    st.markdown("**What it read**")
    if evidence.unreadable:
        st.caption(f"Explanations that cannot be read, by another program or damaged: {evidence.unreadable:,d}.")
    if not evidence.methods:
        st.info("This run was not explained yet: nothing is known of what its steps read.")
        _explain(shown, step)
        return
    method = _method(evidence)
    if step.id not in evidence.targets(method):
        st.info("This step was not explained by this method.")
        _explain(shown, step, label=False)
        return
    readings = evidence.readings(method, step.id)
    through = any(item.through is not None for item in readings)
    if not readings:
        st.caption("It read nothing but its own tokens.")
    few = readings[:FIRST_SOURCES]
    if len(readings) > len(few) and st.session_state.get(ALL_SOURCES):
        few = readings
    passages = Passages(shown, method, step.id)
    draw_sources(shown, few, method, key=SOURCES, through=through, passages=passages)
    if passages.elsewhere:
        st.caption("This method scores whole sources; the passages shown are those that another method points at.")
    if len(readings) > FIRST_SOURCES:
        st.toggle(f"All {len(readings):,d} sources", key=ALL_SOURCES)
    _trust(shown, step, method)
    _actions(shown, step)


def method_choice(evidence: Evidence, *, key: str) -> str:
    """Which of a trace's methods is shown; the URL decides."""
    current = state.method(evidence.methods) or evidence.methods[0]
    st.session_state[key] = current

    def chosen() -> None:
        state.select_method(st.session_state[key])

    st.selectbox("Method", evidence.methods, key=key, on_change=chosen)
    return current


def _method(evidence: Evidence) -> str:
    """The choice of a method, and what the chosen one is."""
    current = method_choice(evidence, key=METHOD_CHOICE)
    explanation = evidence.explanation(current)
    elements.doubts(trust.doubts(explanation))
    known = METHODS.get(current)
    what = known.summary if known else "another program’s method"
    of = trust.function_name(explanation)
    st.text(payload.one_line(f"{what} ({explanation.unit}{f', {of}' if of else ''})", limit=240))
    return current


def draw_sources(
    shown: Shown,
    readings: Sequence[Reading],
    method: str | None,
    *,
    key: str,
    through: bool,
    passages: Passages | None = None,
) -> None:
    """A list of sources, or of readers; a click selects one."""
    signed = method is not None and shown.evidence.explanation(method).signed
    sources = [_source(shown, reading, None if passages is None else passages.of(reading)) for reading in readings]
    names = [reading.step_id if reading.step_id is not None else reading.part for reading in readings]
    source_list.source_list(sources, signed=signed, through=through, key=key, on_open=partial(_open, key, names))


def _open(key: str, names: Sequence[str | int | None]) -> None:
    row = event_value(key, source_list.OPEN)
    if isinstance(row, int) and 0 <= row < len(names):
        name = names[row]
        if name is not None:
            go(name)


def _source(shown: Shown, reading: Reading, passage: str | None) -> Source:
    text = payload.one_line(passage if passage is not None else shown.text_of(reading), limit=120)
    if reading.step_id is not None:
        return Source(reading, f"step {shown.number(reading.step_id)}", text)
    if reading.part is not None:
        return Source(reading, "in the prompt", text)
    return Source(reading, "", "all of it" if reading.kind == "template" else "where attention rests")


def trust_sentence(evidence: Evidence, method: str) -> None:
    """How far a method's scores can be trusted on a trace, in a sentence."""
    known = evidence.trust(method, "")
    if known.better is None:
        st.warning(
            "How far these scores can be trusted was not measured: nothing shows so far that they say what the model "
            "relied on."
        )
    elif known.better:
        st.success(
            f"Taking away what this method ranks first costs the model more than random removals do (z = {known.z:.1f} "
            f"over {len(known.measured):,d} measured {'step' if len(known.measured) == 1 else 'steps'})."
        )
    else:
        st.warning(
            f"On this trace the method is not shown to be better than random (z = {known.z:.1f} over "
            f"{len(known.measured):,d} measured {'step' if len(known.measured) == 1 else 'steps'}): do not take its "
            "ranking for what the model relied on."
        )


def _trust(shown: Shown, step: Step, method: str) -> None:
    """How far the scores of a step can be trusted, in a sentence and in numbers."""
    known = shown.evidence.trust(method, step.id)
    trust_sentence(shown.evidence, method)
    if known.better is None:
        _measure(shown, step, method)
        return
    _worth(shown, step, method, known)


def _worth(shown: Shown, step: Step, method: str, known: Trust) -> None:
    if known.worth is None:
        numbers = [shown.number(name) for name in known.measured if name in shown.evidence.steps]
        st.caption("Not measured for this step, but for these:")
        st.text(", ".join(f"step {number}" for number in numbers))
        _measure(shown, step, method)
        return
    worth = known.worth
    fit, drop, deletion, insertion = st.columns(4)
    with fit:
        elements.fact("LDS", "unknown" if worth.lds is None else f"{worth.lds:+.2f}")
    with drop:
        elements.fact(f"Without {worth.k:d} of {worth.sources:d} most in favour", f"{-worth.top_k_drop:+.2f} nats")
    with deletion:
        elements.fact("Deletion vs random", f"{worth.deletion:+.2f} nats")
    with insertion:
        elements.fact("Insertion vs random", f"{worth.insertion:+.2f} nats")


def _measure(shown: Shown, step: Step, method: str) -> None:
    if method not in METHODS:
        st.caption("It is another program's method: it cannot be measured here.")
        return
    if max(len(shown.evidence.readings(name, step.id)) for name in shown.evidence.methods) < FEWEST:
        st.caption("It read one thing only: there is no order of sources that could be measured.")
        return
    trusted = "answer" if step.id in shown.evidence.answers else "all"
    parameters = explain_parameters(shown, [method], [step.id], faithfulness=trusted, probes=[])
    jobs.start_button(
        "Measure it", "explain", {**parameters, **as_explained(shown.evidence.explanation(method))}, key="card_measure"
    )


def as_explained(explanation: Explanation) -> dict[str, object]:
    """What the job ``explain`` must be given to go on with an explanation, and not to begin another."""
    replica = explanation.replica
    return {
        "methods": [explanation.method],
        "parameters": {explanation.method: explanation.parameters},
        "target_function": explanation.target_function,
        "foil": explanation.foil,
        "chunk_tokens": explanation.chunk_tokens,
        "seed": explanation.seed,
        "force": bool((explanation.parity or {}).get("forced") or (explanation.parity or {}).get("retokenised")),
        **{name: value for name, value in (("dtype", replica.get("dtype")), ("replica", replica.get("name"))) if value},
    }


def explain_parameters(
    shown: Shown, methods: Sequence[str], targets: str | Sequence[str], *, faithfulness: str, probes: list[str] | None
) -> dict[str, object]:
    """What the job ``explain`` takes; ``probes`` of ``None`` stands for those that the model has."""
    found: dict[str, object] = {
        "trace": shown.evidence.trace.id,
        # Asked for as the default, those that a model lacks weights for are left out instead of refused.
        "methods": None if tuple(methods) == DEFAULT_METHODS else list(methods),
        "targets": targets if isinstance(targets, str) else list(targets),
        "faithfulness": faithfulness,
    }
    return found if probes is None else {**found, "probes": probes}


def _actions(shown: Shown, step: Step) -> None:
    explain, *links = st.columns([2, 1, 1], vertical_alignment="center")
    with explain, st.popover("Explain more", width="stretch"):
        _explain(shown, step)
    query = {state.RUN: shown.evidence.trace.id, state.STEP: step.id}
    method = state.method(shown.evidence.methods)
    if method is not None:
        query[state.METHOD] = method
    links[0].page_link(state.TOKENS_PAGE, label="Tokens", icon=":material/text_fields:", query_params=query)
    links[1].page_link(state.GRAPH_PAGE, label="Graph", icon=":material/account_tree:", query_params=query)


def _explain(shown: Shown, step: Step, *, label: bool = True) -> None:
    """What to compute and the button that starts it."""
    if label:
        st.caption("The recorded tokens are replayed through a copy of the weights on this machine.")
    methods = st.multiselect("Methods", list(METHODS), default=list(DEFAULT_METHODS), key="explain_methods")
    targets = st.selectbox("What to explain", TARGETS, key="explain_targets")
    trusted = st.selectbox("Measure how far the scores can be trusted, for", TRUSTED, key="explain_trusted")
    chosen = {"this step": [step.id], "the answer": "answer"}.get(targets, "all")
    if not methods:
        st.caption("Choose at least one method.")
        return
    jobs.start_button(
        "Explain",
        "explain",
        explain_parameters(shown, methods, chosen, faithfulness=_TRUSTED_NAMES[trusted], probes=None),
        key="card_explain",
    )
