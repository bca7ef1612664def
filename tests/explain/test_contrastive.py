"""MIRAGE against hand computations, plain transformers passes of its own, and a model whose attribution is known."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy import stats

from tests.explain.needle import needle_model, needle_trace
from tests.explain.planted import random_ids, small_trace
from tests.explain.tiny_runs import recorded_run, write_replica
from tests.tiny_models import FAMILIES, tiny_model
from tracer.errors import CancelledError, InputError, ModelError
from tracer.explain.attribution import contrastive
from tracer.explain.attribution.contrastive import divergence, run, sensitive
from tracer.explain.base import Context, Finding
from tracer.explain.methods import request
from tracer.explain.removal import Removal
from tracer.explain.service import explain
from tracer.replay.model import Replica
from tracer.replay.recorded import Recorded, Target
from tracer.trace.trace import Trace

COMMON = random_ids(14, seed=1)
BEGUN = random_ids(3, seed=6)
# Two samples that begin alike, and a second prompt that begins like the first and its completion.
TRACE = small_trace(
    [COMMON, [*COMMON, *random_ids(6, seed=2)]],
    [[[*BEGUN, *random_ids(6, seed=3)], [*BEGUN, *random_ids(4, seed=4)]], [random_ids(8, seed=5)]],
)
ALL: dict[str, Any] = {"threshold": 0.0}
"""Keeps every token that the context changed at all."""


METHODS = ("mirage", "mirage_signed")


def findings(context: Context, *targets: Target, method: str = "mirage", **parameters: Any) -> dict[str, Finding]:
    chosen = targets or context.recorded.targets
    return {found.target.step_id: found for found in run(context, [request(method, parameters)], chosen)}


def table(found: Finding) -> list[dict[str, Any]]:
    return cast("list[dict[str, Any]]", found.details["tokens"])


class Logits:
    """In the place of a replica whose rows are logits already."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def unembed(self, rows: torch.Tensor) -> torch.Tensor:
        return rows


def compare(with_: Any, without: Any, written: list[int]) -> contrastive.Divergence:
    rows, less = (torch.as_tensor(logits, dtype=torch.float32) for logits in (with_, without))
    return divergence(cast("Replica", Logits(rows.shape[-1])), rows, less, np.array(written))


def test_the_divergence_is_that_of_with_from_without() -> None:
    found = compare([[math.log(9), 0.0]], [[0.0, 0.0]], [0])
    # p = (9/10, 1/10) and q = (1/2, 1/2); the other direction would be 0.5108.
    assert found.kl == pytest.approx([0.9 * math.log(1.8) + 0.1 * math.log(0.2)], abs=1e-6)
    assert found.kl == pytest.approx([0.3681], abs=1e-4)


def test_divergences_equal_scipy_in_blocks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    with_, without = 4 * generator.normal(size=(2, 7, 11))
    p, q = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) for logits in (with_, without))
    whole = compare(with_, without, [0] * 7)
    monkeypatch.setattr(contrastive, "_LOGITS", 22)
    blocks = compare(with_, without, [0] * 7)
    assert whole.kl == pytest.approx(stats.entropy(p, q, axis=-1), rel=1e-5)
    assert blocks.kl.tolist() == whole.kl.tolist()
    assert blocks.preferred.tolist() == whole.preferred.tolist() == q.argmax(-1).tolist()


def test_the_foil_is_the_likeliest_other_token_without_the_context() -> None:
    without = [[0.0, 3.0, 2.0], [0.0, 3.0, 2.0]]
    found = compare([[5.0, 0.0, 0.0], [0.0, 5.0, 0.0]], without, [0, 1])
    assert found.preferred.tolist() == [1, 1]
    assert found.foils.tolist() == [1, 2]


def test_logits_that_are_not_finite() -> None:
    with pytest.raises(ModelError, match="not finite"):
        compare([[math.nan, 0.0]], [[0.0, 0.0]], [0])


