"""Start an agent on a question, watch it work, and go to its trace."""

from __future__ import annotations

import streamlit as st

from tracer import doctor
from tracer.errors import TraceNotFoundError, TracerError
from tracer.jobs import Job, keep_documents
from ui import elements, jobs, palette, payload, state

AGENTS = ("cot", "cot-sc", "tot", "react")
ENGINES = ("auto", "vllm", "local")
TOOLS = ("calculator", "search", "python")
DTYPES = ("float32", "bfloat16", "float16")
DOCUMENT_TYPES = ["md", "markdown", "txt", "text"]
DOCUMENT_MB = 2
POLL_SECONDS = 1
STEPS_SHOWN = 40
DEFAULT_TOKENS = 512
AGENT_HELP = (
    "CoT thinks step by step. CoT-SC draws several chains and lets them vote. ToT searches a tree of thoughts. ReAct "
    "thinks and uses tools in turn."
)
ENGINE_HELP = (
    "auto takes a vLLM that runs, or starts one, or else loads the model in the worker itself; local is the last of "
    "these; an address is that of a server of any origin, whose key is read from TRACER_API_KEY."
)
STEP_COLUMNS = {
    "step": st.column_config.NumberColumn("#", width=45),
    "kind": st.column_config.TextColumn("kind", width=115),
    "text": st.column_config.TextColumn("text", width=700),
    "error": st.column_config.TextColumn("error", width=160),
}


def main() -> None:
    """Draw the page."""
    st.title("New run")
    job = state.job()
    if job is not None and job.kind == "run":
        st.fragment(_watch, run_every=None if job.is_over else POLL_SECONDS)(job.id, not job.is_over)
        return
    if state.has_job():
        st.warning("The link names a run that is not being recorded here; start a new one below.")
    _form()


def _form() -> None:
    agent = _agent()
    left, right = st.columns([3, 2], gap="medium")
    with left:
        question = st.text_area(
            "Question", key="new_question", placeholder="What shall it answer?", height=140, persist_state="session"
        )
        reference = st.text_input(
            "Right answer",
            key="new_reference",
            placeholder="if you know it: the run is judged by it",
            persist_state="session",
        )
        files = _documents()
        st.caption("The run goes on when this page is reloaded or closed, and is kept with all that it recorded.")
        start = st.button("Start", key="new_start")
    with right:
        model, engine = _where()
        tools = _tools() if agent == "react" else None
        options = _parameters(agent)
    if not start:
        return
    try:
        docs = str(keep_documents(state.documents_folder(), files)) if files else None
        given: dict[str, object] = {"kind": agent, "question": question, "reference": reference.strip() or None}
        given |= {"docs": docs, "model": model or None, "engine": engine or "auto", "tools": tools or None}
        job = state.jobs().start("run", given | options)
    except TracerError as error:
        with left:
            st.error("The run cannot be started.")
            st.text(str(error))
        return
    state.select_job(job.id)
    st.rerun()


def _agent() -> str:
    chosen = st.segmented_control(
        "Agent",
        AGENTS,
        default=AGENTS[0],
        required=True,
        key="new_agent",
        format_func=lambda kind: palette.agent_name(kind.replace("-", "_")),
        help=AGENT_HELP,
        persist_state="session",
    )
    return chosen or AGENTS[0]


def _documents() -> list[tuple[str, bytes]]:
    """Names and contents of what was dropped; ReAct searches it, the other agents are given all of it."""
    single, folder = st.columns(2)
    files = single.file_uploader(
        "Documents",
        type=DOCUMENT_TYPES,
        accept_multiple_files=True,
        key="new_files",
        max_upload_size=DOCUMENT_MB,
        help="Text and markdown files. ReAct searches them, the other agents are given all of them.",
    )
    more = folder.file_uploader(
        "A folder of documents",
        type=DOCUMENT_TYPES,
        accept_multiple_files="directory",
        key="new_folder",
        max_upload_size=DOCUMENT_MB,
    )
    return [(file.name, file.getvalue()) for file in (*(files or ()), *(more or ()))]


def _where() -> tuple[str | None, str | None]:
    model, engine = st.columns(2)
    chosen = model.selectbox(
        "Model",
        model_names(),
        key="new_model",
        accept_new_options=True,
        help="demo, a local folder, a GGUF file or a hub id such as org/name; fetched on first use.",
        persist_state="session",
    )
    runner = engine.selectbox(
        "Engine", ENGINES, key="new_engine", accept_new_options=True, help=ENGINE_HELP, persist_state="session"
    )
    return chosen, runner


@st.cache_resource(ttl=30, show_spinner=False)
def model_names() -> list[str]:
    """Names of the models on this machine, the demo model first."""
    try:
        found = [model.name for model in doctor.models()]
    except TracerError:
        found = []
    return ["demo", *sorted({name for name in found if name != "demo"})]


