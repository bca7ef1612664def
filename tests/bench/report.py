"""Rows of the benchmark: a table on the screen, and ``results.json`` beside this module, which is committed."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

RESULTS = Path(__file__).with_name("results.json")


@dataclass(frozen=True, slots=True)
class Row:
    """One measured figure.

    Args:
        name: What was measured.
        value: The median of the runs.
        goal: What it must reach; ``None`` for a figure that is only reported.
        better: Which way is better.
        unit: Unit of the value.
        spread: Smallest and largest of the runs, or another interval that ``note`` names.
        runs: Number of runs.
        note: How it was measured, where the name does not say it.
    """

    name: str
    value: float
    goal: float | None
    better: Literal["lower", "higher"]
    unit: str
    spread: tuple[float, float]
    runs: int
    note: str = ""

    @property
    def verdict(self) -> str:
        """Whether the goal is reached."""
        if self.goal is None:
            return "reported"
        reached = self.value <= self.goal if self.better == "lower" else self.value >= self.goal
        return "reached" if reached else "MISSED"


def median_row(
    name: str,
    values: Sequence[float],
    *,
    goal: float | None,
    unit: str,
    better: Literal["lower", "higher"] = "lower",
    note: str = "",
) -> Row:
    """A row from the values of several runs."""
    return Row(
        name,
        round(statistics.median(values), 4),
        goal,
        better,
        unit,
        (round(min(values), 4), round(max(values), 4)),
        len(values),
        note,
    )


def agreement_row(what: str, distance: float, goal: float, *, note: str) -> Row:
    """A row about how far two computations of the same numbers are apart, relative to the largest of them."""
    name = f"{what}: largest difference over largest value"
    return Row(name, float(f"{distance:.3g}"), goal, "lower", "relative", (distance, distance), 1, note)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def save(rows: Sequence[Row]) -> None:
    """Put rows into the file; a row of the same name is replaced, all others stay."""
    old: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"results": []}
    kept = {row["name"]: row for row in old["results"]}
    for row in rows:
        kept[row.name] = {**asdict(row), "measured_at": f"{datetime.now(UTC):%Y-%m-%d}"}
    content = {"machine": machine(), "results": list(kept.values())}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