@pytest.mark.parametrize(
    ("kl", "parameters", "threshold", "kept"),
    [
        ([0.0, 0.0, 0.0, 4.0], {}, 1 + math.sqrt(3), [3]),
        ([1.0, 0.0, 5.0, 4.0], {"deviations": 0.5}, 2.5 + 0.5 * math.sqrt(4.25), [2, 3]),
        ([1.0, 0.0, 5.0, 4.0], {"deviations": 0.0}, 2.5, [2, 3]),
        # Of two tokens one is at the threshold exactly.
        ([0.1, 0.7], {}, 0.7, [1]),
        # Few tokens do not reach it: the highest stands in.
        ([3.0, 3.0, 2.9, 0.0], {}, 2.225 + math.sqrt((2 * 0.775**2 + 0.675**2 + 2.225**2) / 4), [0, 1]),
        ([2.0], {}, 2.0, [0]),
        ([0.0, 1e-9], {}, 1e-9, []),
        ([0.2, 0.7, 0.0], {"threshold": 0.2}, 0.2, [0, 1]),
        ([0.2, 0.7, 0.0], {"threshold": 0.9}, 0.9, []),
        ([0.2, 0.7, 0.0], {"threshold": 0.0}, 0.0, [0, 1]),
    ],
)
def test_which_tokens_are_kept(kl: list[float], parameters: dict[str, Any], threshold: float, kept: list[int]) -> None:
    limit, indices = sensitive(np.array(kl), request("mirage", parameters))
    assert limit == pytest.approx(threshold, abs=1e-9)
    assert indices.tolist() == kept


@dataclass(frozen=True)
class Plain:
    """What eager passes of a model of its own give, for each token of a target."""

    kl: np.ndarray
    foils: np.ndarray
    scores: dict[str, list[np.ndarray]]

    def total(self, method: str, kept: Sequence[int]) -> Any:
        found = np.sum([self.scores[method][index] for index in kept], axis=0)
        return pytest.approx(found, abs=3e-5 * float(np.abs(found).max()))


def in_plain_passes(family: str, recorded: Recorded, target: Target, kind: str = "delete") -> Plain:
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    sequence = recorded.sequences[target.sequence].token_ids[: target.end]
    ids = torch.as_tensor(sequence)
    kinds = [recorded.sources[int(number)].kind for number in recorded.source_of[target.sequence][: target.end]]
    keep = torch.tensor([name != "document" for name in kinds])
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    rows = slice(target.start - 1, target.end - 1)
    logits = model(inputs_embeds=embeddings[None]).logits[0, rows]
    with torch.no_grad():
        if kind == "delete":
            less = model(ids[None, keep]).logits[0, -(target.end - target.start) - 1 : -1]
        else:
            seen = torch.ones(len(ids), len(ids), dtype=torch.bool).tril() & keep[None]
            seen |= torch.eye(len(ids), dtype=torch.bool)  # a hidden token may read itself: nobody reads it
            bias = torch.zeros(len(ids), len(ids)).masked_fill(~seen, torch.finfo(torch.float32).min)
            places = torch.arange(len(ids))[None]
            less = model(ids[None], attention_mask=bias[None, None], position_ids=places).logits[0, rows]
    p, q = (part.detach().double().softmax(-1).numpy() for part in (logits, less))
    written = sequence[target.start :]
    others = q.copy()
    others[np.arange(len(written)), written] = -1
    foils = others.argmax(-1)
    scores: dict[str, list[np.ndarray]] = {name: [] for name in METHODS}
    for row, (own, foil) in enumerate(zip(written, foils, strict=True)):
        [gradient] = torch.autograd.grad(logits[row, own] - logits[row, foil], embeddings, retain_graph=True)
        scores["mirage"].append(gradient.square().sum(-1).sqrt().numpy())
        scores["mirage_signed"].append((gradient * embeddings.detach()).sum(-1).numpy())
    return Plain(stats.entropy(p, q, axis=-1), foils, scores)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_equals_plain_passes_of_its_own(family: str, low_memory: bool) -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model(family)), recorded, low_memory=low_memory)
    found = {
        (item.request.method.name, item.target.step_id): item
        for item in run(context, [request(name, ALL) for name in METHODS], recorded.targets)
    }
    assert set(found) == {(name, target.step_id) for name in METHODS for target in recorded.targets}
    for name, target in itertools.product(METHODS, recorded.targets):
        item, plain = found[name, target.step_id], in_plain_passes(family, recorded, target)
        rows = table(item)
        assert [row["kl"] for row in rows] == pytest.approx(plain.kl, rel=1e-3, abs=1e-5)
        kept = [row["index"] for row in rows if row["kept"]]
        assert kept == np.flatnonzero(plain.kl > 1e-6).tolist()
        assert [rows[index]["foil"] for index in kept] == plain.foils[kept].tolist()
        assert item.scores == plain.total(name, kept)
        for index in kept:
            own = recorded.aggregate(target, plain.scores[name][index])
            theirs = {source.id: value for source, value in zip(recorded.sources, own, strict=True)}
            listed = rows[index]["sources"]
            assert list(listed) == item.details["context"]
            most = float(np.abs(own).max())
            assert listed == pytest.approx({source: theirs[source] for source in listed}, abs=3e-5 * most)
    # Both methods share the passes.
    assert context.cost.backward_passes == sum(row["kept"] for item in found.values() for row in table(item)) / 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_masking_in_place_of_deleting(family: str) -> None:
    recorded = Recorded(TRACE)
    target = recorded.targets[-1]
    [found] = findings(Context(Replica(tiny_model(family)), recorded), target, removal="mask", **ALL).values()
    plain = in_plain_passes(family, recorded, target, "mask")
    assert [row["kl"] for row in table(found)] == pytest.approx(plain.kl, rel=1e-3, abs=1e-5)
    assert [row["foil"] for row in table(found)] == plain.foils.tolist()
    assert found.scores == plain.total("mirage", range(len(plain.kl)))
    assert found.details["removal"] == "mask"
    deleted = findings(Context(Replica(tiny_model(family)), recorded), target, **ALL)[target.step_id]
    assert [row["kl"] for row in table(deleted)] != pytest.approx(plain.kl, rel=1e-3, abs=1e-5)


