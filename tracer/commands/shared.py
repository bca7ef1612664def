"""Options and helpers that several commands share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tracer.errors import CancelledError, InputError, TraceNotFoundError, TracerError

if TYPE_CHECKING:
    from pydantic import JsonValue

    from tracer.engines.base import Engine
    from tracer.store import Arrays, Store
    from tracer.trace.trace import Trace

StoreOption = Annotated[
    str | None,
    typer.Option("--store", help="Database file or URL; TRACER_STORE sets it for good.", metavar="FILE|URL"),
]
EngineOption = Annotated[
    str, typer.Option(help="auto, local, vllm, or the address of a server.", metavar="auto|local|vllm|URL")
]
ModelOption = Annotated[str | None, typer.Option(help="demo, a local folder, a GGUF file or a hub id.", metavar="NAME")]
DtypeOption = Annotated[str | None, typer.Option(help="Precision of a model that tracer loads or serves.")]


@contextmanager
def open_store(location: str | None) -> Iterator[Store]:
    """The store at a file or URL, or the default one."""
    from tracer.store import Store

    with Store(location) as store:
        yield store


@contextmanager
def connected(name: str, model: str | None, dtype: str | None, *, quiet: bool = False) -> Iterator[Engine]:
    """An engine that is closed at the end; says which one it is, unless ``quiet``."""
    from tracer.console import err, stages
    from tracer.engines.connect import connect

    with stages() as progress:
        found = connect(name, model=model, dtype=dtype, progress=None if quiet else progress)
    if not quiet:
        err.print(f"engine: {found.description}", markup=False)
    try:
        yield found
    finally:
        found.close()


def save(trace: Trace, path: Path) -> None:
    """Write a trace file.

    Raises:
        InputError: It cannot be written.
    """
    try:
        trace.save(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def load_trace(name: str, runs: Store) -> Trace:
    """A stored run, or a trace file.

    Raises:
        InputError: There is no such file.
        TraceNotFoundError: There is no such run.
        TraceFormatError: The file is no trace.
    """
    from tracer.trace.trace import Trace

    file = _file(name)
    return runs.load(name) if file is None else Trace.load(file)


def open_traces(names: Iterable[str], runs: Store, *, quiet: bool) -> list[Trace]:
    """Stored runs and trace files for a command that keeps what it finds with stored ones only, and says so.

    Raises:
        As `load_trace`.
    """
    from tracer.console import err

    traces = [load_trace(name, runs) for name in dict.fromkeys(names)]
    strange = sum(not is_stored(trace, runs) for trace in traces)
    if strange and not quiet:
        which = "this run is" if len(traces) == 1 else f"{strange} of the {len(traces)} runs are"
        err.print(f"{which} not in the store: what is found is shown and not kept; `tracer import FILE` first keeps it")
    return traces


def open_trace(
    name: str, runs: Store, out_file: Path | None, *, quiet: bool
) -> tuple[Trace, Store | None, Arrays | None]:
    """A stored run or a trace file for a command with ``--out``, and where its explanations and token scores go.

    Raises:
        InputError: There is no such file, or it cannot be written.
        TraceNotFoundError: There is no such run.
        TraceFormatError: The file is no trace.
    """
    from tracer.console import err
    from tracer.store import Arrays

    if out_file is not None and out_file.is_dir():
        raise InputError(f"cannot write {out_file}: it is a folder")
    trace, file = load_trace(name, runs), _file(name)
    if file is None:
        return trace, runs, None
    if out_file is None:
        if not quiet and not is_stored(trace, runs):
            err.print("this run is not in the store: what is found is shown and not kept; --out FILE keeps it")
        return trace, runs, None
    arrays = Arrays.beside(out_file)
    arrays.adopt(Arrays.beside(file), trace.id)
    return trace, None, arrays


def _file(name: str) -> Path | None:
    file = Path(name)
    return file if file.is_file() or file.suffix == ".json" or len(file.parts) > 1 else None


@contextmanager
def keeping(out_file: Path | None, *, stored: bool) -> Iterator[None]:
    """Write what was finished when work fails or is stopped, and say so where nothing is kept of it."""
    try:
        yield
    except TracerError as error:
        if out_file is not None and error.trace is not None:
            save(error.trace, out_file)
        elif isinstance(error, CancelledError) and not stored:
            error.args = ("stopped; nothing is kept",)
        raise


def is_stored(trace: Trace, runs: Store) -> bool:
    """Whether a trace's explanations can be kept beside it."""
    try:
        return runs.resolve(trace.id) == trace.id
    except TraceNotFoundError:
        return False


def names_of(text: str) -> list[str]:
    """Names that are separated by commas.

    Raises:
        InputError: There are none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError("an empty list of names; separate names by commas")
    return names


def parameters_of(texts: list[str]) -> dict[str, dict[str, JsonValue]]:
    """Parse ``METHOD.NAME=VALUE``; a value that is no JSON is a text.

    Raises:
        InputError: One is not of that form.
    """
    found: dict[str, dict[str, JsonValue]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        method, dot, parameter = name.partition(".")
        if not (equals and dot and method and parameter):
            raise InputError(
                f"--param takes METHOD.NAME=VALUE, found {text!r}; try --param integrated_gradients.points=32"
            )
        try:
            parsed: JsonValue = json.loads(value)
        except ValueError:
            parsed = value
        found.setdefault(method, {})[parameter] = parsed
    return found
