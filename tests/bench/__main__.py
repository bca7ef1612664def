"""``make bench``: measure, print a table, write ``results.json``.

``python -m tests.bench [PART ...]``; all of them if none is named. Rows are written as they are
measured, so a stopped benchmark keeps what it has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.table import Table

from tests.bench import (
    ablation,
    accuracy,
    attention,
    attribution,
    decomposition,
    faithfulness,
    local,
    patching,
    probes,
    serving,
)
from tests.bench.report import Row, save

PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "serving": serving.measure,
    "local": local.measure,
    "attribution": attribution.measure,
    "attention": attention.measure,
    "decomposition": decomposition.measure,
    "ablation": ablation.measure,
    "patching": patching.measure,
    "faithfulness": faithfulness.measure,
    "probes": probes.measure,
    "probe_worth": probes.measure_worth,
    "accuracy": accuracy.measure,
}


def main() -> None:
    """Measure the parts that are named."""
    chosen = sys.argv[1:] or list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        sys.exit(f"unknown part {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    console = Console(width=None if sys.stdout.isatty() else 170, highlight=False)
    table = Table(box=None, header_style="bold")
    for name in ("figure", "value", "unit", "goal", "spread", "runs", "verdict"):
        table.add_column(name, justify="right" if name in ("value", "goal", "runs") else "left")
    for part in chosen:
        for row in PARTS[part]():
            save([row])
            console.print(f"{row.name}: {row.value} {row.unit} ({row.verdict})", soft_wrap=True)
            goal = "" if row.goal is None else f"{'<=' if row.better == 'lower' else '>='} {row.goal:g}"
            spread = f"{row.spread[0]:g} - {row.spread[1]:g}"
            table.add_row(row.name, f"{row.value:g}", row.unit, goal, spread, str(row.runs), row.verdict)
    console.print(table)


if __name__ == "__main__":
    main()
