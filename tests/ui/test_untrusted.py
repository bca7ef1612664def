"""No text from a trace reaches anything that renders markdown or HTML: an argument is constant or provably harmless.

Every call of a Streamlit function in ``ui/`` must be listed here; what it renders as markdown may only be built from
constants, numbers and `ui.palette`'s own strings.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import streamlit as st

UI = Path(__file__).parents[2] / "ui"
SAFE = {"text", "code", "dataframe", "json", "altair_chart"}
"""Functions that show any text as it is; their ``help`` is markdown all the same."""
ALL_ARGUMENTS = {
    "badge",
    "caption",
    "error",
    "exception",
    "header",
    "help",
    "info",
    "latex",
    "markdown",
    "metric",
    "spinner",
    "subheader",
    "success",
    "table",
    "title",
    "toast",
    "warning",
}
"""Functions all of whose arguments are taken for markdown."""
LABELLED = {
    "Page": ("title", "icon"),
    "button": ("label", "icon"),
    "checkbox": ("label",),
    "dialog": ("title", "icon"),
    "download_button": ("label", "icon"),
    "expander": ("label", "icon"),
    "file_uploader": ("label",),
    "multiselect": ("label", "placeholder"),
    "number_input": ("label", "placeholder"),
    "page_link": ("label", "icon"),
    "popover": ("label", "icon"),
    "progress": ("text",),
    "segmented_control": ("label",),
    "selectbox": ("label", "placeholder"),
    "slider": ("label",),
    "text_area": ("label", "placeholder"),
    "text_input": ("label", "placeholder"),
    "toggle": ("label",),
    # Ours, in ui/elements.py and ui/jobs.py: they hand the label on to Streamlit.
    "fact": ("label",),
    "failures": ("label",),
    "folded": ("label",),
    "start_button": ("label",),
    "whole_number": ("label",),
    "choice": ("label",),
}
"""Functions whose label is markdown; every other argument is shown as text or not at all."""
OURS = {"fact", "failures", "folded", "start_button", "whole_number", "choice"}
LABEL_POSITION = {"Page": None, "page_link": None, "progress": 1}
"""Where the label stands among the positional arguments, if not first."""
SILENT = {
    "App",
    "cache_resource",
    "columns",
    "container",
    "fragment",
    "navigation",
    "rerun",
    "set_page_config",
    "stop",
    "switch_page",
}
"""Functions that show nothing of what they are given."""
OWN = {("elements.py", "label"), ("jobs.py", "label")}
"""Parameters that are checked where the function is called instead."""
NUMERIC_FORMAT = ("d", "f", "g", "e", "%")


def problems(source: str, *, file: str = "page.py") -> list[str]:
    """What is wrong in a module of the app, one line each."""
    found: list[str] = []
    nodes = list(ast.walk(ast.parse(source)))
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "streamlit":
            found.append(f"{node.lineno}: import streamlit as st, so that its calls can be checked")
        elif isinstance(node, ast.Import):
            aliases = {alias.asname for alias in node.names if alias.name.split(".")[0] == "streamlit"}
            if aliases - {"st"}:
                found.append(f"{node.lineno}: streamlit must be imported as st")
        elif isinstance(node, ast.Call):
            found += [f"{node.lineno}: {problem}" for problem in call_problems(node, file)]
        elif isinstance(node, ast.Attribute):
            found += [f"{node.lineno}: {problem}" for problem in attribute_problems(node, called=id(node) in called)]
    return found


def attribute_problems(node: ast.Attribute, *, called: bool) -> Iterator[str]:
    """A Streamlit function that this test does not know, or that is kept to be called under another name."""
    known = SAFE | ALL_ARGUMENTS | set(LABELLED) | SILENT
    # Components show text by `textContent` alone; see below.
    values = {"session_state", "query_params", "context", "column_config", "components", "__file__"}
    if isinstance(node.value, ast.Name) and node.value.id == "st" and node.attr not in known | values:
        yield f"st.{node.attr} is not listed here; decide what it renders"
    if node.attr in ALL_ARGUMENTS | set(LABELLED) and not called and node.attr.islower() and is_streamlit(node.value):
        yield f"{node.attr} is not called here; where it is, its arguments cannot be checked"


def is_streamlit(node: ast.expr) -> bool:
    """Whether an expression is the streamlit module."""
    return isinstance(node, ast.Name) and node.id == "st"


def call_problems(call: ast.Call, file: str) -> Iterator[str]:
    """Arguments of one call that must be constant and are not."""
    if isinstance(call.func, ast.Name):
        if call.func.id in ("getattr", "eval", "exec", "__import__"):
            yield f"{call.func.id} hides what is called"
        return
    if isinstance(call.func, ast.Call) and ast.unparse(call.func.func) == "st.fragment":
        return
    if not isinstance(call.func, ast.Attribute):
        yield "a computed function cannot be checked; call it by its name"
        return
    name = call.func.attr
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    checked: list[ast.expr] = []
    if name in ALL_ARGUMENTS:
        checked = [*call.args, *given.values()]
    elif name in LABELLED:
        position = LABEL_POSITION.get(name, 0)
        checked = [given[argument] for argument in (*LABELLED[name], "help") if argument in given]
        checked += [] if position is None or len(call.args) <= position else [call.args[position]]
        if None in given:
            yield f"{name} is given unknown keyword arguments"
    elif name.endswith("Column") and is_column_config(call.func):
        checked = [*call.args, *given.values()]
    elif name in SAFE and "help" in given:
        checked = [given["help"]]
    if "unsafe_allow_html" in given:
        yield "unsafe_allow_html is never needed"
    for argument in checked:
        if not harmless(argument, file):
            yield f"{name} renders markdown, and {ast.unparse(argument)!r} may be text from a trace"


def is_column_config(function: ast.Attribute) -> bool:
    """Whether this is ``st.column_config.SomethingColumn``."""
    return isinstance(function.value, ast.Attribute) and function.value.attr == "column_config"


def harmless(node: ast.expr, file: str) -> bool:
    """Whether an expression cannot hold text from outside this project."""
    match node:
        case ast.Constant():
            return True
        case ast.Name(id=name):
            return (file, name) in OWN or name.isupper()
        case ast.JoinedStr(values=values):
            return all(harmless(value, file) for value in values)
        case ast.FormattedValue(format_spec=ast.JoinedStr(values=[ast.Constant(value=str(form))])) if form:
            # Python refuses these formats for anything but a number.
            return form.endswith(NUMERIC_FORMAT)
        case ast.FormattedValue(value=value):
            return harmless(value, file)
        case ast.IfExp(body=body, orelse=other):
            return harmless(body, file) and harmless(other, file)
        case ast.Call(func=ast.Attribute(value=ast.Name(id="palette"))):
            return True
        case ast.Call(func=ast.Name(id="len")):
            return True
        case _:
            return False


@pytest.mark.parametrize("path", sorted(UI.rglob("*.py")), ids=lambda path: str(path.relative_to(UI)))
def test_no_text_of_a_trace_is_rendered(path: Path) -> None:
    assert problems(path.read_text(encoding="utf-8"), file=path.name) == []


@pytest.mark.parametrize(
    "line",
    [
        "st.markdown(step.text)",
        "st.write(step.text)",
        "st.html('x')",
        "st.error(str(error))",
        "st.caption(f'in {call.id}')",
        "st.caption(f'{step.text:>20}')",
        "left.subheader(step.kind)",
        "st.metric('answer', trace.outcome.answer)",
        "st.button(step.id)",
        "st.selectbox('Step', steps, help=step.text)",
        "st.expander(label=step.text)",
        "st.page_link(RUNS, label=trace.name)",
        "st.text('x', help=step.text)",
        "st.button('x', **options)",
        "elements.fact(step.kind, 'x')",
        "jobs.start_button(step.text, 'explain', {}, 'key')",
        "st.progress(0.5, job.stage)",
        "st.column_config.TextColumn(step.kind)",
        "(st.info if a else st.error)(step.text)",
        "getattr(st, 'markdown')(step.text)",
        "from streamlit import markdown",
        "import streamlit as other",
        "show = st.markdown",
    ],
)
def test_the_check_sees_dangerous_lines(line: str) -> None:
    assert problems(line)


@pytest.mark.parametrize(
    "line",
    [
        "st.text(step.text)",
        "st.caption(f'{len(trace.steps):,d} steps')",
        "st.subheader(f'Step {number:,d}: {palette.kind_name(step.kind)}')",
        "st.selectbox('Branch', branches, format_func=str)",
        "elements.fact('Answer', trace.outcome.answer)",
    ],
)
def test_the_check_lets_plain_text_through(line: str) -> None:
    assert problems(line) == []


def test_every_name_in_the_check_is_streamlits() -> None:
    listed = SAFE | ALL_ARGUMENTS | set(LABELLED) | SILENT
    assert {name for name in listed if not hasattr(st, name)} == OURS


@pytest.mark.parametrize("form", [",d", ".2f", ".4g", ".1%", "e"])
def test_a_numeric_format_refuses_text(form: str) -> None:
    with pytest.raises(ValueError, match="(?i)format code"):
        format("![image](http://example.invalid/x.png)", form)


COMPONENTS = UI / "components"
MARKUP = (
    "innerHTML",
    "outerHTML",
    "insertAdjacentHTML",
    "createContextualFragment",
    "document.write",
    "DOMParser",
    "setHTML",
    "srcdoc",
    "eval(",
    "Function(",
    "import(",
    "fetch(",
    "XMLHttpRequest",
    "WebSocket",
    "localStorage",
    "://",
    "url(",
    "@import",
    ".href",
    ".src",
)
"""What a component needs for reading text as markup or code, or for asking somebody else."""


@pytest.mark.parametrize(
    "path", sorted([*COMPONENTS.glob("*.js"), *COMPONENTS.glob("*.css")]), ids=lambda path: path.name
)
def test_components_show_text_as_text_and_ask_nobody(path: Path) -> None:
    source = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert [word for word in MARKUP if word in source] == []


def test_components_are_made_of_files_alone() -> None:
    """A component's script and style are constants of this project: nothing else may become one."""
    for path in UI.rglob("*.py"):
        calls = [
            node
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith(("components.v2.component", "components.v1.html"))
        ]
        assert not calls or path.name == "mount.py", path
        assert not any(keyword.arg == "html" for call in calls for keyword in call.keywords), path


