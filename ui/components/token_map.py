"""The token map: every token of a prompt and a completion, and what the target's tokens read of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tracer.trace.trace import Trace
from ui import palette
from ui.components.mount import component, mount, tell
from ui.state import Grain
from ui.token_scores import Run, Span, Target, Written, pack, runs

PIN = "pin"
"""The component's event: first token and one past the last of what was pinned."""
_KINDS = (*palette.KINDS, *palette.PARTS, "")
_MAP = component("token_map")


def token_map(
    trace: Trace,
    item: Written,
    *,
    texts: Sequence[str],
    found: Sequence[Target],
    signed: bool,
    grain: Grain,
    span: Span | None,
    key: str,
    on_pin: Callable[[], None],
) -> None:
    """Draw the map.

    Args:
        trace: The trace.
        item: Prompt and completion.
        texts: One for each of its tokens.
        found: Targets in it.
        signed: Whether scores below zero speak against the target.
        grain: What tokens are taken together as.
        span: The tokens that were pinned; all their sources are sent.
        key: The component's key.
        on_pin: Called when tokens are pinned; `ui.components.mount.event_value` tells which.
    """
    data = map_data(trace, item, texts=texts, found=found, signed=signed)
    # Tells pinned tokens of another call or method apart, whose numbers would fit here as well.
    of = hashlib.blake2b(f"{item.call.id} {item.completion} {data['rows']}".encode(), digest_size=8).hexdigest()
    mount(_MAP, {"channel": key, "of": of, **data}, key=key, on_event={PIN: on_pin})
    tell(key, {"of": of, "grain": grain, "pin": _pin(span)})


def map_data(
    trace: Trace, item: Written, *, texts: Sequence[str], found: Sequence[Target], signed: bool
) -> dict[str, Any]:
    """What is sent to the browser, apart from what is pinned."""
    numbers = {step.id: number for number, step in enumerate(trace.steps, 1)}
    completion = item.call.completions[item.completion]
    return {
        "looks": [palette.source_look(kind)._asdict() for kind in _KINDS],
        "scale": {**palette.scale_properties(), "tint": f"{100 * palette.TINT:.0f}%"},
        "texts": list(texts),
        "prompt": item.prompt,
        "logprobs": [round(value, 3) for value in completion.logprobs],
        "runs": [_run(item, run, numbers) for run in runs(trace, item)],
        "rows": pack(found),
        "signed": signed,
    }


def _run(item: Written, run: Run, numbers: Mapping[str, int]) -> list[object]:
    kind = _KINDS.index(run.kind) if run.kind in _KINDS else _KINDS.index("")
    number = numbers.get(run.step_id or "")
    section = "written" if run.start >= item.prompt else "tool" if run.kind == "observation" else "prompt"
    place = {"written": "written in this call", "tool": "tool output", "prompt": "in the prompt"}[section]
    where = place if number is None else f"step {number}, {place}"
    return [run.start, run.end, kind, where, section]


def _pin(span: Span | None) -> dict[str, Any] | None:
    if span is None or not span.members:
        return None
    start, end = span.bounds
    return {"asked": [span.start, span.end], "start": start, "end": end, "values": span.packed()}
