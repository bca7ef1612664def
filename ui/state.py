"""Typed access to what outlives a rerun: the store, the URL's query parameters, the session's state.

A link to a step is ``/trace?run=ID&step=STEP``. Both parameters come from outside and are checked where they are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, tzinfo
from pathlib import Path
from typing import Literal, NoReturn, TypeVar, cast
from urllib.parse import quote, unquote
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np
import streamlit as st
from numpy.typing import NDArray

from tracer.errors import InputError, TracerError
from tracer.jobs import Job, Jobs
from tracer.store import Store, TraceFilter, TraceSummary, default_location
from tracer.token_texts import TokenTexts, token_texts
from tracer.trace.explanation import ArrayFile
from tracer.trace.trace import Step, Trace
from ui import neighbourhood
from ui.evidence import Evidence, Part
from ui.palette import AGENTS, STATUSES, Theme

RUNS_PAGE = "app_pages/runs.py"
TRACE_PAGE = "app_pages/trace.py"
TOKENS_PAGE = "app_pages/tokens.py"
GRAPH_PAGE = "app_pages/graph.py"
PROBES_PAGE = "app_pages/probes.py"
COMPARE_PAGE = "app_pages/compare.py"
NEW_RUN_PAGE = "app_pages/new_run.py"
SETTINGS_PAGE = "app_pages/settings.py"

RUN = "run"
STEP = "step"
PART = "part"
METHOD = "method"
CALL = "call"
TOKEN = "token"  # noqa: S105
GRAIN = "grain"
HOPS = "hops"
DIRECTION = "dir"
MINIMUM = "min"
PINS = "pins"
WITH = "with"
JOB = "job"

AGENT = "filter_agent"
MODEL = "filter_model"
STATUS = "filter_status"
CORRECT = "filter_correct"
SEARCH = "filter_search"
KINDS = "filter_kinds"
BRANCH = "filter_branch"
TASK = "filter_task"
FILTERS = (AGENT, MODEL, STATUS, CORRECT, SEARCH, TASK)

Grain = Literal["token", "word", "sentence", "segment"]
GRAINS: tuple[Grain, ...] = ("token", "word", "sentence", "segment")
DEFAULT_HOPS, DEFAULT_MINIMUM = 1, 0.1
ID_CHARACTERS = 200
_PIN_CHARACTERS = 4000

_RUNS_OFFSET = "runs_offset"
_RUNS_SELECTED = "runs_selected"
_RUNS_UNTICKED = "runs_unticked"
_RUN_CLICKED = "run_clicked"
_RUNS_TO_DELETE = "runs_to_delete"
_LOOKED_FOR = "looked_for"
_PAIRS_OFFSET = "pairs_offset"
_IMPORTED = "imported"
_JOB_STARTED = "job_started_"
_Value = TypeVar("_Value")


def store() -> Store:
    """The store that ``TRACER_STORE`` names, one for all sessions."""
    return _open(str(default_location()))


@st.cache_resource(max_entries=4, show_spinner=False)
def _open(location: str) -> Store:
    return Store(location)


def store_location() -> str:
    """What `store` opens: a path, or a database URL that may hold a password and is not to be shown."""
    return str(default_location())


def documents_folder() -> Path:
    """Where documents that were dropped into the app are kept: beside the store, as its jobs are."""
    folder = jobs().folder
    return folder.with_name(folder.name.removesuffix(".jobs") + ".documents")


def load(summary: TraceSummary) -> Trace:
    """The trace of a summary; shared between sessions, so it must not be changed."""
    return _load(store().where, summary.id, f"{summary.events} {summary.status} {summary.updated_at.isoformat()}")


@st.cache_resource(max_entries=8, show_spinner=False)
def _load(where: str, trace_id: str, version: str) -> Trace:
    return store().load(trace_id)


def evidence(summary: TraceSummary) -> Evidence:
    """What explanations and probes say about the trace of a summary; shared between sessions."""
    return _evidence(store().where, summary.id, f"{summary.events} {summary.status} {summary.updated_at.isoformat()}")


@st.cache_resource(max_entries=8, show_spinner=False)
def _evidence(where: str, trace_id: str, version: str) -> Evidence:
    return Evidence(_load(where, trace_id, version))


def texts_of(trace: Trace) -> tuple[TokenTexts | None, str]:
    """What turns a trace's ids into text; where that cannot be had, why."""
    try:
        # Shown after half a second only: the first time it takes a second or two.
        with st.spinner("Reading the model's tokenizer"):
            return token_texts(trace.model), ""
    except TracerError as error:
        return None, str(error)


