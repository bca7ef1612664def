"""One call of a run, token by token: what each token that the model wrote in it read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import streamlit as st

from tracer.explain.methods import METHODS
from tracer.trace.trace import Trace
from ui import card_reading, elements, jobs, opened, payload, state, trust
from ui.components import token_map
from ui.components.mount import event_value
from ui.evidence import Evidence
from ui.shown import token_arrays
from ui.token_scores import LONGEST, Span, Target, Written, targets, written, written_in

MAP = "token_map"
CALL = "tokens_call"
METHOD_CHOICE = "tokens_method"
GRAIN_CHOICE = "tokens_grain"
PINNED = "tokens_pinned"


def main() -> None:
    """Draw the page."""
    if state.run_id() is None:
        st.title("Tokens")
    st.fragment(_view)(opened.run_or_stop())


def _view(run: str) -> None:
    with elements.failures("This run cannot be shown."):
        evidence = state.evidence(state.store().summary(run))
    trace = evidence.trace
    elements.fact("Question", payload.one_line(trace.task.question, limit=400))
    found = [item for item in written(trace) if len(item.token_ids) <= LONGEST]
    if not found:
        st.info(
            "The model wrote nothing in this run, or it was recorded without token ids: there are no tokens to show."
        )
        return
    number, step_id = _call_choice(evidence, found)
    item = found[number]
    method = state.method(evidence.methods)
    _controls(evidence, found, number)
    texts = _texts(trace, item)
    arrays, problem = ({}, None) if method is None else token_arrays(evidence, method)
    own = [] if method is None else targets(evidence, item, method, arrays)
    _notes(evidence, item, method, own, problem=problem, step_id=step_id)
    signed = method is not None and evidence.explanation(method).signed
    token_map.token_map(
        trace,
        item,
        texts=texts,
        found=own,
        signed=signed,
        grain=state.grain(),
        span=_pinned(trace, item, own, signed=signed),
        key=MAP,
        on_pin=partial(_pin, trace, item, own),
    )


def _call_choice(evidence: Evidence, found: Sequence[Written]) -> tuple[int, str | None]:
    """The completion that the URL names, or that holds the step in the URL, or the answer; and that step."""
    call = state.call()
    if call is not None and 1 <= call <= len(found):
        return call - 1, None
    step = state.step_of(evidence.trace)
    if step is None and evidence.answers:
        step = evidence.steps[evidence.answers[0]]
    number = None if step is None else written_in(found, step)
    return (len(found) - 1 if number is None else number), step.id if step is not None else None


def _controls(evidence: Evidence, found: Sequence[Written], number: int) -> None:
    calls, method, grain, back = st.columns([4, 3, 2, 1], vertical_alignment="bottom")
    names = [_call_name(evidence, item, at, len(found)) for at, item in enumerate(found)]
    st.session_state[CALL] = number

    def call_chosen() -> None:
        chosen = next(iter(found[st.session_state[CALL]].steps(evidence.trace)), None)
        if chosen is not None:
            state.select_step(chosen)
        else:
            state.select_call(st.session_state[CALL] + 1)

    with calls:
        st.selectbox("Call", range(len(found)), key=CALL, format_func=names.__getitem__, on_change=call_chosen)
    with method:
        if evidence.methods:
            card_reading.method_choice(evidence, key=METHOD_CHOICE)
    with grain:
        st.session_state[GRAIN_CHOICE] = state.grain()

        def grain_chosen() -> None:
            state.select_grain(st.session_state[GRAIN_CHOICE])

        st.selectbox("Taken together", state.GRAINS, key=GRAIN_CHOICE, on_change=grain_chosen)
    back.page_link(
        state.TRACE_PAGE,
        label="Trace",
        icon=":material/arrow_back:",
        query_params={state.RUN: evidence.trace.id, **state.selection()},
    )


def _call_name(evidence: Evidence, item: Written, at: int, count: int) -> str:
    numbers = [evidence.numbers[name] for name in item.steps(evidence.trace)]
    steps = (
        f"steps {numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"step {numbers[0]}" if numbers else "no step"
    )
    return f"{at + 1} of {count}: {steps}, {payload.count(len(item.token_ids), 'token')}"


def _texts(trace: Trace, item: Written) -> list[str]:
    """The text of each token, or its id where that is not known."""
    texts, why = state.texts_of(trace)
    if texts is not None:
        return texts.texts(item.token_ids)
    st.warning("Ids stand for the tokens: their texts are not known here.")
    st.text(payload.one_line(why, limit=400))
    return [f"{token_id} " for token_id in item.token_ids]


def _notes(
    evidence: Evidence,
    item: Written,
    method: str | None,
    own: Sequence[Target],
    *,
    problem: str | None,
    step_id: str | None,
) -> None:
    """What is known of this call, and a button for what is not."""
    here = item.steps(evidence.trace)
    if method is None:
        st.info("This run was not explained yet: nothing is known of what its tokens read.")
        _explain(evidence, None, here)
        return
    if problem is not None:
        st.warning("The scores of single tokens cannot be shown.")
        st.text(problem)
        _explain(evidence, [method], here)
        return
    wanted = step_id if step_id in here else here[-1] if here else None
    if not own:
        st.info("The steps of this call were not explained by this method.")
        _explain(evidence, [method], here)
    elif wanted is not None and not evidence.token_targets(method, wanted):
        st.caption(
            f"Of step {evidence.numbers[wanted]:,d} only the scores of the step as a whole are known: "
            "any of its tokens shows them."
        )
        _explain(evidence, [method], [f"{wanted}#*"])
    elements.doubts(trust.doubts(evidence.explanation(method)))
    card_reading.trust_sentence(evidence, method)


def _explain(evidence: Evidence, methods: list[str] | None, names: list[str]) -> None:
    if names and all(name in METHODS for name in methods or ()):
        jobs.start_button(
            "Explain every token of it" if names[0].endswith("#*") else "Explain its steps",
            "explain",
            {"trace": evidence.trace.id, "methods": methods, "targets": names, "faithfulness": "none", "probes": []},
            key="tokens_explain",
        )


def _place(trace: Trace, item: Written) -> tuple[str, str, int]:
    return trace.id, item.call.id, item.completion


def _pin(trace: Trace, item: Written, own: Sequence[Target]) -> None:
    """Remember what was pinned; a step that it lies in goes into the URL."""
    value = event_value(MAP, token_map.PIN)
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(part, int) for part in value):
        return
    start, end = value
    if not 0 <= start < end <= len(item.token_ids):
        return
    st.session_state[PINNED] = (*_place(trace, item), start, end)
    inside = next((found for found in own if "#" not in found.name and found.start <= start < found.end), None)
    if inside is not None:
        state.select_step(inside.name)
        state.select_token(start - inside.start)


def _pinned(trace: Trace, item: Written, own: Sequence[Target], *, signed: bool) -> Span | None:
    known = st.session_state.get(PINNED)
    if isinstance(known, tuple) and known[:3] == _place(trace, item):
        return Span(own, known[3], known[4], signed)
    number, step = state.token(), state.step_id()
    inside = next((found for found in own if found.name == step), None)
    if number is None or inside is None or inside.start + number >= inside.end:
        return None
    return Span(own, inside.start + number, inside.start + number + 1, signed)


if __name__ == "__main__":
    main()
