"""The commands ``serve`` and ``models``."""

from __future__ import annotations

import sys
from typing import Annotated, cast

import typer

from tracer.commands.shared import DtypeOption

models_app = typer.Typer(no_args_is_help=True, help="Model weights: what is there, where, and fetching more.")


def serve(
    model: Annotated[str, typer.Option(help="demo, a local folder, a GGUF file or a hub id.", metavar="NAME")] = "demo",
    port: Annotated[int | None, typer.Option(help="A free one if not given.")] = None,
    dtype: DtypeOption = None,
    max_model_len: Annotated[int, typer.Option(help="Tokens of a prompt and its completion together.")] = 4096,
    idle_timeout: Annotated[float, typer.Option(help="Minutes without a request after which it ends; 0: never.")] = 0,
    lens: Annotated[
        bool,
        typer.Option(
            "--lens", help="Give hidden states too, to tracer alone; installs the plugin vllm-lens beside vLLM."
        ),
    ] = False,
    status: Annotated[bool, typer.Option("--status", help="Show running servers and do nothing else.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Stop every server that tracer started.")] = False,
) -> None:
    """Start a vLLM, or reuse the one that runs; it stays until `tracer serve --stop`."""
    from tracer.console import err, out, stages
    from tracer.engines import models, server, server_state
    from tracer.engines.install import Dtype, ServeOptions, find_vllm
    from tracer.engines.lens import ensure_lens

    if status or stop:
        found = server_state.status()
        for item in found:
            if stop:
                server.stop(item.state)
            state = "stopped" if stop else item.health
            out.print(f"{item.state.url}  {item.state.model} ({item.state.dtype})  {state}", markup=False)
        if not found:
            err.print("no vLLM is running; `tracer serve` starts one")
        return
    options = ServeOptions(
        port=port,
        dtype=cast("Dtype | None", dtype),
        max_model_len=max_model_len,
        idle_timeout=idle_timeout * 60 if idle_timeout > 0 else None,
        lens=lens,
    )
    with stages() as progress:
        install = find_vllm() if lens else None
        if install is not None:
            ensure_lens(install, progress)
        handle = server.reuse_or_start(models.resolve(model, progress=progress), options, progress=progress)
    out.print(f"{handle.url}  {'already running' if handle.reused else 'started'}, model {model}", markup=False)
    err.print("stop it with `tracer serve --stop`")


@models_app.command("list")
def list_models() -> None:
    """Models on this machine, and the demo model."""
    from tracer.console import out
    from tracer.engines import models

    for entry in models.list_models():
        size = f"{entry.size_bytes / 1e9:.2f} GB" if entry.fetched else "not fetched"
        out.print(f"{entry.name:40} {size:>12}  {entry.source}  {entry.path or ''}", markup=False)


@models_app.command("path")
def model_path(name: Annotated[str, typer.Argument(help="A model's name.")]) -> None:
    """Print the local folder of a model that is here already."""
    from tracer.engines import models

    sys.stdout.write(f"{models.resolve(name, fetch=False).path}\n")


@models_app.command("fetch")
def fetch_model(
    name: Annotated[str, typer.Argument(help="A model's name.")],
    verify: Annotated[bool, typer.Option("--verify", help="Check every byte of what is here already.")] = False,
) -> None:
    """Fetch and convert a model, with progress; does nothing if it is here."""
    from tracer.console import err, stages
    from tracer.engines import models

    with stages() as progress:
        found = models.resolve(name, progress=progress, verify=verify)
    err.print(f"{found.name}: {found.source}", markup=False)
    sys.stdout.write(f"{found.path}\n")
