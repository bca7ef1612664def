"""The palette can be read in both themes and without colours."""

from __future__ import annotations

from typing import get_args

import pytest

from tracer.trace import trace as trace_module
from ui import palette


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.2 defines it."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Contrast ratio as WCAG 2.2 defines it."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("kind", [*palette.KINDS, "unknown"])
def test_text_contrast(kind: str, theme: palette.Theme) -> None:
    assert contrast(palette.look(kind).colour(theme), palette.BACKGROUND[theme]) >= 4.5


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_primary_contrast(theme: palette.Theme) -> None:
    assert contrast(palette.PRIMARY[theme], palette.BACKGROUND[theme]) >= 4.5


def test_cues_and_labels_differ_without_colour() -> None:
    looks = [*palette.KINDS.values(), palette.OTHER]
    assert len({look.cue for look in looks}) == len({look.label for look in looks}) == len(looks)


def test_all_kinds_of_the_trace_format_have_a_look() -> None:
    closed = get_args(get_args(trace_module.StepKind)[0])
    assert set(palette.KINDS) == set(closed)


def test_all_statuses_and_agents_have_a_name() -> None:
    assert set(palette.STATUSES) == set(get_args(get_args(trace_module.Status)[0]))
    assert set(palette.AGENTS) == set(get_args(get_args(trace_module.AgentKind)[0]))


def test_hostile_names_never_come_back() -> None:
    text = "![image](http://example.invalid/x.png)"
    shown = palette.kind_name(text) + palette.kind_label(text) + palette.agent_name(text) + palette.status_name(text)
    assert "example" not in shown + palette.status_sentence(text)


def mixed(tint: str, share: float, background: str) -> str:
    """What a tint looks like in front of a background."""
    pairs = [(int(tint[at : at + 2], 16), int(background[at : at + 2], 16)) for at in (1, 3, 5)]
    return "#" + "".join(f"{round(share * one + (1 - share) * other):02x}" for one, other in pairs)


TEXT: dict[palette.Theme, str] = {"light": "#31333f", "dark": "#fafafa"}
"""Streamlit's text colours."""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_signed_colours_can_be_told_from_the_background_and_text_from_them(theme: palette.Theme) -> None:
    scale = palette.SCALES[theme]
    assert contrast(scale.raises, palette.BACKGROUND[theme]) >= 4.5
    assert contrast(scale.lowers, palette.BACKGROUND[theme]) >= 4.5
    for tint in (scale.raises_tint, scale.lowers_tint):
        assert contrast(mixed(tint, palette.TINT, palette.BACKGROUND[theme]), TEXT[theme]) >= 4.5


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("kind", [*palette.PARTS, "unknown"])
def test_parts_of_a_prompt_can_be_read(kind: str, theme: palette.Theme) -> None:
    assert contrast(palette.source_look(kind).colour(theme), palette.BACKGROUND[theme]) >= 4.5


def test_cues_of_parts_are_no_cues_of_steps() -> None:
    cues = [look.cue for look in (*palette.KINDS.values(), *palette.PARTS.values())]
    assert len(set(cues)) == len(cues)
    segments = set(get_args(get_args(trace_module.SegmentKind)[0])) - set(palette.KINDS)
    assert set(palette.PARTS) == segments | {"sink"}
