"""Scoring shortened sequences with an engine in place of the replica, such as a vLLM that serves the same weights.

On a GPU a server works through many short sequences at once; on a CPU the replica with its prefix tree is faster. The
server must be the replica's twin: its tokenizer and precision are compared, and the longest sequence is scored by both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from tracer.engines import models, server
from tracer.engines.base import Engine
from tracer.engines.connect import URL_VARIABLE, connect
from tracer.errors import InputError, ModelError
from tracer.explain.base import Context
from tracer.explain.removal import Backend, ReplicaBackend
from tracer.replay.parity import ABSURD, tolerance
from tracer.replay.tree import Ids

if TYPE_CHECKING:
    from tracer.replay.model import Replica

AT_ONCE = 32
"""Sequences that an engine is given together."""


@dataclass(slots=True)
class EngineBackend:
    """Sends ids to an engine; `tracer.explain.removal.Backend`.

    Args:
        engine: Serves the replica's weights in the replica's precision.
    """

    engine: Engine
    _checked: bool = False

    def logprobs(
        self, context: Context, sequences: Sequence[Ids], positions: Sequence[Ids], written: int
    ) -> NDArray[np.float64]:
        """Log-probabilities of the last ``written`` tokens of each sequence, ``(sequences, written)``.

        Raises:
            InputError: The engine has another tokenizer or precision than the replica, or tokens lie apart.
            ModelError: The engine does not behave like the replica.
            EngineError: The engine failed.
            CancelledError: The context's ``cancel`` was set.
        """
        if any(int(places[-1]) != len(places) - 1 for places in positions):
            raise InputError("an engine reads tokens at consecutive positions; use removal=delete")
        if not self._checked:
            self._check(context, max(sequences, key=len), written)
            self._checked = True
        found = np.empty((len(sequences), written))
        for start in range(0, len(sequences), AT_ONCE):
            batch = [sequence.tolist() for sequence in sequences[start : start + AT_ONCE]]
            found[start : start + AT_ONCE] = self._score(context, batch, written)
            context.inside(start + len(batch), len(sequences))
        return found

    def _score(self, context: Context, batch: Sequence[list[int]], written: int) -> list[list[float]]:
        context.check_cancel()
        prompts = [sequence[: len(sequence) - written] for sequence in batch]
        continuations = [sequence[len(sequence) - written :] for sequence in batch]
        context.cost.forward_tokens += sum(len(sequence) - 1 for sequence in batch)
        return self.engine.score(prompts, continuations, cancel=context.cancel)

    def _check(self, context: Context, sequence: Ids, written: int) -> None:
        """Refuse an engine that is not the replica's twin."""
        _check_identity(self.engine, context.replica)
        own = ReplicaBackend().logprobs(context, [sequence], [np.arange(len(sequence))], written)
        theirs = np.array(self._score(context, [sequence.tolist()], written))
        mean, largest = tolerance(str(context.replica.identity["dtype"]), context.replica)
        # Rounding alone moves what the model finds absurd by more than the tolerance.
        differences = np.abs(own - theirs)[own > ABSURD]
        if len(differences) and (differences.mean() > mean or differences.max() > largest):
            raise ModelError(
                f"the engine does not behave like the replica: log-probabilities differ by {differences.mean():.2g} on "
                f"average and {differences.max():.2g} at most (allowed: {mean:g} and {largest:g}). Serve the same "
                f"weights in the same precision: tracer serve --dtype {context.replica.identity['dtype']}"
            )


def _check_identity(engine: Engine, replica: Replica) -> None:
    name = replica.identity["name"] or "the replica"
    own, theirs = replica.identity["tokenizer_sha256"], engine.info.tokenizer_sha256
    if own and theirs and own != theirs:
        raise InputError(
            f"the engine serves {engine.info.name}, which has another tokenizer than {name}; "
            "serve the replica's model, or use backend=replica"
        )
    if engine.info.dtype not in (None, replica.identity["dtype"]):
        raise InputError(
            f"the engine serves {engine.info.name} in {engine.info.dtype}, the replica is in "
            f"{replica.identity['dtype']}: what removals change is less than the difference; serve it with "
            f"--dtype {replica.identity['dtype']}, or explain with --dtype {engine.info.dtype}"
        )


class Backends:
    """The backends of one piece of work by name, each made when it is first asked for."""

    def __init__(self, context: Context, stack: ExitStack) -> None:
        self._context = context
        self._stack = stack
        self._known: dict[str, Backend] = {"replica": ReplicaBackend()}

    def named(self, method: str, name: JsonValue) -> Backend:
        """The backend of a name.

        Args:
            method: Which method asks.
            name: ``replica``; ``vllm`` for the context's engine, else the server that ``TRACER_ENGINE_URL`` names, a
                running one or a new one; or a server's address.

        Raises:
            InputError: There is no such backend.
            EngineError: There is no such server.
            ModelError: The server's tokenizer is not on this machine.
        """
        if not isinstance(name, str) or not (name in ("replica", "vllm") or name.startswith(("http://", "https://"))):
            raise InputError(f"{method}: backend is {name!r}; use replica, vllm, or the address of a vLLM server")
        if name not in self._known:
            self._known[name] = EngineBackend(self._engine(name))
        return self._known[name]

    def _engine(self, name: str) -> Engine:
        if name == "vllm" and self._context.engine is not None:
            return self._context.engine
        own = self._context.replica.identity
        address = name if name != "vllm" else os.environ.get(URL_VARIABLE) or _running(self._context.replica)
        engine = connect(address) if address else self._start(str(own["name"]), str(own["dtype"]))
        self._stack.callback(engine.close)
        return engine

    def _start(self, name: str, dtype: str) -> Engine:
        """A new server, which takes a while; told about, and given up where somebody stops it."""
        return connect("vllm", model=name, dtype=dtype, progress=self._context.wait)


def _running(replica: Replica) -> str | None:
    """The address of a running server of the replica's model, one in its precision first."""
    own = replica.identity
    if own["name"] is None:
        raise InputError("the replica has no name that a vLLM could serve; give an engine, or a server's address")
    model = models.resolve(own["name"])
    # Another precision is refused by name later: better than a second server beside it.
    state = server.running(model, dtype=own["dtype"]) or server.running(model)
    return None if state is None else state.url


@contextmanager
def backends(context: Context) -> Iterator[Backends]:
    """Backends whose connections end with the block; an engine that the context brought stays open."""
    with ExitStack() as stack:
        yield Backends(context, stack)
