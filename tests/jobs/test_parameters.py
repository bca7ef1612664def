"""What is refused before a job is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from tracer.errors import InputError, UnknownNameError
from tracer.jobs.parameters import KINDS, ExplainParameters, RunParameters, parse


@pytest.mark.parametrize(
    ("kind", "parameters", "message"),
    [
        ("runn", {}, "did you mean 'run'"),
        ("run", {"kind": "cot"}, "question of the job run"),
        ("run", {"kind": "cot", "question": "  "}, "the question is empty"),
        ("run", {"kind": "cott", "question": "q"}, "kind of the job run"),
        ("run", {"kind": "cot", "question": "q", "temprature": 1}, "temprature of the job run"),
        ("run", {"kind": "cot", "question": "q", "max_tokens": 0}, "max_tokens of the job run"),
        ("run", {"kind": "react", "question": "q", "tools": ["serch"]}, "did you mean 'search'"),
        ("run", {"kind": "react", "question": "q", "docs": "/nowhere"}, "/nowhere"),
        ("run", {"kind": "cot", "question": "q", "prompt": "nothing"}, "nothing"),
        ("run", {"kind": "cot", "question": "q", "engine": "http://me:secret@host:1"}, "no user or password"),
        ("explain", {"trace": "x", "methods": ["grad_l3"]}, "did you mean .grad_l"),
        ("explain", {"trace": "x", "methods": ["integrated_gradients"], "targets": []}, "no target is named"),
        ("explain", {"trace": "x", "probes": ["/etc/passwd.safetensors"]}, "probes.0 of the job explain"),
        (
            "explain",
            {"trace": "x", "methods": ["grad_x_input"], "parameters": {"grad_x_input": {"nothing": 1}}},
            "nothing",
        ),
        ("faithfulness", {"runs": []}, "runs of the job faithfulness"),
        ("serve_start", {"max_model_len": 1}, "max_model_len of the job serve_start"),
        ("fetch_model", {"name": ""}, "name of the job fetch_model"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(kind: str, parameters: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse(kind, parameters)
    assert "\n" not in str(caught.value)


def test_a_kind_that_is_not_there_is_an_unknown_name() -> None:
    with pytest.raises(UnknownNameError):
        parse("", {})


def test_options_reach_the_agent(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# A\nText.")
    found = parse(
        "run",
        {
            "kind": "react",
            "question": "q",
            "docs": str(tmp_path),
            "tools": ["search"],
            "max_steps": 3,
            "style": "native",
        },
    )
    assert isinstance(found, RunParameters)
    options = found.options()
    assert (options.docs, options.tools, options.budget.steps, options.style) == (tmp_path, ["search"], 3, "native")


def test_parameters_survive_their_file() -> None:
    given = {"trace": "t", "methods": ["alti"], "targets": ["s1", "s2#*"], "probes": [], "faithfulness": "all"}
    found = parse("explain", given)
    assert isinstance(found, ExplainParameters)
    assert parse("explain", found.model_dump(mode="json")) == found


def test_only_jobs_that_load_a_model_of_their_own_wait() -> None:
    assert {name for name, kind in KINDS.items() if kind.heavy} == {"explain", "cite", "faithfulness", "probe_train"}
