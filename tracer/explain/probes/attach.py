"""Finding the probes of a model, and scoring a trace with them from the replay that is run anyway."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from tracer.errors import InputError, TracerError, UnknownNameError
from tracer.explain.document import Kept, content_sha256
from tracer.explain.probes.asking import Progress, Question, contexts, p_true
from tracer.explain.probes.saved import STATEMENTS, STEPS, SavedProbe, probe_path
from tracer.explain.probes.score import Read, Reading, score_key, score_places
from tracer.replay.forward import Replayed, Wanted
from tracer.replay.model import Replica
from tracer.replay.parity import Parity
from tracer.replay.recorded import Recorded
from tracer.trace.probes import ProbeScore

SUFFIX = ".safetensors"
_NAMES: Mapping[str, tuple[str, ...]] = {
    "truth": (STATEMENTS, STEPS),
    STATEMENTS: (STATEMENTS,),
    STEPS: (STEPS,),
}
"""What can be asked for, and the probes that stand for it."""


@dataclass(frozen=True, slots=True)
class Found:
    """The probes of a model.

    Args:
        probes: Those that are there.
        hint: How to make the others, where nobody insisted on them.
    """

    probes: tuple[SavedProbe, ...]
    hint: str | None = None


def check_names(names: Sequence[str]) -> None:
    """Refuse names that stand for no probe, before weights are loaded.

    Raises:
        UnknownNameError: One stands for none.
        InputError: A file is not there.
    """
    for name in names:
        if name.endswith(SUFFIX):
            if not Path(name).is_file():
                raise InputError(f"there is no probe at {name}; `tracer probe train` makes one")
        elif name not in _NAMES:
            raise UnknownNameError("probe", name, [*_NAMES, f"FILE{SUFFIX}"])


def find_probes(names: Sequence[str] | None, identity: Mapping[str, JsonValue]) -> Found:
    """The saved probes of a model.

    Args:
        names: ``truth``, one of its kinds, or files; ``None`` takes what is there and does not insist.
        identity: Of the replica that they shall read.

    Raises:
        InputError: One that was asked for is missing, or belongs to another model.
        StoreError: A file is damaged.
    """
    found: list[SavedProbe] = []
    for name in ("truth",) if names is None else names:
        files = [Path(name)] if name.endswith(SUFFIX) else [probe_path(identity, own) for own in _NAMES[name]]
        try:
            own = [SavedProbe.load(file, identity=identity) for file in files if file.is_file()]
        except TracerError as error:
            if names is None:
                return Found((), str(error))
            raise
        if not own:
            model = identity.get("name") or "NAME"
            hint = f"there is no truth probe for this model yet; `tracer probe train --model {model}` makes one"
            if names is None:
                return Found((), hint)
            raise InputError(hint)
        found += [probe for probe in own if probe.record.name not in {item.record.name for item in found}]
    return Found(tuple(found))


class Scoring:
    """The scores of a trace that are known, and what has to be read for the others.

    Args:
        recorded: The trace.
        replica: The model.
        probes: Its probes.
        kept: Where scores are kept.
        ask: Whether the model shall be asked about each text too.
    """

    def __init__(
        self, recorded: Recorded, replica: Replica, probes: Sequence[SavedProbe], kept: Kept, *, ask: bool
    ) -> None:
        self._recorded = recorded
        self._replica = replica
        self._kept = kept
        self._ask = ask
        self._probes = tuple(probes)
        content = content_sha256(recorded.trace)
        known = {probe.record.name: self._known(score_key(content, probe)) for probe in self._probes}
        self._lacking = tuple(probe for probe in self._probes if not known[probe.record.name])
        self._reading = Reading.of(recorded, self._lacking, replica.tokenizer) if self._lacking else None

    @property
    def wanted(self) -> Wanted | None:
        """The replay that has to be run, or ``None`` where everything is known."""
        return None if self._reading is None else self._reading.wanted(self._recorded)

    def take(
        self,
        replayed: Replayed,
        *,
        identity: Mapping[str, JsonValue],
        parity: Parity,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> None:
        """Score what was read, and keep it.

        Args:
            replayed: What the replay of `wanted` gave.
            identity: Of the replica.
            parity: How far it is from what was recorded.
            progress: Told questions asked and their total.
            cancel: Ends the asking.

        Raises:
            InputError: The model shall be asked and the replica has no tokenizer.
            CancelledError: ``cancel`` was set.
            EngineUnavailableError: Memory ran out.
            StoreError: The scores cannot be kept.
        """
        if self._reading is None:
            return
        asked = None
        if self._ask:
            before = contexts(self._recorded.trace)
            questions = [Question(before.get(place.step_id, ""), place.text) for place in self._reading.places]
            asked = p_true(self._replica, questions, progress=progress, cancel=cancel).tolist()
        read = Read.of(self._reading, self._recorded, replayed, replica=identity, parity=parity.to_document())
        scores = score_places(self._recorded, self._reading, read, self._lacking, p_true=asked)
        self._kept.put_scores({probe.record.name for probe in self._lacking}, scores)

    @property
    def scores(self) -> tuple[ProbeScore, ...]:
        """The scores of all probes, as they are kept."""
        return tuple(score for probe in self._probes for score in self._kept.scores(probe.record.name))

    def _known(self, key: str) -> bool:
        """Whether all that is asked for is there under a key."""
        own = [score for score in self._kept.scores(None) if score.key == key]
        return bool(own) and (not self._ask or all(score.baselines.p_true is not None for score in own))
