"""Contrastive attribution of the tokens that the context changed: MIRAGE, the form of PECoRe for retrieved documents.

The context of a target is what it read of documents and observations, or of the kinds that were asked for. Two passes
over the target's own tokens, one with the context and one without it, give two distributions for each token t, and

    m_t = KL(P_with || P_without)

over the whole vocabulary (Qi et al. 2024, arXiv:2406.13663, step 1; Sarti et al. 2024, arXiv:2310.01188, its metrics of
context-sensitive token identification). Tokens with m_t of at least the mean plus ``deviations`` (population) standard
deviations over the target depend on the context. Where none reaches that, which happens in short targets, the highest
is kept; a difference that is rounding never is.

For each kept token the difference of two logits, both with the context, is differentiated: that of the token over that
of its foil, the likeliest *other* token without the context. Where the model would have written something else without
it, the foil is the token that it preferred, as in the papers. Where it would have written the same, less surely, a
contrast of the token with itself is zero, though the context did matter (Sarti et al. want it seen and turn to the
gradient of the divergence): here the second choice without the context stands in, so that it stays one contrast of two
tokens that a person can read. The papers differentiate probabilities, whose gradient vanishes near 1; that of logits
does not.

``mirage`` scores a token by the L2 norm of that gradient at its embedding, as the papers do: unsigned, it says that a
document mattered and not for which of the two. ``mirage_signed`` takes gradient times input instead, so that what spoke
for the foil counts against it. In models that normalise what each layer reads, the gradient is all but orthogonal to
the input of the first one (scaling an embedding changes little), so that signed sums are small and mostly noise: of the
two it is the second choice. Scores add up over the kept tokens and over the tokens of a source. Every token before the
target has one; those of the context are what citations are made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import JsonValue

from tracer.errors import InputError, ModelError
from tracer.explain.attribution.ablation import removal_parameters
from tracer.explain.attribution.backward import Gradients, gradients
from tracer.explain.attribution.gradient import ON_INPUT, ids_read, padded
from tracer.explain.attribution.parameters import number
from tracer.explain.base import Context, Finding, Request
from tracer.explain.removal import Removal, batches, placed_tree, removable
from tracer.replay.forward import Wanted, replay
from tracer.replay.model import Replica
from tracer.replay.recorded import Target

CONTRAST = "logit of the token over that of its foil, the likeliest other token without the context"
_SCORES = {"mirage": ON_INPUT["grad_l2"], "mirage_signed": ON_INPUT["grad_x_input"]}
_ROUNDING = 1e-6
"""Nats of divergence that float32 logits cannot tell from none."""
_LOGITS = 1 << 23
"""Logits in float64 that are held at once for each of the two distributions: 64 MiB."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """How the context changes the distribution of each token of a target.

    Args:
        kl: KL(P_with || P_without), ``(tokens,)``, nats.
        preferred: The likeliest token without the context, ``(tokens,)``.
        foils: The likeliest one other than what was written, ``(tokens,)``.
    """

    kl: NDArray[np.float64]
    preferred: NDArray[np.int64]
    foils: NDArray[np.int64]


@dataclass(slots=True)
class _Reading:
    """What is known of one target, for methods that differ only in what they make of the gradient."""

    items: Sequence[Request]
    removal: Removal
    without: torch.Tensor
    divergence: Divergence = field(init=False)
    threshold: float = field(init=False)
    kept: NDArray[np.int64] = field(init=False)
    inputs: torch.Tensor = field(init=False)
    contrasts: list[float] = field(init=False, default_factory=list)
    scores: dict[str, list[NDArray[np.float32]]] = field(init=False)
    """For each method the token scores of the kept tokens, each ``(target.end,)``."""

    def aims(self, rows: torch.Tensor) -> Sequence[torch.Tensor]:
        """The contrast of each kept token, from the rows that predict the target's with the context."""
        context, written = self.removal.context, self._written()
        self.divergence = divergence(context.replica, rows.detach(), self.without, written)
        self.threshold, self.kept = sensitive(self._judged, self.items[0])
        self.inputs = context.replica.embed(ids_read(context, self.removal.target)).float()
        self.scores = {item.method.name: [] for item in self.items}
        if not len(self.kept):
            return []
        chosen = rows[torch.as_tensor(self.kept, device=rows.device)]
        own, other = (
            context.replica.unembed_tokens(chosen, torch.as_tensor(ids[self.kept], device=rows.device))
            for ids in (written, self.divergence.foils)
        )
        return list((own - other).unbind())

    def add(self, found: Gradients) -> None:
        """Take in the gradient of the next kept token."""
        self.contrasts.append(found.value)
        for name, scores in self.scores.items():
            scores.append(padded(_SCORES[name](found.gradient, self.inputs), self.removal.target))

    @property
    def complete(self) -> bool:
        """Whether all kept tokens were differentiated."""
        return len(self.contrasts) == len(self.kept)

    def findings(self) -> Iterator[Finding]:
        """For each method the sum over the kept tokens, and the table of all."""
        recorded, target, kl = self.removal.context.recorded, self.removal.target, self._judged
        for item in self.items:
            scores = self.scores[item.method.name]
            details: dict[str, JsonValue] = {
                "removal": self.removal.kind,
                "contrast": CONTRAST,
                "context": [recorded.sources[unit].id for unit in self.removal.units],
                "mean": float(kl.mean()) if len(kl) else 0.0,
                "deviation": float(kl.std()) if len(kl) else 0.0,
                "threshold": self.threshold,
                "tokens": [*self._table(scores)],
            }
            total = sum(scores, np.zeros(target.end, dtype=np.float32))
            yield Finding(item, target, total, details)

    def _written(self) -> NDArray[np.int64]:
        target = self.removal.target
        return self.removal.context.recorded.sequences[target.sequence].token_ids[target.start : target.end]

    @property
    def _judged(self) -> NDArray[np.float64]:
        """Divergences of the words: an end-of-sequence token is none, and would be measured against them."""
        tokenizer, kl = self.removal.context.replica.tokenizer, self.divergence.kl
        ended = tokenizer is not None and int(self._written()[-1]) in tokenizer.eos_token_ids
        return kl[:-1] if ended else kl

    def _table(self, scores: Sequence[NDArray[np.float32]]) -> Iterator[dict[str, JsonValue]]:
        context, target = self.removal.context, self.removal.target
        texts = token_texts(context, target)
        places = {int(token): place for place, token in enumerate(self.kept)}
        for index, (token_id, kl) in enumerate(zip(self._written(), self.divergence.kl, strict=True)):
            row: dict[str, JsonValue] = {
                "index": index,
                "token_id": int(token_id),
                "text": texts[index],
                "kl": float(kl),
                "kept": index in places,
            }
            if index in places:
                foil, place = int(self.divergence.foils[index]), places[index]
                by_source = context.recorded.aggregate(target, scores[place])
                row |= {
                    "preferred": int(self.divergence.preferred[index]),
                    "foil": foil,
                    "foil_text": _text_of(context.replica, foil),
                    "contrast": self.contrasts[place],
                    "sources": {
                        context.recorded.sources[unit].id: float(by_source[unit]) for unit in self.removal.units
                    },
                }
            yield row


