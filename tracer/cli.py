"""The command line. Commands parse, call the library and print; nothing else happens here."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated

import typer

from tracer.commands.at2 import at2_app
from tracer.commands.cite import cite
from tracer.commands.explain import explain, explain_new, list_methods
from tracer.commands.faithfulness import faithfulness
from tracer.commands.layer_map import map_truth
from tracer.commands.probe import probe_app
from tracer.commands.run import run
from tracer.commands.runs import export, import_runs, list_runs, show
from tracer.commands.serving import models_app, serve
from tracer.commands.shared import EngineOption, ModelOption, StoreOption, connected, open_store
from tracer.errors import CancelledError, TracerError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run reasoning agents, record every step token for token, and look at what happened.\n\n"
    "Start with `tracer demo`, or `tracer run cot 'What is 17 * 24?'`.",
)

app.command()(run)
app.command("list")(list_runs)
app.command()(show)
app.command()(export)
app.command("import")(import_runs)
app.command()(explain)
app.command("methods")(list_methods)
app.command()(cite)
app.command()(faithfulness)
app.command()(serve)
app.add_typer(at2_app, name="at2")
app.add_typer(models_app, name="models")
probe_app.command("map")(map_truth)
app.add_typer(probe_app, name="probe")


@app.command()
def demo(
    engine: EngineOption = "auto",
    model: ModelOption = None,
    port: Annotated[int, typer.Option(help="Port of the app.")] = 8501,
    ui: Annotated[bool, typer.Option("--ui/--no-ui", help="Serve the app at the end.")] = True,
    every: Annotated[bool, typer.Option("--all", help="All bundled tasks, not just a few of each kind.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run again what is stored already.")] = False,
    explained: Annotated[
        bool, typer.Option("--explain/--no-explain", help="Explain the run whose answer was copied from its prompt.")
    ] = True,
    store: StoreOption = None,
) -> None:
    """Run all four agents on bundled tasks, store the traces, explain one, show a summary and serve the app."""
    from tracer.console import err, out, stop_on_signal, summary_table
    from tracer.demo import run_demo, story_of

    with open_store(store) as runs:
        with connected(engine, model, None) as runner, stop_on_signal() as cancel:
            traces = run_demo(runner, runs, every=every, fresh=fresh, cancel=cancel)
        out.print(summary_table(traces))
        story = story_of(traces) if explained else None
        if story is not None:
            out.print(f"\nWhat the answer of {story.id} was read from:", markup=False)
            try:
                explain_new(story, runs, top=3, answer_only=True)
            except CancelledError:
                raise
            except TracerError as error:
                # The runs are there and the app can be shown all the same.
                err.print(f"not explained: {error}", markup=False)
    if ui:
        err.print("starting the app; Ctrl-C ends it, the runs stay")
        raise typer.Exit(_serve_ui(port, store))


@app.command("ui")
def user_interface(
    port: Annotated[int, typer.Option(help="Port; the next free one if it is taken.")] = 8501,
    store: StoreOption = None,
) -> None:
    """Serve the app at localhost."""
    raise typer.Exit(_serve_ui(port, store))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list.")] = False,
    store: StoreOption = None,
) -> None:
    """Say what is installed, what works, and how to mend what does not."""
    from rich.text import Text

    from tracer.console import out
    from tracer.doctor import examine

    findings = examine(store)
    if as_json:
        sys.stdout.write(json.dumps([finding._asdict() for finding in findings]) + "\n")
    else:
        for finding in findings:
            line = Text(
                f"{finding.state:8}", style={"ok": "green", "missing": "yellow", "broken": "red"}[finding.state]
            )
            line.append(f"{finding.what}: {finding.detail}")
            out.print(line)
            if finding.remedy:
                out.print(Text(f"        -> {finding.remedy}"))
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(1)


def main() -> None:
    """Run the command line: exit code 0 for success, 1 for a run that failed, 2 for bad usage or input."""
    try:
        app()
    except TracerError as error:
        _complain(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _complain(CancelledError("stopped by the user"))
        sys.exit(CancelledError.exit_code)
    except BrokenPipeError:
        # The reader of our output is gone; that is its business. Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _complain(error: BaseException) -> None:
    from tracer.console import err, one_line

    err.print(f"tracer: {one_line(str(error), 1000)}", markup=False, soft_wrap=True)


def _serve_ui(port: int, store: str | None) -> int:
    from ui.serve import serve as serve_ui

    return serve_ui(port, store=store)