def token_arrays(trace_id: str, key: str, file: ArrayFile) -> Mapping[str, NDArray[np.float32]]:
    """Token scores of an explanation by target.

    Raises:
        StoreError: They are missing, or not those that were written.
    """
    return _token_arrays(store().where, trace_id, key, file.sha256, file)


@st.cache_resource(max_entries=8, show_spinner=False)
def _token_arrays(
    where: str, trace_id: str, key: str, sha256: str, _file: ArrayFile
) -> Mapping[str, NDArray[np.float32]]:
    return store().arrays.read(trace_id, key, _file)


def jobs() -> Jobs:
    """The jobs of the store that is shown, one object for all sessions."""
    return _jobs(str(default_location()))


@st.cache_resource(max_entries=4, show_spinner=False)
def _jobs(location: str) -> Jobs:
    return Jobs.of_store(location)


def zone() -> tzinfo:
    """The browser's time zone, or UTC where it is not known."""
    try:
        return ZoneInfo(st.context.timezone or "UTC")
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return UTC


def theme() -> Theme:
    """Whether the person reads on a light or a dark background."""
    return "dark" if st.context.theme.type == "dark" else "light"


def run_id() -> str | None:
    """The id in the URL, if it can be one; whether such a run exists is the store's to say."""
    return _parameter(RUN)


def step_id() -> str | None:
    """The id of a step in the URL, if it can be one."""
    return _parameter(STEP)


def step_of(trace: Trace) -> Step | None:
    """The step that the URL names; ``None`` if it names none or one that is not in the trace."""
    wanted = _parameter(STEP)
    return next((step for step in trace.steps if step.id == wanted), None) if wanted else None


def has_step() -> bool:
    """Whether the URL names a step."""
    return STEP in st.query_params


def select_step(step_id: str) -> None:
    """Put a step in the URL, in place of a part of the prompt or a call."""
    for other in (PART, CALL):
        st.query_params.pop(other, None)
    st.query_params[STEP] = step_id


def part_of(parts: Sequence[Part]) -> Part | None:
    """The part of the prompt that the URL names, by its number; ``None`` if it names none or one that is not there."""
    wanted = _number(PART)
    return None if wanted is None else next((part for part in parts if part.number == wanted), None)


def select_part(number: int) -> None:
    """Put a part of the prompt in the URL, in place of a step."""
    st.query_params.pop(STEP, None)
    st.query_params[PART] = str(number)


def call() -> int | None:
    """Number of a completion of the run, from 1, that the URL names."""
    return _number(CALL)


def select_call(number: int) -> None:
    """Put a completion that no step was cut from in the URL, in place of a step, by its number from 1."""
    for other in (STEP, PART, TOKEN):
        st.query_params.pop(other, None)
    st.query_params[CALL] = str(number)


def method(known: Sequence[str] | None = None) -> str | None:
    """The explanation method that the URL names.

    Args:
        known: Those that there are: the first of them stands for any other. Without it, the name as it is.
    """
    wanted = _parameter(METHOD)
    if known is None:
        return wanted
    return wanted if wanted in known else known[0] if known else None


def select_method(name: str) -> None:
    """Put a method in the URL."""
    st.query_params[METHOD] = name


def selection() -> dict[str, str]:
    """Step and method in the URL, to take them along to another page."""
    found = {name: _parameter(name) for name in (STEP, METHOD)}
    return {name: value for name, value in found.items() if value is not None}


def token() -> int | None:
    """Number of a token in its step, from 0, that the URL names."""
    return _number(TOKEN)


def select_token(number: int) -> None:
    """Put a token in the URL, by its number in its step."""
    st.query_params[TOKEN] = str(number)


