"""Options and helpers that several commands share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tracer.errors import InputError

if TYPE_CHECKING:
    from tracer.engines.base import Engine
    from tracer.store import Store
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
