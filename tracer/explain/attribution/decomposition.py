"""Decomposition of the residual stream: ALTI, ALTI-Logit, and the span form with hops through earlier steps.

All of them read the contributions of `tracer.explain.attribution.residual` and need no gradients. One replay and one
sweep from the top layer down serve every method, every target and every earlier step that a hop goes through; rows that
no target depends on are not computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import JsonValue

from tracer.explain.attribution.carriers import TINY, Product
from tracer.explain.attribution.logit_updates import LogitUpdates
from tracer.explain.attribution.objective import check_foil
from tracer.explain.attribution.parameters import whole
from tracer.explain.attribution.residual import Passing, Reading, TreeResidual, check_derivation, proximity
from tracer.explain.attribution.tree_attention import Branches, memory_guard
from tracer.explain.base import Context, Finding, Request
from tracer.replay.recorded import Recorded, Target

_MOST_HOPS = 1_000


def run(context: Context, requests: Sequence[Request], targets: Sequence[Target]) -> Iterator[Finding]:
    """Run decomposition methods for targets; `tracer.explain.base.Family`.

    The scores of ``alti`` and ``span`` add up to one for each target, those of ``alti_logit`` to the part of the
    target's logits that attention added. Tokens behind the last one that predicts something have none.

    Raises:
        InputError: A parameter is out of its range, or the derivation does not hold for the model.
        CancelledError: The context's ``cancel`` was set.
        EngineUnavailableError: Memory ran out.
    """
    check_derivation(context.replica)
    check_foil(context.replica, context.foil)
    for request in requests:
        if request.method.name == "span":
            _hops(request)
    if not requests or not targets:
        return
    with context.cost.timed(), memory_guard():
        found = _findings(context, requests, targets)
    yield from found


@torch.inference_mode()
def _findings(context: Context, requests: Sequence[Request], targets: Sequence[Target]) -> list[Finding]:
    """Go through the layers once for all methods."""
    names = {request.method.name for request in requests}
    branches = Branches.of(context.recorded, targets)
    residual = TreeResidual(context, branches.tree)
    alti = Product(branches.starts(residual.device), passing=0.0) if "alti" in names else None
    updates = LogitUpdates(context, branches, residual) if "alti_logit" in names else None
    hopping = any(request.method.name == "span" and _hops(request) for request in requests)
    chain = Chain.of(context.recorded, branches, earlier=hopping) if "span" in names else None
    spans = None if chain is None else _Spans(residual, chain.spans.starts(residual.device))
    for layer in reversed(range(residual.layers)):
        _cross(layer, residual, [carrier for carrier in (alti, updates) if carrier is not None], updates, spans)
    shares = None if spans is None else spans.shares()
    return [
        finding
        for request in requests
        for finding in (
            _span_findings(request, branches, cast("Chain", chain), cast("NDArray[np.float64]", shares))
            if request.method.name == "span"
            else _carried_findings(
                request, branches, cast("Product", alti if request.method.name == "alti" else updates)
            )
        )
    ]


def _cross(
    layer: int,
    residual: TreeResidual,
    carriers: Sequence[Product],
    updates: LogitUpdates | None,
    spans: _Spans | None,
) -> None:
    """Let everybody read one layer."""
    entering = residual.entering(layer)
    carried = torch.zeros(len(residual.tree), dtype=torch.bool, device=residual.device)
    for carrier in carriers:
        carried |= carrier.needed(layer)
    needed = carried.clone()
    for reader in (updates, spans):
        if reader is not None:
            needed |= reader.rows
    leaving = residual.entering(layer + 1)
    for reading in residual.readings(layer, needed):
        if updates is not None:
            updates.read(layer, reading, entering, leaving)
        if spans is not None:
            spans.read(reading)
        if carried[reading.heads.rows].any():
            block = residual.shares(layer, reading, entering)
            for carrier in carriers:
                carrier.cross(layer, block)
    for carrier in carriers:
        carrier.descend()
    if spans is not None:
        spans.descend(layer, entering)


def _carried_findings(request: Request, branches: Branches, carrier: Product) -> Iterator[Finding]:
    shares = carrier.shares().cpu()
    for number, target in enumerate(branches.targets):
        yield Finding(request, target, branches.scores(shares[:, number], number), carrier.details(number))


def _span_findings(
    request: Request, branches: Branches, chain: Chain, shares: NDArray[np.float64]
) -> Iterator[Finding]:
    hops = _hops(request)
    for number, target in enumerate(branches.targets):
        scores, moved = chain.handed_on(shares, number, hops=hops)
        details: dict[str, JsonValue] = {"own": float(scores[target.start :].sum()), "handed_on": list(moved)}
        yield Finding(request, target, scores.astype(np.float32), details)


class _Spans:
    """What whole spans of rows read: contributions are summed over a span's rows before their proximity is taken.

    The span form of FlashTrace (2026). For each layer the shares of a span's columns are scaled to a sum of one; a span
    that nothing is near to keeps itself.

    Args:
        residual: The residual stream.
        starts: A span is the mean of its rows, ``(tokens, spans)``; proximity doesn't depend on the scale.
    """

    def __init__(self, residual: TreeResidual, starts: torch.Tensor) -> None:
        self.rows = starts.any(1)
        self._residual = residual
        self._starts = starts
        tokens, spans = starts.shape
        self._coefficients = torch.zeros(tokens, spans, residual.replica.heads, device=starts.device)
        width = residual.out_weight(0).shape[1]
        self._attended = torch.zeros(spans, width, device=starts.device)
        self._total = torch.zeros_like(starts, dtype=torch.float64)

    def read(self, reading: Reading) -> None:
        """Read a block of a layer's attention."""
        block = reading.heads
        starts = self._starts[block.rows]
        chosen = torch.nonzero(starts.any(0))[:, 0]
        member = starts[:, chosen]
        weights = (block.weights.transpose(1, 2) @ member).permute(1, 2, 0)
        self._coefficients[block.columns[:, None], chosen] += weights
        self._attended[chosen] += member.T @ reading.attended

    def descend(self, layer: int, entering: torch.Tensor) -> None:
        """All blocks of a layer have been read."""
        totals = self._attended @ self._residual.out_weight(layer).T + self._starts.T @ entering
        found = torch.zeros_like(self._starts)
        for node in self._residual.tree.nodes:
            rows = slice(node.start, node.end)
            chosen = torch.nonzero(self._coefficients[rows].any(-1).any(0) | self._starts[rows].any(0))[:, 0]
            if not len(chosen):
                continue
            starts = self._starts[rows, chosen]
            columns, spans = torch.nonzero(starts, as_tuple=True)
            passing = Passing(spans, columns, entering[rows][columns] * starts[columns, spans, None])
            written = self._residual.written(layer, node)
            found[rows, chosen] = proximity(self._coefficients[rows, chosen], written, totals[chosen], passing).T
        found.clamp_(min=0)
        sums = found.sum(0)
        alone = sums < TINY
        self._total += torch.where(alone, self._starts, found / sums.masked_fill(alone, 1))
        self._coefficients.zero_()
        self._attended.zero_()

    def shares(self) -> NDArray[np.float64]:
        """Mean over layers, ``(tokens, spans)``."""
        shares: NDArray[np.float64] = (self._total / self._residual.layers).cpu().numpy()
        return shares


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """Targets, and the steps that the model wrote before them in the same sequence.

    Args:
        spans: Every span once: targets, and steps before them.
        own: For each target the number of its span.
        earlier: For each target the numbers of the spans of earlier steps.
    """

    spans: Branches
    own: Sequence[int]
    earlier: Sequence[Sequence[int]]

    @classmethod
    def of(cls, recorded: Recorded, branches: Branches, *, earlier: bool) -> Chain:
        """Find the spans.

        A step counts as earlier where a target's sequence begins with all that the step was written after, and with the
        step. A step that is quoted in another prompt is a source like others there: what it read is not in sight.

        Args:
            recorded: The trace.
            branches: The targets.
            earlier: Whether earlier steps are wanted.
        """
        places = recorded.tree.sequences
        spans: list[Target] = []
        sequences: list[int] = []
        numbers: dict[tuple[int, int], int] = {}

        def number_of(span: Target, sequence: int) -> int:
            # The last token's index stands for all that comes before it too.
            key = (int(places[span.sequence][span.start]), int(places[span.sequence][span.end - 1]))
            if key not in numbers:
                numbers[key] = len(spans)
                spans.append(span)
                sequences.append(sequence)
            return numbers[key]

        own = [number_of(target, branches.sequences[at]) for at, target in enumerate(branches.targets)]
        steps = recorded.targets if earlier else ()
        before: list[list[int]] = []
        for at, target in enumerate(branches.targets):
            path = places[target.sequence][: target.start]
            shared = [
                step
                for step in steps
                if step.end <= len(path) and places[step.sequence][step.end - 1] == path[step.end - 1]
            ]
            before.append(
                [
                    number_of(replace(step, sequence=target.sequence), branches.sequences[at])
                    for step in _apart(shared, target)
                ]
            )
        return cls(Branches(branches.tree, spans, sequences), own, before)

    def handed_on(
        self, shares: NDArray[np.float64], number: int, *, hops: int
    ) -> tuple[NDArray[np.float64], tuple[float, ...]]:
        """What a target read, with what it read of earlier steps handed on to what these had read.

        In each hop the share that lies on the tokens of an earlier step moves to the tokens before that step, in
        proportion to the step's own shares there. Later steps' shares may arrive at earlier ones, which the next hop
        moves on.

        Args:
            shares: Shares of the tree's tokens, ``(tokens, spans)``.
            number: The target.
            hops: How often.

        Returns:
            Scores of the tokens before the target's end, ``(target.end,)``, and the share that each hop moved, as long
            as there was one.
        """
        places = self.spans.places(self.own[number])
        scores = shares[places, self.own[number]]
        moved: list[float] = []
        steps = [(self.spans.targets[span], span) for span in self.earlier[number]]
        for _ in range(hops):
            kept = scores.copy()
            arrived = np.zeros_like(scores)
            for step, span in steps:
                mass = scores[step.start : step.end].sum()
                read = shares[places[: step.start], span]
                if mass > 0 and read.sum() > 0:
                    kept[step.start : step.end] = 0
                    arrived[: step.start] += mass * read / read.sum()
            if not arrived.any():
                break
            moved.append(float(arrived.sum()))
            scores = kept + arrived
        return scores, tuple(moved)


def _apart(steps: Sequence[Target], target: Target) -> list[Target]:
    """Steps that share no token: branches that begin alike have them in one place. The target's own come first."""
    taken = np.zeros(target.start, dtype=bool)
    found: list[Target] = []
    for step in sorted(steps, key=lambda step: step.sequence != target.sequence):
        if not taken[step.start : step.end].any():
            taken[step.start : step.end] = True
            found.append(step)
    return found


def _hops(request: Request) -> int:
    return whole(request, "hops", least=0, most=_MOST_HOPS)