def test_scores_are_of_the_kept_tokens_only_and_passes_are_shared() -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model("llama")), recorded)
    found = findings(context)
    kept = {name: [row["index"] for row in table(item) if row["kept"]] for name, item in found.items()}
    assert all(0 < len(indices) < len(table(found[name])) for name, indices in kept.items())
    for target in recorded.targets:
        rows = table(found[target.step_id])
        threshold = float(str(found[target.step_id].details["threshold"]))
        assert all(row["kl"] >= 0.999 * threshold for row in rows if row["kept"])
        plain = in_plain_passes("llama", recorded, target)
        assert found[target.step_id].scores == plain.total("mirage", kept[target.step_id])
    assert context.cost.backward_passes == sum(map(len, kept.values()))
    # One pass over the tree with the context and one over what is left without it.
    prefixes: set[tuple[int, ...]] = set()
    for target in recorded.targets:
        removal = Removal(context, target, kinds=frozenset({"document"}))
        for keep in (True, False):
            ids, _ = removal.shortened(np.full(len(removal.units), keep))
            prefixes |= {(keep, *ids[:end].tolist()) for end in range(1, len(ids))}
    assert context.cost.forward_tokens == len(prefixes)


def planted(method: str) -> tuple[dict[str, float], dict[str, Any]]:
    recorded = Recorded(needle_trace(hidden_in=4))
    [found] = findings(Context(Replica(needle_model()), recorded), method=method).values()
    by_source = recorded.aggregate(found.target, found.scores)
    values = {str(source.step_id): float(value) for source, value in zip(recorded.sources, by_source, strict=True)}
    [row] = table(found)
    return values, row


def test_a_planted_document_is_found() -> None:
    values, row = planted("mirage")
    assert row["kept"]
    assert row["kl"] > 0.1
    assert values["d4"] > 10 * max(value for name, value in values.items() if name not in ("d4", "None"))


def test_signed_scores_are_blind_where_one_layer_reads_normalised_inputs() -> None:
    """What makes them the second choice: scaling an embedding changes nothing, so the gradient is orthogonal to it."""
    values, row = planted("mirage_signed")
    assert row["kept"]
    assert row["contrast"] > 1
    assert max(abs(value) for name, value in values.items() if name.startswith("d")) < 1e-3


def test_a_document_that_cannot_be_read_changes_nothing() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    recorded = Recorded(TRACE)
    found = findings(Context(Replica(model), recorded), recorded.targets[-1])
    [item] = found.values()
    assert not any(row["kept"] for row in table(item))
    assert not item.scores.any()
    assert max(row["kl"] for row in table(item)) < 1e-6


def test_a_target_without_context() -> None:
    recorded = Recorded(TRACE)
    context = Context(Replica(tiny_model("llama")), recorded)
    found = findings(context, kinds="vote+observation")
    for target in recorded.targets:
        assert found[target.step_id].scores.shape == (target.end,)
        assert not found[target.step_id].scores.any()
        assert found[target.step_id].details == {"context": [], "tokens": []}
    assert context.cost.forward_tokens == context.cost.backward_passes == 0


