"""Where the logits of a target's tokens come from: ALTI-Logit (Ferrando et al. 2023, arXiv:2305.12535).

The final norm and the unembedding are linear once the norm's divisor is known, so the logit of a token is the product
of one direction with the residual stream of the row that predicts it, and the stream is a sum: the embedding, and what
attention and the feed-forward block of each layer added. What attention added is a sum over the tokens that it read in
turn, and each of these parts is handed on to the input by the layers below.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import JsonValue

from tracer.explain.attribution.carriers import Product
from tracer.explain.attribution.objective import runner_up
from tracer.explain.attribution.residual import Reading, TreeResidual
from tracer.explain.attribution.tree_attention import Branches
from tracer.explain.base import Context
from tracer.replay.forward import log_softmax_blocks


class LogitUpdates(Product):
    """Carries what each layer's attention added to the targets' logits down to the input.

    Its rows are those of ALTI; a target's parts and their updates by layer are its details. With ``contrast`` as target
    function the logit of a token is its logit over the foil's.

    Args:
        context: Model, target function and foil.
        branches: The targets.
        residual: The residual stream of their tree.
    """

    def __init__(self, context: Context, branches: Branches, residual: TreeResidual) -> None:
        super().__init__(torch.zeros_like(branches.starts(residual.device)), passing=0.0)
        rows, tokens, owners = [], [], []
        for number, target in enumerate(branches.targets):
            places = branches.places(number)[target.start - 1 :]
            rows.append(torch.from_numpy(places[:-1].copy()))
            tokens.append(torch.from_numpy(branches.tree.token_ids[places[1:]]))
            owners.append(torch.full((len(places) - 1,), number))
        device = residual.device
        self._rows, self._owners = torch.cat(rows).to(device), torch.cat(owners).to(device)
        self._residual = residual
        self._added = torch.zeros_like(self._state)
        count = len(branches.targets)
        self._attention, self._mlp = (
            torch.zeros(residual.layers, count, dtype=torch.float64, device=device) for _ in range(2)
        )
        self._directions, self._logits = _directions(context, residual, self._rows, torch.cat(tokens).to(device))
        self._embedding = self._sums(torch.zeros(len(self._rows), dtype=torch.float64, device=device))

    @property
    def rows(self) -> torch.Tensor:
        """Tokens whose attention is read in every layer, ``(tokens,)`` of bool."""
        found = torch.zeros(len(self._state), dtype=torch.bool, device=self._state.device)
        found[self._rows] = True
        return found

    def read(self, layer: int, reading: Reading, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        """Add what attention and the feed-forward block of a layer did to the logits.

        Args:
            layer: The layer.
            reading: What was read in it.
            entering: The residual stream in front of it, ``(tokens, width)``.
            leaving: The residual stream behind it, ``(tokens, width)``.
        """
        block = reading.heads
        chosen = torch.nonzero((self._rows >= block.rows.start) & (self._rows < block.rows.stop))[:, 0]
        if not len(chosen):
            return
        rows, directions = self._rows[chosen], self._directions[chosen]
        inside = rows - block.rows.start
        projected = directions @ self._residual.out_weight(layer)
        attention = (projected.double() * reading.attended[inside].double()).sum(-1)
        change = (directions.double() * (leaving[rows].double() - entering[rows].double())).sum(-1)
        self._attention[layer] += self._sums(attention, chosen)
        self._mlp[layer] += self._sums(change - attention, chosen)
        if layer == 0:
            self._embedding += self._sums((directions.double() * entering[rows].double()).sum(-1), chosen)
        heads, groups = len(block.weights), len(reading.values)
        by_head = projected.view(len(chosen), heads, -1).transpose(0, 1).reshape(groups, -1, reading.values.shape[-1])
        said = (by_head @ reading.values.transpose(1, 2)).view(heads, len(chosen), -1)
        updates = (block.weights[:, inside] * said).sum(0)
        owners = torch.nonzero(self._owners[chosen].bincount())[:, 0]
        member = (self._owners[chosen][:, None] == owners).float()
        self._added[block.columns[:, None], owners] += updates.T @ member

    def descend(self) -> None:
        """Go on with what was handed down, and with what this layer added."""
        super().descend()
        self._state += self._added
        self._added.zero_()

    def details(self, number: int) -> Mapping[str, JsonValue]:
        """The logit and its parts; they and the updates by layer add up to it."""
        attention, mlp = self._attention[:, number].tolist(), self._mlp[:, number].tolist()
        return {
            "logit": float(self._logit[number]),
            "embedding": float(self._embedding[number]),
            "attention": sum(attention),
            "mlp": sum(mlp),
            "attention_by_layer": attention,
            "mlp_by_layer": mlp,
        }

    @property
    def _logit(self) -> torch.Tensor:
        return self._sums(self._logits.double())

    def _sums(self, values: torch.Tensor, chosen: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Sums by target, ``(targets,)``."""
        sums = torch.zeros(self._state.shape[1], dtype=torch.float64, device=values.device)
        return sums.index_add_(0, self._owners[chosen], values)


def _directions(
    context: Context, residual: TreeResidual, rows: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What of the residual stream the logits of tokens are products with, ``(rows, width)``, and the logits themselves.

    The logits come from the model's own norm and unembedding, so that the parts have something to add up to.
    """
    replica = context.replica
    leaving = residual.entering(residual.layers)[rows]
    normed = replica.final_norm(leaving.to(replica.dtype))
    weight = replica.model.get_output_embeddings().weight
    chosen, logits = weight[tokens].float(), replica.unembed_tokens(normed, tokens)
    if context.target_function == "contrast":
        foils = torch.full_like(tokens, -1 if context.foil is None else context.foil)
        if context.foil is None:
            for start, block in log_softmax_blocks(replica, normed):
                here = slice(start, start + len(block))
                foils[here] = runner_up(block, tokens[here])
        chosen, logits = chosen - weight[foils].float(), logits - replica.unembed_tokens(normed, foils)
    module = replica.model.get_submodule(str(replica.architecture.final_norm))
    divisor = torch.rsqrt(leaving.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
    return chosen * module.weight.float() * divisor, logits