CHART_FORBIDDEN = {
    # An image or a link is fetched, or followed, wherever the data say.
    "mark_image",
    "Href",
    "Url",
    "UrlData",
    "topo_feature",
    # Raw specifications and expressions would be read as more than data.
    "from_dict",
    "from_json",
    "expr",
    "ExprRef",
    "param",
    "transform_calculate",
    "transform_filter",
    "transform_lookup",
}
DATA_ARGUMENTS: dict[str, set[int | str | None]] = {"Chart": {0}, "Scale": {"domain", "range"}, "layer": {0}}
"""Where a chart is given data, or lists that it only compares with data."""


def chart_problems(source: str) -> list[str]:
    """What is wrong in the module that makes charts: names of fields, titles and formats must be constants.

    Vega-Lite draws the values of a field as text; but a field's name can be a path or an aggregate, and a title, a
    format or a condition can be an expression.
    """
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in CHART_FORBIDDEN:
            found.append(f"{node.lineno}: {node.attr}")
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name = node.func.attr
        if {keyword.arg for keyword in node.keywords} & {"href", "url"}:
            found.append(f"{node.lineno}: a link")
        if ast.unparse(node.func.value) != "alt" or name == "layer":
            continue
        given: list[tuple[int | str | None, ast.expr]] = [
            *enumerate(node.args),
            *((keyword.arg, keyword.value) for keyword in node.keywords),
        ]
        for place, value in given:
            if place not in DATA_ARGUMENTS.get(name, set()) and not chart_constant(value):
                found.append(f"{node.lineno}: {name} is given {ast.unparse(value)}")
    return found