def _tools() -> list[str]:
    return st.multiselect(
        "Tools",
        TOOLS,
        key="new_tools",
        placeholder="what the task needs: search with documents, else calculator",
        help="python runs what the model writes in a confined process; calculator and search run nothing.",
        persist_state="session",
    )


def _parameters(agent: str) -> dict[str, object]:
    """What is sent besides the question; nothing stands for the agent's own default."""
    with st.expander("Parameters"):
        first, second = st.columns(2)
        with first:
            found: dict[str, object] = {
                "max_tokens": elements.whole_number("Tokens of a reply", "new_max_tokens", value=DEFAULT_TOKENS),
                "token_budget": elements.whole_number("Tokens of the whole run", "new_token_budget"),
            }
        with second:
            found["seed"] = st.number_input("Seed", value=0, step=1, key="new_seed", persist_state="session")
            found["dtype"] = elements.choice("Precision", DTYPES, "new_dtype", index=None)
        with first:
            found |= _ways(agent)
        with second:
            found |= _amounts(agent)
    return found


def _ways(agent: str) -> dict[str, object]:
    match agent:
        case "cot":
            return {"shots": elements.choice("Examples in the prompt", ("zero", "few"), "new_cot_shots")}
        case "cot-sc":
            return {
                "shots": elements.choice("Examples in the prompt", ("zero", "few"), "new_sc_shots", index=1),
                "vote": elements.choice("Vote", ("majority", "weighted", "unnormalised"), "new_vote"),
            }
        case "tot":
            return {
                "search": elements.choice("Search", ("bfs", "dfs"), "new_search"),
                "generate": elements.choice("New thoughts", ("propose", "sample"), "new_generate"),
                "evaluate": elements.choice("Thoughts are judged by", ("value", "vote"), "new_evaluate"),
            }
        case _:
            return {"style": elements.choice("Tool calls", ("text", "native"), "new_style")}


def _amounts(agent: str) -> dict[str, object]:
    found: dict[str, object] = {}
    if agent == "cot-sc":
        found["n"] = elements.whole_number("Chains", "new_chains", value=5)
    elif agent == "tot":
        found["n"] = elements.whole_number("Thoughts kept a level", "new_breadth")
        found["depth"] = elements.whole_number("Thoughts on a path", "new_depth")
    elif agent == "react":
        found["max_steps"] = elements.whole_number("Rounds of thought and action", "new_rounds")
    if agent in ("cot-sc", "tot"):
        found["temperature"] = st.number_input(
            "Temperature",
            min_value=0.0,
            max_value=10.0,
            value=None,
            step=0.1,
            key="new_temperature",
            placeholder="the default",
            persist_state="session",
        )
    return found


def _watch(job_id: str, polling: bool) -> None:
    """A run's question, its steps as they arrive, and what the model is writing."""
    with elements.failures("This run cannot be shown."):
        job = state.jobs().get(job_id)
        if polling and job.is_over:
            st.rerun(scope="app")
        elements.fact("Question", payload.one_line(str(job.parameters.get("question")), limit=2000))
        _links(job)
        _steps(job)
        jobs.draw_job(job)


def _links(job: Job) -> None:
    trace, again, _ = st.columns([1, 1, 4], vertical_alignment="bottom")
    if job.trace_id is not None:
        trace.page_link(
            state.TRACE_PAGE,
            label="Open the trace",
            icon=":material/arrow_forward:",
            query_params={state.RUN: job.trace_id},
        )
    if job.is_over:
        again.button("Another run", on_click=state.select_job, args=(None,), key="new_again", width="stretch")


def _steps(job: Job) -> None:
    if job.trace_id is None:
        return
    try:
        summary = state.store().summary(job.trace_id)
        trace = state.load(summary)
    except TraceNotFoundError:
        return
    if job.is_over:
        answer, correct = st.columns([4, 2])
        with answer:
            elements.fact("Answer", payload.one_line(trace.outcome.answer) or "none")
        with correct:
            elements.fact("Answer was", palette.correct_name(trace.outcome.correct))
    numbered = list(enumerate(trace.steps, 1))
    if len(numbered) > STEPS_SHOWN:
        st.caption(f"The last {STEPS_SHOWN:,d} of {len(numbered):,d} steps.")
    shown = numbered[-STEPS_SHOWN:]
    table = payload.steps_table(shown)
    colours = palette.colours_of(palette.KINDS, state.theme())
    st.dataframe(
        table.style.map(lambda name: f"color: {colours[name]}", subset=["kind"]),
        hide_index=True,
        column_config=STEP_COLUMNS,
        column_order=[name for name in STEP_COLUMNS if name != "error" or any(step.error for _, step in shown)],
        height=min(38 + 35 * max(len(shown), 1), 420),
        placeholder="",
        alt="Steps as they are recorded",
    )


if __name__ == "__main__":
    main()
