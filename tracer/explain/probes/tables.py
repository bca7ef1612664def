"""What an evaluation found, as plain tables: for the terminal, a note or a page."""

from __future__ import annotations

from dataclasses import dataclass

from tracer.trace.probe_report import Estimate, Evaluation, MethodResult

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


def evaluation_tables(found: Evaluation) -> list[Table]:
    """Methods beside their controls, methods by topic, methods by layer, and calibration."""
    tables = [_methods(found), _topics(found)]
    if found.by_layer:
        tables.append(_layers(found))
    return [*tables, _calibration(found)]


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
