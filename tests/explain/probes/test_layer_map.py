"""Truth by layer and token on a model with a planted direction, against transformers and other probes."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.explain import tiny_runs
from tests.explain.probes.truthful_model import write_truthful
from tests.explain.tiny_runs import AUTO, perturbed, recorded_run
from tracer.errors import CancelledError, ModelError, TraceFormatError
from tracer.explain.probes.activations import extract
from tracer.explain.probes.examples import normalise
from tracer.explain.probes.held_out import Material
from tracer.explain.probes.layer_map import LayerProbes, fit_layers, map_layers
from tracer.explain.probes.statements import Statement
from tracer.replay.model import Replica
from tracer.replay.recorded import Recorded
from tracer.store import Store
from tracer.trace.layer_map import LayerMap, layer_maps
from tracer.trace.probes import probe_scores
from tracer.trace.trace import Trace


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_truthful(tmp_path_factory.mktemp("truthful"))


@pytest.fixture(scope="module")
def replica(folder: Path) -> Replica:
    return Replica.load(str(folder))


@pytest.fixture(scope="module")
def material(replica: Replica, tmp_path_factory: pytest.TempPathFactory) -> Material:
    """Statements about four topics that are true where they end with an exclamation mark."""
    statements = [
        Statement(f"{topic}{number} is so{'!' if label else '.'}", label, topic, False, f"{topic}{number}")
        for topic in ("ab", "cd", "ef", "gh")
        for number in range(8)
        for label in (True, False)
    ]
    folder = tmp_path_factory.mktemp("activations")
    return Material(statements, extract(replica, [item.text for item in statements], folder=folder))


@pytest.fixture(scope="module")
def probes(material: Material) -> LayerProbes:
    return fit_layers(material)


@pytest.fixture
def trace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Trace:
    monkeypatch.setattr(
        tiny_runs, "FIRST", [("thought", "s2", "Grass is green! Snow is black. "), ("action", "s3", "go ")]
    )
    return recorded_run(folder)


def test_every_layers_probe_finds_the_planted_truth_in_new_topics(probes: LayerProbes) -> None:
    assert probes.layers == (0, 1)
    assert min(probes.held_out) > 0.95


def test_the_map_shows_where_it_was_said(trace: Trace, replica: Replica, probes: LayerProbes) -> None:
    recorded = Recorded(trace)
    found = map_layers(recorded, replica, probes, [recorded.target("s2")])[0]
    completion = trace.call(found.call_id).completions[found.completion]
    # The tokenizer of this model has one token a byte.
    text = "Grass is green! Snow is black. "
    assert (found.start, len(found.values[0])) == (trace.step("s2").start, len(text))
    assert len(completion.token_ids) > len(text)
    for row in found.values:
        assert row[text.index("!")] > 0 > row[text.index(".")]


def test_values_are_those_of_transformers_hidden_states(
    trace: Trace, folder: Path, replica: Replica, material: Material, probes: LayerProbes
) -> None:
    recorded = Recorded(trace)
    found = map_layers(recorded, replica, probes, [recorded.target("s5"), recorded.target("s6")])
    model = AUTO.from_pretrained(str(folder)).eval()
    for own in found:
        call = trace.call(own.call_id)
        ids = call.prompt_token_ids + call.completions[own.completion].token_ids
        first = len(call.prompt_token_ids) + own.start
        with torch.no_grad():
            # The last one of `hidden_states` has been through the final norm.
            hidden = model.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1]
        rows = normalise(hidden[0, first : first + len(own.values[0])].numpy(), "rms")
        assert own.values[0] == pytest.approx(probes.probes[0].score(rows), abs=5e-3)


def test_scores_are_in_units_of_the_training_spread(material: Material, probes: LayerProbes) -> None:
    for layer, probe in zip(probes.layers, probes.probes, strict=True):
        assert np.std(probe.score(material.at(layer).values)) == pytest.approx(1.0)


def test_another_model_is_refused(trace: Trace, folder: Path, probes: LayerProbes, tmp_path: Path) -> None:
    other = Replica.load(str(perturbed(folder, tmp_path)))
    recorded = Recorded(trace)
    with pytest.raises(ModelError):
        map_layers(recorded, other, probes, recorded.targets)
    assert len(map_layers(recorded, other, probes, recorded.targets, force=True)) == len(recorded.targets)


def test_it_can_be_stopped(material: Material) -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(CancelledError):
        fit_layers(material, cancel=cancel)


def test_a_map_is_kept_among_probes_and_is_no_score(
    trace: Trace, replica: Replica, probes: LayerProbes, tmp_path: Path
) -> None:
    recorded = Recorded(trace)
    own = map_layers(recorded, replica, probes, [recorded.target("s6")])[0]
    with Store(tmp_path / "runs.db") as store:
        store.import_trace(trace)
        store.put_document(trace.id, "probe", key="layer_map s6", document=own.model_dump(mode="json"))
        again = store.load(trace.id)
    assert layer_maps(again) == {"s6": own}
    assert probe_scores(again) == []
    assert Trace.from_json(again.to_json()).probes == again.probes


def test_a_map_that_is_not_rectangular_is_refused() -> None:
    document = LayerMap(
        step_id="s",
        call_id="c",
        completion=0,
        start=0,
        kind="x",
        layers=[0],
        values=[[0.0]],
        held_out=[0.5],
        protocol="",
    ).model_dump(mode="json")
    with pytest.raises(TraceFormatError, match="a row for each layer"):
        LayerMap.read({**document, "layers": [0, 1]})
