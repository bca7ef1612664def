"""Scoring the steps of a trace: how true the model takes them to be, by its hidden states and by what else is known.

All of it comes out of one pass over the trace: a replay, or what a served model gives of its own (`live`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from tracer.explain.document import content_sha256
from tracer.explain.probes.activations import sinks
from tracer.explain.probes.baselines import TokenValues, agreement, branch_agreement, token_baselines
from tracer.explain.probes.places import Place, find_places, read_position
from tracer.explain.probes.saved import SavedProbe, mark
from tracer.replay.forward import Replayed, Wanted
from tracer.replay.recorded import Recorded
from tracer.replay.tree import Ids
from tracer.trace.probes import NOT_BETTER, NOT_MEASURED, OTHER_TEXT, SEEN, SINK, ProbeBaselines, ProbeScore
from tracer.trace.segments import Tokenizer


@dataclass(frozen=True, slots=True)
class Reading:
    """What has to be read of a trace for some probes.

    Args:
        places: The texts.
        layers: Layers whose output is read.
        tokens: Tokens that are read, as pairs of sequence and position.
    """

    places: tuple[Place, ...]
    layers: tuple[int, ...]
    tokens: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, recorded: Recorded, probes: Sequence[SavedProbe], tokenizer: Tokenizer | None) -> Reading:
        """What some probes have to read of a trace.

        Raises:
            InputError: A probe reads a token that this tracer does not know.
        """
        places = find_places(recorded, tokenizer)
        positions = {read_position(probe.record.position) for probe in probes}
        tokens = {(place.sequence, place.tokens[position]) for place in places for position in positions}
        return cls(places, tuple(sorted({probe.record.layer for probe in probes})), tuple(sorted(tokens)))

    def restricted(self, steps: Collection[str]) -> Reading:
        """What is to be read for some steps alone."""
        places = tuple(place for place in self.places if place.step_id in steps)
        tokens = {(place.sequence, at) for place in places for at in place.tokens.values()}
        return Reading(places, self.layers, tuple(token for token in self.tokens if token in tokens))

    def wanted(self, recorded: Recorded) -> Wanted:
        """The replay that reads it, and scores all completions beside."""
        return Wanted(scored=recorded.scored, hidden_indices=self.indices(recorded), hidden_layers=self.layers)

    def indices(self, recorded: Recorded) -> Ids:
        """Indices of the tokens in the trace's tree, ``(tokens,)``."""
        sequences = recorded.tree.sequences
        return np.array([int(sequences[number][at]) for number, at in self.tokens], dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """What was read of a trace.

    Args:
        hidden: Residual stream behind each layer before the final norm, each ``(tokens, width)``.
        logprobs: Of all completion tokens.
        entropy: Of the distributions that they were drawn from, if it is known.
        replica: Identity of the model that was read.
        parity: How far its log-probabilities are from the recorded ones.
    """

    hidden: Mapping[int, NDArray[np.float32]]
    logprobs: TokenValues
    entropy: TokenValues | None
    replica: Mapping[str, JsonValue] = field(default_factory=dict)
    parity: Mapping[str, JsonValue] | None = None

    @classmethod
    def of(
        cls,
        reading: Reading,
        recorded: Recorded,
        replayed: Replayed,
        *,
        replica: Mapping[str, JsonValue],
        parity: Mapping[str, JsonValue] | None,
    ) -> Read:
        """What a replay of `Reading.wanted` found."""
        hidden = replayed.hidden.float().numpy()
        return cls(
            {layer: hidden[number] for number, layer in enumerate(reading.layers)},
            recorded.by_completion(replayed.logprobs),
            recorded.by_completion(replayed.entropy),
            replica,
            parity,
        )


def score_places(
    recorded: Recorded,
    reading: Reading,
    read: Read,
    probes: Sequence[SavedProbe],
    *,
    p_true: Sequence[float] | None = None,
) -> list[ProbeScore]:
    """Scores of all places by all probes.

    Args:
        recorded: The trace.
        reading: What was to be read.
        read: What was read.
        probes: Probes for this very model.
        p_true: What the model says when it is asked about each place, if it was asked.

    Returns:
        Probe by probe, in the order of the trace.
    """
    beside = _baselines(recorded, reading, read, p_true)
    return [score for probe in probes for score in _by_probe(recorded, reading, read, probe, beside)]


def score_key(content: str, probe: SavedProbe) -> str:
    """SHA-256 of what the scores of a probe for a trace of that content depend on."""
    record = json.dumps(probe.record.model_dump(mode="json"), sort_keys=True, ensure_ascii=True)
    weights = np.append(probe.probe.weights, probe.probe.bias).tobytes()
    return hashlib.sha256(f"{content}\n{record}\n".encode() + weights).hexdigest()


def _baselines(
    recorded: Recorded, reading: Reading, read: Read, p_true: Sequence[float] | None
) -> list[ProbeBaselines]:
    shares = agreement(recorded.trace)
    steps = {step.id: step for step in recorded.trace.steps}
    found: list[ProbeBaselines] = []
    for number, place in enumerate(reading.places):
        own = token_baselines(recorded, place, read.logprobs, read.entropy)
        found.append(
            own.model_copy(
                update={
                    "agreement": branch_agreement(steps[place.step_id], shares),
                    "p_true": None if p_true is None else float(p_true[number]),
                }
            )
        )
    return found


def _by_probe(
    recorded: Recorded, reading: Reading, read: Read, probe: SavedProbe, beside: Sequence[ProbeBaselines]
) -> list[ProbeScore]:
    if not reading.places:
        return []
    record = probe.record
    position = read_position(record.position)
    rows = {token: row for row, token in enumerate(reading.tokens)}
    own = [rows[place.sequence, place.tokens[position]] for place in reading.places]
    values = read.hidden[record.layer][own]
    scores, bands = probe.score(values), probe.probability(values)
    medians = None if record.median_norm is None else np.array([record.median_norm], dtype=np.float32)
    sink = sinks(values[:, None], medians)[:, 0]
    worth, key = _worth(probe), score_key(content_sha256(recorded.trace), probe)
    learnt = frozenset(record.training.texts)
    found: list[ProbeScore] = []
    for number, place in enumerate(reading.places):
        flags = _flags(place, probe, sink=bool(sink[number]), seen=mark(place.text) in learnt)
        known = SEEN not in flags
        call = recorded.sequences[place.sequence].call
        found.append(
            ProbeScore(
                key=key,
                name=record.name,
                layer=record.layer,
                position=record.position,
                step_id=place.step_id,
                sentence=place.sentence,
                text=place.text,
                call_id=call.id,
                completion=recorded.sequences[place.sequence].completion if place.written else None,
                start=place.start,
                end=place.end,
                token=place.tokens[position],
                score=float(scores[number]) if known else None,
                probability=float(bands.probability[number]) if known else None,
                low=float(bands.low[number]) if known else None,
                high=float(bands.high[number]) if known else None,
                baselines=beside[number],
                held_out=worth,
                flags=flags,
                replica=dict(read.replica),
                parity=None if read.parity is None else dict(read.parity),
            )
        )
    return found


def _flags(place: Place, probe: SavedProbe, *, sink: bool, seen: bool) -> list[str]:
    worth = probe.record.on_steps
    found = {
        SEEN: seen,
        SINK: sink,
        OTHER_TEXT: not place.is_statement,
        NOT_MEASURED: worth is None,
        NOT_BETTER: worth is not None and not worth.beats_logprob,
    }
    return [name for name, applies in found.items() if applies]


def _worth(probe: SavedProbe) -> dict[str, JsonValue]:
    """The probe's own held-out results, as a score shows them."""
    held, steps = probe.record.held_out, probe.record.on_steps
    area = held.overall.auroc
    return {
        "kind": probe.record.kind,
        "protocol": held.protocol,
        "rows": held.overall.rows,
        "accuracy": [held.overall.accuracy.value, held.overall.accuracy.low, held.overall.accuracy.high],
        "auroc": None if area is None else [area.value, area.low, area.high],
        "steps": None if steps is None else steps.to_document(),
    }