def grain() -> Grain:
    """What tokens are taken together as."""
    wanted = _parameter(GRAIN)
    return next((known for known in GRAINS if known == wanted), "token")


def select_grain(name: Grain) -> None:
    """Put it in the URL."""
    st.query_params[GRAIN] = name


def hops() -> int:
    """How many edges away from the selected step the graph reaches."""
    found = _parameter(HOPS)
    return int(found) if found in tuple(map(str, neighbourhood.HOPS)) else DEFAULT_HOPS


def direction() -> neighbourhood.Direction:
    """Whether the graph follows edges to what a step read, to what read it, or both."""
    found = _parameter(DIRECTION)
    return next((known for known in neighbourhood.DIRECTIONS if known == found), "both")


def minimum() -> float:
    """Least strength of an influence on the graph, as a share of the strongest on the same step, from 0 to 1."""
    try:
        found = float(_parameter(MINIMUM) or DEFAULT_MINIMUM)
    except ValueError:
        return DEFAULT_MINIMUM
    return found if 0.0 <= found <= 1.0 else DEFAULT_MINIMUM


def pins(steps: Iterable[Step]) -> tuple[str, ...]:
    """Ids of the pinned steps, those left out that are not there."""
    given = st.query_params.get(PINS) or ""
    wanted = {unquote(part) for part in given[:_PIN_CHARACTERS].split(",") if part}
    return tuple(step.id for step in steps if step.id in wanted)


def set_pins(step_ids: Iterable[str]) -> None:
    """Put pinned steps in the URL."""
    put(PINS, ",".join(quote(step_id, safe="") for step_id in step_ids))


def other_id() -> str | None:
    """The id of the run to compare with, if the URL has one; whether it exists is the store's to say."""
    return _parameter(WITH)


def job() -> Job | None:
    """The job that the URL names, if there is one of that id."""
    wanted = _parameter(JOB)
    if wanted is None:
        return None
    try:
        return jobs().get(wanted)
    except InputError:
        return None


def has_job() -> bool:
    """Whether the URL names a job."""
    return JOB in st.query_params


def select_job(job_id: str | None) -> None:
    """Put a job in the URL, or take it out of it."""
    if job_id is None:
        st.query_params.pop(JOB, None)
    else:
        st.query_params[JOB] = job_id


def put(name: str, value: str) -> None:
    """Put a value in the URL, or take it out where it is empty."""
    if value:
        st.query_params[name] = value
    else:
        st.query_params.pop(name, None)


def open_run(trace_id: str) -> NoReturn:
    """Go to a run's trace."""
    for key in (KINDS, BRANCH):
        st.session_state.pop(key, None)
    chosen = {RUN: trace_id}
    step = _parameter(STEP)
    if step is not None:
        chosen[STEP] = step
    st.switch_page(TRACE_PAGE, query_params=chosen)


def open_at(trace_id: str, name: str, value: str) -> NoReturn:
    """Go to a step, or to a part of the prompt, on the trace page; the method stays."""
    kept = {METHOD: chosen} if (chosen := _parameter(METHOD)) is not None else {}
    st.switch_page(TRACE_PAGE, query_params={RUN: trace_id, name: value, **kept})


def compare_runs(first: str, second: str) -> NoReturn:
    """Go to two runs side by side."""
    st.switch_page(COMPARE_PAGE, query_params={RUN: first, WITH: second})


def run_filter() -> TraceFilter:
    """What the filters of the runs page ask for; values that no widget offers are ignored."""
    agent = _read(AGENT, str)
    status = _read(STATUS, str)
    return TraceFilter(
        agent=agent if agent in AGENTS else None,
        model=_read(MODEL, str) or None,
        status=status if status in STATUSES else None,
        correct=_read(CORRECT, bool),
        text=(_read(SEARCH, str) or "").strip() or None,
        about=(_read(TASK, str) or "").strip() or None,
    )


def clear_filters() -> None:
    """Show all runs again, from the newest."""
    for key in FILTERS:
        st.session_state[key] = "" if key in (SEARCH, TASK) else None
    set_runs_offset(0)


