"""Hidden states of statements at their last token, all layers, in one pass over what the statements share.

Layer ``l`` is the output of decoder layer ``l``, counted from 0, before the final norm, as in all of `tracer.replay`;
it equals transformers' ``hidden_states[l + 1]``, but for the last layer, whose entry there comes after the norm.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from tracer.errors import InputError, StoreError, UnknownNameError
from tracer.files import write_atomic
from tracer.replay.forward import CHUNK, Wanted, check_cancel, replay
from tracer.replay.model import Replica, identity_of
from tracer.replay.tree import Ids, build_tree
from tracer.trace.segments import Tokenizer

BATCH_TOKENS = 8192
"""Tokens of statements that form one tree and one file; larger ones share more and make fuller passes."""
SINK_FACTOR = 4.0
"""A hidden state so many times as long as the median one is an attention sink; measured ones are 20 times as long."""
_FORMAT = "tracer-activations-1"
_TENSOR = "hidden_states"

Progress = Callable[[int, int], None]
"""Called with statements done and their total."""


@dataclass(frozen=True, slots=True, eq=False)
class Activations:
    """Hidden states of texts.

    Args:
        values: Outputs of decoder layers before the final norm, ``(statements, layers, width)``.
        layers: Numbers of the layers, counted from 0.
        sink: Which of them are attention sinks, ``(statements, layers)``.
    """

    values: NDArray[np.float32]
    layers: tuple[int, ...]
    sink: NDArray[np.bool_]

    def at(self, layer: int) -> NDArray[np.float32]:
        """Hidden states behind one layer, ``(statements, width)``.

        Raises:
            UnknownNameError: It was not extracted.
        """
        if layer not in self.layers:
            raise UnknownNameError("layer of these activations", str(layer), map(str, self.layers))
        return self.values[:, self.layers.index(layer)]


def extract(
    replica: Replica,
    texts: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    folder: Path | None = None,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> Activations:
    """Hidden states at the last token of each text.

    Texts stand alone, behind what the tokenizer puts before every text. Those that begin alike share the work.

    Args:
        replica: The model; its precision is that of the pass.
        texts: Statements; equal ones are computed once.
        layers: Which layers; all of them if not given.
        batch_tokens: Tokens of texts that are worked on together, at least 1.
        folder: Keeps what is finished, under a name that says model and texts. A run that was stopped goes on from
            there, and a file that was changed since is made again.
        progress: Told statements done and their total.
        cancel: Ends the work between two passes; finished batches are kept.

    Raises:
        InputError: There is no text, one has no token, or the replica has no tokenizer or no such layer.
        PromptTooLongError: A text is longer than the replica's context.
        CancelledError: ``cancel`` was set.
        EngineUnavailableError: Memory ran out.
        StoreError: ``folder`` cannot be written.
    """
    wanted = _layers(replica, layers)
    sequences = tokenise(replica, texts)
    # Neighbours share most; and equal texts fall together.
    order = sorted(range(len(texts)), key=lambda number: tuple(sequences[number]))
    values = np.empty((len(texts), len(wanted), replica.width), dtype=np.float32)
    kept = None if folder is None else _Kept(folder, replica, sequences, wanted, batch_tokens)
    done = 0
    for number, members in enumerate(_batches(order, sequences, batch_tokens)):
        check_cancel(cancel)
        found = None if kept is None else kept.read(number, len(members))
        if found is None:
            found = _pass(replica, [sequences[member] for member in members], wanted, cancel)
            if kept is not None:
                kept.write(number, found)
        values[members] = found.float().numpy()
        done += len(members)
        if progress is not None:
            progress(done, len(texts))
    return Activations(values, wanted, sinks(values))


def tokenise(replica: Replica, texts: Sequence[str]) -> list[Ids]:
    """Token ids of texts that stand alone, each ``(tokens,)``.

    Raises:
        InputError: There is no text, one has no token, or the replica has no tokenizer.
    """
    tokenizer = tokenizer_of(replica)
    if not texts:
        raise InputError("there is no statement to extract hidden states of")
    start = list(tokenizer.start_token_ids)
    found: list[Ids] = []
    for number, text in enumerate(texts):
        own = tokenizer.encode(text).token_ids
        if not own:
            raise InputError(f"statement {number + 1} is empty; leave it out")
        found.append(np.asarray([*start, *own], dtype=np.int64))
    return found


def tokenizer_of(replica: Replica) -> Tokenizer:
    """The replica's tokenizer.

    Raises:
        InputError: It has none.
    """
    if replica.tokenizer is None:
        raise InputError("the replica has no tokenizer, so texts cannot be read; load it by its model's name")
    return replica.tokenizer


def sinks(values: NDArray[np.float32], medians: NDArray[np.float32] | None = None) -> NDArray[np.bool_]:
    """Which hidden states are attention sinks: far longer than others of their layer.

    Some tokens, often a full stop early in a text, serve as a resting place for attention. What they hold is the same
    large vector whatever the text says (Xiao et al. 2023, arXiv:2309.17453; Sun et al. 2024, arXiv:2402.17762).

    Args:
        values: ``(texts, layers, width)``.
        medians: Median norm of ordinary ones in each layer, ``(layers,)``; those of ``values`` if not given.

    Returns:
        ``(texts, layers)``.
    """
    norms = np.linalg.norm(values, axis=-1)
    usual = np.median(norms, axis=0) if medians is None else medians
    found: NDArray[np.bool_] = norms > SINK_FACTOR * usual
    return found


def _layers(replica: Replica, layers: Sequence[int] | None) -> tuple[int, ...]:
    count = len(replica.layers)
    if layers is None:
        return tuple(range(count))
    if not layers or len(set(layers)) != len(layers) or not all(0 <= layer < count for layer in layers):
        raise InputError(f"layers must be different numbers from 0 to {count - 1}, found {list(layers)}")
    return tuple(layers)


def _batches(order: Sequence[int], sequences: Sequence[Ids], batch_tokens: int) -> Iterator[list[int]]:
    members: list[int] = []
    tokens = 0
    for number in order:
        if members and tokens + len(sequences[number]) > batch_tokens:
            yield members
            members, tokens = [], 0
        members.append(number)
        tokens += len(sequences[number])
    yield members


def _pass(
    replica: Replica, sequences: Sequence[Ids], layers: tuple[int, ...], cancel: threading.Event | None
) -> torch.Tensor:
    """Hidden states at the ends of sequences, ``(sequences, layers, width)``, in the replica's precision."""
    tree = build_tree(sequences, longest=CHUNK)
    ends = np.asarray([places[-1] for places in tree.sequences])
    found = replay(replica, tree, Wanted(hidden_indices=ends, hidden_layers=layers), cancel=cancel)
    return found.hidden.transpose(0, 1).contiguous()


