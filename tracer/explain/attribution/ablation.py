"""Attribution by taking sources away: leave-one-out, ContextCite and Shapley values.

All of them ask the same question, the target's probability under masks over its sources (`tracer.explain.removal`), and
differ in which masks they ask about and how they divide the answers among the sources.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from tracer.errors import InputError
from tracer.explain.attribution.lasso import fit_lasso
from tracer.explain.attribution.parameters import number, whole
from tracer.explain.base import Context, Finding, Request
from tracer.explain.methods import request
from tracer.explain.removal import Kind, Masks, Removal, logit, removable
from tracer.explain.scoring import Backends, backends
from tracer.replay.recorded import Target

EXACT_SHAPLEY = 6
"""Most sources whose Shapley values are computed exactly: 64 masks."""
_CONFIDENT = 1.959964
_MOST = 4096
"""Ablations of ContextCite, at most."""


@dataclass(frozen=True, slots=True)
class _Shares:
    """Values of the removable sources."""

    values: NDArray[np.float64]
    masks: int
    """How many different ones they took."""
    half_width: NDArray[np.float64] | None = None
    """Half of the 95 % interval, where they were sampled."""
    details: dict[str, JsonValue] | None = None


def run(context: Context, requests: Sequence[Request], targets: Sequence[Target]) -> Iterator[Finding]:
    """Run ablation methods; what one of them asked is known to the others.

    Raises:
        InputError: A parameter cannot be used.
        CancelledError: Somebody stopped it.
        EngineUnavailableError: Memory ran out.
    """
    if context.target_function != "logprob":
        names = ", ".join(item.method.name for item in requests)
        raise InputError(
            f"{names}: what removals change is measured on the log-probability, so ablation takes no other target "
            "function; run it apart from methods that do"
        )
    for item in requests:
        removal_parameters(item)
    with backends(context) as known:
        yield from _run(context, requests, targets, known)


def _run(
    context: Context, requests: Sequence[Request], targets: Sequence[Target], known: Backends
) -> Iterator[Finding]:
    solvers = {"leave_one_out": _leave_one_out, "contextcite": _context_cite, "shapley": _shapley}
    done, total = 0, len(targets) * len(requests)
    context.report(done, total)
    for target in targets:
        shared: dict[tuple[Kind, frozenset[str] | None, JsonValue], Removal] = {}
        for item in requests:
            context.check_cancel()
            kind, kinds = removal_parameters(item)
            if not removable(context.recorded, target, kinds):
                # Nothing of the kinds that were asked for was there to be read.
                yield Finding(item, target, np.zeros(target.end, dtype=np.float32), {"masks": 0})
                done += 1
                context.report(done, total)
                continue
            by = item.parameters["backend"]
            removal = shared.get((kind, kinds, by))
            if removal is None:
                backend = known.named(item.method.name, by)
                removal = shared[kind, kinds, by] = Removal(context, target, kind=kind, kinds=kinds, backend=backend)
            shares = solvers[item.method.name](context, removal, item)
            details: dict[str, JsonValue] = {
                "removal": kind,
                "backend": by,
                "masks": shares.masks,
                "complete": _only(removal, np.ones(len(removal.units), dtype=bool)),
                **(shares.details or {}),
            }
            if shares.half_width is not None:
                details["half_width_95"] = {
                    context.recorded.sources[unit].id: float(width)
                    for unit, width in zip(removal.units, shares.half_width, strict=True)
                }
            yield Finding(item, target, removal.spread(shares.values), details)
            done += 1
            context.report(done, total)


def removal_parameters(item: Request) -> tuple[Kind, frozenset[str] | None]:
    """How a request wants sources removed, and which kinds of them.

    Raises:
        InputError: It asks for a way that there is not.
    """
    kind, kinds = item.parameters["removal"], item.parameters["kinds"]
    if kind not in ("delete", "mask"):
        raise InputError(f"{item.method.name}: removal is {kind!r}; use 'delete' or 'mask'")
    chosen = kinds.split("+") if isinstance(kinds, str) else kinds
    if kind == "mask" and item.parameters.get("backend", "replica") != "replica":
        raise InputError(
            f"{item.method.name}: an engine can only be sent shortened texts, where masking leaves gaps; "
            "use removal=delete, or backend=replica"
        )
    if chosen is not None and (not isinstance(chosen, list) or not chosen):
        raise InputError(f"{item.method.name}: kinds is {kinds!r}; name kinds of sources, such as document+observation")
    return cast("Kind", kind), None if chosen is None else frozenset(str(name) for name in chosen)


def random_masks(count: int, units: int, *, seed: int) -> Masks:
    """Masks that keep each source with probability one half, ``(count, units)``."""
    return np.random.default_rng(seed).random((count, units)) < 0.5


def fitted_masks(requests: Iterable[Request], units: int, *, seed: int) -> Masks:
    """Masks that ContextCite is fitted on among these requests, or would be by default, ``(masks, units)``.

    With fewer ablations it is fitted on the first of them.
    """
    every = [request("contextcite"), *(item for item in requests if "ablations" in item.parameters)]
    return random_masks(max(whole(item, "ablations", least=2, most=_MOST) for item in every), units, seed=seed)


def _leave_one_out(context: Context, removal: Removal, item: Request) -> _Shares:
    """What the target loses with the source: log p(all) - log p(all but it)."""
    units = len(removal.units)
    masks = np.concatenate([np.ones((1, units), dtype=bool), ~np.eye(units, dtype=bool)])
    values = removal.values(masks)
    return _Shares(values[0] - values[1:], len(masks))


def _context_cite(context: Context, removal: Removal, item: Request) -> _Shares:
    """Coefficients of a sparse linear model of logit p over random masks (Cohen-Wang et al. 2024, section 3).

    The model is fitted on standardised masks with the target's length divided out, and its coefficients are put back
    into the units of the masks.
    """
    count, penalty = whole(item, "ablations", least=2, most=_MOST), number(item, "penalty", least=0.0)
    units = len(removal.units)
    masks = random_masks(count, units, seed=context.seed)
    # The whole is asked in the same tree, for what is told beside the shares.
    removal.values(np.concatenate([masks, np.ones((1, units), dtype=bool)]))
    written = removal.target.end - removal.target.start
    outcomes = logit(removal.values(masks))
    coefficients, intercept = fit_lasso(masks.astype(float), outcomes / written, penalty=penalty)
    predicted = masks @ coefficients + intercept
    spread = float(np.var(outcomes / written))
    fit = 1 - float(np.mean((outcomes / written - predicted) ** 2)) / spread if spread > 0 else 0.0
    return _Shares(coefficients * written, _different(masks), details={"intercept": intercept * written, "fit_r2": fit})


def _shapley(context: Context, removal: Removal, item: Request) -> _Shares:
    """Shapley values of log p (Shapley 1953): exact for few sources, means over random orders otherwise."""
    units = len(removal.units)
    if units <= EXACT_SHAPLEY:
        return _Shares(_exact_shapley(removal), 2**units, details={"exact": True})
    orders = whole(item, "orders", least=2, most=10_000)
    generator = np.random.default_rng(context.seed)
    drawn = np.stack([generator.permutation(units) for _ in range(orders)])
    # Row ``step`` of an order's masks keeps its first ``step`` sources.
    masks = np.argsort(drawn, axis=1)[:, None, :] < np.arange(units + 1)[:, None]
    values = removal.values(masks.reshape(-1, units)).reshape(orders, units + 1)
    gains = np.empty((orders, units))
    np.put_along_axis(gains, drawn, np.diff(values), axis=1)
    half = _CONFIDENT * gains.std(0, ddof=1) / math.sqrt(orders)
    asked = _different(masks.reshape(-1, units))
    return _Shares(gains.mean(0), asked, half, {"exact": False, "orders": orders})


def _exact_shapley(removal: Removal) -> NDArray[np.float64]:
    units = len(removal.units)
    masks = np.array(list(itertools.product([False, True], repeat=units)))
    values = {mask.tobytes(): value for mask, value in zip(masks, removal.values(masks), strict=True)}
    shares = np.zeros(units)
    for mask in masks:
        size = int(mask.sum())
        for unit in np.flatnonzero(~mask):
            larger = mask.copy()
            larger[unit] = True
            weight = math.factorial(size) * math.factorial(units - size - 1) / math.factorial(units)
            shares[unit] += weight * (values[larger.tobytes()] - values[mask.tobytes()])
    return shares


def _different(masks: Masks) -> int:
    return len(np.unique(masks, axis=0))


def _only(removal: Removal, mask: NDArray[np.bool_]) -> float:
    return float(removal.values(mask[None])[0])
