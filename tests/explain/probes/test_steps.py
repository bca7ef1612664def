"""Reading, judging and locating steps: against eager passes, planted directions and hand-made chains."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.explain.probes.truthful_model import truth_probe
from tests.explain.tiny_runs import AUTO, write_replica
from tracer.errors import CancelledError, InputError
from tracer.explain.probes import step_probe, unseen_steps
from tracer.explain.probes.controls import TEXT
from tracer.explain.probes.first_error import (
    NONE,
    MistakeChain,
    ask_first_wrong,
    best_threshold,
    first_errors,
    locate,
    read_mistakes,
    step_examples,
)
from tracer.explain.probes.metrics import auroc, auroc_difference
from tracer.explain.probes.places import POSITIONS, Position
from tracer.explain.probes.saved import STEPS, mark
from tracer.explain.probes.step_chains import StepExample, chains, perturbed
from tracer.explain.probes.step_features import StepFeatures, on_policy, step_features
from tracer.explain.probes.step_probe import train_step_probe
from tracer.explain.probes.transfer import (
    Reader,
    cross_validated,
    measure_baselines,
    read_steps,
    step_worth,
    transfer,
)
from tracer.explain.probes.unseen_steps import unseen_chains, with_worth
from tracer.replay.model import Replica, identity_of

WIDTH, LAYERS = 32, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_replica(tmp_path_factory.mktemp("steps"), context=2048)


@pytest.fixture(scope="module")
def replica(folder: Path) -> Replica:
    return Replica.load(str(folder))


def made(
    labels: np.ndarray,
    *,
    direction: dict[tuple[Position, int], float] | None = None,
    logprob: float = 0.0,
    seed: int = 0,
) -> StepFeatures:
    """Features of steps whose hidden states and log-probabilities tell the label as strongly as is said."""
    rng = np.random.default_rng(seed)
    examples = [
        replace(item, label=bool(label))
        for item, label in zip(perturbed(chains(len(labels) // 3, seed=seed)), labels, strict=False)
    ]
    signs = np.where(labels, 1.0, -1.0)
    hidden = {position: rng.normal(size=(len(labels), LAYERS, WIDTH)).astype(np.float32) for position in POSITIONS}
    for (position, layer), strength in (direction or {}).items():
        hidden[position][:, layer, 0] += strength * signs
    plain = {name: rng.normal(size=len(labels)) for name in ("mean_logprob", "min_logprob", "entropy", "length")}
    baselines = {"answer_logprob": rng.normal(size=len(labels)) + logprob * signs, **plain}
    return StepFeatures(tuple(examples), labels, hidden, tuple(range(LAYERS)), baselines)


def labels_of(count: int, *, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random(count) < 0.5


def test_features_are_those_of_an_eager_pass(replica: Replica, folder: Path) -> None:
    examples = perturbed(chains(5, seed=1))
    found = step_features(replica, examples, ask=True)
    model = AUTO.from_pretrained(str(folder), attn_implementation="eager").eval()
    tokenizer = replica.tokenizer
    assert tokenizer is not None
    asked = "Solve the problem step by step. Write each step on a line of its own and nothing else.\n\n"
    for row, item in enumerate(examples):
        lead = f"{asked}{item.context}\n\n" + "".join(f"{line}\n" for line in item.before)
        # One token is one byte here.
        ids = tokenizer.encode(lead + item.step.text).token_ids
        step, result = len(lead), (len(lead) + item.step.start, len(lead) + item.step.end)
        with torch.no_grad():
            output = model(torch.tensor([ids]), output_hidden_states=True)
        logs = output.logits[0].log_softmax(-1)
        own = logs[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].numpy()
        entropy = -(logs.exp() * logs).sum(-1).numpy()
        assert found.baselines["mean_logprob"][row] == pytest.approx(own[step - 1 :].mean(), abs=1e-4)
        assert found.baselines["min_logprob"][row] == pytest.approx(own[step - 1 :].min(), abs=1e-4)
        assert found.baselines["answer_logprob"][row] == pytest.approx(
            own[result[0] - 1 : result[1] - 1].mean(), abs=1e-4
        )
        assert found.baselines["entropy"][row] == pytest.approx(-entropy[step - 1 : -1].mean(), abs=1e-4)
        assert found.baselines["length"][row] == -len(item.step.text)
        places: dict[Position, int] = {"last": len(ids) - 1, "answer": result[1] - 1}
        for position, at in places.items():
            expected = output.hidden_states[1][0, at].numpy()
            assert found.hidden[position][row, 0] == pytest.approx(expected, abs=1e-4)
    assert found.labels.tolist() == [item.label for item in examples]
    assert ((found.baselines["p_true"] > 0) & (found.baselines["p_true"] < 1)).all()
    assert found.operations.sum(1).tolist() == [1.0] * len(examples)
    brief = step_features(replica, examples, whole=False)
    assert set(brief.baselines) == {"answer_logprob", "length", "position"}
    assert brief.baselines["answer_logprob"] == pytest.approx(found.baselines["answer_logprob"], abs=1e-5)
    assert np.allclose(brief.hidden["last"], found.hidden["last"], atol=1e-5)
    some = found.take([3, 0])
    assert some.examples == (examples[3], examples[0])
    assert np.array_equal(some.hidden["last"], found.hidden["last"][[3, 0]])


def test_shared_beginnings_of_steps_are_computed_once(replica: Replica) -> None:
    examples = perturbed(chains(3, seed=2))
    passed: list[int] = []
    handle = replica.layers[0].register_forward_hook(lambda _m, inputs, _o: passed.append(inputs[0].shape[1]))
    try:
        step_features(replica, examples)
    finally:
        handle.remove()
    problems = sum(len(item.context) + len("".join(item.before)) + len(item.step.text) for item in examples)
    assert sum(passed) < 0.6 * problems
    with pytest.raises(InputError, match="no steps"):
        step_features(replica, [])
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(CancelledError):
        step_features(replica, examples, cancel=cancel)


def test_own_results_are_judged_by_the_verified_ones(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    from tracer.explain.probes import step_features as module

    chosen = chains(12, seed=3)
    tokenizer = replica.tokenizer
    assert tokenizer is not None
    seen: list[str] = []

    def scripted(_replica: Replica, prompts: list[Any], *, max_tokens: int, **_: object) -> list[list[int]]:
        """A model that gives right results after a plus and 7 after anything else, and none after a minus."""
        written = []
        for prompt in prompts:
            text = tokenizer.decode(prompt.tolist()).text
            seen.append(text)
            line = text.rsplit("\n", 1)[-1]
            if " + " in line:
                left, right = line.removesuffix("=").split(" + ")
                written.append(tokenizer.encode(f" {int(left) + int(right)}.\nSo").token_ids)
            else:
                written.append(tokenizer.encode(" ..." if " - " in line else " 7 or so").token_ids)
        return written

    monkeypatch.setattr(module, "complete", scripted)
    found = on_policy(replica, chosen)
    by_operation = {item.step.operation: item for item in found}
    assert "subtract" not in by_operation and "swap" not in by_operation
    assert all(item.label for item in found if item.step.operation == "add")
    assert all(item.step.result == "7" for item in found if item.step.operation == "multiply")
    assert not any(item.label for item in found if item.step.operation == "multiply")
    assert not any(text.endswith(" ") for text in seen)


def test_a_planted_probe_beats_the_logprob_and_adds_to_it() -> None:
    labels = labels_of(240)
    features = made(labels, logprob=0.3)
    good = np.where(labels, 1.0, -1.0) + np.random.default_rng(2).normal(size=240)
    worth = step_worth(features, good, name="good", steps="a test", draws=300)
    assert worth.beats_logprob and worth.adds_to_stack
    assert worth.probe.auroc is not None
    assert worth.probe.auroc.value == pytest.approx(auroc(good, labels))
    assert worth.over_logprob.value == pytest.approx(
        (auroc(good, labels) or 0) - (auroc(features.baselines["answer_logprob"], labels) or 0)
    )
    document = worth.to_document()
    assert document["best_baseline"] == "answer_logprob"
    noise = step_worth(features, np.random.default_rng(3).normal(size=240), name="noise", steps="a test", draws=300)
    assert not noise.beats_logprob and not noise.adds_to_stack
    # What says the same as a baseline adds nothing.
    copied = step_worth(features, features.baselines["answer_logprob"], name="copy", steps="a test", draws=300)
    assert not copied.beats_logprob and not copied.adds_to_stack
    assert copied.adds.value == pytest.approx(0.0, abs=5e-4)
    assert copied.over_logprob.value == copied.over_logprob.high == 0.0
    assert worth.wrong == int((~labels).sum()) and worth.rows == 240


def test_baselines_are_on_their_own_scale(replica: Replica) -> None:
    labels = labels_of(200)
    features = made(labels, logprob=2.0)
    found = {item.name: item for item in measure_baselines(features, draws=100)}
    assert set(found) == {*features.baselines, "operation", TEXT}
    # The steps' words say nothing about labels that were drawn at random.
    text = found[TEXT].auroc
    assert text is not None and text.low < 0.5 < text.high + 0.05
    own = found["answer_logprob"]
    assert own.auroc is not None and own.auroc.value == pytest.approx(
        auroc(features.baselines["answer_logprob"], labels)
    )
    # A shifted log-probability separates as well: its accuracy is at a threshold, not at zero.
    shifted = {**features.baselines, "answer_logprob": features.baselines["answer_logprob"] - 100}
    again = {item.name: item for item in measure_baselines(replace(features, baselines=shifted), draws=100)}
    assert again["answer_logprob"].accuracy.value == pytest.approx(own.accuracy.value, abs=0.02) and (
        own.accuracy.value > 0.9
    )


def test_cross_validation_never_learns_from_the_same_problem() -> None:
    # The label is the problem's own: only leaking could tell it.
    problems = np.repeat(np.arange(40), 5)
    labels = np.random.default_rng(0).random(40)[problems] < 0.5
    columns = np.random.default_rng(1).normal(size=(40, 30))[problems]
    scores = cross_validated(columns, labels, problems.tolist())
    assert abs((auroc(scores, labels) or 0.0) - 0.5) < 0.2
    told = cross_validated(np.where(labels, 1.0, -1.0)[:, None], labels, problems.tolist())
    assert auroc(told, labels) == 1.0
    with pytest.raises(InputError, match="too few right or too few wrong"):
        cross_validated(columns, np.ones(200, dtype=bool), problems.tolist())


def test_a_difference_is_zero_for_the_same_scores() -> None:
    labels = labels_of(60)
    scores = np.random.default_rng(0).normal(size=60)
    same = auroc_difference(scores, 2 * scores + 1, labels, range(60))
    assert same is not None and (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    assert auroc_difference(scores, scores, np.ones(60, dtype=bool), range(60)) is None


def test_a_step_probe_finds_the_planted_layer_and_token(
    replica: Replica, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def planted(_replica: Replica, examples: list[StepExample], *, layers: Any = None, **_: Any) -> StepFeatures:
        labels = np.array([item.label for item in examples])
        found = made(labels, direction={("answer", 1): 2.0}, logprob=0.2, seed=len(examples))
        found = replace(found, examples=tuple(examples))
        own = list(range(LAYERS)) if layers is None else list(layers)
        hidden = {position: values[:, own] for position, values in found.hidden.items()}
        return replace(found, hidden=hidden, layers=tuple(own))

    def mistaken(_replica: Replica, chosen: Any, **_: Any) -> list[StepExample]:
        return [item for number, item in enumerate(perturbed(chosen, seed=77)) if number % 3]

    for module in (step_probe, unseen_steps):
        monkeypatch.setattr(module, "step_features", planted)
        monkeypatch.setattr(module, "on_policy", mistaken)
    stages: set[str] = set()
    probe, unseen = train_step_probe(
        replica, problems=25, test_problems=20, progress=lambda stage, *_: stages.add(stage)
    )
    record = probe.record
    assert (record.name, record.layer, record.position) == (STEPS, 1, "answer")
    assert record.held_out.overall.auroc is not None and record.held_out.overall.auroc.value > 0.95
    assert {item.name for item in record.held_out.controls} == {"shuffled labels", "random direction", "layer 0"}
    for control in record.held_out.controls:
        assert control.auroc is not None and abs(control.auroc.value - 0.5) < 0.25
    assert record.on_steps is not None and record.on_steps.beats_logprob
    assert abs(float(probe.probe.weights[0])) == np.abs(probe.probe.weights).max()
    assert record.median_norm is not None and record.training.texts
    assert "choosing a layer" in stages
    learnt = set(record.training.texts)
    assert unseen.own is not None
    for features in (unseen.own, unseen.made_up):
        assert not learnt & {mark(item.step.text) for item in features.examples}
    probe.save(tmp_path / "steps.safetensors")
    loaded = type(probe).load(tmp_path / "steps.safetensors", identity=identity_of(replica))
    assert loaded.record == record


def test_a_step_probe_of_a_random_model_is_worth_nothing(replica: Replica) -> None:
    probe, unseen = train_step_probe(replica, problems=12, test_problems=12)
    # A random model comes to no result, so that there is nothing of its own to judge.
    assert probe.record.on_steps is None
    assert probe.record.held_out.overall.auroc is not None
    assert unseen.own is None
    assert [item.record.on_steps for item in with_worth([probe], unseen.own)] == [None]
    assert "random model" not in probe.record.held_out.protocol


def test_unseen_problems_have_no_step_that_was_learnt_from() -> None:
    first = unseen_chains(20, seed=4)
    learnt = {mark(step.text) for chain in first[:5] for step in chain.steps}
    apart = unseen_chains(20, seed=4, learnt=learnt)
    assert len(apart) == 20 and not {chain.problem for chain in first[:5]} & {chain.problem for chain in apart}
    assert not learnt & {mark(step.text) for chain in apart for step in chain.steps}
    # Problems to learn from and problems to judge by are drawn apart.
    assert not {chain.problem for chain in chains(200, seed=4)} & {chain.problem for chain in first}
    everything = {mark(step.text) for chain in unseen_chains(40, seed=4) for step in chain.steps}
    with pytest.raises(InputError, match="no step that the probe learnt from"):
        unseen_chains(20, seed=4, learnt=everything)


def test_transfer_reads_the_layer_of_each_probe(replica: Replica) -> None:
    labels = labels_of(240)
    features = made(labels, direction={("last", 1): 2.0})
    probe = truth_probe(identity_of(replica), layer=1)
    scores = read_steps(features, Reader.of(probe))
    assert scores == pytest.approx(features.hidden["last"][:, 1, 0].astype(float))
    found = transfer(features, [Reader.of(probe)], steps="a test", draws=100)
    assert found.probes[0].probe.name == "statements"
    assert found.probes[0].beats_logprob
    assert sum(count for count, _ in found.by_operation.values()) == found.rows == 240
    assert sum(wrong for _, wrong in found.by_operation.values()) == found.wrong
    curves = {item.name: item.roc for item in found.curves}
    assert set(curves) == {"statements", *features.baselines}
    heights = np.interp(0.2, curves["statements"].false_positives, curves["statements"].true_positives)
    assert heights > 0.8
    with pytest.raises(InputError, match="layer 1, which was not extracted"):
        read_steps(replace(features, layers=(0,)), Reader.of(probe))


CHAIN = MistakeChain("sums", "What is 2 + 2 - 1?", ("2 + 2 = 4.", "4 - 1 = 2.", "The answer is 2."), 1)


def test_steps_of_a_chain_with_a_mistake() -> None:
    examples = step_examples([CHAIN, MistakeChain("sums", "?", ("All is well",), NONE)])
    assert [item.label for item in examples] == [True, False, False, True]
    assert [item.step.result for item in examples] == ["4", "2", "2", "All is well"]
    assert examples[2].before == CHAIN.steps[:2]


def test_the_first_step_below_a_threshold() -> None:
    scores = [np.array([3.0, 1.0, 0.0]), np.array([2.0, 2.0]), np.array([0.5])]
    assert locate(scores, 1.5).tolist() == [1, NONE, 0]
    assert locate(scores, -1.0).tolist() == [NONE, NONE, NONE]
    truth = np.array([1, NONE, 0])
    threshold = best_threshold(scores, truth)
    assert (locate(scores, threshold) == truth).all()
    # Brute force over all thresholds that matter cannot do better.
    rng = np.random.default_rng(5)
    many = [rng.normal(size=4) for _ in range(12)]
    where = rng.integers(-1, 4, 12)
    best = max((locate(many, t) == where).mean() for t in [*np.concatenate(many) + 1e-9, -9.0])
    assert (locate(many, best_threshold(many, where)) == where).mean() == best


def test_a_probe_that_knows_finds_every_first_error(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    from tracer.explain.probes import first_error

    rng = np.random.default_rng(1)
    own = [
        MistakeChain("easy", f"problem {number}", ("a b c.", "d e f.", "g h i."), int(rng.integers(-1, 3)))
        for number in range(40)
    ]

    def knowing(_replica: Replica, examples: list[StepExample], **_: Any) -> StepFeatures:
        labels = np.array([item.label for item in examples])
        found = made(labels, direction={("last", 1): 50.0})
        return replace(found, examples=tuple(examples))

    monkeypatch.setattr(first_error, "step_features", knowing)
    found = first_errors(replica, own, [Reader.of(truth_probe(identity_of(replica), layer=1))])
    (task,) = found.tasks
    methods = {item.name: item for item in task.methods}
    assert task.chains == 40 and task.with_mistake == sum(chain.first_wrong != NONE for chain in own)
    assert methods["statements"].overall.value == 1.0
    assert methods["statements"].named is not None and methods["statements"].named.value == 1.0
    assert methods["chance"].overall.value == pytest.approx(0.25)
    assert methods["answer_logprob"].overall.value < 0.7
    assert {"asking the model", TEXT, "most common place", "mean_logprob", "min_logprob", "entropy"} < set(methods)


def test_asking_takes_the_likeliest_number(replica: Replica, folder: Path) -> None:
    model = AUTO.from_pretrained(str(folder), attn_implementation="eager").eval()
    tokenizer = replica.tokenizer
    assert tokenizer is not None
    text = (
        "What is 2 + 2 - 1?\n\nHere is a solution:\nStep 1: 2 + 2 = 4.\nStep 2: 4 - 1 = 2.\nStep 3: The answer is 2."
        "\n\nWhich step is the first wrong one? Answer with its number, or with 0 if every step is right.\nAnswer:"
    )
    sums = []
    for number in range(4):
        prompt, option = tokenizer.encode(text).token_ids, tokenizer.encode(f" {number}").token_ids
        with torch.no_grad():
            logs = model(torch.tensor([[*prompt, *option]])).logits[0].log_softmax(-1)
        places = torch.arange(len(prompt) - 1, len(prompt) + len(option) - 1)
        sums.append(float(logs[places, torch.tensor(option)].sum()))
    assert ask_first_wrong(replica, [CHAIN]).tolist() == [int(np.argmax(sums)) - 1]


def test_chains_are_read_from_files(tmp_path: Path) -> None:
    rows = [{"input": f"p{n}", "steps": ["one\n  more", "two"], "mistake_index": n % 2 or None} for n in range(9)]
    (tmp_path / "easy.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    every = read_mistakes(tmp_path, limit=None)
    assert len(every) == 9 and every[0] == MistakeChain("easy", "p0", ("one more", "two"), NONE)
    assert every[1].first_wrong == 1
    some = read_mistakes(tmp_path, limit=4, seed=1)
    assert len(some) == 4 and some == read_mistakes(tmp_path, limit=4, seed=1) and set(some) < set(every)
    with pytest.raises(InputError, match="no chains with known mistakes"):
        read_mistakes(tmp_path / "nowhere")
    for broken in ("no json", '{"input": "x"}', json.dumps({**rows[0], "mistake_index": 2}), "[1]"):
        (tmp_path / "easy.jsonl").write_text(broken)
        with pytest.raises(InputError, match="line 1 is no chain"):
            read_mistakes(tmp_path)
