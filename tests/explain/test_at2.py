"""AT2: its features against transformers' own attention, its fit against planted weights, and what it keeps."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from tests.explain.needle import needle_model, needle_trace
from tests.explain.planted import random_ids, small_trace
from tests.explain.tiny_runs import recorded_run, write_replica
from tests.tiny_models import HEADS, LAYERS, tiny_model
from tracer import cli
from tracer.errors import CancelledError, InputError, ModelError, StoreError
from tracer.explain.attribution.at2 import features, prepare, run
from tracer.explain.attribution.at2_examples import Example, choose, measure
from tracer.explain.attribution.at2_fit import fit, fit_runs, pearson, validate
from tracer.explain.attribution.head_weights import (
    FitDocument,
    Interval,
    Validation,
    default_path,
    load_weights,
    save_weights,
)
from tracer.explain.base import Context
from tracer.explain.checked import read_checked, write_checked
from tracer.explain.methods import request
from tracer.explain.removal import Removal, logit, removable
from tracer.replay.model import Replica, identity_of
from tracer.replay.recorded import Recorded
from tracer.store import Store
from tracer.trace.trace import Trace

TRACE = small_trace([random_ids(20, seed=1), random_ids(15, seed=2)], [[random_ids(12, seed=3)]] * 2, steps=3)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_replica(tmp_path_factory.mktemp("replica"))


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Replica:
    return Replica.load(str(folder), device="cpu")


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[Trace]:
    return [recorded_run(folder, "run-1"), recorded_run(folder, "run-2")]


def document(replica: Replica, **changes: Any) -> FitDocument:
    interval = Interval(mean=0.5, low=0.4, high=0.6)
    own: dict[str, Any] = {
        "model": "tiny",
        "weights_sha256": identity_of(replica)["weights_sha256"],
        "training_sha256": "0" * 64,
        "examples": 4,
        "masks": 32,
        "seed": 0,
        "iterations": 10,
        "validation": Validation(
            lds=interval, uniform=interval, random=interval, targets=4, folds=2, held_out="questions"
        ),
        "created_at": "2026-01-01T00:00:00+00:00",
    }
    return FitDocument(**{**own, **changes})


def planted(
    weights: np.ndarray, *, examples: int, noise: float = 0.0, seed: int = 0, questions: int = 4
) -> list[Example]:
    """Targets whose outcomes follow from attention to kept sources under known weights."""
    generator = np.random.default_rng(seed)
    found: list[Example] = []
    for number in range(examples):
        attended = generator.dirichlet(np.full(7, 0.5), size=weights.shape).astype(np.float32)
        masks = generator.random((32, 7)) < 0.5
        # Every target has a scale and an offset of its own.
        outcomes = generator.uniform(1, 9) * (masks @ np.tensordot(weights, attended, axes=2)) + generator.normal()
        outcomes += noise * outcomes.std() * generator.normal(size=32)
        measured = np.asarray(outcomes, dtype=np.float64)
        found.append(Example(f"{number}", f"question {number % questions}", attended, masks, measured))
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mistral_window"])
def test_features_are_the_attention_that_transformers_returns(family: str) -> None:
    recorded = Recorded(TRACE)
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    expected = []
    for target in recorded.targets:
        sequence = recorded.sequences[target.sequence].token_ids[: target.end]
        with torch.no_grad():
            layers = model(torch.as_tensor(sequence)[None], output_attentions=True).attentions
        rows = torch.stack([layer[0, :, target.start - 1 : target.end - 1] for layer in layers]).mean(2)
        owner = recorded.source_of[target.sequence][: target.end]
        summed = np.zeros((LAYERS, HEADS, len(recorded.sources)))
        for position in range(1, target.end):
            summed[..., owner[position]] += rows[..., position].numpy()
        expected.append(summed)
    context = Context(Replica(tiny_model(family)), recorded)
    found = features(context, recorded.targets)
    assert len(found) == len(recorded.targets) == 6
    for own, theirs in zip(found, expected, strict=True):
        assert own == pytest.approx(theirs, abs=1e-5)
    # A target's part is the same whatever else is asked.
    [alone] = features(Context(context.replica, recorded), recorded.targets[4:5])
    assert alone == pytest.approx(found[4], abs=1e-6)


@pytest.mark.parametrize("low_memory", [False, True])
def test_scores_are_weighted_features_of_what_can_be_removed(tmp_path: Path, low_memory: bool) -> None:
    recorded = Recorded(TRACE)
    replica = Replica(tiny_model("qwen3"))
    values = np.random.default_rng(0).normal(size=(LAYERS, HEADS))
    values /= np.abs(values).sum()
    weights = save_weights(tmp_path / "w.safetensors", values, document(replica))
    item = request("at2", {"path": str(tmp_path / "w.safetensors")})
    context = Context(replica, recorded, low_memory=low_memory)
    found = list(run(context, [item], recorded.targets))
    expected = features(Context(replica, recorded), recorded.targets)
    for finding, attended in zip(found, expected, strict=True):
        by_source = recorded.aggregate(finding.target, finding.scores)
        units = list(removable(recorded, finding.target, None))
        assert by_source[units] == pytest.approx(np.tensordot(values, attended, axes=2)[units], abs=1e-5)
        rest = np.delete(by_source, units)
        assert len(rest) and not rest.any()
        assert finding.details["fit"] == weights.sha256
        validation = finding.details["validation"]
        assert isinstance(validation, dict) and validation["lds"] == {"mean": 0.5, "low": 0.4, "high": 0.6}


def test_pearson_and_its_gradient_equal_the_closed_form() -> None:
    generator = np.random.default_rng(5)
    left, right = generator.normal(size=(3, 32)), generator.normal(size=(3, 32))
    values = torch.tensor(left, requires_grad=True)
    found = pearson(values, torch.tensor(right))
    expected = [stats.pearsonr(first, second).statistic for first, second in zip(left, right, strict=True)]
    assert found.detach().numpy() == pytest.approx(expected, abs=1e-12)
    torch.autograd.backward(found.sum())
    first, second = (side - side.mean(1, keepdims=True) for side in (left, right))
    sizes = [np.linalg.norm(side, axis=1, keepdims=True) for side in (first, second)]
    # d r / d x = (y / |y| - r x / |x|) / |x| for centred x and y.
    gradient = (second / sizes[1] - np.array(expected)[:, None] * first / sizes[0]) / sizes[0]
    assert values.grad is not None
    assert values.grad.numpy() == pytest.approx(gradient, abs=1e-12)
    assert pearson(torch.ones(1, 4), torch.rand(1, 4)).tolist() == [0.0]


def test_planted_weights_are_recovered() -> None:
    truth = np.zeros((3, 4))
    truth[0, 1], truth[2, 0], truth[2, 3] = 0.5, 0.3, -0.2
    found = fit(planted(truth, examples=24))
    assert np.abs(found).sum() == pytest.approx(1)
    assert found == pytest.approx(truth, abs=0.01)
    noisy = fit(planted(truth, examples=24, noise=0.5))
    assert np.corrcoef(noisy.ravel(), truth.ravel())[0, 1] > 0.95
    assert found.tolist() == fit(planted(truth, examples=24)).tolist()


def test_validation_is_on_questions_that_were_not_seen() -> None:
    truth = np.zeros((3, 4))
    truth[1, 2] = 1.0
    examples = planted(truth, examples=20, noise=0.3)
    found = validate(examples, seed=1, iterations=60)
    assert (found.targets, found.folds, found.held_out) == (20, 4, "questions")
    assert found.lds.low > found.uniform.high and found.lds.mean > 0.8
    assert abs(found.random.mean) < 0.15 and found.random.low < found.random.high
    assert found == validate(examples, seed=1, iterations=60)
    # Outcomes that have nothing to do with attention: what fits the seen ones is worth nothing on the others.
    generator = np.random.default_rng(2)
    chance = [
        Example(item.key, item.question, item.features, item.masks, generator.normal(size=32)) for item in examples
    ]
    assert abs(validate(chance, seed=1, iterations=60).lds.mean) < 0.2
    one = [Example(item.key, "the same", item.features, item.masks, item.outcomes) for item in examples]
    assert validate(one, seed=1, iterations=20).held_out == "targets"


def test_too_little_to_learn_from() -> None:
    [example] = planted(np.ones((1, 1)), examples=1)
    still = Example("b", "q", example.features, example.masks, np.zeros(32))
    with pytest.raises(InputError, match="1 targets can be learned from"):
        validate([example, still], seed=0)
    with pytest.raises(InputError, match="changed nothing"):
        fit([still])


def test_measured_outcomes_are_logits_under_the_masks() -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model("llama")), recorded, seed=3)
    [target] = choose(recorded, 1, seed=0)
    [example] = measure(context, [target], masks=9)
    removal = Removal(Context(context.replica, recorded), target)
    assert example.masks.shape == (9, len(removal.units))
    assert example.outcomes == pytest.approx(logit(removal.values(example.masks)), abs=1e-4)
    [attended] = features(Context(context.replica, recorded), [target])
    assert example.features == pytest.approx(attended[..., list(removal.units)], abs=1e-6)
    # Summing what heads give to kept sources is the same as summing the sources' scores.
    weights = np.random.default_rng(1).normal(size=(LAYERS, HEADS))
    scores = np.tensordot(weights, example.features, axes=2)
    assert example.predictors() @ weights.ravel() == pytest.approx(example.masks @ scores, abs=1e-6)


def test_steps_that_read_too_little_are_left_out() -> None:
    recorded = Recorded(TRACE)
    chosen = choose(recorded, 99, seed=0)
    assert [len(removable(recorded, target, None)) for target in recorded.targets] == [2, 3, 4, 2, 3, 4]
    assert [target.step_id for target in chosen] == ["s2", "s3", "s5", "s6"]
    few = choose(recorded, 2, seed=0)
    assert len(few) == 2 and set(few) <= set(chosen)


def test_an_interrupted_measurement_goes_on(tmp_path: Path) -> None:
    recorded = Recorded(TRACE)
    replica = Replica(tiny_model("llama"))
    targets = choose(recorded, 99, seed=0)
    cancel = threading.Event()
    with pytest.raises(CancelledError):
        measure(Context(replica, recorded, cancel=cancel), targets, masks=8, folder=tmp_path, done=cancel.set)
    assert len(list(tmp_path.iterdir())) == 1
    context = Context(replica, recorded)
    whole = measure(context, targets, masks=8, folder=tmp_path)
    fresh_context = Context(replica, recorded)
    fresh = measure(fresh_context, targets, masks=8)
    assert context.cost.forward_tokens < fresh_context.cost.forward_tokens
    for own, theirs in zip(whole, fresh, strict=True):
        assert own.key == theirs.key
        assert own.outcomes == pytest.approx(theirs.outcomes, abs=1e-5)
    known = Context(replica, recorded)
    assert [item.key for item in measure(known, targets, masks=8, folder=tmp_path)] == [item.key for item in whole]
    assert known.cost.forward_tokens == 0
    # A damaged file is measured again, another number of masks or seed is something else.
    [first, *_] = sorted(tmp_path.iterdir())
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    measure(known, targets, masks=8, folder=tmp_path)
    assert known.cost.forward_tokens > 0
    assert read_checked(first).about["key"] == first.stem
    measure(Context(replica, recorded, seed=1), targets[:1], masks=8, folder=tmp_path)
    measure(Context(replica, recorded), targets[:1], masks=9, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == len(targets) + 2


def test_a_planted_document_is_found_after_fitting() -> None:
    replica = Replica(needle_model())
    examples: list[Example] = []
    for hidden_in in (0, 2, 3, 5):
        recorded = Recorded(needle_trace(hidden_in=hidden_in))
        examples += measure(Context(replica, recorded), recorded.targets, masks=32)
    weights = fit(examples)
    save_weights(default_path(replica), weights, document(replica))
    recorded = Recorded(needle_trace(hidden_in=4))
    [finding] = run(Context(replica, recorded), [request("at2")], recorded.targets)
    by_source = recorded.aggregate(recorded.targets[0], finding.scores)
    values = {str(source.step_id): value for source, value in zip(recorded.sources, by_source, strict=True)}
    others = max(abs(value) for name, value in values.items() if name != "d4")
    assert values["d4"] > 5 * others


def test_heads_that_look_at_the_wrong_document_are_told_apart() -> None:
    """Half of the heads read the needle, the other half a decoy that means nothing: raw attention can't tell."""
    replica = Replica(needle_model())
    projection = replica.model.model.layers[0].self_attn
    with torch.no_grad():
        projection.o_proj.weight[2, 16] = 0.0  # what the second head finds is lost
    examples: list[Example] = []
    for hidden_in in (0, 2, 3, 5):
        recorded = Recorded(needle_trace(hidden_in=hidden_in))
        [example] = measure(Context(replica, recorded), recorded.targets, masks=32)
        # What the second head got is put on another document.
        example.features[0, 1] = np.roll(example.features[0, 1], 1)
        examples.append(example)
    weights = fit(examples)
    assert weights[0, 0] > 0.5 and weights[0, 0] > 2 * abs(weights[0, 1])


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    own, other = Replica(tiny_model("llama")), Replica(tiny_model("llama", seed=1))
    path = tmp_path / "w.safetensors"
    values = np.full((LAYERS, HEADS), 1 / (LAYERS * HEADS))
    save_weights(path, values, document(own))
    assert load_weights(path, own).values == pytest.approx(values)
    with pytest.raises(InputError, match=r"fitted for another model \(tiny\).*run `tracer at2 fit RUN\.\.\.`"):
        load_weights(path, other)
    save_weights(path, values[:, :2], document(own))
    with pytest.raises(InputError, match="another model"):
        load_weights(path, own)


