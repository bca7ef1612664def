"""Scoring steps with the served model itself, while an agent runs: no second copy of the weights, no replay."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from tracer.engines.lens import check_loopback
from tracer.engines.weights.identity import tokenizer_sha256
from tracer.errors import EngineError, InputError, TracerError
from tracer.explain.document import Kept
from tracer.explain.probes.attach import check_names, find_probes
from tracer.explain.probes.saved import SavedProbe
from tracer.explain.probes.score import Read, Reading, score_places
from tracer.replay.model import weights_sha256
from tracer.replay.recorded import Recorded, has_token_ids
from tracer.trace.events import CallStarted, Event, RunFinished, RunStarted, TraceBuilder
from tracer.trace.probes import ProbeScore
from tracer.trace.trace import Trace

if TYPE_CHECKING:
    from tracer.engines.vllm import VllmEngine
    from tracer.store import Store


class LiveProbes:
    """Scores the steps of runs as they come; pass `watch` as an agent's ``on_event``.

    Log-probabilities are those that the server gave when it wrote a step; entropies are not known, nor is there a
    replay whose parity could be told: `tracer.explain` replaces these scores.

    Attributes:
        identity: Of the served model.
        probes: Its probes.
        scores: Those of the run that was watched last.
        error: Why its scoring ended early; ``None`` where it did not. The run itself goes on.

    Args:
        engine: A server that gives hidden states, started with ``tracer serve --lens``.
        names: ``truth``, one of its kinds, or files of probes.
        on_scores: Called with the scores of steps that are new.

    Raises:
        InputError: There is no such probe for the served model, or the server is on another machine.
        UnknownNameError: A name stands for no probe.
        StoreError: A probe's file is damaged.
    """

    def __init__(
        self,
        engine: VllmEngine,
        names: Sequence[str] = ("truth",),
        *,
        on_scores: Callable[[Sequence[ProbeScore]], None] | None = None,
    ) -> None:
        check_names(names)
        check_loopback(engine.url)
        self._engine = engine
        self._on_scores = on_scores
        self.identity: Mapping[str, JsonValue] = {
            "name": engine.info.name,
            "weights_sha256": weights_sha256(engine.folder),
            "tokenizer_sha256": tokenizer_sha256(engine.folder),
            "dtype": engine.info.dtype,
            "engine": "vllm",
        }
        self.probes: tuple[SavedProbe, ...] = find_probes(names, self.identity).probes
        self.scores: list[ProbeScore] = []
        self.error: TracerError | None = None
        self._builder: TraceBuilder | None = None

    def watch(self, event: Event) -> None:
        """Take in an event of a run; when the next call begins, or at the end, the steps before it are scored.

        A server that fails or gives no hidden states ends the scoring, see `error`, but not the run.
        """
        if isinstance(event, RunStarted):
            self._builder, self.scores, self.error = TraceBuilder(event), [], None
            return
        if self._builder is None or self.error is not None:
            return
        self._builder.apply(event)
        # Not at a call's end: its steps are recorded after it.
        if isinstance(event, CallStarted | RunFinished):
            try:
                found = self.score(self._builder.trace, known=self.scores)
            except (EngineError, InputError) as error:
                self.error = error
                return
            new, self.scores = found[len(self.scores) :], found
            if new and self._on_scores is not None:
                self._on_scores(new)

    def attach(self, trace: Trace, store: Store | None = None) -> Trace:
        """A trace with the scores of the run that was watched, in place of earlier ones of these probes.

        Args:
            trace: The run.
            store: Keeps them, if the run is in it.

        Raises:
            StoreError: They cannot be kept.
        """
        kept = Kept(trace, store=store, arrays=None)
        kept.put_scores({probe.record.name for probe in self.probes}, self.scores)
        return kept.trace

    def score(
        self, trace: Trace, *, known: Sequence[ProbeScore] = (), cancel: threading.Event | None = None
    ) -> list[ProbeScore]:
        """Scores of all steps that a trace has so far.

        Args:
            trace: A trace of this server's model, finished or not.
            known: Scores of steps that need not be read again.
            cancel: Ends the requests.

        Raises:
            InputError: The trace was written by another model, or holds no token ids.
            EngineError: The server failed, or gives no hidden states.
            CancelledError: ``cancel`` was set.
        """
        self._check(trace)
        done = {score.step_id for score in known}
        left = [step for step in trace.steps if step.id not in done]
        if not left or not has_token_ids(trace):
            return list(known)
        recorded = Recorded(trace)
        reading = Reading.of(recorded, self.probes, self._engine.tokenizer)
        reading = reading.restricted({step.id for step in left})
        read = self._read(recorded, reading, cancel)
        found = score_places(recorded, reading, read, self.probes)
        # No key: it would say that a replay has nothing to add.
        return [*known, *(score.model_copy(update={"key": None}) for score in found)]

    def _read(self, recorded: Recorded, reading: Reading, cancel: threading.Event | None) -> Read:
        ends: dict[int, int] = {}
        for number, at in reading.tokens:
            ends[number] = max(ends.get(number, 0), at + 1)
        numbers = sorted(ends)
        sequences = [recorded.sequences[number].token_ids[: ends[number]].tolist() for number in numbers]
        states = self._engine.hidden_states(sequences, reading.layers, cancel=cancel) if sequences else []
        by_sequence = dict(zip(numbers, states, strict=True))
        hidden = {
            layer: np.array([by_sequence[number][place, at] for number, at in reading.tokens], dtype=np.float32)
            for place, layer in enumerate(reading.layers)
        }
        return Read(
            hidden, [_recorded_logprobs(recorded, n) for n in range(len(recorded.sequences))], None, self.identity
        )

    def _check(self, trace: Trace) -> None:
        own, theirs = self.identity["tokenizer_sha256"], trace.model.tokenizer_sha256
        if theirs is not None and theirs != own:
            raise InputError(
                f"the server runs {self._engine.info.name!r}, which has another tokenizer than {trace.model.name!r}, "
                "which wrote the trace; score it with the model that wrote it"
            )


def _recorded_logprobs(recorded: Recorded, number: int) -> NDArray[np.float64]:
    """Log-probabilities of a completion as the engine gave them; not numbers where it gave none."""
    sequence = recorded.sequences[number]
    completion = sequence.call.completions[sequence.completion]
    found = np.full(len(completion.token_ids), np.nan)
    if len(completion.logprobs) == len(found):
        found[:] = completion.logprobs
    return found
