"""What an evaluation found, as plain tables: for the terminal, a note or a page."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tracer.explain.probes.saved import ProbeRecord
from tracer.trace.probe_report import (
    Estimate,
    Evaluation,
    FirstErrors,
    FirstErrorTask,
    Measured,
    MethodResult,
    ProbeReport,
    StepEvaluation,
    StepWorth,
    Transfer,
)
from tracer.trace.probes import NOT_BETTER, NOT_MEASURED, SENTENCES

_LAYERS_SHOWN = 24


@dataclass(frozen=True, slots=True)
class Table:
    """Cells to be shown in columns.

    Args:
        title: What it is about.
        columns: Names of the columns; all but the first are numbers.
        rows: Cells, as many in each row as there are columns.
        notes: Sentences to be shown below.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def report_tables(found: ProbeReport) -> list[Table]:
    """All sections of an evaluation."""
    tables = [] if found.statements is None else evaluation_tables(found.statements)
    tables += [] if found.steps is None else step_tables(found.steps)
    return tables + ([] if found.mistakes is None else first_error_tables(found.mistakes))


def probe_tables(record: ProbeRecord) -> list[Table]:
    """What a saved probe is worth: on what it was made for, and on steps that the model wrote itself."""
    held, worth, learnt = record.held_out, record.on_steps, record.training
    notes = [
        held.protocol,
        f"expected calibration error {percent(record.calibration.reliability.ece)}%, on what the calibration has not "
        "seen",
        *(str(note) for name, note in record.notes.items() if name == "sign"),
        *([SENTENCES[NOT_MEASURED]] if worth is None else []),
    ]
    rows = [_measured_row(item) for item in (held.overall, *held.parts, *held.baselines, *held.controls)]
    found = Table(
        f"Probe of {record.name}, {record.kind}, for {record.model.get('name')}: layer {record.layer}, "
        f"{record.position} token, {learnt.rows} rows of {len(learnt.topics)} topics",
        ("held out", "accuracy % [95%]", "AUROC [95%]", "rows"),
        tuple(rows),
        tuple(notes),
    )
    return [found] if worth is None else [found, _worth_table(worth)]


def evaluation_tables(found: Evaluation) -> list[Table]:
    """Methods beside their controls, methods by topic, methods by layer, and calibration."""
    tables = [_methods(found), _topics(found)]
    if found.by_layer:
        tables.append(_layers(found))
    return [*tables, _calibration(found)]


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


def _worth_table(worth: StepWorth) -> Table:
    beside = (worth.probe, *worth.baselines, worth.stack, worth.with_probe)
    notes = [
        worth.protocol,
        f"AUROC over the best log-probability {interval(worth.over_logprob)}, added to the stack "
        f"{interval(worth.adds)}",
    ]
    return Table(
        f"On steps that the model wrote itself: {worth.rows}, {worth.wrong} of them wrong",
        ("by", "accuracy % [95%]", "AUROC [95%]", "rows"),
        tuple(_measured_row(item) for item in beside),
        tuple(notes if worth.beats_logprob else [*notes, SENTENCES[NOT_BETTER]]),
    )


def _measured_row(item: Measured) -> tuple[str, ...]:
    return item.name, interval(item.accuracy, shares=True), interval(item.auroc), str(item.rows)


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


def percent(value: float | None) -> str:
    """A share in per cent; a dash where it is unknown."""
    return "-" if value is None else f"{100 * value:.1f}"


def interval(estimate: Estimate | None, *, shares: bool = False) -> str:
    """A number and its 95% interval, in per cent if ``shares``; a dash where it is unknown."""
    if estimate is None:
        return "-"
    if shares:
        return f"{percent(estimate.value)} [{percent(estimate.low)}, {percent(estimate.high)}]"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _methods(found: Evaluation) -> Table:
    def row(result: MethodResult) -> tuple[str, ...]:
        return (
            result.name,
            interval(result.accuracy, shares=True),
            percent(result.accuracy_sd),
            interval(result.auroc),
            percent(result.affirmative),
            percent(result.negated),
        )

    return Table(
        f"Truth probes on {found.model or 'a model'}: each {found.left_out} left out in turn, {found.repeats} repeats",
        ("method", "accuracy % [95%]", "sd", "AUROC [95%]", "affirmative %", "negated %"),
        tuple(row(result) for result in (*found.methods, *found.controls)),
        (
            f"{found.statements} statements, {len(found.topics)} topics; normalisation {found.normalisation}; layer "
            f"{found.layer_choice}, over all topics {found.chosen_layer}; sd over repeats, intervals over entities",
            *(
                (f"{found.sinks} of the hidden states at layer {found.chosen_layer} are attention sinks",)
                if found.sinks
                else ()
            ),
            *found.notes,
            *_warnings(found),
        ),
    )


def _warnings(found: Evaluation) -> tuple[str, ...]:
    """Methods that are not shown to know anything."""
    none = [item.name for item in found.methods if item.auroc is None or item.auroc.low <= 0.5]
    if not none:
        return ()
    return (f"not shown to be better than chance on a {found.left_out} they have not seen: {', '.join(none)}",)


def _topics(found: Evaluation) -> Table:
    return Table(
        f"Accuracy % (AUROC) by the {found.left_out} that was left out",
        (found.left_out, "layer", *(item.name for item in found.methods)),
        tuple(
            (
                topic,
                str(found.methods[0].topics[number].layer),
                *(
                    f"{percent(item.topics[number].accuracy)} ({_plain(item.topics[number].auroc)})"
                    for item in found.methods
                ),
            )
            for number, topic in enumerate(found.topics)
        ),
    )


def _layers(found: Evaluation) -> Table:
    methods = tuple(dict.fromkeys(item.method for item in found.by_layer))
    cells = {(item.layer, item.method): item for item in found.by_layer}
    layers = tuple(dict.fromkeys(item.layer for item in found.by_layer))
    step = -(-len(layers) // _LAYERS_SHOWN)
    return Table(
        "Accuracy % [95%] (AUROC) by layer",
        ("layer", *methods),
        tuple(
            (
                str(layer),
                *(
                    f"{interval(cells[layer, name].accuracy, shares=True)} ({_plain(cells[layer, name].auroc.value)})"
                    for name in methods
                ),
            )
            for layer in layers[::step]
        ),
        ("looked at all topics: a layer that is picked from this table is picked on test data",),
    )


def _calibration(found: Evaluation) -> Table:
    return Table(
        f"Calibration on a {found.left_out} that had no part in it",
        ("method", "expected calibration error %", "bins: predicted % / true %"),
        tuple(
            (
                item.method,
                percent(item.reliability.ece),
                "  ".join(f"{100 * one.predicted:.0f}/{100 * one.share:.0f}" for one in item.reliability.bins),
            )
            for item in found.pictures
        ),
    )


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
