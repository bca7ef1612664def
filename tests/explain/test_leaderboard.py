"""Comparing methods over traces whose true attribution is known."""

from __future__ import annotations

import re
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue

from tests.explain.needle import needle_model, needle_trace
from tracer.errors import CancelledError, InputError, UnknownNameError
from tracer.explain.estimate import Estimate, estimate
from tracer.explain.leaderboard import CHANCE, Board, leaderboard
from tracer.explain.methods import METHODS
from tracer.explain.service import explain
from tracer.replay.model import Replica
from tracer.trace.trace import Trace

FITTING: dict[str, dict[str, JsonValue]] = {
    # Right next to zero embeddings the norm turns every token into the same direction.
    "integrated_gradients": {"baseline": 5},
    # The model has one layer.
    "rpi": {"layer": 0},
}
BETTER = ("attention", "leave_one_out", "contextcite", "span")


def traces() -> list[Trace]:
    return [
        needle_trace(hidden_in=hidden_in).model_copy(update={"id": f"needle-{hidden_in}"}) for hidden_in in range(6)
    ]


@pytest.fixture(scope="module")
def replica() -> Replica:
    return Replica(needle_model())


@pytest.fixture(scope="module")
def board(replica: Replica) -> Board:
    return leaderboard(traces(), methods=BETTER, replica=replica, parameters={"contextcite": {"ablations": 32}})


def ends(found: Estimate) -> tuple[float, float]:
    """Both ends of an interval that is there."""
    assert found.low is not None and found.high is not None
    return found.low, found.high


@given(st.lists(st.lists(st.floats(-5, 5), max_size=4), min_size=1, max_size=6))
def test_an_estimate_is_the_mean_of_all_values_inside_its_interval(groups: list[list[float]]) -> None:
    values = [value for group in groups for value in group]
    found = estimate(groups)
    if not values:
        assert found is None
        return
    assert found is not None
    assert found.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert found.count == len(values)
    if len(values) == 1:
        assert found.low is None and found.high is None
    elif sum(map(bool, groups)) > 1:
        low, high = ends(found)
        assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


def test_the_interval_is_that_of_the_normal_approximation_where_it_holds() -> None:
    values = np.random.default_rng(1).normal(3, 2, size=400)
    found = estimate([[float(value)] for value in values])
    assert found is not None
    half = 1.96 * values.std() / np.sqrt(len(values))
    low, high = ends(found)
    assert high - low == pytest.approx(2 * half, rel=0.08)


def test_values_of_one_trace_are_drawn_together() -> None:
    groups = [[0.0] * 10, [1.0] * 10, [0.5] * 10]
    together, apart = estimate(groups), estimate([[value] for group in groups for value in group])
    assert together is not None and apart is not None
    widths = [high - low for low, high in map(ends, (together, apart))]
    assert widths[0] > 1.5 * widths[1]


def test_methods_that_see_the_planted_document_beat_chance_and_chance_does_not(board: Board) -> None:
    found = {item.method: item for item in board.standings}
    assert set(found) == {*BETTER, CHANCE}
    for name in BETTER:
        assert found[name].better_than_random, name
        lds, chance = found[name].lds, found[CHANCE].lds
        assert lds is not None and chance is not None
        low, high = ends(lds)
        assert chance.mean < low <= lds.mean <= high
    assert not found[CHANCE].better_than_random
    assert all(item.targets == 6 for item in board.standings)


def test_each_method_pays_for_itself(board: Board) -> None:
    found = {item.method: item for item in board.standings}
    # Six documents and the whole: leave-one-out asks for seven sequences, ContextCite for up to 32.
    assert found["attention"].forward_tokens < found["leave_one_out"].forward_tokens
    assert found["leave_one_out"].forward_tokens < found["contextcite"].forward_tokens
    assert all(item.seconds > 0 and item.passes > 0 for item in board.standings if item.method != CHANCE)
    rated = [item.lds_per_pass for item in board.standings if item.lds_per_pass is not None]
    assert rated == sorted(rated, reverse=True)


def test_explanations_and_measures_are_in_the_traces_and_not_computed_again(board: Board, replica: Replica) -> None:
    again = leaderboard(board.traces, methods=BETTER, replica=replica, parameters={"contextcite": {"ablations": 32}})
    measured = [(item.method, item.lds, item.z, item.forward_tokens) for item in board.standings]
    assert sorted(measured, key=str) == sorted(
        ((item.method, item.lds, item.z, item.forward_tokens) for item in again.standings), key=str
    )


