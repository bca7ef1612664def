"""What methods share that run layers again: targets with their captured sequences, and how strongly they are meant."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from tracer.explain.attribution.objective import objective, runner_up
from tracer.explain.base import Context
from tracer.replay.layers import Captured, capture
from tracer.replay.model import Replica
from tracer.replay.recorded import Target

_LOGITS = 1 << 26
"""Logits that are held at once: 256 MiB in float32."""
_ROWS = {"cpu": 512, "cuda": 8192}
"""Rows that run through a layer side by side, by device: on a CPU more of them leave its cache and take longer each."""


def versions_at_once(replica: Replica, rows: int) -> int:
    """How many versions of so many rows should run through a layer side by side."""
    return max(1, _ROWS.get(replica.device.type, _ROWS["cpu"]) // rows)


class Meant:
    """The target function of one target, read off changed residual streams.

    A contrast keeps one foil at each position, the runner-up of the unchanged model where the context names none, so
    that values under different changes can be compared.

    Args:
        context: Replica, trace and target function.
        target: The target.
        captured: Its sequence, captured up to the last layer.
    """

    def __init__(self, context: Context, target: Target, captured: Captured) -> None:
        self._replica = context.replica
        self._function = context.target_function
        ids = context.recorded.sequences[target.sequence].token_ids[target.start : target.end]
        self._tokens = torch.as_tensor(ids, device=context.replica.device)
        self._foils = torch.empty_like(self._tokens)
        rows = captured.inputs[captured.layers.stop][target.start - 1 : target.end - 1]
        if self._function == "contrast":
            self._foils[:] = self._runners_up(rows) if context.foil is None else context.foil
        with torch.no_grad():
            self.value = float(self(rows))

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """The target function, summed over the target's tokens.

        Args:
            hidden: The residual stream behind the last layer at the rows that predict the target,
                ``(..., tokens, width)``.

        Returns:
            ``(...)`` in float64, nats.
        """
        flat = hidden.reshape(-1, *hidden.shape[-2:])
        step = max(1, _LOGITS // (self._replica.vocabulary * flat.shape[1]))
        return torch.cat([self._each(part).double().sum(-1) for part in torch.split(flat, step)]).reshape(
            hidden.shape[:-2]
        )

    def _each(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = self._replica.final_norm(hidden)
        match self._function:
            case "logprob":
                return objective(self._replica.unembed(rows), self._tokens, function="logprob", foil=None)
            case "logit":
                return self._replica.unembed_tokens(rows, self._tokens)
            case "contrast":
                chosen, foils = (self._replica.unembed_tokens(rows, ids) for ids in (self._tokens, self._foils))
                return chosen - foils

    def _runners_up(self, rows: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return runner_up(self._replica.unembed(self._replica.final_norm(rows)), self._tokens)


def captured_targets(
    context: Context, targets: Sequence[Target], layers: range
) -> Iterator[tuple[Target, Captured, Meant]]:
    """Targets with what was captured of their sequences; targets of one sequence share a pass.

    Args:
        context: Replica, trace, cancellation and cost.
        targets: Any order; they come back by sequence.
        layers: The layers to keep; the last one is the model's last.

    Raises:
        PromptTooLongError: A sequence is longer than the replica's context.
        CancelledError: Somebody stopped it.
        EngineUnavailableError: Memory ran out.
    """
    by_sequence: dict[int, list[Target]] = {}
    for target in targets:
        by_sequence.setdefault(target.sequence, []).append(target)
    for number, own in by_sequence.items():
        ids = context.recorded.sequences[number].token_ids[: max(target.end for target in own) - 1]
        with context.cost.timed():
            captured = capture(context.replica, ids, layers=layers, cancel=context.cancel)
        context.cost.forward_tokens += len(ids)
        for target in own:
            context.check_cancel()
            with context.cost.timed():
                meant = Meant(context, target, captured)
            yield target, captured, meant