def kinds() -> list[str]:
    """The kinds of step to show; empty for all."""
    chosen = _read(KINDS, list) or []
    return [kind for kind in chosen if isinstance(kind, str)]


def branch() -> str | None:
    """The branch to show, if not all."""
    return _read(BRANCH, str)


def looked_for(trace_id: str) -> str:
    """The words that were looked for last in the steps of this run."""
    of, words = _read(_LOOKED_FOR, tuple) or ("", "")
    return str(words) if of == trace_id else ""


def look_for(trace_id: str, query: str) -> None:
    """Remember it; only one run's is kept."""
    st.session_state[_LOOKED_FOR] = (trace_id, query[:ID_CHARACTERS])


def runs_offset() -> int:
    """The number of runs before the first one on the page."""
    return _read(_RUNS_OFFSET, int) or 0


def set_runs_offset(offset: int) -> None:
    """Turn to another page of runs."""
    st.session_state[_RUNS_OFFSET] = max(0, offset)


def selected_runs() -> Sequence[str]:
    """The ids of the runs that are ticked on the runs page."""
    return cast(Sequence[str], st.session_state.get(_RUNS_SELECTED, ()))


def select_runs(ids: Sequence[str]) -> None:
    """Tick runs by their ids: their rows move while others are recorded."""
    st.session_state[_RUNS_SELECTED] = tuple(ids)


def untick_runs() -> None:
    """Tick none; `times_unticked` tells that the page did so, and not a person in the table."""
    select_runs(())
    st.session_state[_RUNS_UNTICKED] = times_unticked() + 1


def times_unticked() -> int:
    """How often the page took all ticks away in this session."""
    return _read(_RUNS_UNTICKED, int) or 0


def click_run(trace_id: str) -> None:
    """Remember the run that was clicked; a callback cannot leave the page."""
    st.session_state[_RUN_CLICKED] = trace_id


def clicked_run() -> str | None:
    """The run that was clicked, once."""
    clicked = st.session_state.pop(_RUN_CLICKED, None)
    return clicked if isinstance(clicked, str) else None


def runs_to_delete() -> Sequence[str]:
    """The ids of the runs that a person is being asked about."""
    return cast(Sequence[str], st.session_state.get(_RUNS_TO_DELETE, ()))


def set_runs_to_delete(ids: Sequence[str]) -> None:
    """Ask about deleting runs, or no longer."""
    st.session_state[_RUNS_TO_DELETE] = tuple(ids)


def pairs_offset() -> int:
    """The number of compared steps before the first one on the page."""
    return _read(_PAIRS_OFFSET, int) or 0


def set_pairs_offset(offset: int) -> None:
    """Turn to another page of compared steps."""
    st.session_state[_PAIRS_OFFSET] = max(0, offset)


def import_result(file_id: str) -> tuple[Literal["ok", "failed"], str] | None:
    """What became of an uploaded file: its trace's id, or why it was refused."""
    done = _read(_IMPORTED, dict) or {}
    return cast("tuple[Literal['ok', 'failed'], str] | None", done.get(file_id))


def set_import_result(file_id: str, outcome: Literal["ok", "failed"], text: str) -> None:
    """Remember it, so that a rerun does not import the file again; only the last file's outcome is kept."""
    st.session_state[_IMPORTED] = {file_id: (outcome, text)}


def started_job(key: str) -> str | None:
    """The id of the job that the button of this key started last in this session."""
    return _read(_JOB_STARTED + key, str)


def set_started_job(key: str, job_id: str) -> None:
    """Remember it, so that its end is shown where it was started."""
    st.session_state[_JOB_STARTED + key] = job_id


def _read(key: str, kind: type[_Value]) -> _Value | None:
    value = st.session_state.get(key)
    return value if isinstance(value, kind) else None


def _parameter(name: str) -> str | None:
    value = st.query_params.get(name)
    return value if value and len(value) <= ID_CHARACTERS and value.isprintable() else None


def _number(name: str) -> int | None:
    value = _parameter(name)
    return int(value) if value is not None and value.isascii() and value.isdecimal() and len(value) < 10 else None
