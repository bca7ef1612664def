"""The trace file format."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydantic import JsonValue

from tracer.errors import TraceFormatError, UnknownNameError
from tracer.trace.schema import SCHEMA_FILE, json_schema
from tracer.trace.trace import (
    AgentInfo,
    Call,
    Completion,
    Edge,
    ModelInfo,
    Sampling,
    Segment,
    Step,
    Task,
    Trace,
)


def small_trace() -> Trace:
    return Trace(
        id="t1",
        name="a run",
        created_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        status="completed",
        agent=AgentInfo(kind="cot"),
        model=ModelInfo(name="m"),
        task=Task(question="q?"),
        calls=[
            Call(
                id="c1",
                prompt_token_ids=[1, 2, 3],
                segments=[
                    Segment(start=0, end=1, kind="template"),
                    Segment(start=1, end=3, kind="question", step_id="s1"),
                ],
                sampling=Sampling(),
                completions=[Completion(token_ids=[4, 5], logprobs=[-0.5, -1.0], text="ab", finish_reason="stop")],
                started_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
                seconds=0.5,
            )
        ],
        steps=[
            Step(id="s1", kind="question", text="q?"),
            Step(id="s2", kind="answer", text="ab", parents=["s1"], call_id="c1", completion=0, start=0, end=2),
        ],
        edges=[Edge(source="s1", target="s2", kind="next")],
    )


def test_the_keys_of_the_contract_are_there() -> None:
    raw = json.loads(small_trace().to_json())
    assert {
        "schema_version", "id", "name", "created_at", "status", "agent", "model", "task", "calls", "steps", "edges",
        "outcome", "explanations", "probes", "fork_of",
    } <= set(raw)  # fmt: skip
    assert set(raw["calls"][0]) >= {
        "id", "prompt_token_ids", "segments", "sampling", "completions", "started_at", "seconds",
    }  # fmt: skip
    assert set(raw["steps"][0]) >= {
        "id", "kind", "text", "parents", "branch", "pruned", "score", "call_id", "completion", "start", "end", "error",
    }  # fmt: skip
    assert set(raw["model"]) >= {
        "name", "dtype", "tokenizer_sha256", "chat_template_sha256", "engine", "engine_version",
    }  # fmt: skip


def test_published_schema_is_that_of_the_code_and_accepts_a_trace() -> None:
    import jsonschema

    published = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    assert published == json_schema()
    jsonschema.validate(json.loads(small_trace().to_json()), published)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**json.loads(small_trace().to_json()), "status": "odd"}, published)


def test_a_newer_minor_version_loads_and_keeps_what_it_does_not_know() -> None:
    raw = json.loads(small_trace().to_json())
    raw["schema_version"] = "1.9"
    raw["steps"][1]["kind"] = "daydream"
    raw["steps"][1]["mood"] = {"value": 3}
    raw["novelty"] = [1]
    text = Trace.from_json(json.dumps(raw)).to_json()
    assert json.loads(text)["steps"][1]["kind"] == "daydream"
    assert json.loads(text)["steps"][1]["mood"] == {"value": 3}
    assert json.loads(text)["novelty"] == [1]
    assert Trace.from_json(text).to_json() == text


@pytest.mark.parametrize(
    ("version", "message"),
    [("2.0", "upgrade tracer"), ("0.3", "upgrade tracer"), ("one", "MAJOR.MINOR"), (None, "MAJOR")],
)
def test_an_unknown_major_version_is_refused(version: str | None, message: str) -> None:
    raw = {**json.loads(small_trace().to_json()), "schema_version": version}
    with pytest.raises(TraceFormatError, match=message):
        Trace.from_json(json.dumps(raw))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("steps", 1, "parents"), ["s9"], "parent 's9'"),
        (("steps", 0, "parents"), ["s2"], "not an earlier step"),
        (("steps", 1, "end"), 3, "not within"),
        (("steps", 1, "completion"), 1, "none of index 1"),
        (("steps", 1, "call_id"), "c7", "no call 'c7'"),
        (("steps", 1, "id"), "s1", "two steps"),
        (("calls", 0, "segments", 1, "start"), 2, "without gaps"),
        (("calls", 0, "segments", 1, "end"), 2, "cover 2 tokens"),
        (("calls", 0, "segments", 1, "step_id"), "s8", "'s8'"),
        (("calls", 0, "completions", 0, "logprobs"), [-0.5], "1 log-probabilities"),
        (("calls", 0, "completions", 0, "logprobs"), [-0.5, float("nan")], "finite"),
        (("edges", 0, "target"), "s7", "no step 's7'"),
        (("status",), "odd", "status"),
        (("steps",), "none", "steps"),
    ],
)
def test_an_inconsistent_trace_is_refused_with_the_reason(
    path: tuple[str | int, ...], value: object, message: str
) -> None:
    raw = json.loads(small_trace().to_json())
    target = raw
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(TraceFormatError, match=message):
        Trace.from_json(json.dumps(raw))


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"x"', "{}", "\x00", "[" * 100_000])
def test_what_is_no_trace_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(TraceFormatError) as caught:
        Trace.from_json(text)
    assert "\n" not in str(caught.value)


def test_files(tmp_path: Path) -> None:
    trace = small_trace()
    path = trace.save(tmp_path / "deep" / "run.json")
    assert Trace.load(path).to_json() == trace.to_json()
    assert [file.name for file in path.parent.iterdir()] == ["run.json"]
    with pytest.raises(TraceFormatError, match="cannot read"):
        Trace.load(tmp_path / "absent.json")
    with pytest.raises(TraceFormatError, match="cannot read"):
        Trace.load(tmp_path)
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TraceFormatError, match="UTF-8"):
        Trace.load(binary)


def test_graph_has_steps_and_kinds_of_edges() -> None:
    graph = small_trace().graph()
    assert {node: data["kind"] for node, data in graph.nodes(data=True)} == {"s1": "question", "s2": "answer"}
    assert [(a, b, data["kind"]) for a, b, data in graph.edges(data=True)] == [("s1", "s2", "next")]


def test_graph_adds_influence_summed_over_the_sources_of_a_step() -> None:
    trace = small_trace()
    sources: list[JsonValue] = [
        {"id": "a", "step_id": "s1"},
        {"id": "b", "step_id": "s1"},
        {"id": "c", "step_id": None},
    ]
    trace.explanations = [
        {"method": "grad", "targets": ["s2"], "sources": sources, "values": [[0.25, -1.0, 5.0]]},
    ]
    edges = [data for *_, data in trace.graph(influence="grad").edges(data=True) if data["kind"] == "influences"]
    assert edges == [{"kind": "influences", "method": "grad", "weight": -0.75}]
    with pytest.raises(UnknownNameError, match="grad"):
        trace.graph(influence="graf")