def test_weights_that_are_missing_or_damaged_are_refused(tmp_path: Path) -> None:
    replica = Replica(tiny_model("llama"))
    with pytest.raises(
        InputError, match=r"^at2: no weights are fitted for this model; run `tracer at2 fit RUN\.\.\.`$"
    ):
        prepare(request("at2"), replica)
    with pytest.raises(InputError, match="there is no file"):
        prepare(request("at2", {"path": str(tmp_path / "none")}), replica)
    with pytest.raises(InputError, match="path of at2 is 3"):
        prepare(request("at2", {"path": 3}), replica)
    path = tmp_path / "w.safetensors"
    item = request("at2", {"path": str(path)})
    path.write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="no safetensors file"):
        prepare(item, replica)
    write_checked(path, {"x": np.zeros(3)}, {"format": "something else"})
    with pytest.raises(InputError, match="holds no weights of AT2"):
        prepare(item, replica)
    save_weights(path, np.zeros((LAYERS, HEADS)), document(replica))
    content = path.read_bytes()
    assert content.count(b"2026-01-01") == 1
    path.write_bytes(content.replace(b"2026-01-01", b"2026-01-02"))
    with pytest.raises(InputError, match="was changed since it was written"):
        prepare(item, replica)


def test_other_weights_are_another_explanation(tmp_path: Path) -> None:
    replica = Replica(tiny_model("llama"))
    values = np.full((LAYERS, HEADS), 1 / (LAYERS * HEADS))
    first = save_weights(default_path(replica), values, document(replica))
    item = prepare(request("at2"), replica)
    assert item.parameters == {"path": None, "fit": first.sha256}
    assert prepare(item, replica) == item
    second = save_weights(default_path(replica), values, document(replica, seed=1))
    assert prepare(request("at2"), replica).parameters["fit"] == second.sha256 != first.sha256
    with pytest.raises(InputError, match="the weights .* are asked for"):
        prepare(item, replica)


