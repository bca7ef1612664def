"""The command ``at2 fit``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tracer.commands.shared import StoreOption, load_trace, open_store
from tracer.errors import CancelledError, InputError

if TYPE_CHECKING:
    from tracer.explain.attribution.head_weights import HeadWeights, Interval

at2_app = typer.Typer(no_args_is_help=True, help="AT2: attention weighted by head, learned once for each model.")


@at2_app.callback()
def _group() -> None:
    """AT2: attention weighted by head, learned once for each model."""


@at2_app.command()
def fit(
    runs: Annotated[list[str], typer.Argument(metavar="RUNS...", help="Ids of stored runs, or trace files.")],
    masks: Annotated[int, typer.Option(help="Random removals measured for each step.", min=4, max=4096)] = 32,
    steps: Annotated[int, typer.Option(help="Most steps taken from each run.", min=1)] = 8,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="REPLICA", help="Weights to replay with, if not those that the runs name."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Precision of the replica: float32, bfloat16 or float16.")] = "float32",
    iterations: Annotated[int, typer.Option(help="Steps of gradient descent.", min=1)] = 300,
    seed: Annotated[int, typer.Option(help="Which steps, which removals, and what is held out.", min=0)] = 0,
    out_file: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write the weights here, and not to the model's own place."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what is known about the fit as JSON.")] = False,
    store: StoreOption = None,
) -> None:
    """Learn what each attention head says about what a step relied on.

    Parts of what a step read are taken away at random, and the model is asked what that changes. The weights of heads
    that foretell it best are kept for the model, with a score on runs that they were not fitted on; then
    `tracer explain --methods at2` uses them. Measuring takes about as long as ContextCite. It is kept step by step:
    Ctrl-C loses one step, and the same command goes on.
    """
    from tracer.console import err, stages, stop_on_signal
    from tracer.explain.attribution.at2_fit import fit_runs
    from tracer.explain.attribution.head_weights import default_path, fits_dir, save_weights
    from tracer.explain.service import load_replica

    with open_store(store) as kept:
        traces = [load_trace(name, kept) for name in dict.fromkeys(runs)]
    if model is None and len(names := sorted({trace.model.name for trace in traces})) > 1:
        raise InputError(f"the runs are of several models ({', '.join(names)}); fit each apart, or name one by --model")
    if out_file is not None and out_file.is_dir():
        raise InputError(f"cannot write {out_file}: it is a folder")
    with stop_on_signal() as cancel, stages() as progress:
        replica = load_replica(model, traces[0], dtype, None if as_json else progress)
        try:
            values, about = fit_runs(
                traces,
                replica,
                masks=masks,
                steps=steps,
                seed=seed,
                iterations=iterations,
                folder=fits_dir() / "measured",
                progress=None if as_json else progress,
                cancel=cancel,
            )
        except CancelledError:
            raise CancelledError(
                "stopped; what was measured is kept, and the same command goes on from there"
            ) from None
    path = out_file or default_path(replica)
    weights = save_weights(path, values, about)
    if as_json:
        sys.stdout.write(json.dumps({"path": str(path), "sha256": weights.sha256, **about.model_dump()}) + "\n")
    else:
        _print(weights)
        err.print(f"wrote {path}", markup=False)


def _print(weights: HeadWeights) -> None:
    """The validation score beside what it has to beat, and the heads that count most."""
    import numpy as np

    from tracer.console import out

    found = weights.about.validation
    out.print(
        f"fitted on {weights.about.examples} steps, {weights.about.masks} removals each; scored in {found.folds} folds "
        f"on {found.held_out} that were held out"
    )
    for name, score in (("AT2", found.lds), ("raw attention", found.uniform), ("random", found.random)):
        out.print(f"  {name:14} LDS {_score(score)}", markup=False)
    order = np.argsort(-np.abs(weights.values), axis=None)[:5]
    heads = [tuple(int(part) for part in np.unravel_index(number, weights.values.shape)) for number in order]
    named = ", ".join(f"layer {layer} head {head} ({weights.values[layer, head]:+.1%})" for layer, head in heads)
    out.print(f"  largest weights: {named}", markup=False)


def _score(score: Interval) -> str:
    return f"{score.mean:+.2f} [{score.low:+.2f}, {score.high:+.2f}]"
