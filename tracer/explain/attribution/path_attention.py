"""RPI: gradients integrated over attention from randomised baselines (Barkan et al. 2024, 2024.findings-emnlp.551).

With a the attention weights of one layer, a baseline ``b = sqrt(abar_T) a + (1 - abar_T) noise`` is the end of a
Gaussian diffusion (T = 500 steps, beta linear from 1e-4 to 0.02, abar_T the product of 1 - beta). On the way from it,
``v_j = b + j/n (a - b)`` for j = 1 ... n, the map is ``mean_j(v_j * dF/dv_j) * a``, with F the target function of a
model whose weights in that layer are v_j. Scores are the map's rows at the tokens that predict the target: mean over
heads, sum over rows.

Choices where the text leaves one: noise is standard normal and only where a token may read, so that nothing is read
from the future; v_j replaces the weights as it is, without a new softmax; the scores are the mean over samples, where
the paper picks the best one by the very metric that it then reports.

No map is held but for the target's rows. The layer's output is linear in its weights, so outputs of v_j lie on the line
between those of b and a, and with values V the gradient of a row of weights is ``dF/do V^T`` for the gradient at its
output o. Before the target's rows nothing needs a gradient; layers below run once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import JsonValue

from tracer.explain.attribution.objective import check_foil
from tracer.explain.attribution.parameters import layer_number, whole
from tracer.explain.attribution.rerun import Meant, captured_targets, versions_at_once
from tracer.explain.attribution.tree_attention import memory_guard
from tracer.explain.base import Context, Finding, Request
from tracer.replay.attention import Plan, Rule, visible, weights
from tracer.replay.layers import Captured
from tracer.replay.recorded import Target
from tracer.replay.tree import Node

_STEPS = 500
_BETAS = (1e-4, 0.02)
_LOGITS = 1 << 25
"""Logits with a gradient that are held at once: 128 MiB in float32, and about twice that for the gradient."""
_BLOCK = 64
"""Rows of noise that are held at once."""


@dataclass(frozen=True, slots=True)
class _Settings:
    samples: int
    points: int
    layer: int


def run(context: Context, requests: Sequence[Request], targets: Sequence[Target]) -> Iterator[Finding]:
    """Run RPI for targets; `tracer.explain.base.Family`.

    Details are the target function, the layer, and the relative standard error of the scores over the samples.

    Raises:
        InputError: A parameter is out of its range.
        CancelledError: Somebody stopped it.
        EngineUnavailableError: Memory ran out.
    """
    last = len(context.replica.layers)
    chosen = [_settings(request, last) for request in requests]
    check_foil(context.replica, context.foil)
    total = sum(settings.samples for settings in chosen) * len(targets)
    done = 0
    for request, settings in zip(requests, chosen, strict=True):
        for target, captured, meant in captured_targets(context, targets, range(settings.layer, last)):
            with memory_guard():
                path = _Path(context, target, captured, meant, settings)
                maps: list[NDArray[np.float64]] = []
                for sample in range(settings.samples):
                    context.check_cancel()
                    with context.cost.timed():
                        maps.append(path.sample(sample))
                    done += 1
                    context.report(done, total)
            mean = np.mean(maps, axis=0)
            scores = np.zeros(target.end, dtype=np.float32)
            scores[:-1] = mean
            error = float(np.linalg.norm(np.std(maps, axis=0)) / math.sqrt(len(maps)))
            details: dict[str, JsonValue] = {
                "target_function": meant.value,
                "layer": settings.layer,
                "relative_standard_error": error / max(float(np.linalg.norm(mean)), 1e-30),
                "note": "mean over samples; the paper picks the best sample by the metric that it reports",
            }
            yield Finding(request, target, scores, details)


def retained(steps: int = _STEPS, betas: tuple[float, float] = _BETAS) -> float:
    """What a Gaussian diffusion retains of a signal's power: the product of 1 - beta over its steps."""
    return float(np.prod(1 - np.linspace(*betas, steps)))


def noise(rows: range, heads: int, length: int, rule: Rule, generator: torch.Generator) -> torch.Tensor:
    """Standard normal numbers where tokens may read, zero elsewhere.

    Args:
        rows: Positions of the tokens that read.
        heads: Number of heads.
        length: Number of columns.
        rule: The layer's rule.
        generator: Drawn from row by row, so that it does not matter how rows are cut into blocks.

    Returns:
        ``(heads, rows, length)`` on the CPU.
    """
    drawn = torch.zeros(heads, len(rows), length)
    for number, row in enumerate(rows):
        drawn[:, number, : row + 1] = torch.randn(heads, row + 1, generator=generator)
    return drawn * visible(len(rows), length, rule, drawn.device, last=rows.stop)


