"""The step map: the steps of a run as a list, with what the selected one read."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tracer.trace.trace import Step, Trace
from ui import palette
from ui.components.mount import component, mount, tell
from ui.evidence import Evidence, Part, mean_logprob

OPEN = "open"
"""The component's event: the number of the row that was clicked."""
FIND = "find"
"""The component's event: words to look for in whole texts, since the lines that it has may be shortened."""
LINE = 160
"""Characters of a line at most."""
BUDGET = 140_000
"""Bytes of all lines together, as they are sent."""
READINGS = 12_000
"""Sources of all steps together."""
PARTS_SHOWN = 8
"""Parts of the prompt that are shown unfolded."""
_KINDS = (*palette.KINDS, *palette.PARTS, "")
_MAP = component("step_map")


class Row(NamedTuple):
    """A line of the map: a step, or a part of the prompt."""

    step: Step | None
    part: Part | None
    number: int
    """The step's number in the trace, or the part's."""
    text: str
    """For a part: what it says, or what it is."""

    @property
    def name(self) -> str | int:
        """The step's id or the part's number, as `Evidence.thing` names them."""
        return self.step.id if self.step is not None else self.number


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that are folded together."""

    name: str
    label: str
    folded: bool


def step_map(
    evidence: Evidence,
    rows: Sequence[Row],
    *,
    method: str | None,
    selected: str | int | None,
    key: str,
    query: str,
    on_open: Callable[[], None],
    on_find: Callable[[], None],
) -> None:
    """Draw the map.

    Args:
        evidence: What is known of the trace.
        rows: What to show, in order.
        method: Whose scores to show; ``None`` where the trace was not explained.
        selected: Id of the selected step, or number of the selected part.
        key: The component's key.
        query: Words that were looked for last.
        on_open: Called when a row is clicked; `ui.components.mount.event_value` tells which.
        on_find: Called when words are looked for, if any line is shortened; `event_value` tells which.
    """
    events = {OPEN: on_open, FIND: on_find}
    mount(_MAP, {"channel": key, **map_data(evidence, rows, method=method)}, key=key, on_event=events)
    chosen = next((number for number, row in enumerate(rows) if row.name == selected), -1)
    # Apart, so that a click does not send the list again; tells the rows, too, since their numbers depend on them.
    news = {"select": chosen, "of": len(rows), "first": str(rows[0].name) if rows else ""}
    tell(key, {**news, "query": query, "hits": matches(rows, query)})


def map_data(evidence: Evidence, rows: Sequence[Row], *, method: str | None) -> dict[str, Any]:
    """What is sent to the browser."""
    groups, group_of = _groups(evidence.trace, rows)
    places = {row.name: number for number, row in enumerate(rows)}
    limit = max(24, min(LINE, BUDGET // max(1, len(rows))))
    texts = [line(row.text, limit=limit) for row in rows]
    read = None if method is None else evidence.explanation(method)
    fallback = None if method is None else evidence.default_target(method)
    return {
        "run": evidence.trace.id,
        "looks": [palette.source_look(kind)._asdict() for kind in _KINDS],
        "scale": palette.scale_properties(),
        "kind": [_kind_number(row) for row in rows],
        "number": [str(row.number) if row.step is not None else "" for row in rows],
        "text": texts,
        "shortened": any(len(row.text) > len(text) for row, text in zip(rows, texts, strict=True)),
        "depth": [_depth(evidence.trace, row) for row in rows],
        "pruned": [number for number, row in enumerate(rows) if row.step is not None and row.step.pruned],
        "group": group_of,
        "groups": [{"name": group.name, "label": group.label, "folded": group.folded} for group in groups],
        "truth": [_truth(evidence, row) for row in rows],
        "logprob": [_logprob(evidence, row) for row in rows],
        "reads": "" if method is None else _readings(evidence, method, places),
        "signed": read is not None and read.signed,
        "method": "" if read is None else line(f"{read.method}, {read.unit}", limit=80),
        "fallback": places.get(fallback, -1) if fallback is not None else -1,
    }


def matches(rows: Sequence[Row], query: str) -> list[int]:
    """Numbers of the rows whose whole text contains the words, in any case; none for no words."""
    wanted = " ".join(query.split()).lower()
    return [at for at, row in enumerate(rows) if wanted in " ".join(row.text.split()).lower()] if wanted else []


def line(text: str, *, limit: int) -> str:
    """The text on one line, cut where it would take more than ``limit`` bytes to send."""
    found: list[str] = []
    left = limit
    for character in " ".join(text[: 4 * limit].split()):
        # JSON sends others as escapes of six bytes, two of them beyond the basic plane.
        left -= 1 if character.isascii() else 6 if character < "\U00010000" else 12
        if left < 0:
            return "".join(found).rstrip() + "…"
        found.append(character)
    return "".join(found)


def _kind_number(row: Row) -> int:
    kind = row.step.kind if row.step is not None else row.part.kind if row.part is not None else ""
    return _KINDS.index(kind) if kind in _KINDS else _KINDS.index("")


def _depth(trace: Trace, row: Row) -> int:
    if trace.agent.kind != "tot" or row.step is None or not row.step.branch:
        return 0
    return min(8, row.step.branch.count("."))


def _truth(evidence: Evidence, row: Row) -> list[int] | None:
    scores = [] if row.step is None else evidence.truth(row.step.id)
    for score in scores:
        if score.probability is not None and score.low is not None and score.high is not None:
            return [round(100 * value) for value in (score.probability, score.low, score.high)]
    return None


def _logprob(evidence: Evidence, row: Row) -> float | None:
    mean = None if row.step is None else mean_logprob(evidence.logprobs(row.step))
    return None if mean is None else round(mean, 2)


def _readings(evidence: Evidence, method: str, places: Mapping[str | int, int]) -> str:
    """For every target: its row, how many sources follow, and their rows with values from -127 to 127; base64."""
    top = max(6, min(32, READINGS // max(1, len(evidence.targets(method)))))
    packed = bytearray()
    for target, found in evidence.influences(method, rows=places, top=top).items():
        pairs = [(row, round(127 * value)) for row, value in found if round(127 * value)]
        packed += struct.pack("<IB", target, len(pairs))
        for row, value in pairs:
            packed += struct.pack("<Ib", row, value)
    return base64.b64encode(packed).decode()


def _groups(trace: Trace, rows: Sequence[Row]) -> tuple[list[Group], list[int]]:
    """Runs of rows that fold: the prompt, the chains of CoT-SC, the paths that a tree gave up."""
    chains = {step.branch for step in trace.steps if step.branch is not None}
    fold_branches = trace.agent.kind != "tot" and len(chains) > 1
    groups: list[Group] = []
    group_of: list[int] = []
    before: str | None = None
    for number, row in enumerate(rows):
        name = _group_name(row, fold_branches=fold_branches)
        if name is not None and name != before:
            run = _run(rows, number, fold_branches=fold_branches)
            groups.append(_group(f"{name} {number if row.step is not None else ''}", run))
        group_of.append(len(groups) - 1 if name is not None else -1)
        before = name
    return groups, group_of


def _group_name(row: Row, *, fold_branches: bool) -> str | None:
    if row.step is None:
        return "prompt"
    if row.step.pruned:
        return "pruned"
    return f"branch {row.step.branch}" if fold_branches and row.step.branch is not None else None


def _run(rows: Sequence[Row], start: int, *, fold_branches: bool) -> Sequence[Row]:
    name = _group_name(rows[start], fold_branches=fold_branches)
    end = start
    while end < len(rows) and _group_name(rows[end], fold_branches=fold_branches) == name:
        end += 1
    return rows[start:end]


def _group(name: str, run: Sequence[Row]) -> Group:
    first = run[0].step
    count = f"{len(run)} {'step' if len(run) == 1 else 'steps'}"
    if first is None:
        parts = "1 part" if len(run) == 1 else f"{len(run)} parts"
        return Group(name, f"Prompt: {parts}", folded=len(run) > PARTS_SHOWN)
    if first.pruned:
        which = f"step {run[0].number}" if len(run) == 1 else f"steps {run[0].number} to {run[-1].number}"
        said = f", {line(run[0].text, limit=60)}" if len(run) == 1 else ""
        return Group(name, f"Given up: {which}{said}", folded=True)
    last = run[-1].step
    answer = last.data.get("value", last.text) if last is not None and last.kind == "answer" else None
    vote = "no answer" if answer is None else f"votes {line(str(answer), limit=60)}"
    return Group(name, f"Branch {line(first.branch or '', limit=40)}: {count}, {vote}", folded=True)