def test_checked_files_hold_what_was_written(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6).reshape(2, 3), "b": np.array([True, False]), "c": np.zeros((0, 2), np.float32)}
    digest = write_checked(tmp_path / "deep" / "x", arrays, {"n": 1, "t": "é"})
    found = read_checked(tmp_path / "deep" / "x")
    assert (found.about, found.sha256) == ({"n": 1, "t": "é"}, digest)
    assert all(np.array_equal(found.arrays[name], array) for name, array in arrays.items())
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        write_checked(tmp_path / "file" / "x", arrays, {})
    with pytest.raises(StoreError, match="cannot be read"):
        read_checked(tmp_path / "none")


def test_a_fit_on_runs_says_what_it_is_worth(runs: list[Trace], tiny: Replica, tmp_path: Path) -> None:
    seen: list[tuple[object, ...]] = []
    values, about = fit_runs(
        runs,
        tiny,
        masks=8,
        steps=3,
        iterations=50,
        folder=tmp_path,
        progress=lambda at: seen.append((at.stage, at.done, at.total)),
    )
    assert values.shape == (2, 4) and np.abs(values).sum() == pytest.approx(1)
    assert about.weights_sha256 == tiny.identity["weights_sha256"]
    assert (about.masks, about.iterations, about.validation.held_out) == (8, 50, "targets")
    assert about.validation.targets == about.examples == 6
    assert seen[0] == ("taking sources away", 0, 6) and seen[-2:] == [("taking sources away", 6, 6), ("fitting", 0, 0)]
    again, same = fit_runs(runs[::-1], tiny, masks=8, steps=3, iterations=50, folder=tmp_path)
    assert same.training_sha256 == about.training_sha256
    assert again == pytest.approx(values, abs=1e-9)
    _, other = fit_runs(runs, tiny, masks=8, steps=3, iterations=50, seed=1, folder=tmp_path)
    assert other.training_sha256 != about.training_sha256