class _Kept:
    """Finished batches of one extraction, a safetensors file each."""

    def __init__(
        self, folder: Path, replica: Replica, sequences: Sequence[Ids], layers: tuple[int, ...], batch_tokens: int
    ) -> None:
        digest = hashlib.sha256()
        about = [_FORMAT, model_sha256(replica), layers, batch_tokens, len(sequences)]
        digest.update(json.dumps(about).encode())
        for sequence in sequences:
            digest.update(len(sequence).to_bytes(8, "little") + sequence.astype("<i8").tobytes())
        self._key = digest.hexdigest()
        self._folder = folder / self._key[:32]
        self._shape = (len(layers), replica.width)
        self._dtype = replica.dtype

    def read(self, number: int, rows: int) -> torch.Tensor | None:
        """A batch ``(rows, layers, width)``, or ``None`` where it is missing or not what was written."""
        path = self._path(number)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                values = cast("torch.Tensor", file.get_tensor(_TENSOR))
        except (OSError, SafetensorError):
            return None
        same = metadata.get("key") == self._key and metadata.get("batch") == str(number)
        if not same or values.shape != (rows, *self._shape) or values.dtype != self._dtype:
            return None
        return values if metadata.get("sha256") == _sha256(values) else None

    def write(self, number: int, values: torch.Tensor) -> None:
        """Keep a batch; its file appears whole or not at all."""
        metadata = {"format": _FORMAT, "key": self._key, "batch": str(number), "sha256": _sha256(values)}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self._path(number), save({_TENSOR: values}, metadata=metadata))
        except OSError as error:
            raise StoreError(f"cannot keep activations in {self._folder}: {error.strerror or error}") from None

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:05d}.safetensors"


def model_sha256(replica: Replica) -> str:
    """SHA-256 of a replica's weights, tokenizer and precision: what the hidden states of a text depend on."""
    own = identity_of(replica)
    about = [own[name] for name in ("weights_sha256", "tokenizer_sha256", "dtype")]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _sha256(values: torch.Tensor) -> str:
    return hashlib.sha256(values.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