def test_a_prompt_that_begins_with_its_document() -> None:
    """The first token stays where everything is taken away: something must be read."""
    ids = random_ids(6, seed=8)
    base = small_trace([ids], [[random_ids(3, seed=9)]], steps=1)
    call = base.calls[0]
    segments = [call.segments[-1].model_copy(update={"start": 0, "end": 6})]
    trace = base.model_copy(update={"calls": [call.model_copy(update={"segments": segments})]})
    recorded = Recorded(trace)
    context = Context(Replica(tiny_model("llama")), recorded)
    removal = Removal(context, recorded.targets[0])
    assert removal.shortened(np.array([False]))[0].tolist() == [ids[0], *call.completions[0].token_ids]
    found = findings(context, **ALL)[recorded.targets[0].step_id]
    model = tiny_model("llama")
    with torch.no_grad():
        written = call.completions[0].token_ids
        p, q = (
            model(torch.tensor([[*before, *written]])).logits[0, -4:-1].double().softmax(-1).numpy()
            for before in (ids, ids[:1])
        )
    assert [row["kl"] for row in table(found)] == pytest.approx(stats.entropy(p, q, axis=-1), rel=1e-3)


@pytest.mark.parametrize(
    ("parameters", "settings", "message"),
    [
        ({"removal": "hide"}, {}, "removal is 'hide'"),
        ({"kinds": 3}, {}, "kinds is 3"),
        ({"deviations": -1.0}, {}, "deviations of mirage is -1.0"),
        ({"threshold": "much"}, {}, "threshold of mirage is 'much'"),
        ({}, {"target_function": "logit"}, "takes no target function and no foil"),
        ({}, {"target_function": "contrast", "foil": 5}, "takes no target function and no foil"),
    ],
)
def test_what_cannot_be_used(parameters: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    context = Context(Replica(tiny_model("llama")), Recorded(TRACE), **settings)
    with pytest.raises(InputError, match=message):
        findings(context, **parameters)
    assert context.cost.forward_tokens == 0


def test_cancelling_keeps_the_findings_before() -> None:
    cancel = threading.Event()
    context = Context(Replica(tiny_model("llama")), Recorded(TRACE), cancel=cancel)
    seen: list[Finding] = []
    with pytest.raises(CancelledError):
        for found in run(context, [request("mirage")], context.recorded.targets):
            seen.append(found)
            cancel.set()
    assert len(seen) == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_replica(tmp_path_factory.mktemp("replica"))


@pytest.fixture(scope="module")
def agent_run(folder: Path) -> Trace:
    return recorded_run(folder)


def test_every_step_of_an_agent_that_follows_an_observation(agent_run: Trace) -> None:
    report = explain(agent_run, methods=["mirage"])
    explanation = report.explanation("mirage")
    assert (explanation.unit, explanation.signed) == ("logits per unit of the embedding", False)
    observation = next(source.id for source in explanation.sources if source.kind == "observation")
    for step_id in ("s2", "s3"):
        assert explanation.details[step_id]["context"] == []
        assert not any(explanation.row(step_id))
    for step_id, text in (("s5", "So in y. "), ("s6", "y.")):
        details = explanation.details[step_id]
        assert details["context"] == [observation]
        rows = cast("list[dict[str, Any]]", details["tokens"])
        assert "".join(row["text"] for row in rows) == text
        kept = [row for row in rows if row["kept"]]
        assert kept
        total = sum(row["sources"][observation] for row in kept)
        column = [source.id for source in explanation.sources].index(observation)
        assert explanation.row(step_id)[column] == pytest.approx(total, rel=1e-4)
    assert report.explanation("mirage").faithfulness is not None
    # The trace carries all of it, to the byte.
    assert Trace.from_json(report.trace.to_json()).explanations == report.trace.explanations


def test_an_end_of_sequence_token_is_no_word_of_the_answer(folder: Path) -> None:
    replica = Replica.load(str(folder))
    assert replica.tokenizer is not None
    [end] = replica.tokenizer.eos_token_ids
    recorded = Recorded(small_trace([COMMON], [[[70, 71, end], [end]]], steps=1))
    target, empty = recorded.targets
    found = findings(Context(replica, recorded), **ALL)
    rows = table(found[target.step_id])
    assert [row["kept"] for row in rows] == [True, True, False]
    assert rows[2]["kl"] > 1e-6
    assert found[target.step_id].details["mean"] == pytest.approx((rows[0]["kl"] + rows[1]["kl"]) / 2)
    assert [row["text"] for row in rows] == [*replica.tokenizer.decode([70, 71]).text, ""]
    assert not found[empty.step_id].scores.any()


def test_a_foil_that_is_no_token_of_the_tokenizer_has_no_text(folder: Path) -> None:
    """Vocabularies are padded."""
    replica = Replica.load(str(folder))
    assert contrastive._text_of(replica, 65) == "b"
    assert contrastive._text_of(replica, replica.vocabulary - 1) == ""