def test_runs_of_another_model_are_not_learned_from(runs: list[Trace], tiny: Replica, tmp_path: Path) -> None:
    wrong = runs[0].model_copy(deep=True)
    for call in wrong.calls:
        call.completions[0].logprobs = [value - 0.5 for value in call.completions[0].logprobs]
    with pytest.raises(ModelError, match="does not behave like the model that wrote the trace"):
        fit_runs([runs[1], wrong], tiny, masks=8, folder=tmp_path)


def test_explaining_with_weights_that_were_fitted(runs: list[Trace], folder: Path, tmp_path: Path, capfd: Any) -> None:
    with Store(tmp_path / "runs.db") as store:
        store.import_trace(runs[0])
    options = ["--store", str(tmp_path / "runs.db")]

    def command(*arguments: str) -> tuple[int, str, str]:
        before, sys.argv = sys.argv, ["tracer", *arguments, *options]
        try:
            cli.main()
        except SystemExit as ended:
            return int(ended.code or 0), *capfd.readouterr()
        finally:
            sys.argv = before
        return 0, *capfd.readouterr()

    code, _, err = command("explain", "run-1", "--methods", "at2", "--model", str(folder))
    assert code == 2
    assert err.splitlines()[-1] == "tracer: at2: no weights are fitted for this model; run `tracer at2 fit RUN...`"
    code, out, err = command("at2", "fit", "run-1", "--masks", "8", "--iterations", "50", "--model", str(folder))
    assert code == 0, err
    assert "fitted on 3 steps, 8 removals each; scored in 3 folds on targets that were held out" in out
    assert all(name in out for name in ("AT2", "raw attention", "random", "largest weights: layer"))
    code, out, _ = command("explain", "run-1", "--methods", "at2", "--model", str(folder), "--json")
    assert code == 0
    [explanation] = json.loads(out)["explanations"]
    replica = Replica.load(str(folder), device="cpu")
    fitted = load_weights(None, replica)
    assert explanation["parameters"] == {"path": None, "fit": fitted.sha256}
    details = explanation["details"]["s6"]
    assert details["validation"]["targets"] == 3 and details["fitted_on"] == 3
    # Another fit: computed again under a key of its own, beside the old one.
    code, _, err = command("at2", "fit", "run-1", "--masks", "8", "--iterations", "51", "--model", str(folder))
    assert code == 0, err
    code, out, _ = command("explain", "run-1", "--methods", "at2", "--model", str(folder), "--json")
    assert [item["parameters"]["fit"] for item in json.loads(out)["explanations"]].count(fitted.sha256) == 1
    assert len(json.loads(out)["explanations"]) == 2
    kept = tmp_path / "kept.safetensors"
    code, out, _ = command("at2", "fit", "run-1", "--masks", "8", "--model", str(folder), "--out", str(kept), "--json")
    assert json.loads(out)["sha256"] == load_weights(kept, replica).sha256
    code, _, err = command("at2", "fit", "run-1", "--out", str(tmp_path), "--model", str(folder))
    assert (code, "it is a folder" in err) == (2, True)


@pytest.mark.model
def test_features_of_the_demo_model_are_shares() -> None:
    trace = Trace.load(Path(__file__).parents[1] / "bench" / "traces" / "six_steps.json")
    recorded = Recorded(trace)
    replica = Replica.load("demo")
    target = recorded.targets[2]
    [found] = features(Context(replica, recorded), [target])
    assert found.shape == (24, 14, len(recorded.sources))
    whole = found.sum(-1)
    # What is missing rests on the first token.
    assert whole.min() >= 0 and whole.max() <= 1 + 1e-5 and whole.mean() < 0.98
