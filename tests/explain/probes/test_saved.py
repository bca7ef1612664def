"""A probe's file: what is written is read, and what is damaged, newer or another model's is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from tests.explain.probes.planted_truth import planted
from tracer.errors import InputError, StoreError, StoreVersionError
from tracer.explain.probes.probe import Probe
from tracer.explain.probes.saved import ProbeRecord, SavedProbe, mark, probe_path
from tracer.explain.probes.train import train

MODEL = {"name": "tiny", "weights_sha256": "a" * 64, "tokenizer_sha256": "b" * 64, "dtype": "float32"}
MATERIAL = planted(topics=4, entities=12, strength=1.5, normalisation="rms").material


@pytest.fixture(scope="module")
def made() -> SavedProbe:
    return train(MATERIAL, identity=MODEL, kind="ttpd", prefix="Say: ", source="planted", seed=3)


def test_a_probe_survives_its_file(made: SavedProbe, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "probe.safetensors"
    made.save(path)
    found = SavedProbe.load(path, identity={**MODEL, "dtype": "bfloat16"})
    assert found.record == made.record
    assert found.probe.notes == made.probe.notes
    assert set(found.probe.directions) == {"truth", "polarity_sensitive_truth", "polarity"}
    values = MATERIAL.activations.at(made.record.layer)
    assert found.score(values).tolist() == made.score(values).tolist()
    band, again = made.probability(values), found.probability(values)
    assert band.probability.tolist() == again.probability.tolist()
    assert ((band.low >= 0.0) & (band.low <= band.probability) & (band.probability <= band.high)).all()


def test_the_record_says_what_is_to_be_known(made: SavedProbe) -> None:
    record = made.record
    assert (record.layer, record.position, record.prefix, record.normalisation) == (1, "last", "Say: ", "rms")
    assert record.model == MODEL
    assert record.training.rows == len(MATERIAL.statements) == 192
    assert mark(MATERIAL.statements[0].text) in record.training.texts
    assert record.held_out.overall.accuracy.value > 0.8
    assert {item.name for item in record.held_out.parts} >= {"affirmative", "negated", "topic 0"}
    assert [item.name for item in record.held_out.baselines] == ["TF-IDF of the text"]
    assert len(record.held_out.controls) == 3
    for control in record.held_out.controls[:1]:
        assert control.accuracy.value < record.held_out.overall.accuracy.low
    assert record.calibration.reliability.bins


@pytest.mark.parametrize("key", ["weights_sha256", "tokenizer_sha256"])
def test_another_model_is_refused(made: SavedProbe, tmp_path: Path, key: str) -> None:
    path = tmp_path / "p.safetensors"
    made.save(path)
    with pytest.raises(InputError, match=f"their {key.removesuffix('_sha256')} differ"):
        SavedProbe.load(path, identity={**MODEL, "name": "other", key: "c" * 64})


@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 0.9, 0.99])
def test_a_changed_byte_is_noticed(made: SavedProbe, tmp_path: Path, where: float) -> None:
    path = tmp_path / "p.safetensors"
    made.save(path)
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises((StoreError, InputError)) as raised:
        SavedProbe.load(path)
    assert "train" in str(raised.value)


def test_a_cut_file_is_noticed(made: SavedProbe, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    made.save(path)
    content = path.read_bytes()
    for kept in (0, 7, 100, len(content) - 1):
        path.write_bytes(content[:kept])
        with pytest.raises(StoreError, match="damaged"):
            SavedProbe.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no probe at"):
        SavedProbe.load(tmp_path / "none.safetensors")
    other = tmp_path / "weights.safetensors"
    other.write_bytes(save({"weights": np.zeros(3)}, metadata={"format": "pt"}))
    with pytest.raises(InputError, match="holds no probe of tracer"):
        SavedProbe.load(other)
    other.write_bytes(save({"weights": np.zeros(3)}, metadata={"format": "tracer-probe", "version": "2"}))
    with pytest.raises(StoreVersionError, match="version '2'"):
        SavedProbe.load(other)
    other.write_text("not a safetensors file at all")
    with pytest.raises(StoreError, match="damaged"):
        SavedProbe.load(other)


FINITE = st.floats(-1e6, 1e6)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    weights=st.lists(FINITE, min_size=1, max_size=8),
    bias=FINITE,
    prefix=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    layer=st.integers(0, 80),
    notes=st.dictionaries(st.text(max_size=5), st.none() | st.booleans() | FINITE | st.text(max_size=5), max_size=3),
)
def test_any_probe_survives_its_file(
    made: SavedProbe,
    tmp_path: Path,
    weights: list[float],
    bias: float,
    prefix: str,
    layer: int,
    notes: dict[str, None | bool | float | str],
) -> None:
    record = made.record.model_copy(update={"prefix": prefix, "layer": layer, "notes": dict(notes)})
    probe = Probe("mass_mean", np.array(weights), bias, {"truth": np.array(weights[::-1])}, dict(notes))
    path = tmp_path / "any.safetensors"
    SavedProbe(record, probe).save(path)
    found = SavedProbe.load(path)
    assert found.record.model_copy(update={"kind": record.kind}) == record
    assert found.probe.weights.tolist() == weights
    assert found.probe.bias == bias
    assert found.probe.directions["truth"].tolist() == weights[::-1]
    assert found.probe.notes == notes


def test_a_record_is_json_throughout(made: SavedProbe) -> None:
    document = json.loads(json.dumps(made.record.model_dump(mode="json")))
    assert ProbeRecord.model_validate(document) == made.record


def test_every_model_has_its_own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACER_PROBES", str(tmp_path))
    one, other = (probe_path({"weights_sha256": letter * 64}) for letter in "ab")
    assert one != other
    assert one.parent == tmp_path
    assert probe_path({"weights_sha256": "a" * 64}, "steps") != one
    with pytest.raises(InputError, match="no hash"):
        probe_path({"weights_sha256": None})