def run(context: Context, requests: Sequence[Request], targets: Sequence[Target]) -> Iterator[Finding]:
    """Run MIRAGE: two forward passes, and a backward pass for each token that depends on the context.

    A target that read no source of the kinds has no context: its scores are zero.

    Raises:
        InputError: A parameter, the target function or the foil cannot be used.
        CancelledError: Somebody stopped it.
        EngineUnavailableError: Memory ran out.
    """
    if context.target_function != "logprob" or context.foil is not None:
        raise InputError(
            "mirage contrasts each token with what the model preferred without the context, so it takes no target "
            "function and no foil; run it apart from methods that do"
        )
    alike: dict[str, list[Request]] = {}
    for item in requests:
        removal_parameters(item)
        sensitive(np.zeros(1), item)
        alike.setdefault(repr(sorted(item.parameters.items())), []).append(item)
    done = 0
    for items in alike.values():
        for findings in _explain(context, items, targets):
            done += 1
            context.report(done, len(alike) * len(targets))
            yield from findings


def _explain(context: Context, items: Sequence[Request], targets: Sequence[Target]) -> Iterator[Iterable[Finding]]:
    """Findings of methods with the same parameters, target by target."""
    kind, kinds = removal_parameters(items[0])
    removals: list[Removal] = []
    for target in targets:
        if removable(context.recorded, target, kinds):
            removals.append(Removal(context, target, kind=kind, kinds=kinds))
        else:
            nothing = np.zeros(target.end, dtype=np.float32)
            yield [Finding(item, target, nothing, {"context": [], "tokens": []}) for item in items]
    without = rows_without(context, removals)
    readings = {
        removal.target.step_id: _Reading(items, removal, rows) for removal, rows in zip(removals, without, strict=True)
    }
    asked = [removal.target for removal in removals]
    for found in gradients(context, asked, aims=lambda _, target, rows: readings[target.step_id].aims(rows)):
        reading = readings[found.target.step_id]
        reading.add(found)
        if reading.complete:
            yield readings.pop(found.target.step_id).findings()
    for reading in readings.values():
        # No token of these depends on the context.
        yield reading.findings()


