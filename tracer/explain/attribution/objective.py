"""The scalar that is explained: how strongly the model meant what it wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tracer.errors import InputError
from tracer.explain.base import TargetFunction

if TYPE_CHECKING:
    from tracer.replay.model import Replica


def objective(
    logits: torch.Tensor, token_ids: torch.Tensor, *, function: TargetFunction, foil: int | None
) -> torch.Tensor:
    """One value for each token; a step's target function is their sum.

    Args:
        logits: Of the positions that predict the tokens, ``(..., tokens, vocabulary)``.
        token_ids: What was written there, ``(tokens,)``.
        function: ``logprob``, ``logit``, or ``contrast``: the token's logit over the foil's.
        foil: The foil's id for ``contrast``; ``None`` takes the runner-up at each position.

    Returns:
        ``(..., tokens)``, nats.
    """
    ids = token_ids.expand(logits.shape[:-1]).unsqueeze(-1)
    chosen = logits.gather(-1, ids).squeeze(-1)
    match function:
        case "logit":
            return chosen
        case "logprob":
            return chosen - logits.logsumexp(-1)
        case "contrast":
            others = torch.full_like(ids, foil) if foil is not None else runner_up(logits, token_ids).unsqueeze(-1)
            return chosen - logits.gather(-1, others).squeeze(-1)


def runner_up(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """The likeliest token other than the one that was written, ``(..., tokens)``."""
    best = logits.detach().topk(2, dim=-1).indices
    return torch.where(best[..., 0] == token_ids, best[..., 1], best[..., 0])


def check_foil(replica: Replica, foil: int | None) -> None:
    """Refuse a foil that is no token.

    Raises:
        InputError: It is outside the vocabulary.
    """
    if foil is not None and not 0 <= foil < replica.vocabulary:
        raise InputError(f"the foil is token {foil}, but the vocabulary has {replica.vocabulary}")
