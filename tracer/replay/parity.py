"""Whether the replica is the model that wrote a trace: recorded against replayed log-probabilities."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass

import numpy as np
from pydantic import JsonValue

from tracer.errors import InputError, ModelError
from tracer.replay.forward import Progress, Replayed, Wanted, replay
from tracer.replay.model import Replica
from tracer.replay.recorded import Recorded

ABSURD = -10.0
"""Tokens below this log-probability are not judged in float32: rounding alone moves them by more than the tolerance."""


@dataclass(frozen=True, slots=True)
class Parity:
    """How far replayed log-probabilities are from the recorded ones, in nats.

    Args:
        mean_abs: Mean absolute difference.
        max_abs: Largest absolute difference.
        tokens: Tokens that were compared; 0 where nothing could be.
        tolerance_mean: What the mean may reach in this precision.
        tolerance_max: What the largest may reach.
        skipped: Tokens that cannot be compared: drawn under a constraint, or recorded without log-probability.
        forced: Whether the caller insisted on going on in spite of it.
        retokenised: Whether the ids are not the recorded ones.
    """

    mean_abs: float | None
    max_abs: float | None
    tokens: int
    tolerance_mean: float
    tolerance_max: float
    skipped: int = 0
    forced: bool = False
    retokenised: bool = False

    @property
    def holds(self) -> bool:
        """Whether the difference is within the tolerance."""
        return (
            self.mean_abs is not None
            and self.max_abs is not None
            and self.mean_abs <= self.tolerance_mean
            and self.max_abs <= self.tolerance_max
        )

    def to_document(self) -> dict[str, JsonValue]:
        """Plain data for the trace."""
        return asdict(self)


def measure_parity(
    recorded: Recorded,
    replica: Replica,
    *,
    retokenised: bool = False,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> Parity:
    """Replay everything that a trace recorded and compare.

    Raises:
        CancelledError: ``cancel`` was set.
        EngineUnavailableError: Memory ran out.
    """
    replayed = replay(replica, recorded.tree, Wanted(scored=recorded.scored), progress=progress, cancel=cancel)
    return compare(recorded, replayed, replica, retokenised=retokenised)


def compare(recorded: Recorded, replayed: Replayed, replica: Replica, *, retokenised: bool = False) -> Parity:
    """Compare a replay of `Recorded.scored` with what was recorded.

    Tokens drawn under structured output are left out: their recorded log-probabilities were taken after the mask.
    """
    differences: list[np.ndarray] = []
    skipped = 0
    exact = tolerance(recorded.trace.model.dtype, replica) == _EXACT
    for sequence, logprobs in zip(recorded.sequences, recorded.by_completion(replayed.logprobs), strict=True):
        own = np.asarray(sequence.call.completions[sequence.completion].logprobs, dtype=np.float64)
        if sequence.call.sampling.structured is not None or len(own) != len(logprobs):
            skipped += len(logprobs)
            continue
        judged = own > ABSURD if exact else np.ones(len(own), dtype=bool)
        skipped += int((~judged).sum())
        differences.append(np.abs(own - logprobs)[judged])
    every = np.concatenate(differences) if differences else np.empty(0)
    mean, largest = tolerance(recorded.trace.model.dtype, replica)
    return Parity(
        float(every.mean()) if len(every) else None,
        float(every.max()) if len(every) else None,
        len(every),
        mean,
        largest,
        skipped,
        retokenised=retokenised,
    )


def check_identity(recorded: Recorded, replica: Replica) -> None:
    """Refuse a replica that does not even speak the trace's tokens.

    Raises:
        InputError: Its vocabulary is smaller than an id of the trace, or its tokenizer is another one.
    """
    largest = int(max(sequence.token_ids.max() for sequence in recorded.sequences))
    name = replica.identity["name"] or "the replica"
    if largest >= replica.vocabulary:
        raise InputError(
            f"{name} has a vocabulary of {replica.vocabulary}, but the trace holds token {largest}: "
            "it was written by another model; name the right one with --model"
        )
    own, theirs = replica.identity["tokenizer_sha256"], recorded.trace.model.tokenizer_sha256
    if own and theirs and own != theirs:
        raise InputError(
            f"{name} has another tokenizer than {recorded.trace.model.name}, which wrote the trace; "
            "name the model that wrote it with --model"
        )


def refuse(parity: Parity, recorded: Recorded, replica: Replica) -> None:
    """Refuse to explain where the replica does not behave like the model that wrote the trace.

    Raises:
        ModelError: It does not; the message says what to check.
    """
    if parity.holds:
        return
    if parity.mean_abs is None:
        raise ModelError(
            "no log-probability was recorded that the replica could be checked against; --force explains the trace "
            "all the same and marks the result as unchecked"
        )
    model = recorded.trace.model
    template = "" if _same_template(recorded, replica) else "; the chat templates differ"
    raise ModelError(
        f"the replica does not behave like the model that wrote the trace: log-probabilities differ by "
        f"{parity.mean_abs:.2g} on average and {parity.max_abs:.2g} at most over {parity.tokens} tokens "
        f"(allowed: {parity.tolerance_mean:g} and {parity.tolerance_max:g}). Check the weights (the trace says "
        f"{model.name!r}, the replica is {replica.identity['name']!r}) and the precision (trace {model.dtype}, "
        f"replica {replica.identity['dtype']}){template}; --force explains it all the same and marks the result"
    )


_EXACT = (1e-4, 1e-3)
_ROUNDED = (0.03, 0.5)


def tolerance(dtype: str | None, replica: Replica) -> tuple[float, float]:
    """Largest mean and largest single difference of log-probabilities from those of a model in precision ``dtype``.

    They were measured for float32 against float32, and for anything with a 16-bit type in it.
    """
    return _EXACT if dtype == "float32" and replica.identity["dtype"] == "float32" else _ROUNDED


def _same_template(recorded: Recorded, replica: Replica) -> bool:
    own, theirs = replica.identity["chat_template_sha256"], recorded.trace.model.chat_template_sha256
    return own is None or theirs is None or own == theirs
