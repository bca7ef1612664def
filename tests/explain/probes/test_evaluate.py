"""Leaving topics out: planted truth is found, shuffled labels give chance, and nothing leaks."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import numpy as np
import pytest

from tests.explain.probes.planted_truth import planted
from tests.explain.probes.truthful_model import truth_probe, worth
from tracer.errors import CancelledError, InputError, UnknownNameError
from tracer.explain.probes.evaluate import evaluate
from tracer.explain.probes.examples import Examples
from tracer.explain.probes.fit import fit
from tracer.explain.probes.held_out import Material, Watch, by_what, choose_layers, left_out, topic_folds
from tracer.explain.probes.metrics import accuracy
from tracer.explain.probes.probe import Probe
from tracer.explain.probes.tables import evaluation_tables, probe_tables
from tracer.explain.probes.train import train
from tracer.trace.probe_report import Evaluation, MethodResult
from tracer.trace.probes import NOT_BETTER, NOT_MEASURED, SENTENCES

MATERIAL = planted(topics=5, entities=16, strength=2.0, seed=1).material
METHODS = ("ttpd", "logistic_l2", "mass_mean")


@pytest.fixture(scope="module")
def found() -> Evaluation:
    return evaluate(MATERIAL, model="planted", methods=METHODS, repeats=3)


def by_name(results: tuple[MethodResult, ...]) -> dict[str, MethodResult]:
    return {item.name: item for item in results}


def test_planted_truth_is_found_on_topics_left_out(found: Evaluation) -> None:
    assert found.chosen_layer == 1
    for result in found.methods:
        assert result.accuracy.value > 0.9
        assert result.auroc is not None
        assert result.auroc.value > 0.95
        assert result.accuracy.low < result.accuracy.value < result.accuracy.high
        assert {topic.layer for topic in result.topics} == {1}
        assert result.affirmative == pytest.approx(result.negated, abs=0.06)
    layers = {(item.method, item.layer): item.accuracy.value for item in found.by_layer}
    assert layers["ttpd", 1] > 0.9
    assert abs(layers["ttpd", 0] - 0.5) < 0.1


def test_controls_find_nothing(found: Evaluation) -> None:
    controls = by_name(found.controls)
    assert set(controls) == {
        "logistic_l2, shuffled labels",
        "random direction",
        "logistic_l2, layer 0",
        "TF-IDF of the text",
    }
    for name in ("logistic_l2, shuffled labels", "logistic_l2, layer 0"):
        assert controls[name].accuracy.value == pytest.approx(0.5, abs=0.12)
    assert controls["random direction"].accuracy.value < 0.85
    assert controls["TF-IDF of the text"].topics[0].layer is None


def test_labels_shuffled_beforehand_give_chance() -> None:
    rng = np.random.default_rng(0)
    # Twins stay twins: an entity's four labels are turned round together, or not at all.
    turned = {item.entity: bool(rng.random() < 0.5) for item in MATERIAL.statements}
    statements = [replace(item, label=item.label != turned[item.entity]) for item in MATERIAL.statements]
    shuffled = Material(statements, MATERIAL.activations, "none")
    for result in evaluate(shuffled, methods=METHODS, layer=1, swept=[], repeats=2).methods:
        assert result.accuracy.value == pytest.approx(0.5, abs=0.1)


def test_the_numbers_are_means_over_topics_and_repeats() -> None:
    result = evaluate(MATERIAL, methods=["mass_mean"], layer=1, swept=[], repeats=2, seed=7).methods[0]
    trained = lambda examples, seed: fit("mass_mean", examples, seed=seed)  # noqa: E731
    scores = left_out(MATERIAL, trained, dict.fromkeys(range(5), 1), repeats=2, seed=7)
    topics = np.array([int(item.topic[-1]) for item in MATERIAL.statements])
    table = [[accuracy(line[topics == t], MATERIAL.labels[topics == t]) for t in range(5)] for line in scores]
    assert result.accuracy.value == pytest.approx(np.mean(table))
    assert result.accuracy_sd == pytest.approx(np.std(np.mean(table, axis=1), ddof=1))
    assert [topic.accuracy for topic in result.topics] == pytest.approx(np.mean(table, axis=0).tolist())


def test_a_topic_has_no_part_in_the_probe_that_judges_it() -> None:
    """Whatever the left-out topic says, its probe stays the same; and the probe never sees its rows."""
    seen: list[set[int]] = []

    def watching(examples: Examples, seed: int) -> Probe:
        seen.append(set(examples.topics.tolist()))
        return fit("mass_mean", examples, seed=seed)

    left_out(MATERIAL, watching, dict.fromkeys(range(5), 1), repeats=2)
    assert seen == [set(range(5)) - {topic} for topic in range(5) for _ in range(2)]

    flipped = [replace(item, label=item.label != (item.topic == "topic 2")) for item in MATERIAL.statements]
    other = Material(flipped, MATERIAL.activations, "none")
    trained = lambda examples, seed: fit("ttpd", examples, seed=seed)  # noqa: E731
    one, two = (left_out(given, trained, {2: 1}, repeats=1) for given in (MATERIAL, other))
    rows = [row for row, item in enumerate(MATERIAL.statements) if item.topic == "topic 2"]
    assert one[0, rows].tolist() == two[0, rows].tolist()
    assert np.isnan(one[0, [row for row in range(len(flipped)) if row not in rows]]).all()


def test_the_layer_of_a_fold_is_chosen_without_it() -> None:
    """Truth is planted at layer 2, but at layer 3 for the topics of one fold: these have no say in their own layer."""
    material = planted(topics=6, entities=14, layers=4, strength=2.0, seed=2).material
    folds = topic_folds(6)
    odd = int(np.flatnonzero([0 in fold for fold in folds])[0])
    values = material.activations.values.copy()
    rows = np.flatnonzero(np.isin(material.examples.topics, folds[odd]))
    values[rows] = values[rows][:, [0, 1, 3, 2]]
    moved = Material(material.statements, replace(material.activations, values=values), "none")
    best, chosen = choose_layers(moved, folds)
    assert chosen[odd] == 2
    assert best == 2
    assert sorted(np.concatenate(folds).tolist()) == list(range(6))


def test_pictures_hold_what_is_drawn(found: Evaluation) -> None:
    picture = found.pictures[0]
    assert picture.roc.false_positives[0] == picture.roc.true_positives[0] == 0.0
    assert picture.roc.false_positives[-1] == picture.roc.true_positives[-1] == 1.0
    assert sum(item.count for item in picture.reliability.bins) == found.statements
    counts = picture.density
    assert sum(counts.true) + sum(counts.false) == found.statements and len(counts.edges) == len(counts.true) + 1
    middle = np.array(counts.edges[:-1]) + np.diff(counts.edges) / 2
    assert np.average(middle, weights=counts.true) > np.average(middle, weights=counts.false) + 1.0
    planted = next(item for item in found.by_layer if item.method == picture.method and item.layer == 1)
    assert planted.accuracy.low < planted.accuracy.value < planted.accuracy.high
    places = found.projection
    assert places is not None
    truth, label = np.array(places.truth), np.array(places.label)
    assert truth[label].mean() > truth[~label].mean() + 2.0
    sensitive = np.array(places.polarity_sensitive) * np.where(places.negated, -1, 1)
    assert sensitive[label].mean() > sensitive[~label].mean() + 1.0
    assert json.loads(json.dumps(found.model_dump(mode="json")))["chosen_layer"] == 1
    assert Evaluation.model_validate_json(found.model_dump_json()) == found


def test_tables_show_every_method_and_control(found: Evaluation) -> None:
    tables = evaluation_tables(found)
    assert [row[0] for row in tables[0].rows] == [item.name for item in (*found.methods, *found.controls)]
    assert all(len(row) == len(table.columns) for table in tables for row in table.rows)
    assert {row[0] for row in tables[1].rows} == set(found.topics)
    assert len(tables[2].rows) == 3


@pytest.mark.parametrize("beats", [True, False])
def test_a_probe_that_does_not_beat_the_logprob_is_printed_with_that_sentence(beats: bool) -> None:
    known = truth_probe({"name": "m"}, on_steps=worth(beats=beats))
    table, on_steps = probe_tables(known.record)
    assert table.rows[0][0] == "probe" and SENTENCES[NOT_MEASURED] not in table.notes
    assert (SENTENCES[NOT_BETTER] in on_steps.notes) is not beats
    assert [row[0] for row in on_steps.rows] == ["probe", "mean_logprob", "length", "stack", "with probe"]
    (alone,) = probe_tables(truth_probe({"name": "m"}).record)
    assert SENTENCES[NOT_MEASURED] in alone.notes


def test_one_topic_is_judged_by_entities_it_has_not_seen() -> None:
    one = [replace(item, topic="only") for item in MATERIAL.statements]
    material, left = by_what(Material(one, MATERIAL.activations, "none"))
    assert left == "group of entities"
    where: dict[str, set[str]] = {}
    for before, item in zip(one, material.statements, strict=True):
        where.setdefault(before.entity, set()).add(item.topic)
    assert all(len(groups) == 1 for groups in where.values())
    probe = train(Material(one, MATERIAL.activations, "none"), identity={"weights_sha256": "a"}, kind="mass_mean")
    assert "group of entities" in probe.record.held_out.protocol
    assert probe.record.training.topics == ("only",)
    assert probe.record.held_out.overall.accuracy.value > 0.9


def test_statements_without_negations_leave_out_what_needs_them() -> None:
    rows = [row for row, item in enumerate(MATERIAL.statements) if not item.negated]
    activations = replace(
        MATERIAL.activations, values=MATERIAL.activations.values[rows], sink=MATERIAL.activations.sink[rows]
    )
    material = Material([MATERIAL.statements[row] for row in rows], activations, "none")
    found = evaluate(material, methods=["ttpd", "ccs", "mass_mean"], layer=1, swept=[], repeats=1)
    assert [item.name for item in found.methods] == ["mass_mean"]
    assert "ttpd, ccs" in found.notes[0]
    assert found.projection is None
    with pytest.raises(InputError, match="negations"):
        evaluate(material, methods=["ttpd"])


def test_what_cannot_be_evaluated_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="tdpt"):
        evaluate(MATERIAL, methods=["tdpt"])
    with pytest.raises(UnknownNameError, match="layer"):
        evaluate(MATERIAL, layer=9, methods=METHODS)
    with pytest.raises(InputError, match="repeats"):
        evaluate(MATERIAL, repeats=0)
    few = replace(MATERIAL.activations, values=MATERIAL.activations.values[:8], sink=MATERIAL.activations.sink[:8])
    with pytest.raises(InputError, match="too few to hold any out"):
        evaluate(Material(MATERIAL.statements[:8], few, "none"))
    true = [replace(item, label=item.label or item.topic == "topic 3") for item in MATERIAL.statements]
    with pytest.raises(InputError, match="'topic 3' have the same label"):
        evaluate(Material(true, MATERIAL.activations, "none"))


def test_it_can_be_watched_and_stopped() -> None:
    told: list[tuple[int, int]] = []
    evaluate(MATERIAL, methods=["mass_mean"], repeats=1, progress=lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == list(range(1, len(told) + 1))
    assert {total for _, total in told} == {len(told)}
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(CancelledError):
        Watch(cancel=cancel).step()
    with pytest.raises(CancelledError):
        train(MATERIAL, identity={}, cancel=cancel)