def rows_without(context: Context, removals: Sequence[Removal]) -> list[torch.Tensor]:
    """Rows that predict each target's tokens where all of its context is gone; one pass over what they share.

    Returns:
        For each target ``(tokens, width)``, which `Replica.unembed` turns into logits.
    """
    replica = context.replica
    last = len(replica.layers) - 1
    shortened = [removal.shortened(np.zeros(len(removal.units), dtype=bool)) for removal in removals]
    found: list[torch.Tensor] = []
    for batch in batches([len(ids) for ids, _ in shortened]):
        if not batch:
            continue
        ids, positions = zip(*(shortened[number] for number in batch), strict=True)
        tree = placed_tree(
            [item[:-1] for item in ids], [item[:-1] for item in positions], vocabulary=replica.vocabulary
        )
        sizes = [removals[number].target.end - removals[number].target.start for number in batch]
        rows = np.concatenate([places[-size:] for places, size in zip(tree.sequences, sizes, strict=True)])
        with context.cost.timed(), torch.inference_mode():
            out = replay(replica, tree, Wanted(hidden_indices=rows, hidden_layers=[last]), cancel=context.cancel)
            normed = replica.final_norm(out.hidden[0].to(replica.device))
        found += [normed[end - size : end] for size, end in zip(sizes, np.cumsum(sizes).tolist(), strict=True)]
        context.cost.forward_tokens += out.tokens
    return found


@torch.inference_mode()
def divergence(replica: Replica, rows: torch.Tensor, without: torch.Tensor, token_ids: NDArray[np.int64]) -> Divergence:
    """Compare two distributions for each of some tokens, in float64.

    Args:
        replica: Turns rows into logits.
        rows: With the context, ``(tokens, width)``.
        without: Without it, ``(tokens, width)``.
        token_ids: What was written, ``(tokens,)``.

    Raises:
        ModelError: A logit is not finite.
    """
    size = max(1, _LOGITS // replica.vocabulary)
    kl: list[torch.Tensor] = []
    best: list[torch.Tensor] = []
    for start in range(0, len(rows), size):
        with_, less = (replica.unembed(part[start : start + size]).double().log_softmax(-1) for part in (rows, without))
        kl.append((with_.exp() * (with_ - less)).sum(-1).clamp_min(0.0).cpu())
        best.append(less.topk(2, dim=-1).indices.cpu())
    values = torch.cat(kl).numpy()
    if not np.isfinite(values).all():
        raise ModelError("the replica's logits are not finite; use --dtype float32")
    first, second = torch.cat(best).numpy().T
    return Divergence(values, first, np.where(first == token_ids, second, first))


def sensitive(kl: NDArray[np.float64], item: Request) -> tuple[float, NDArray[np.int64]]:
    """Which tokens depend on the context: the threshold in nats, and their indices, ``(kept,)``.

    Raises:
        InputError: The request's ``deviations`` or ``threshold`` cannot be used.
    """
    deviations = number(item, "deviations", least=0.0)
    if not len(kl):
        return 0.0, np.empty(0, dtype=np.int64)
    above_rounding = kl > _ROUNDING
    if item.parameters["threshold"] is not None:
        threshold = number(item, "threshold", least=0.0)
        return threshold, np.flatnonzero(above_rounding & (kl >= threshold))
    threshold = float(kl.mean() + deviations * kl.std())
    # Of two tokens the higher one is exactly at the mean plus one deviation, but for rounding.
    kept = above_rounding & (kl >= min(threshold, kl.max()) * (1 - 1e-9))
    return threshold, np.flatnonzero(kept)


def token_texts(context: Context, target: Target) -> list[str | None]:
    """What each token of a target adds to its text; ``None`` where the replica has no tokenizer."""
    sequence = context.recorded.sequences[target.sequence]
    if context.replica.tokenizer is None:
        return [None] * (target.end - target.start)
    decoded = context.replica.tokenizer.decode(sequence.token_ids[sequence.prompt :].tolist())
    bounds = [0, *decoded.ends]
    places = range(target.start - sequence.prompt, target.end - sequence.prompt)
    return [decoded.text[bounds[place] : bounds[place + 1]] for place in places]


def _text_of(replica: Replica, token_id: int) -> str | None:
    return None if replica.tokenizer is None else replica.tokenizer.decode([token_id]).text
