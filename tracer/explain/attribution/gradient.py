"""Gradient attribution: one forward pass over the prefix tree, one backward pass for each target.

With ``x_i`` the input embedding of token i and F the target function summed over a step's tokens, the methods are the
L1 and L2 norms of dF/dx_i, the product ``x_i . dF/dx_i``, and integrated gradients, ``(x_i - b_i) . mean of dF/dx_i``
on the straight path from a baseline b (Sundararajan et al. 2017, equation 1). The signed ones are linear in F, so a
step costs one backward pass; norms are not, and are those of the step's gradient, not sums over its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import JsonValue

from tracer.errors import InputError
from tracer.explain.attribution.backward import Gradients, gradients
from tracer.explain.attribution.objective import check_foil
from tracer.explain.base import Context, Finding, Request
from tracer.replay.recorded import Target

ON_INPUT: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "grad_x_input": lambda gradient, inputs: (gradient * inputs).sum(-1),
    "grad_l1": lambda gradient, inputs: gradient.abs().sum(-1),
    "grad_l2": lambda gradient, inputs: gradient.norm(dim=-1),
}
"""How methods turn a gradient and its embeddings, both ``(tokens, width)``, into a score for each token."""


@dataclass(frozen=True, slots=True)
class _Path:
    """The straight line from a baseline to the input, sampled at Gauss-Legendre points."""

    request: Request
    baseline: torch.Tensor | None
    shares: tuple[float, ...]
    weights: tuple[float, ...]

    def at(self, share: float) -> Callable[[torch.Tensor], torch.Tensor]:
        """How embeddings ``(tokens, width)`` look at a share of the way."""
        return lambda inputs: self.start(inputs) + share * (inputs - self.start(inputs))

    def start(self, inputs: torch.Tensor) -> torch.Tensor:
        """The baseline of embeddings ``(tokens, width)``."""
        return torch.zeros_like(inputs) if self.baseline is None else self.baseline.expand_as(inputs)


def run(context: Context, requests: Sequence[Request], targets: Sequence[Target]) -> Iterator[Finding]:
    """Run gradient methods; all that read the gradient at the input share its passes.

    Raises:
        InputError: A parameter cannot be used.
        CancelledError: Somebody stopped it.
        EngineUnavailableError: Memory ran out.
    """
    check_foil(context.replica, context.foil)
    at_input = [item for item in requests if item.method.name in ON_INPUT]
    paths = [_path(context, item) for item in requests if item.method.name not in ON_INPUT]
    total = len(targets) * (bool(at_input) + sum(len(path.shares) for path in paths))
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        context.report(done, total)

    if at_input:
        for found in gradients(context, targets):
            inputs = context.replica.embed(ids_read(context, found.target)).float()
            for item in at_input:
                scores = ON_INPUT[item.method.name](found.gradient, inputs)
                yield Finding(item, found.target, padded(scores, found.target), {"target_function": found.value})
            advance()
    for path in paths:
        yield from _integrated(context, path, targets, advance)


def _integrated(
    context: Context, path: _Path, targets: Sequence[Target], advance: Callable[[], None]
) -> Iterator[Finding]:
    sums: dict[str, torch.Tensor] = {}
    last: dict[str, Gradients] = {}
    for share, weight in zip(path.shares, path.weights, strict=True):
        for found in gradients(context, targets, change=path.at(share)):
            name = found.target.step_id
            sums[name] = sums.get(name, torch.zeros_like(found.gradient)) + weight * found.gradient
            last[name] = found
            advance()
    ends = {share: _values(context, targets, path.at(share)) for share in (0.0, 1.0)}
    for target in targets:
        inputs = context.replica.embed(ids_read(context, target)).float()
        scores = ((inputs - path.start(inputs)) * sums[target.step_id]).sum(-1)
        change = ends[1.0][target.step_id] - ends[0.0][target.step_id]
        error = float(scores.double().sum()) - change
        details: dict[str, JsonValue] = {
            "change": change,
            "completeness_error": error,
            "relative_completeness_error": abs(error) / max(abs(change), 1e-12),
        }
        yield Finding(path.request, target, padded(scores, target), details)


def _values(
    context: Context, targets: Sequence[Target], change: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, float]:
    return {found.target.step_id: found.value for found in gradients(context, targets, change=change, backward=False)}


def _path(context: Context, request: Request) -> _Path:
    points, baseline = request.parameters["points"], request.parameters["baseline"]
    if not isinstance(points, int) or isinstance(points, bool) or not 1 <= points <= 1000:
        raise InputError(f"integrated_gradients: points is {points!r}; it must be a whole number from 1 to 1000")
    shares, weights = np.polynomial.legendre.leggauss(points)
    replica = context.replica
    start: torch.Tensor | None = None
    if baseline != "zero":
        if not isinstance(baseline, int) or isinstance(baseline, bool) or not 0 <= baseline < replica.vocabulary:
            raise InputError(
                f"integrated_gradients: baseline is {baseline!r}; it must be 'zero' or a token id below "
                f"{replica.vocabulary}"
            )
        start = replica.embed([baseline])
    return _Path(request, start, tuple(((shares + 1) / 2).tolist()), tuple((weights / 2).tolist()))


def ids_read(context: Context, target: Target) -> np.ndarray:
    """Ids of the tokens that the target function depends on."""
    return context.recorded.sequences[target.sequence].token_ids[: target.end - 1]


def padded(scores: torch.Tensor, target: Target) -> np.ndarray:
    """Scores of all tokens before the target's end; its last token is not read by anything in it."""
    padded = np.zeros(target.end, dtype=np.float32)
    padded[: len(scores)] = scores.cpu().numpy()
    return padded
