"""What probes are worth on reasoning: transfer to steps, and where chains first go wrong; with tables of both."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tracer.explain.probes.examples import Floats, normalise
from tracer.explain.probes.fit import fit
from tracer.explain.probes.held_out import Material
from tracer.explain.probes.places import Position
from tracer.explain.probes.probe import Probe
from tracer.explain.probes.step_chains import perturbed
from tracer.explain.probes.step_features import step_features
from tracer.explain.probes.step_probe import ON_POLICY, TEST_PROBLEMS, Progress, held_out_chains, own_steps
from tracer.explain.probes.tables import Table, interval
from tracer.explain.probes.transfer import Reader, transfer
from tracer.replay.model import Replica
from tracer.trace.probe_report import FirstErrors, FirstErrorTask, Measured, StepEvaluation, StepWorth, Transfer

MADE_UP = "right steps and the same with a made-up wrong result"


def statement_readers(
    material: Material, kinds: Sequence[str], layer: int, *, position: Position = "last", seed: int = 0
) -> list[Reader]:
    """Probes of several kinds fitted on all statements behind one layer, and one in a random direction.

    Raises:
        InputError: The statements lack something that a kind needs.
        UnknownNameError: There is no such kind or layer.
    """
    examples = material.at(layer)
    found: list[Reader] = []
    for kind in kinds:
        probe = fit(kind, examples, seed=seed).rescaled(examples.values)
        found.append(Reader(kind, layer, position, _scorer(probe, material)))
    direction = np.random.default_rng(seed).standard_normal((examples.values.shape[-1],))
    random = Probe("random", direction, 0.0)
    centre = float(np.median(random.score(examples.values)))
    return [*found, Reader("random direction", layer, position, _scorer(replace(random, bias=-centre), material))]


def evaluate_steps(
    replica: Replica,
    readers: Sequence[Reader],
    *,
    problems: int = TEST_PROBLEMS,
    seed: int = 0,
    ask: bool = True,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> StepEvaluation:
    """Judge probes on steps of new problems.

    Args:
        replica: The model.
        readers: The probes.
        problems: How many problems.
        seed: For everything drawn at random.
        ask: Whether to ask the model too whether each step is true.
        progress: Told how far the work is.
        cancel: Ends the work between two passes.

    Raises:
        InputError: The replica has no tokenizer, or there are too few problems.
        CancelledError: ``cancel`` was set.
        EngineUnavailableError: Memory ran out.
    """
    test = held_out_chains(problems, seed=seed)
    layers = sorted({reader.layer for reader in readers})
    own = own_steps(replica, test, layers, ask=ask, progress=progress, cancel=cancel)

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress("reading made-up steps", done, total)

    examples = perturbed(test, seed=seed)
    made_up = step_features(replica, examples, layers=layers, ask=ask, progress=report, cancel=cancel)
    return StepEvaluation(
        own=None if own is None else transfer(own, readers, steps=ON_POLICY, seed=seed),
        made_up=transfer(made_up, readers, steps=MADE_UP, seed=seed),
    )


def step_tables(found: StepEvaluation) -> list[Table]:
    """Probes beside every baseline, on the model's own steps and on made-up ones."""
    tables = [_transfer_table(item) for item in (found.own, found.made_up) if item is not None]
    if found.own is None:
        note = "the model is nearly always right or nearly always wrong on its own steps: nothing to tell apart"
        tables[0] = replace(tables[0], notes=(*tables[0].notes, note))
    return tables


def first_error_tables(found: FirstErrors) -> list[Table]:
    """Where chains first go wrong, task by task."""
    return [_first_error_table(task, found.protocol) for task in found.tasks]


def _transfer_table(found: Transfer) -> Table:
    kinds = ", ".join(f"{name} {wrong} of {count} wrong" for name, (count, wrong) in found.by_operation.items())
    stack = found.probes[0].stack if found.probes else None
    rows = [
        *(_probe_row(worth) for worth in found.probes),
        *(_row(item) for item in found.baselines),
        *([_row(stack)] if stack is not None else []),
    ]
    none = [worth.probe.name for worth in found.probes if not worth.beats_logprob]
    useless = [worth.probe.name for worth in found.probes if not worth.adds_to_stack]
    notes = [f"{found.rows} steps, {found.wrong} of them wrong: {kinds}; intervals over problems"]
    if none:
        notes.append(f"not shown to be better than the log-probability: {', '.join(none)}")
    if useless:
        notes.append(f"not shown to add to the stack of all baselines: {', '.join(useless)}; experimental, no truth")
    columns = ("on steps", "AUROC [95%]", "over log-probability", "added to the stack", "accuracy % [95%]")
    return Table(f"Transfer to reasoning: {found.steps}", columns, tuple(rows), tuple(notes))


def _probe_row(worth: StepWorth) -> tuple[str, ...]:
    return (
        f"probe {worth.probe.name}",
        interval(worth.probe.auroc),
        interval(worth.over_logprob),
        interval(worth.adds),
        interval(worth.probe.accuracy, shares=True),
    )


def _row(item: Measured) -> tuple[str, ...]:
    return item.name, interval(item.auroc), "", "", interval(item.accuracy, shares=True)


def _first_error_table(task: FirstErrorTask, protocol: str) -> Table:
    return Table(
        f"First wrong step, {task.task}: {task.chains} chains, {task.with_mistake} with a mistake",
        ("found by", "right % [95%]", "naming it %", "saying there is none %"),
        tuple(
            (
                item.name,
                interval(item.overall, shares=True),
                interval(item.named, shares=True),
                interval(item.none, shares=True),
            )
            for item in task.methods
        ),
        (protocol,),
    )


def _scorer(probe: Probe, material: Material) -> Callable[[NDArray[np.float32]], Floats]:
    """Scores hidden states as they come from a layer."""
    return lambda values: probe.score(normalise(values, material.normalisation))
