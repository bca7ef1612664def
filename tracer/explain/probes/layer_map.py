"""Truth by layer and token: a probe for every layer, read at every token of a step.

A saved probe reads one layer, the best on statements. A map of all layers shows whether what it says comes up early or
late, and at which words; each row carries what its own layer's probe is worth.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np

from tracer.errors import TraceNotFoundError
from tracer.explain.probes.examples import Examples, Floats, Normalisation, normalise
from tracer.explain.probes.fit import fit
from tracer.explain.probes.held_out import CHOICE, Material, Watch, by_what, topic_folds
from tracer.explain.probes.metrics import auroc
from tracer.explain.probes.probe import Probe
from tracer.explain.probes.train import FACTS_PER_TOPIC
from tracer.explain.probes.workbench import Workbench
from tracer.explain.report import Stage
from tracer.replay.forward import Wanted, replay
from tracer.replay.model import Replica, identity_of
from tracer.replay.parity import check_identity, compare, refuse
from tracer.replay.recorded import Recorded, Target
from tracer.trace.layer_map import LAYER_MAP, LayerMap

if TYPE_CHECKING:
    from tracer.store import Store
    from tracer.trace.trace import Trace

MOST_TOKENS = 512
"""Tokens of a step that are read; of a longer one, the last."""
_DECIMALS = 3


@dataclass(frozen=True, slots=True, eq=False)
class LayerProbes:
    """A probe for each layer of a model.

    Args:
        kind: How they were fitted.
        layers: Their layers, rising.
        probes: In the order of the layers, in units of the spread of their training scores.
        held_out: AUROC of each on topics that had no part in it.
        protocol: How that was measured.
        normalisation: What is done to hidden states first.
    """

    kind: str
    layers: tuple[int, ...]
    probes: tuple[Probe, ...]
    held_out: tuple[float, ...]
    protocol: str
    normalisation: Normalisation


def fit_layers(
    material: Material,
    *,
    kind: str = CHOICE,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    cancel: threading.Event | None = None,
) -> LayerProbes:
    """Fit a probe at every layer on all statements, and judge each with groups of topics left out.

    Args:
        material: Statements with hidden states.
        kind: What kind of probe.
        seed: For everything drawn at random.
        progress: Told fits done and their total.
        cancel: Ends the work between two fits.

    Raises:
        InputError: There are too few topics and entities, or the kind does not fit the statements.
        UnknownNameError: There is no such kind.
        CancelledError: ``cancel`` was set.
    """
    material, left = by_what(material, seed=seed)
    folds = topic_folds(len(material.topics), seed=seed)
    watch = Watch(progress, cancel, len(material.layers) * (len(folds) + 1))
    probes: list[Probe] = []
    areas: list[float] = []
    for layer in material.layers:
        examples = material.at(layer)
        areas.append(_held_out(examples, folds, kind, seed, watch))
        watch.step()
        probes.append(fit(kind, examples, seed=seed).rescaled(examples.values))
    protocol = f"AUROC over statements, each {left} judged by probes of others; {len(folds)} groups left out in turn"
    return LayerProbes(kind, material.layers, tuple(probes), tuple(areas), protocol, material.normalisation)


def _held_out(examples: Examples, folds: Sequence[np.ndarray], kind: str, seed: int, watch: Watch) -> float:
    """Mean over topics of the AUROC of probes that learnt from the topics of other folds."""
    found: list[float] = []
    for fold in folds:
        watch.step()
        test = np.isin(examples.topics, fold)
        probe = fit(kind, examples.take(np.flatnonzero(~test)), seed=seed)
        for topic in fold:
            rows = np.flatnonzero(examples.topics == topic)
            area = auroc(probe.score(examples.values[rows]), examples.labels[rows])
            found += [] if area is None else [area]
    return float(np.mean(found))


def map_layers(
    recorded: Recorded,
    replica: Replica,
    probes: LayerProbes,
    targets: Sequence[Target],
    *,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
    cancel: threading.Event | None = None,
) -> list[LayerMap]:
    """Read every layer at every token of some steps, in one replay of the trace.

    Args:
        recorded: The trace.
        replica: The model that wrote it, whose statements the probes learnt from.
        probes: One for each layer.
        targets: The steps.
        force: Whether to go on where the replica does not reproduce the recorded log-probabilities.
        progress: Told tokens done and their total.
        cancel: Ends the replay between two chunks.

    Raises:
        InputError: The replica is another model.
        ModelError: Its log-probabilities are not the recorded ones, and nobody insists.
        CancelledError: ``cancel`` was set.
        EngineUnavailableError: Memory ran out.
    """
    check_identity(recorded, replica)
    ranges = [range(max(target.start, target.end - MOST_TOKENS), target.end) for target in targets]
    sequences = recorded.tree.sequences
    indices = [int(sequences[target.sequence][at]) for target, own in zip(targets, ranges, strict=True) for at in own]
    wanted = Wanted(recorded.scored, np.array(indices, dtype=np.int64), probes.layers)
    replayed = replay(replica, recorded.tree, wanted, progress=progress, cancel=cancel)
    parity = compare(recorded, replayed, replica)
    if not force:
        refuse(parity, recorded, replica)
    scores = np.stack(
        [
            probe.score(normalise(replayed.hidden[number].float().numpy(), probes.normalisation))
            for number, probe in enumerate(probes.probes)
        ]
    )
    found: list[LayerMap] = []
    done = 0
    for target, own in zip(targets, ranges, strict=True):
        sequence = recorded.sequences[target.sequence]
        found.append(
            LayerMap(
                step_id=target.step_id,
                call_id=sequence.call.id,
                completion=sequence.completion,
                start=own.start - sequence.prompt,
                kind=probes.kind,
                layers=list(probes.layers),
                values=_rounded(scores[:, done : done + len(own)]),
                held_out=[round(area, _DECIMALS) for area in probes.held_out],
                protocol=probes.protocol,
                replica=dict(identity_of(replica)),
                parity=parity.to_document(),
                created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            )
        )
        done += len(own)
    return found


def map_trace(
    trace: Trace,
    bench: Workbench,
    *,
    steps: str | Sequence[str] = "answer",
    store: Store | None = None,
    force: bool = False,
) -> list[LayerMap]:
    """Fit a probe for every layer of a model, read a trace with them, and keep what they say.

    Args:
        trace: The trace; one with token ids.
        bench: The model and its statements.
        steps: ``answer``, ``all`` or ids.
        store: Where the maps are kept, if the trace is in it.
        force: Whether to go on where the replica does not reproduce the recorded log-probabilities.

    Raises:
        InputError: A step is not there or has no tokens, or the model is another one.
        ModelError: The model's log-probabilities are not the recorded ones, and nobody insists.
        CancelledError: Somebody stopped it; hidden states that were extracted are kept.
        EngineUnavailableError: Memory ran out.
        StoreError: The maps cannot be kept.
    """
    recorded = Recorded(trace)
    if steps == "answer":
        targets: Sequence[Target] = recorded.answer()
    elif steps == "all":
        targets = recorded.targets
    else:
        targets = [recorded.target(step) for step in ([steps] if isinstance(steps, str) else steps)]

    def counted(stage: str) -> Callable[[int, int], None] | None:
        told = bench.progress
        return None if told is None else lambda done, total: told(Stage(stage, done, total))

    # Before anything is fitted: what cannot be read shall fail at once.
    check_identity(recorded, bench.replica)
    probes = fit_layers(
        bench.material(FACTS_PER_TOPIC),
        seed=bench.seed,
        progress=counted("fitting probes"),
        cancel=bench.cancel,
    )
    told = counted("reading hidden states")
    found = map_layers(recorded, bench.replica, probes, targets, force=force, progress=told, cancel=bench.cancel)
    if store is not None and _is_in(store, trace):
        documents = {f"{LAYER_MAP} {own.step_id}": own.model_dump(mode="json") for own in found}
        store.put_documents(trace.id, "probe", documents)
    return found


def _is_in(store: Store, trace: Trace) -> bool:
    try:
        return store.resolve(trace.id) == trace.id
    except TraceNotFoundError:
        return False


def _rounded(values: Floats) -> list[list[float]]:
    rows: list[list[float]] = values.round(_DECIMALS).tolist()
    return rows
