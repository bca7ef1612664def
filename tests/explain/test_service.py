"""`tracer.explain`: what it computes, keeps, takes up again and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tracer
from tests.explain.tiny_runs import Families, perturbed, recorded_run, register, write_replica
from tracer.errors import (
    CancelledError,
    EngineUnavailableError,
    InputError,
    ModelError,
    TracerError,
    UnknownNameError,
)
from tracer.explain.base import Context
from tracer.explain.faithfulness import Faithfulness, measure, measures_of
from tracer.explain.removal import Removal
from tracer.replay.model import Replica
from tracer.replay.recorded import Recorded
from tracer.store import Arrays, Store
from tracer.trace.explanation import Explanation
from tracer.trace.faithfulness import against_random
from tracer.trace.trace import Trace

OWN = ["near", "surprise"]
CONTRACT = {
    "method", "parameters", "target_function", "unit", "signed", "targets", "sources", "values", "faithfulness",
    "parity", "replica", "cost", "seed", "arrays", "key", "details", "created_at", "through",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_replica(tmp_path_factory.mktemp("replica"))


@pytest.fixture(scope="module")
def trace(folder: Path) -> Trace:
    return recorded_run(folder)


@pytest.fixture(scope="module")
def replica(folder: Path) -> Replica:
    return Replica.load(str(folder), device="cpu")


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> Families:
    return register(monkeypatch)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def store(tmp_path: Path, trace: Trace) -> Iterator[Store]:
    with Store(tmp_path / "runs.db") as opened:
        opened.import_trace(trace)
        yield opened


def stages(seen: list[Any]) -> list[str]:
    return list(dict.fromkeys(item.stage for item in seen))


def test_the_document_holds_what_the_contract_names_and_sums_of_token_scores(
    trace: Trace, replica: Replica, families: Families
) -> None:
    before = trace.to_json()
    report = tracer.explain(trace, methods=OWN, replica=replica, faithfulness="none")
    assert trace.to_json() == before
    document = report.trace.explanations[0]
    assert set(document) >= CONTRACT
    assert (document["method"], document["targets"], document["faithfulness"], document["arrays"]) == (
        "near", ["s2", "s3", "s5", "s6"], None, None,
    )  # fmt: skip
    text = report.trace.to_json()
    again = Trace.from_json(text)
    assert again.to_json() == text
    assert again.explanations == report.trace.explanations

    # The question's 12 tokens stand behind 12 others; the answer ends after all 76.
    near = report.explanation("near")
    end = len(trace.calls[1].prompt_token_ids) + len(trace.calls[1].completions[0].token_ids)
    question = next(number for number, source in enumerate(near.sources) if source.step_id == "s1")
    assert near.row("s6")[question] == pytest.approx(sum(1 / (end - place) for place in range(12, 24)), rel=1e-6)
    assert near.row("s2")[[source.step_id for source in near.sources].index("s4")] == 0.0
    assert near.details["s6"] == {"tokens": end}
    assert near.cost["forward_tokens"] == 36 + 46 + 66 + 68


def test_the_report_ranks_sources_and_leaves_out_the_step_itself(
    trace: Trace, replica: Replica, families: Families
) -> None:
    report = tracer.explain(trace, methods=OWN, targets=["s5"], replica=replica)
    found = report.sources("s5", "surprise")
    assert [abs(value) for _, value in found] == sorted((abs(value) for _, value in found), reverse=True)
    assert {source.step_id for source, _ in found} == {None, "s1", "s2", "s3", "s4"}
    scores = report.token_scores("s5", "surprise")
    observed = Recorded(trace).target("s5").start - len("x is in y. ")
    value = next(value for source, value in found if source.step_id == "s4")
    assert value == pytest.approx(float(scores[observed : observed + 11].sum()), rel=1e-6)
    with pytest.raises(UnknownNameError, match="surprise"):
        report.sources("s5", "suprise")
    with pytest.raises(UnknownNameError, match="s6"):
        report.sources("s6", "near")


def test_targets_can_be_the_answer_steps_or_tokens(trace: Trace, replica: Replica, families: Families) -> None:
    def targets(wanted: str | list[str]) -> tuple[str, ...]:
        return tracer.explain(trace, methods=["near"], targets=wanted, replica=replica).targets

    assert targets("answer") == ("s6",)
    assert targets("s3") == ("s3",)
    assert targets(["s5", "s2", "s5"]) == ("s5", "s2")
    assert targets(["s6#1"]) == ("s6#1",)
    assert targets(["s6#*"]) == ("s6#0", "s6#1")
    report = tracer.explain(trace, methods=["near"], targets=["s6#*", "s6", "s2"], replica=replica)
    assert report.explanations[0].targets == ["s2", "s6", "s6#0", "s6#1"]
    # A token reads its step's earlier tokens.
    assert "s6" in [source.step_id for source, _ in report.sources("s6#1", "near")]
    assert "s6" not in [source.step_id for source, _ in report.sources("s6", "near")]


def test_nothing_is_computed_twice(trace: Trace, replica: Replica, families: Families) -> None:
    first = tracer.explain(trace, methods=OWN, targets=["s2", "s6"], replica=replica)
    families.asked.clear()
    seen: list[Any] = []
    again = tracer.explain(first.trace, methods=OWN, targets=["s2", "s6"], replica=replica, progress=seen.append)
    assert families.computed == []
    assert again.trace.to_json() == first.trace.to_json()
    assert again.parity == first.parity
    assert stages(seen) == []

    more = tracer.explain(first.trace, methods=["near"], targets="all", replica=replica)
    assert families.computed == [("near", "s3"), ("near", "s5")]
    assert len(more.trace.explanations) == 2
    assert more.explanations[0].targets == ["s2", "s3", "s5", "s6"]
    assert more.explanations[0].row("s6") == first.explanations[0].row("s6")
    assert more.explanations[0].cost["forward_tokens"] == 36 + 46 + 66 + 68
    whole = tracer.explain(trace, methods=["near"], replica=replica).explanations[0]
    assert (whole.values, whole.through) == (more.explanations[0].values, more.explanations[0].through)


@pytest.mark.parametrize(
    "change",
    [
        {"parameters": {"near": {"scale": 2.0}}},
        {"seed": 1},
        {"target_function": "logit"},
        {"chunk_tokens": 4},
    ],
)
def test_whatever_changes_the_result_is_computed_anew(
    change: dict[str, Any], trace: Trace, replica: Replica, families: Families
) -> None:
    first = tracer.explain(trace, methods=["near"], targets=["s2"], replica=replica)
    second = tracer.explain(first.trace, methods=["near"], targets=["s2"], replica=replica, **change)
    assert families.computed == [("near", "s2"), ("near", "s2")]
    assert [document["key"] for document in second.trace.explanations] == [
        first.explanations[0].key,
        second.explanations[0].key,
    ]


def test_other_weights_of_the_same_name_are_another_replica(trace: Trace, folder: Path, families: Families) -> None:
    def in_memory() -> Replica:
        return Replica(Replica.load(str(folder), device="cpu").model)

    one, other = in_memory(), in_memory()
    first = tracer.explain(trace, methods=["near"], targets=["s2"], replica=one)
    assert tracer.explain(first.trace, methods=["near"], targets=["s2"], replica=other).parity == first.parity
    assert families.computed == [("near", "s2")]
    with torch.no_grad():
        other.model.model.layers[0].mlp.down_proj.weight.mul_(1.3)
    with pytest.raises(ModelError, match="does not behave like"):
        tracer.explain(first.trace, methods=["near"], targets=["s2"], replica=other)


def test_a_stored_trace_keeps_its_explanations_and_token_scores(
    store: Store, trace: Trace, replica: Replica, families: Families
) -> None:
    report = tracer.explain(store.load("run-1"), methods=OWN, replica=replica, store=store)
    loaded = store.load("run-1")
    assert loaded.to_json() == report.trace.to_json()
    explanation = Explanation.read(loaded.explanations[1])
    assert explanation.arrays is not None and explanation.key is not None
    tokens = store.arrays.read("run-1", explanation.key, explanation.arrays)
    assert sorted(tokens) == ["s2", "s3", "s5", "s6"]
    np.testing.assert_array_equal(tokens["s6"], report.token_scores("s6", "surprise"))
    assert tokens["s6"].dtype == np.float32

    families.asked.clear()
    # The trace as it was recorded, without what the store has added to it.
    again = tracer.explain(trace, methods=OWN, replica=replica, store=store)
    assert families.computed == []
    assert len(again.trace.explanations) == len(store.load("run-1").explanations) == 2
    np.testing.assert_array_equal(again.token_scores("s6", "surprise"), tokens["s6"])


def test_an_imported_explanation_is_completed_in_its_place(
    tmp_path: Path, trace: Trace, replica: Replica, families: Families
) -> None:
    first = tracer.explain(trace, methods=["near"], targets=["s2"], replica=replica)
    with Store(tmp_path / "other.db") as store:
        store.import_trace(first.trace)
        tracer.explain(store.load("run-1"), methods=["near"], targets=["s3"], replica=replica, store=store)
        (document,) = store.load("run-1").explanations
    assert document["targets"] == ["s2", "s3"]


def test_token_scores_that_were_changed_are_computed_again(
    store: Store, trace: Trace, replica: Replica, families: Families
) -> None:
    report = tracer.explain(trace, methods=["near"], targets=["s2", "s3"], replica=replica, store=store)
    path = store.arrays.path("run-1", str(report.explanations[0].key))
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    families.asked.clear()
    again = tracer.explain(store.load("run-1"), methods=["near"], targets=["s2"], replica=replica, store=store)
    assert families.computed == [("near", "s2")]
    arrays = again.explanations[0].arrays
    assert arrays is not None
    np.testing.assert_array_equal(
        store.arrays.read("run-1", str(again.explanations[0].key), arrays)["s2"], report.token_scores("s2", "near")
    )


def test_only_this_very_trace_is_written_to(store: Store, trace: Trace, replica: Replica, families: Families) -> None:
    for other in (
        trace.model_copy(update={"id": "run"}),  # the beginning of a stored id
        trace.model_copy(update={"steps": trace.steps[:-1], "edges": []}),
    ):
        report = tracer.explain(other, methods=["near"], targets=["s2"], replica=replica, store=store)
        assert report.explanations[0].arrays is None
        assert store.load("run-1").explanations == []
        assert not store.arrays.root.exists()


def test_arrays_go_where_they_are_told(tmp_path: Path, trace: Trace, replica: Replica, families: Families) -> None:
    arrays = Arrays.beside(tmp_path / "run.json")
    report = tracer.explain(trace, methods=["near"], replica=replica, arrays=arrays)
    file = report.explanations[0].arrays
    assert file is not None
    assert (tmp_path / "run.json.arrays" / file.file).stat().st_size == file.bytes


def test_cancelling_keeps_what_is_finished(store: Store, trace: Trace, replica: Replica, families: Families) -> None:
    cancel = threading.Event()
    families.before_target = lambda method, step: cancel.set() if (method, step) == ("surprise", "s3") else None
    with pytest.raises(CancelledError) as caught:
        tracer.explain(trace, methods=OWN, replica=replica, store=store, cancel=cancel)
    kept = caught.value.trace
    assert kept is not None and kept.explanations == store.load("run-1").explanations
    assert [(item["method"], item["targets"]) for item in kept.explanations] == [
        ("near", ["s2", "s3", "s5", "s6"]),
        ("surprise", ["s2", "s3"]),
    ]
    families.asked.clear()
    done = tracer.explain(store.load("run-1"), methods=OWN, replica=replica, store=store)
    assert families.computed == [("surprise", "s5"), ("surprise", "s6")]
    whole = tracer.explain(trace, methods=OWN, replica=replica)
    assert [item.values for item in done.explanations] == [item.values for item in whole.explanations]


def test_what_failed_halfway_is_kept_up_to_there(
    store: Store, trace: Trace, replica: Replica, families: Families
) -> None:
    def fail(method: str, step: str) -> None:
        if (method, step) == ("surprise", "s5"):
            raise torch.OutOfMemoryError("CUDA out of memory")

    families.before_target = fail
    with pytest.raises(EngineUnavailableError, match="--low-memory") as caught:
        tracer.explain(trace, methods=OWN, replica=replica, store=store)
    assert caught.value.trace is not None
    assert [item["targets"] for item in store.load("run-1").explanations] == [
        ["s2", "s3", "s5", "s6"],
        ["s2", "s3"],
    ]


def test_running_out_of_memory_in_the_model_says_what_lowers_the_need(
    trace: Trace, folder: Path, families: Families, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = Replica.load(str(folder), device="cpu")

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(replica.model.model.layers[1], "forward", fail)
    with pytest.raises(EngineUnavailableError, match="--targets answer.*--dtype bfloat16"):
        tracer.explain(trace, methods=["near"], replica=replica)


def test_a_work_that_takes_long_is_saved_on_the_way(
    store: Store, trace: Trace, replica: Replica, families: Families, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: list[int] = []

    def look(_method: str, _step: str) -> None:
        found = store.load("run-1").explanations
        stored.append(len(Explanation.read(found[0]).targets) if found else 0)

    monkeypatch.setattr("tracer.explain.service.SAVE_SECONDS", -1.0)
    families.before_target = look
    tracer.explain(trace, methods=["near"], replica=replica, store=store)
    assert stored == [0, 1, 2, 3]


def test_the_wrong_weights_are_refused_and_marked_when_forced(
    tmp_path: Path, trace: Trace, folder: Path, families: Families
) -> None:
    other = Replica.load(str(perturbed(folder, tmp_path)), device="cpu")
    with pytest.raises(ModelError, match="does not behave like the model that wrote the trace") as caught:
        tracer.explain(trace, methods=["near"], replica=other)
    assert families.computed == []
    assert caught.value.trace is not None and caught.value.trace.explanations == []

    forced = tracer.explain(trace, methods=["near"], replica=other, force=True)
    assert forced.parity.forced and not forced.parity.holds
    parity = forced.explanations[0].parity
    assert parity is not None and parity["forced"] is True
    # The stored figure is used again, and is still no good.
    with pytest.raises(ModelError, match="does not behave like"):
        tracer.explain(forced.trace, methods=["near"], replica=other)


def test_force_does_not_mark_what_holds(trace: Trace, replica: Replica, families: Families) -> None:
    report = tracer.explain(trace, methods=["near"], replica=replica, force=True)
    assert report.parity.holds and not report.parity.forced
    assert report.parity.tokens == sum(len(call.completions[0].token_ids) for call in trace.calls)


def test_a_trace_without_ids_is_refused_or_tokenised_again_and_marked(
    trace: Trace, replica: Replica, families: Families
) -> None:
    bare = Trace.from_json(trace.to_json())
    bare.calls = []
    for step in bare.steps:
        step.call_id = step.completion = step.start = step.end = None
    with pytest.raises(InputError, match="without token ids.*--force"):
        tracer.explain(bare, methods=["near"], replica=replica)
    report = tracer.explain(bare, methods=["near"], replica=replica, force=True)
    assert report.parity.retokenised and report.parity.forced and report.parity.tokens == 0
    assert report.targets == ("s2", "s3", "s5", "s6")
    assert report.trace.calls == []
    assert {source.step_id for source, _ in report.sources("s6", "near")} >= {"s1", "s2", "s3", "s4", "s5"}
    again = tracer.explain(report.trace, methods=["near"], replica=replica, force=True)
    assert again.trace.to_json() == report.trace.to_json() and again.parity == report.parity


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["naer"]}, "did you mean 'near'"),
        ({"methods": ["near"], "parameters": {"near": {"scael": 1}}}, "no parameter 'scael'; it has: scale"),
        ({"methods": ["near"], "parameters": {"surprise": {}}}, "surprise, which is not among the methods"),
        ({"methods": ["near"], "targets": ["s9"]}, "no step 's9'"),
        ({"methods": ["near"], "targets": ["s4"]}, r"s4 \(observation\) has no tokens"),
        ({"methods": ["near"], "targets": ["s6#7"]}, "tokens 0 to 1"),
        ({"methods": ["near"], "targets": []}, "no target is named"),
        ({"methods": ["near"], "target_function": "logits"}, "did you mean 'logit'"),
        ({"methods": OWN, "target_function": "logit"}, "changes nothing about surprise"),
        ({"methods": ["near"], "seed": -1}, "the seed is -1"),
        ({"methods": ["near"], "foil": "a"}, "only used by the target function contrast"),
        ({"methods": ["near"], "target_function": "contrast", "foil": "ab"}, "is 2 tokens"),
        ({"methods": ["near"], "target_function": "contrast", "foil": 5000}, "the vocabulary has 264"),
        ({"methods": ["near"], "chunk_tokens": 0}, "at least 1"),
        ({"methods": ["near"], "replica": "./nothing"}, "no folder or file"),
        ({"methods": ["near"], "replica": None, "dtype": "float31"}, "unknown dtype"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    options: dict[str, Any], message: str, trace: Trace, replica: Replica, families: Families
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        tracer.explain(trace, **{"replica": replica, **options})
    assert "\n" not in str(caught.value) and families.computed == []


def test_a_foil_is_one_token_or_its_id(trace: Trace, replica: Replica, families: Families) -> None:
    def foil(given: str | int | None) -> int | None:
        report = tracer.explain(
            trace, methods=["near"], targets="answer", target_function="contrast", foil=given, replica=replica
        )
        return report.explanations[0].foil

    token = replica.tokenizer.encode("z").token_ids[0] if replica.tokenizer else -1
    assert (foil("z"), foil(7), foil(None)) == (token, 7, None)


def test_a_replica_that_speaks_another_language_is_refused(
    tmp_path: Path, trace: Trace, folder: Path, families: Families
) -> None:
    small = Replica.load(str(write_replica(tmp_path / "small", vocabulary=64)), device="cpu")
    with pytest.raises(InputError, match="vocabulary of 64"):
        tracer.explain(trace, methods=["near"], replica=small, force=True)
    foreign = trace.model_copy(update={"model": trace.model.model_copy(update={"tokenizer_sha256": "0" * 64})})
    with pytest.raises(InputError, match="another tokenizer"):
        tracer.explain(foreign, methods=["near"], replica=Replica.load(str(folder), device="cpu"))


def test_a_trace_longer_than_the_context_is_refused(trace: Trace, folder: Path, families: Families) -> None:
    with pytest.raises(InputError, match="68 tokens, the replica's context holds 60"):
        tracer.explain(trace, methods=["near"], replica=Replica.load(str(folder), device="cpu", context_length=60))


def test_scores_that_are_not_finite_are_refused(trace: Trace, replica: Replica, families: Families) -> None:
    with pytest.raises(ModelError, match="step s2 that are not finite"):
        tracer.explain(trace, methods=["near"], replica=replica, parameters={"near": {"scale": float("inf")}})


def test_the_model_that_a_trace_names_is_used_but_never_fetched(
    trace: Trace, families: Families, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tracer.explain(trace, methods=["near"], targets="answer")
    assert report.parity.holds
    foreign = trace.model_copy(update={"model": trace.model.model_copy(update={"name": "someone/unknown-model"})})
    with pytest.raises(ModelError, match="is not on this machine yet; run: tracer models fetch"):
        tracer.explain(foreign, methods=["near"])
    named = trace.model_copy(update={"model": trace.model.model_copy(update={"name": "gpt-x"})})
    with pytest.raises(InputError, match="name its replica with --model"):
        tracer.explain(named, methods=["near"])


def test_an_explanation_of_another_form_is_left_alone(trace: Trace, replica: Replica, families: Families) -> None:
    first = tracer.explain(trace, methods=["near"], targets=["s2"], replica=replica)
    broken = [{"method": "theirs", "values": "odd"}, {**first.trace.explanations[0], "values": [[1.0]]}]
    report = tracer.explain(
        trace.model_copy(update={"explanations": broken}), methods=["near"], targets=["s2"], replica=replica
    )
    assert report.trace.explanations[0] == broken[0]
    assert report.trace.explanations[1]["values"] == first.trace.explanations[0]["values"]
    assert len(report.trace.explanations) == 2


def test_a_parity_that_makes_no_sense_is_measured_again(trace: Trace, replica: Replica, families: Families) -> None:
    first = tracer.explain(trace, methods=["near"], targets=["s2"], replica=replica)
    document = json.loads(json.dumps(first.trace.explanations[0]))
    document["parity"] = {**document["parity"], "mean_abs": "0"}
    report = tracer.explain(
        trace.model_copy(update={"explanations": [document]}), methods=["near"], targets=["s2"], replica=replica
    )
    assert report.parity == first.parity


def test_progress_names_its_stages(trace: Trace, folder: Path, families: Families) -> None:
    seen: list[Any] = []
    tracer.explain(trace, methods=["near"], replica=str(folder), progress=seen.append)
    assert stages(seen)[0] == "loading the replica"
    assert stages(seen)[-3:] == ["checking the replica", "near", "measuring faithfulness"]
    assert (seen[-1].done, seen[-1].total) == (1, 1)


def test_scores_come_with_what_they_are_worth(trace: Trace, replica: Replica, families: Families) -> None:
    report = tracer.explain(trace, methods=OWN, replica=replica)
    for explanation in report.explanations:
        assert explanation.faithfulness is not None
        measured = explanation.faithfulness["targets"]
        assert isinstance(measured, dict)
        # The answer alone, unless more is asked for.
        assert list(measured) == ["s6"]
        found = Faithfulness.from_document(measured["s6"])
        assert found.to_document() == measured["s6"]
        assert explanation.faithfulness["better_than_random"] is against_random([found]).better
    # By hand: what the answer loses without the sources that the method ranks first.
    near = report.explanation("near")
    removal = Removal(Context(replica, Recorded(trace)), Recorded(trace).target("s6"))
    order = np.argsort(-removal.of_units(np.array(near.row("s6"))), kind="stable")
    mask = np.ones((2, len(order)), dtype=bool)
    mask[1, order[: found.k]] = False
    first = Faithfulness.from_document(near.faithfulness["targets"]["s6"])  # type: ignore[index, call-overload]
    assert first.top_k_drop == pytest.approx(-np.diff(removal.values(mask))[0], abs=1e-4)

    every = tracer.explain(report.trace, methods=OWN, replica=replica, faithfulness="all")
    targets = every.explanation("near").faithfulness["targets"]  # type: ignore[index]
    assert isinstance(targets, dict)
    assert set(targets) == {"s2", "s3", "s5", "s6"}
    assert targets["s6"] == first.to_document()
    with pytest.raises(UnknownNameError, match="did you mean 'answer'"):
        tracer.explain(trace, methods=OWN, replica=replica, faithfulness="answers")  # type: ignore[arg-type]


def test_every_target_is_measured_against_random_orders_of_its_own(
    trace: Trace, replica: Replica, families: Families, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def watched(*arguments: Any, seed: int, **options: Any) -> dict[str, Faithfulness]:
        seeds.append(seed)
        return measure(*arguments, seed=seed, **options)

    monkeypatch.setattr("tracer.explain.service.measure", watched)
    for seed in (0, 0, 1):
        tracer.explain(trace, methods=["near"], replica=replica, faithfulness="all", seed=seed)
    assert len(seeds) == 12
    assert seeds[:4] == seeds[4:8]
    assert len(set(seeds)) == 8


def test_methods_that_are_measured_apart_are_compared_all_the_same(
    trace: Trace, replica: Replica, families: Families
) -> None:
    first = tracer.explain(trace, methods=["near"], replica=replica)
    second = tracer.explain(first.trace, methods=["surprise"], replica=replica)
    both = tracer.explain(second.trace, methods=OWN, replica=replica)
    for explanation, other in zip(both.explanations, OWN[::-1], strict=True):
        agreement = explanation.faithfulness["agreement"]  # type: ignore[index]
        assert set(agreement["s6"]) == {other}  # type: ignore[index, call-overload, arg-type]
    assert [item["faithfulness"] for item in both.trace.explanations] == [
        item.model_dump(mode="json")["faithfulness"] for item in both.explanations
    ]


def test_what_was_measured_in_another_form_is_measured_again(
    trace: Trace, replica: Replica, families: Families
) -> None:
    first = tracer.explain(trace, methods=["near"], replica=replica)
    document = json.loads(json.dumps(first.trace.explanations[0]))
    good = document["faithfulness"]["targets"]["s6"]
    changes: list[dict[str, Any]] = [{"gap": "x"}, {"gap": None}, {"k": []}]
    for change in changes:
        document["faithfulness"]["targets"]["s6"] = {**good, **change}
        broken = trace.model_copy(update={"explanations": [document]})
        again = tracer.explain(broken, methods=["near"], replica=replica)
        assert again.explanation("near").faithfulness["targets"]["s6"] == good  # type: ignore[index, call-overload]
    # A newer version may know more of it.
    document["faithfulness"]["targets"]["s6"] = {**good, "more": 1}
    newer = trace.model_copy(update={"explanations": [document]})
    assert list(measures_of(tracer.explain(newer, methods=["near"], replica=replica).explanation("near"))) == ["s6"]


def test_the_answer_alone_has_no_shares_through_steps_that_nobody_explained(
    trace: Trace, replica: Replica, families: Families
) -> None:
    alone = tracer.explain(trace, methods=["near"], targets="answer", replica=replica)
    assert alone.explanation("near").through == {}
    assert set(tracer.explain(alone.trace, methods=["near"], replica=replica).explanation("near").through) == {"s6"}


def test_a_default_that_lacks_something_is_left_out_and_says_why(trace: Trace, replica: Replica) -> None:
    report = tracer.explain(trace, targets="answer", replica=replica, faithfulness="none")
    assert [explanation.method for explanation in report.explanations] == ["two_hop"]
    assert "tracer at2 fit" in report.left_out["at2"]
    with pytest.raises(InputError, match="there is no file nowhere"):
        tracer.explain(trace, targets="answer", replica=replica, parameters={"at2": {"path": "nowhere"}})


def test_the_graph_carries_the_influence_between_steps(trace: Trace, replica: Replica, families: Families) -> None:
    report = tracer.explain(trace, methods=["near"], replica=replica)
    graph = report.trace.graph(influence="near")
    edges = {(a, b): data["weight"] for a, b, data in graph.edges(data=True) if data["kind"] == "influences"}
    order = ["s1", "s2", "s3", "s4", "s5", "s6"]
    assert set(edges) == {(a, b) for a in order for b in order if a < b and b not in ("s1", "s4")}
    near = report.explanation("near")
    at = [source.step_id for source in near.sources].index("s4")
    assert edges["s4", "s6"] == near.row("s6")[at]


@pytest.mark.parametrize(
    "first",
    ["import tracer", "import tracer.explain.base", "from tracer.explain import methods", "from tracer import explain"],
)
def test_the_package_can_be_called_whatever_was_imported_before(first: str) -> None:
    code = (
        f"{first}\nimport sys, tracer\nassert callable(tracer.explain)\n"
        "assert 'torch' not in sys.modules\nimport tracer.explain.methods as m\nassert m.METHODS\n"
        "assert tracer.explain is sys.modules['tracer.explain']\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_refusal_is_a_tracer_error_with_the_trace(trace: Trace, replica: Replica, families: Families) -> None:
    families.before_target = lambda method, step: (_ for _ in ()).throw(ModelError("no")) if step == "s5" else None
    with pytest.raises(TracerError) as caught:
        tracer.explain(trace, methods=["near"], replica=replica)
    assert caught.value.trace is not None
    assert caught.value.trace.explanations[0]["targets"] == ["s2", "s3"]