def test_runs_that_are_finished_are_on_a_board_when_the_work_is_stopped(replica: Replica) -> None:
    boards: list[Board] = []
    stages: list[str] = []
    cancel = threading.Event()

    def told(at: object) -> None:
        stages.append(str(getattr(at, "stage", "")))
        if stages[-1].startswith("run 3 of 6"):
            cancel.set()

    with pytest.raises(CancelledError):
        leaderboard(
            traces(), methods=["attention"], replica=replica, progress=told, interim=boards.append, cancel=cancel
        )
    assert [len(board.traces) for board in boards] == [1, 2]
    assert {item.method: item.targets for item in boards[-1].standings} == {"attention": 2, CHANCE: 2}
    assert {"run 1 of 6: attention", "run 1 of 6: measuring faithfulness"} <= set(stages)
    assert re.fullmatch(r"run 3 of 6, about \d+ s left: .+", stages[-1])


def test_passes_that_were_shared_before_are_made_again_for_each_method_alone(board: Board, replica: Replica) -> None:
    parameters: dict[str, dict[str, JsonValue]] = {"contextcite": {"ablations": 32}}
    ablation = ("leave_one_out", "contextcite")
    together = [
        explain(trace, methods=ablation, replica=replica, parameters=parameters, probes=()).trace for trace in traces()
    ]
    assert all("shared_with" in document["cost"] for trace in together for document in trace.explanations)  # type: ignore[operator]
    again = leaderboard(together, methods=BETTER, replica=replica, parameters=parameters)
    cold = {item.method: item.forward_tokens for item in board.standings}
    assert {item.method: item.forward_tokens for item in again.standings} == cold
    # Methods that were measured before others came agree with those, too.
    agreed = {item.method: item.agreement and item.agreement.mean for item in board.standings}
    for item in again.standings:
        assert item.agreement is not None
        assert item.agreement.mean == pytest.approx(agreed[item.method], abs=1e-9)


def test_a_single_value_has_no_interval() -> None:
    assert estimate([[0.5]]) == Estimate(0.5, None, None, 1)
    assert estimate([[0.5], []]) == Estimate(0.5, None, None, 1)


def test_a_method_that_cannot_run_is_told_apart(replica: Replica) -> None:
    board = leaderboard(
        traces()[:2],
        methods=["attention", "attention_flow"],
        replica=replica,
        parameters={"attention_flow": {"max_tokens": 8}},
    )
    flow = next(item for item in board.standings if item.method == "attention_flow")
    assert flow.targets == 0
    assert flow.lds is None
    assert set(flow.problems) == {"needle-0", "needle-1"}
    assert "max_tokens" in flow.problems["needle-0"]


def test_bad_input(replica: Replica) -> None:
    with pytest.raises(InputError, match="no runs"):
        leaderboard([], replica=replica)
    with pytest.raises(InputError, match="no methods"):
        leaderboard(traces()[:1], methods=[], replica=replica)
    with pytest.raises(UnknownNameError, match="did you mean 'attention'"):
        leaderboard(traces()[:1], methods=["atention"], replica=replica)
    with pytest.raises(InputError, match="max_tokens"):
        leaderboard(
            traces()[:1],
            methods=["attention_flow"],
            replica=replica,
            parameters={"attention_flow": {"max_tokens": 0}, "random": {}},
        )


@pytest.mark.parametrize("name", [name for name in METHODS if name not in (CHANCE, "at2")])
def test_every_method_finds_the_planted_document(name: str, replica: Replica) -> None:
    hits = 0
    for trace in traces():
        report = explain(
            trace,
            methods=[name],
            targets="answer",
            replica=replica,
            faithfulness="none",
            parameters={key: value for key, value in FITTING.items() if key == name},
            # RPI's random baselines reach below zero, where log p is steep, and above one, where it is flat.
            target_function="logit" if name == "rpi" else "logprob",
        )
        own = report.explanation(name)
        row = dict(zip([source.step_id for source in own.sources], own.row(report.targets[0]), strict=True))
        documents = {step: value for step, value in row.items() if step and step.startswith("d")}
        hits += max(documents, key=lambda step: documents[step]) == f"d{trace.id[-1]}"
    assert hits == 6