class _Path:
    """The way from baselines to the attention weights of one layer, for one target."""

    def __init__(self, context: Context, target: Target, captured: Captured, meant: Meant, settings: _Settings) -> None:
        self._context = context
        self._captured = captured
        self._meant = meant
        self._settings = settings
        self._seed = (context.seed, target.sequence, target.start, target.end)
        self._context_rows = range(target.start - 1)
        self._rows = range(target.start - 1, target.end - 1)
        layer, stop = settings.layer, self._rows.stop
        heads = context.replica.heads
        self._rule = captured.rules[layer]
        values = captured.values[layer][:, :stop].float()
        self._values = values.repeat_interleave(heads // len(values), dim=0)
        queries = captured.queries[layer][:, self._rows.start : stop].float()
        self._weights = weights(queries, captured.keys[layer][:, :stop].float(), self._rule)
        outputs = captured.heads[layer][:stop].float()
        self._outputs = outputs.view(stop, heads, -1).transpose(0, 1)
        logits = len(self._rows) * context.replica.vocabulary
        self._batch = max(1, min(versions_at_once(context.replica, stop), _LOGITS // logits))

    def sample(self, number: int) -> NDArray[np.float64]:
        """Scores with one baseline, ``(rows.stop,)``."""
        kept = retained()
        seed = np.random.SeedSequence([part & (1 << 64) - 1 for part in (*self._seed, number)]).generate_state(
            1, np.uint64
        )
        generator = torch.Generator().manual_seed(int(seed[0]) >> 1)
        noisy = [self._noise_outputs(rows, generator) for rows in _blocks(self._context_rows)]
        drawn = self._noise(self._rows, generator)
        outputs = torch.cat([*noisy, drawn @ self._values], dim=1)
        baseline_outputs = math.sqrt(kept) * self._outputs + (1 - kept) * outputs
        baseline = math.sqrt(kept) * self._weights + (1 - kept) * drawn
        mean, slope = self._gradients(baseline_outputs)
        back = self._values.transpose(1, 2)
        # The mean of (b + s (a - b)) times the gradient at s, for all points at once.
        integral = baseline * (mean @ back) + (self._weights - baseline) * (slope @ back)
        scores: NDArray[np.float64] = (integral * self._weights).double().mean(0).sum(0).cpu().numpy()
        return scores

    def _gradients(self, baseline: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean over the points of dF/do at the target's rows, and of it times the point's share of the way.

        Both are ``(heads, rows, head_width)``.
        """
        points = self._settings.points
        shares = torch.arange(1, points + 1, device=baseline.device) / points
        sums = [torch.zeros_like(baseline[:, self._rows.start :]) for _ in range(2)]
        for some in torch.split(shares, self._batch):
            self._context.check_cancel()
            outputs = baseline + some.view(-1, 1, 1, 1) * (self._outputs - baseline)
            found = self._gradient(outputs.to(self._context.replica.dtype)).float()
            sums[0] += found.sum(0)
            sums[1] += (found * some.view(-1, 1, 1, 1)).sum(0)
        return sums[0] / points, sums[1] / points

    def _gradient(self, outputs: torch.Tensor) -> torch.Tensor:
        """The gradient at the target's rows of versions of the layer's outputs.

        Args:
            outputs: ``(versions, heads, rows.stop, head_width)``.

        Returns:
            ``(versions, heads, rows, head_width)``.
        """
        captured, count = self._captured, len(outputs)
        before = self._before(outputs[:, :, : self._rows.start])
        own = outputs[:, :, self._rows.start :].detach().requires_grad_()
        parents: list[Node | None] = [*before.nodes] or [None] * count
        ids = np.zeros(len(self._rows), dtype=np.int64)
        nodes = [
            Node(count + number, parent, count * self._rows.start + number * len(ids), self._rows.start, ids)
            for number, parent in enumerate(parents)
        ]
        plan = Plan(intervene=_Outputs(self._settings.layer, own, count), keep=False, nodes=nodes, memory=before.memory)
        with torch.enable_grad():
            hidden = captured.inputs[self._settings.layer][self._rows.start : self._rows.stop].repeat(count, 1)
            last = captured.run(captured.layers, hidden, np.tile(np.asarray(self._rows), count), plan)
            value = self._meant(last.view(count, len(self._rows), -1)).sum()
            with self._context.replica.running(plan):
                (gradient,) = torch.autograd.grad(value, own)
        self._count(count)
        return gradient

    def _before(self, outputs: torch.Tensor) -> Plan:
        """Keys and values of the rows before the target's under versions of the layer's outputs."""
        captured, count, length = self._captured, len(outputs), len(self._context_rows)
        plan = Plan(intervene=_Outputs(self._settings.layer, outputs, 0))
        if length:
            ids = np.zeros(length, dtype=np.int64)
            plan.nodes = [Node(number, None, number * length, 0, ids) for number in range(count)]
            positions = np.tile(np.asarray(self._context_rows), count)
            with torch.no_grad():
                hidden = captured.inputs[self._settings.layer][:length].repeat(count, 1)
                hidden = captured.run(captured.layers[:-1], hidden, positions, plan)
                captured.attend(captured.layers[-1], hidden, positions, plan)
        return plan

    def _noise(self, rows: range, generator: torch.Generator) -> torch.Tensor:
        drawn = noise(rows, len(self._values), self._rows.stop, self._rule, generator)
        return drawn.to(self._values.device)

    def _noise_outputs(self, rows: range, generator: torch.Generator) -> torch.Tensor:
        return self._noise(rows, generator) @ self._values

    def _count(self, versions: int) -> None:
        layers = len(self._context.replica.layers)
        self._context.cost.forward_tokens += versions * self._rows.stop * len(self._captured.layers) // layers
        self._context.cost.backward_passes += versions


class _Outputs:
    """Puts given outputs of heads in place of a layer's own, by version."""

    def __init__(self, layer: int, outputs: torch.Tensor, first: int) -> None:
        self._layer = layer
        self._outputs = outputs
        self._first = first

    def __call__(
        self, layer: int, node: Node, _q: torch.Tensor, _k: torch.Tensor, _v: torch.Tensor, _rule: Rule
    ) -> torch.Tensor | None:
        if layer != self._layer:
            return None
        number = node.number - self._first
        return self._outputs[number : number + 1]


def _blocks(rows: range) -> list[range]:
    return [rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK)]


def _settings(request: Request, layers: int) -> _Settings:
    return _Settings(
        samples=whole(request, "samples", least=1, most=10_000),
        points=whole(request, "points", least=1, most=10_000),
        layer=layer_number(request, "layer", layers),
    )