def chart_constant(node: ast.expr) -> bool:
    """Whether an expression is a constant, a parameter that callers give a constant, or a part of a chart."""
    match node:
        case ast.Constant():
            return True
        case ast.Name(id=name):
            return name in {
                "x",
                "y",
                "form",
                "ticks",
                "domain",
                "own",
                "rows",
                "columns",
                "names",
                "groups",
                "whats",
                "kinds",
            }
        case ast.Call(func=ast.Attribute(value=ast.Name(id="alt"))) | ast.Call(func=ast.Name(id="_legend")):
            return True
        case ast.JoinedStr(values=values):
            return all(
                isinstance(value, ast.Constant)
                or (isinstance(value, ast.FormattedValue) and ast.unparse(value.value) == "field")
                for value in values
            )
        case _:
            return False


def test_charts_name_their_own_columns_only() -> None:
    assert chart_problems((UI / "charts.py").read_text(encoding="utf-8")) == []
    for path in UI.rglob("*.py"):
        names = {name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) for name in imported(node)}
        assert path.name == "charts.py" or "altair" not in names, path


def imported(node: ast.AST) -> set[str]:
    """Packages that a statement imports."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    return {(node.module or "").split(".")[0]} if isinstance(node, ast.ImportFrom) else set()


@pytest.mark.parametrize(
    "line",
    [
        "alt.X(trace.name)",
        "alt.X('x:Q', title=trace.name)",
        "alt.Chart(frame).mark_image()",
        "alt.Chart(frame).encode(href='x')",
        "alt.Chart(frame).transform_calculate(a=text)",
        "alt.Tooltip('x', format=text)",
        "alt.Chart.from_dict(document)",
        "alt.Chart(frame, title=trace.name)",
        "alt.Color(f'{name}:N')",
    ],
)
def test_the_check_of_charts_sees_dangerous_lines(line: str) -> None:
    assert chart_problems(line)


@pytest.mark.parametrize("path", sorted((UI / "app_pages").glob("*.py")), ids=lambda path: path.name)
def test_charts_are_given_constant_titles(path: Path) -> None:
    """What a page hands to `ui.charts` beside a table and a theme is a constant."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("charts."):
            for keyword in node.keywords:
                numeric = isinstance(keyword.value, ast.UnaryOp) and isinstance(keyword.value.operand, ast.Constant)
                assert keyword.arg in ("theme", "widest") or numeric or harmless(keyword.value, path.name), ast.unparse(
                    node
                )
