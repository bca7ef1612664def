"""Scores of steps on a model with a planted truth direction, against transformers and hand-made numbers."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.explain.probes.truthful_model import measured, truth_probe, worth, write_truthful
from tests.explain.tiny_runs import AUTO, recorded_run
from tracer.errors import CancelledError, InputError, UnknownNameError
from tracer.explain.probes.asking import Question, contexts, option_logprobs, p_true, prompt_ids
from tracer.explain.probes.baselines import agreement
from tracer.explain.probes.places import answer_end, find_places, read_position
from tracer.explain.probes.saved import SavedProbe, mark, probe_path
from tracer.explain.report import Report
from tracer.explain.service import explain
from tracer.replay.model import Replica, identity_of
from tracer.replay.recorded import Recorded
from tracer.store import Store
from tracer.trace.probes import (
    NOT_BETTER,
    NOT_MEASURED,
    OTHER_TEXT,
    SEEN,
    SENTENCES,
    SINK,
    ProbeScore,
    of_steps,
    probe_scores,
)
from tracer.trace.segments import Piece
from tracer.trace.trace import Step, Trace

THOUGHT = "Snow is black. Grass is green! Look it up. "
OBSERVED = "x is in the town of y! "
ANSWER = "so it is y."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_truthful(tmp_path_factory.mktemp("truthful"))


@pytest.fixture(scope="module")
def replica(folder: Path) -> Replica:
    return Replica.load(str(folder))


@pytest.fixture
def trace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Trace:
    from tests.explain import tiny_runs

    monkeypatch.setattr(tiny_runs, "FIRST", [("thought", "s2", THOUGHT), ("action", "s3", "search[x] ")])
    monkeypatch.setattr(tiny_runs, "SEEN", [("observation", "s4", OBSERVED)])
    monkeypatch.setattr(tiny_runs, "LAST", [("thought", "s5", "I know it! "), ("answer", "s6", ANSWER)])
    return recorded_run(folder)


@pytest.fixture
def saved(replica: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SavedProbe:
    """A probe where the default one is looked for."""
    monkeypatch.setenv("TRACER_PROBES", str(tmp_path / "probes"))
    probe = truth_probe(identity_of(replica), on_steps=worth(beats=False))
    probe.save(probe_path(identity_of(replica)))
    return probe


def run(trace: Trace, replica: Replica, **options: Any) -> Report:
    return explain(trace, methods=[], faithfulness="none", replica=replica, **options)


def test_the_planted_truth_is_found_in_context(trace: Trace, replica: Replica, saved: SavedProbe) -> None:
    report = run(trace, replica, probes=["truth"])
    by_place = {(score.step_id, score.sentence): score for score in report.probes}
    # An action says nothing; a step with one sentence is not split.
    assert list(by_place) == [("s2", None), ("s2", 0), ("s2", 1), ("s2", 2), ("s4", None), ("s5", None), ("s6", None)]
    true = {place for place, score in by_place.items() if (score.score or 0.0) > 0}
    assert true == {("s2", 1), ("s4", None), ("s5", None)}
    for score in report.probes:
        assert score.probability is not None and score.low is not None and score.high is not None
        assert 0.0 <= score.low <= score.probability <= score.high <= 1.0
        assert (score.probability > 0.5) == ((score.score or 0.0) > 0)
        assert score.held_out["accuracy"] == [0.9, 0.85, pytest.approx(0.95)]
    assert by_place["s2", 1].text == "Grass is green!"
    assert by_place["s2", 2].score == by_place["s2", None].score


def test_scores_are_the_projections_of_transformers_hidden_states(
    trace: Trace, folder: Path, replica: Replica, saved: SavedProbe
) -> None:
    model = AUTO.from_pretrained(str(folder), attn_implementation="eager").eval()
    for score in run(trace, replica, probes=["truth"]).probes:
        call = trace.call(str(score.call_id))
        written = [] if score.completion is None else call.completions[score.completion].token_ids
        assert score.start is not None and score.end is not None and score.token is not None
        ids = [*call.prompt_token_ids, *written]
        with torch.no_grad():
            output = model(torch.tensor([ids[: score.end]]), output_hidden_states=True)
        # Behind the last layer but before the norm: what the last layer adds to what entered it.
        with torch.no_grad():
            captured: list[Any] = []
            handle = model.model.layers[score.layer].register_forward_hook(
                lambda _module, _inputs, output, into=captured: into.append(output)
            )
            model(torch.tensor([ids[: score.token + 1]]))
            handle.remove()
        hidden = captured[0][0] if isinstance(captured[0], tuple) else captured[0]
        expected = saved.score(hidden.reshape(-1, 32)[-1].numpy())
        assert score.score == pytest.approx(float(expected), abs=2e-3)
        if score.completion is not None:
            logs = output.logits[0].log_softmax(-1)[score.start - 1 : score.end - 1]
            own = logs[torch.arange(len(logs)), torch.tensor(ids[score.start : score.end])]
            assert score.baselines.mean_logprob == pytest.approx(float(own.mean()), abs=1e-4)
            assert score.baselines.min_logprob == pytest.approx(float(own.min()), abs=1e-4)
            entropy = -(logs.exp() * logs).sum(-1).mean()
            assert score.baselines.entropy == pytest.approx(float(entropy), abs=1e-4)
        else:
            assert score.baselines.mean_logprob is None


def test_scores_are_kept_with_the_run_and_read_from_there(
    trace: Trace, replica: Replica, saved: SavedProbe, tmp_path: Path
) -> None:
    passes: list[int] = []
    handle = replica.layers[0].register_forward_hook(lambda *_: passes.append(1))
    try:
        with Store(f"sqlite:///{tmp_path / 'runs.db'}") as store:
            store.import_trace(trace)
            first = run(trace, replica, probes=["truth"], store=store)
            assert passes
            loaded = store.load(trace.id)
            assert probe_scores(loaded) == list(first.probes)
            passes.clear()
            again = run(loaded, replica, probes=["truth"], store=store)
            # Everything is known but the parity, which explanations keep.
            assert again.probes == first.probes
            assert loaded.probes == first.trace.probes == again.trace.probes
            # Another probe of the same name replaces what the first one said.
            truth_probe(identity_of(replica), layer=0).save(probe_path(identity_of(replica)))
            other = run(store.load(trace.id), replica, probes=["truth"], store=store)
            assert {score.layer for score in other.probes} == {0}
            assert probe_scores(store.load(trace.id)) == list(other.probes)
    finally:
        handle.remove()
    text = first.trace.to_json()
    assert Trace.from_json(text).to_json() == text
    assert of_steps(first.probes, name="statements").keys() == {"s2", "s4", "s5", "s6"}


def test_one_pass_gives_parity_scores_and_baselines(trace: Trace, replica: Replica, saved: SavedProbe) -> None:
    tokens: list[int] = []
    handle = replica.layers[0].register_forward_hook(lambda _m, inputs, _o: tokens.append(inputs[0].shape[1]))
    try:
        report = run(trace, replica, probes=["truth"])
    finally:
        handle.remove()
    assert sum(tokens) == len(Recorded(trace).tree)
    assert report.parity.holds and report.probes[0].parity == report.parity.to_document()


def test_flags(trace: Trace, replica: Replica, saved: SavedProbe, tmp_path: Path) -> None:
    def flags(probe: SavedProbe) -> dict[tuple[str, int | None], list[str]]:
        probe.save(tmp_path / "own.safetensors")
        report = run(trace, replica, probes=[str(tmp_path / "own.safetensors")])
        return {(score.step_id, score.sentence): score.flags for score in report.probes}

    identity = identity_of(replica)
    assert all(own == [NOT_MEASURED] for own in flags(truth_probe(identity)).values())
    assert all(own == [NOT_BETTER] for own in flags(truth_probe(identity, on_steps=worth(beats=False))).values())
    assert all(own == [] for own in flags(truth_probe(identity, on_steps=worth(beats=True))).values())
    assert all(SINK in own for own in flags(truth_probe(identity, median_norm=0.01)).values())
    learnt = flags(truth_probe(identity, texts=(mark("Grass is  green!"),)))
    assert [place for place, own in learnt.items() if SEEN in own] == [("s2", 1)]
    assert set(SENTENCES) == {SINK, OTHER_TEXT, SEEN, NOT_BETTER, NOT_MEASURED}


def test_a_probe_does_not_score_what_it_learnt_from(trace: Trace, replica: Replica, tmp_path: Path) -> None:
    probe = truth_probe(identity_of(replica), texts=(mark("so it is y."),))
    probe.save(tmp_path / "own.safetensors")
    scores = run(trace, replica, probes=[str(tmp_path / "own.safetensors")]).probes
    unscored = [score for score in scores if score.score is None]
    assert [score.step_id for score in unscored] == ["s6"]
    assert (unscored[0].probability, unscored[0].low, unscored[0].high) == (None, None, None)


def test_without_a_probe_nothing_fails_unless_one_was_asked_for(
    trace: Trace, replica: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACER_PROBES", str(tmp_path))
    report = run(trace, replica)
    assert report.probes == ()
    assert "tracer probe train --model" in str(report.probe_hint)
    assert run(trace, replica, probes=[]).probe_hint is None
    with pytest.raises(InputError, match="tracer probe train --model"):
        run(trace, replica, probes=["truth"])
    with pytest.raises(UnknownNameError, match="unknown probe 'turth'; did you mean 'truth'"):
        run(trace, replica, probes=["turth"])
    with pytest.raises(InputError, match="there is no probe at"):
        run(trace, replica, probes=["gone.safetensors"])
    # A damaged default probe is no reason not to explain.
    probe_path(identity_of(replica)).write_bytes(b"no probe")
    assert "damaged" in str(run(trace, replica).probe_hint)


def test_a_probe_of_another_model_is_refused(trace: Trace, replica: Replica, tmp_path: Path) -> None:
    other = truth_probe({**identity_of(replica), "weights_sha256": "1" * 64})
    other.save(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="trained on the model"):
        run(trace, replica, probes=[str(tmp_path / "other.safetensors")])


def test_the_model_is_asked_on_request(trace: Trace, replica: Replica, saved: SavedProbe, folder: Path) -> None:
    silent = run(trace, replica, probes=["truth"])
    assert all(score.baselines.p_true is None for score in silent.probes)
    asked = run(silent.trace, replica, probes=["truth"], ask=True)
    model = AUTO.from_pretrained(str(folder), attn_implementation="eager").eval()
    tokenizer = replica.tokenizer
    assert tokenizer is not None
    before = contexts(trace)
    for score in asked.probes:
        text = f"{before[score.step_id]}\n\nStatement: {score.text}\n\nIs this statement true or false? Answer with "
        question = Piece(f"{text}one word, True or False.", "question")
        prompt, chat = prompt_ids([question], tokenizer, plain="\nAnswer:")
        assert not chat
        sums = []
        for word in (" True", " False"):
            own = tokenizer.encode(word).token_ids
            with torch.no_grad():
                logs = model(torch.tensor([[*prompt, *own]])).logits[0].log_softmax(-1)
            sums.append(float(logs[torch.arange(len(prompt) - 1, len(prompt) + len(own) - 1), torch.tensor(own)].sum()))
        odds = np.exp(sums[0]) / (np.exp(sums[0]) + np.exp(sums[1]))
        assert score.baselines.p_true == pytest.approx(odds, abs=1e-4)
    assert "Observation: x is in" in before["s6"] and "Observation" not in before["s2"]
    # Known answers are not asked for again.
    cancel = threading.Event()
    cancel.set()
    assert run(asked.trace, replica, probes=["truth"], ask=True).probes == asked.probes


def test_options_of_any_length(replica: Replica, folder: Path) -> None:
    prompts = [[70, 71, 72], [70, 71], [9]]
    options = [[[5], [6, 7, 8]], [[5, 6]], [[1], [2], [3, 4]]]
    model = AUTO.from_pretrained(str(folder), attn_implementation="eager").eval()
    found = option_logprobs(replica, prompts, options)
    for prompt, own, scores in zip(prompts, options, found, strict=True):
        for option, score in zip(own, scores, strict=True):
            with torch.no_grad():
                logs = model(torch.tensor([[*prompt, *option]])).logits[0].log_softmax(-1)
            places = torch.arange(len(prompt) - 1, len(prompt) + len(option) - 1)
            assert score == pytest.approx(float(logs[places, torch.tensor(option)].sum()), abs=1e-4)
    assert option_logprobs(replica, [], []) == []
    assert p_true(replica, []).shape == (0,)
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(CancelledError):
        p_true(replica, [Question("", "Snow is white.")], cancel=cancel)


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("So 37 + 48 = 85.", "So 37 + 48 = 85"),
        ("First 12 + 5 = 17 - 2", None),
        ("3 * 4 = 12 and 12 - 2 = 10, as said.", "3 * 4 = 12 and 12 - 2 = 10"),
        ("The answer is Paris.", "The answer is Paris"),
        ("That is 1,200 apples", "That is 1,200"),
        ("Anna is older than Ben.", None),
    ],
)
def test_where_a_result_ends(text: str, result: str | None) -> None:
    end = answer_end(text)
    assert (None if end is None else text[:end]) == result


def test_places_without_a_tokenizer_and_texts_that_are_no_statements(trace: Trace, replica: Replica) -> None:
    whole = find_places(Recorded(trace), None)
    assert [(place.step_id, place.sentence) for place in whole] == [
        ("s2", None),
        ("s4", None),
        ("s5", None),
        ("s6", None),
    ]
    assert [place.written for place in whole] == [True, False, True, True]
    found = {place.text: place for place in find_places(Recorded(trace), replica.tokenizer)}
    assert found["Grass is green!"].is_statement
    for text in ("y.", "Is it so?", '{"a": 1, "b": 2, "c": 3}.', "```python x = 1 + 1.```"):
        place = whole[0]
        assert not type(place)(**{**{n: getattr(place, n) for n in place.__slots__}, "text": text}).is_statement
    with pytest.raises(InputError, match="reads the token 'first'"):
        read_position("first")


def test_agreement_of_branches() -> None:
    steps = [
        Step(id=f"a{number}", kind="answer", text=text, branch=f"b{number}")
        for number, text in enumerate(["The answer is 12.", "The answer is 12.0 apples.", "The answer is 7."])
    ]
    from tests.explain.planted import small_trace

    base = small_trace([[3, 4, 5]], [[[6, 7]]])
    assert agreement(base) == {}
    shares = agreement(base.model_copy(update={"steps": steps}))
    assert shares == {"b0": pytest.approx(2 / 3), "b1": pytest.approx(2 / 3), "b2": pytest.approx(1 / 3)}


def test_scores_of_other_programs_survive(trace: Trace, replica: Replica, saved: SavedProbe) -> None:
    theirs: Any = {"name": "theirs", "score": "high"}
    with_theirs = trace.model_copy(update={"probes": [theirs]})
    report = run(with_theirs, replica, probes=["truth"])
    assert theirs in report.trace.probes
    assert probe_scores(report.trace) == list(report.probes)
    with pytest.raises(InputError, match="a probe score cannot be read"):
        ProbeScore.read(theirs)
    assert measured("x", 0.5).auroc is not None
