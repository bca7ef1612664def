"""Charts on native Altair: data frames of our own columns in, charts with a description out. Draws nothing.

Text of a trace may be a value of a chart, where it is drawn as text; it is never a name of a field, a parameter or part
of an expression, and no chart has image marks, links or data from elsewhere: ``tests/ui/test_untrusted.py`` checks
that. Colours differ in lightness and shape or dash beside hue.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import altair as alt
import pandas as pd

from ui import palette
from ui.palette import Theme

SERIES: Mapping[Theme, tuple[str, ...]] = MappingProxyType(
    {
        # Okabe and Ito's blue, vermilion, green, purple and grey, shifted until each reaches 3:1.
        "light": ("#00588f", "#c44e00", "#00795a", "#9c3f7a", "#6b6b6b"),
        "dark": ("#6fb7e9", "#f0a35a", "#4fc9a4", "#dd9bdb", "#b0b0b0"),
    }
)
Drawn = alt.LayerChart | alt.FacetChart
HEIGHT = 300
AXIS, LABELS, LEGEND = 52, 112, 44
"""Room for a horizontal axis, for one whose labels are turned, and for a legend; Streamlit counts them as height."""
_ROW, _BAR, _LAYER = 30, 24, 14


def heat_map(frame: pd.DataFrame, *, theme: Theme, low: float, high: float, form: str) -> Drawn:
    """A matrix with its numbers in it; purple below the middle of the scale, orange above.

    Args:
        frame: Columns ``row``, ``column`` and ``value``; empty values are left blank.
        theme: The background.
        low: Value of full purple.
        high: Value of full orange.
        form: How numbers are written, in d3's format; a constant.
    """
    below, middle, above = palette.diverging(theme)
    rows, columns = _order(frame, "row"), _order(frame, "column")
    base = alt.Chart(frame).encode(
        x=alt.X("column:N", sort=columns, title=None, axis=alt.Axis(labelAngle=325, labelLimit=160, orient="top")),
        y=alt.Y("row:N", sort=rows, title=None, axis=alt.Axis(labelLimit=220, labelOverlap=False)),
    )
    colour = alt.Color(
        "value:Q",
        scale=alt.Scale(domain=[low, (low + high) / 2, high], range=[below, middle, above], clamp=True),
        legend=None,
    )
    cells = base.mark_rect().encode(color=colour, tooltip=[alt.Tooltip("value:Q", format=form)])
    frame["strong"] = (frame["value"] - (low + high) / 2).abs() > 0.3 * (high - low)
    strong, faint = ("#ffffff", "#1a1a1a") if theme == "light" else ("#101010", "#f2f2f2")
    numbers = base.mark_text(fontSize=12).encode(
        text=alt.Text("value:Q", format=form),
        color=alt.Color("strong:N", scale=alt.Scale(domain=[True, False], range=[strong, faint]), legend=None),
    )
    chart: Drawn = alt.layer(cells, numbers).resolve_scale(color="independent")
    return chart.properties(height=_ROW * max(len(rows), 1) + LABELS)


def layer_token_map(frame: pd.DataFrame, *, theme: Theme, form: str, widest: float) -> alt.Chart:
    """Layers over tokens: purple where a layer's probe says false, orange where it says true; the deepest on top.

    Args:
        frame: Columns ``layer``, ``token``, which tells tokens apart and is drawn below them, and ``value``.
        theme: The background.
        form: How numbers are written, in d3's format; a constant.
        widest: Absolute value from which on colours are full.
    """
    below, middle, above = palette.diverging(theme)
    columns = _order(frame, "token")
    rows = sorted({int(layer) for layer in frame["layer"]}, reverse=True)
    chart: alt.Chart = (
        alt.Chart(frame)
        .mark_rect()
        .encode(
            x=alt.X(
                "token:N", sort=columns, title=None, axis=alt.Axis(labelAngle=270, labelLimit=110, labelOverlap=True)
            ),
            y=alt.Y("layer:O", sort=rows, title="layer"),
            color=alt.Color(
                "value:Q",
                scale=alt.Scale(domain=[-widest, 0, widest], range=[below, middle, above], clamp=True),
                legend=alt.Legend(orient="right", title="says true"),
            ),
            tooltip=[alt.Tooltip("token:N"), alt.Tooltip("layer:O"), alt.Tooltip("value:Q", format=form)],
        )
        .properties(height=_LAYER * max(len(rows), 8) + LABELS)
    )
    return chart


def lines(
    frame: pd.DataFrame,
    *,
    theme: Theme,
    x: str,
    y: str,
    ticks: float = 0.1,
    band: bool = False,
    rule: float | None = None,
) -> Drawn:
    """Lines with a dash and a mark for each series.

    Args:
        frame: Columns ``x``, ``y`` and ``series``, and ``low`` and ``high`` for a band.
        theme: The background.
        x: Title of the axis; a constant.
        y: Title of the axis; a constant.
        ticks: Least distance of two ticks on the horizontal axis.
        band: Whether intervals are drawn.
        rule: Where a dashed line stands for chance.
    """
    names = _order(frame, "series")
    colour = alt.Color(
        "series:N",
        sort=names,
        scale=alt.Scale(domain=names, range=_colours(names, theme)),
        title=None,
        legend=_legend(),
    )
    base = alt.Chart(frame).encode(
        x=alt.X("x:Q", title=x, axis=alt.Axis(grid=False, tickMinStep=ticks)),
        y=alt.Y("y:Q", title=y, scale=alt.Scale(zero=False)),
        color=colour,
        tooltip=[alt.Tooltip("series:N"), alt.Tooltip("x:Q"), alt.Tooltip("y:Q", format=".3f")],
    )
    layers: list[alt.Chart] = [
        base.mark_line(strokeWidth=2).encode(
            strokeDash=alt.StrokeDash("series:N", sort=names, title=None, legend=_legend())
        )
    ]
    if len(frame) < 200:
        layers.append(
            base.mark_point(size=42, filled=True).encode(
                shape=alt.Shape("series:N", sort=names, title=None, legend=_legend())
            )
        )
    if band:
        layers.insert(0, base.mark_area(opacity=0.18).encode(y=alt.Y("low:Q", title=y), y2=alt.Y2("high:Q")))
    if rule is not None:
        layers.append(_rule(rule, theme))
    chart: Drawn = alt.layer(*layers)
    return chart.properties(height=HEIGHT)


def bars(frame: pd.DataFrame, *, theme: Theme, x: str, rule: float | None = None) -> Drawn:
    """Bars to the right with their intervals, one a name.

    Args:
        frame: Columns ``name``, ``value``, ``low``, ``high`` and ``group``.
        theme: The background.
        x: Title of the axis; a constant.
        rule: Where a dashed line stands for chance.
    """
    names, groups = _order(frame, "name"), _order(frame, "group")
    base = alt.Chart(frame).encode(
        y=alt.Y("name:N", sort=names, title=None, axis=alt.Axis(labelLimit=260, labelOverlap=False))
    )
    drawn = base.mark_bar(height=14, opacity=0.85).encode(
        x=alt.X("value:Q", title=x),
        color=alt.Color(
            "group:N",
            sort=groups,
            scale=alt.Scale(domain=groups, range=_colours(groups, theme)),
            title=None,
            legend=_legend(),
        ),
        tooltip=[alt.Tooltip("name:N"), *(alt.Tooltip(f"{field}:Q", format=".3f") for field in FIELDS)],
    )
    ends = base.mark_rule(strokeWidth=2, color=_ink(theme)).encode(x=alt.X("low:Q"), x2=alt.X2("high:Q"))
    layers: list[alt.Chart] = [drawn, ends]
    if rule is not None:
        layers.append(
            alt.Chart(pd.DataFrame({"at": [rule]})).mark_rule(strokeDash=[5, 4], color=_ink(theme)).encode(x="at:Q")
        )
    chart: Drawn = alt.layer(*layers)
    return chart.properties(height=_BAR * max(len(names), 1) + AXIS + LEGEND)


def scatter(frame: pd.DataFrame, *, theme: Theme, x: str, y: str) -> alt.Chart:
    """Points by what they are and which kind they belong to: colour for one, shape for the other.

    Args:
        frame: Columns ``x``, ``y``, ``what`` and ``kind``.
        theme: The background.
        x: Title of the axis; a constant.
        y: Title of the axis; a constant.
    """
    whats, kinds = _order(frame, "what"), _order(frame, "kind")
    chart: alt.Chart = (
        alt.Chart(frame)
        .mark_point(size=26, opacity=0.65, strokeWidth=1.4)
        .encode(
            x=alt.X("x:Q", title=x),
            y=alt.Y("y:Q", title=y),
            color=alt.Color(
                "what:N",
                sort=whats,
                title=None,
                legend=_legend(),
                scale=alt.Scale(domain=whats, range=_colours(whats, theme)),
            ),
            shape=alt.Shape(
                "kind:N",
                sort=kinds,
                title=None,
                legend=_legend(),
                scale=alt.Scale(domain=kinds, range=["circle", "triangle-up", "square", "cross"][: len(kinds)]),
            ),
        )
        .properties(height=HEIGHT + 80)
    )
    return chart


def reliability(frame: pd.DataFrame, *, theme: Theme, x: str, y: str) -> Drawn:
    """A reliability curve: share that is true over the probability that was given, beside the diagonal.

    Args:
        frame: Columns ``predicted``, ``share``, ``low``, ``high`` and ``count``.
        theme: The background.
        x: Title of the axis; a constant.
        y: Title of the axis; a constant.
    """
    own = SERIES[theme][0]
    domain = alt.Scale(domain=[0, 1])
    base = alt.Chart(frame).encode(x=alt.X("predicted:Q", title=x, scale=domain))
    points = base.mark_point(filled=True, color=own).encode(
        y=alt.Y("share:Q", title=y, scale=domain),
        size=alt.Size("count:Q", legend=None),
        tooltip=[
            alt.Tooltip("predicted:Q", format=".2f"),
            alt.Tooltip("share:Q", format=".2f"),
            alt.Tooltip("count:Q"),
        ],
    )
    ends = base.mark_rule(color=own, strokeWidth=2).encode(y=alt.Y("low:Q", title=y), y2=alt.Y2("high:Q"))
    line = base.mark_line(color=own).encode(y=alt.Y("share:Q", title=y))
    diagonal = (
        alt.Chart(pd.DataFrame({"predicted": [0.0, 1.0], "share": [0.0, 1.0]}))
        .mark_line(strokeDash=[5, 4], color=_ink(theme))
        .encode(x=alt.X("predicted:Q", title=x), y=alt.Y("share:Q", title=y))
    )
    chart: Drawn = alt.layer(diagonal, ends, line, points)
    return chart.properties(height=HEIGHT)


FIELDS = ("value", "low", "high")


def _rule(at: float, theme: Theme) -> alt.Chart:
    rule: alt.Chart = (
        alt.Chart(pd.DataFrame({"y": [at]})).mark_rule(strokeDash=[5, 4], color=_ink(theme)).encode(y="y:Q")
    )
    return rule


def _ink(theme: Theme) -> str:
    return "#3d3d3d" if theme == "light" else "#d9d9d9"


def _legend() -> alt.Legend:
    return alt.Legend(orient="bottom", labelLimit=260, columns=3)


def _colours(names: list[str], theme: Theme) -> list[str]:
    own = SERIES[theme]
    return [own[number % len(own)] for number in range(len(names))]


def _order(frame: pd.DataFrame, column: str) -> list[str]:
    return [str(name) for name in frame[column].drop_duplicates()]
