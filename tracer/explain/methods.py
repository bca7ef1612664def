"""The methods by name; imports no torch, so that they can be listed at once."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, cast

from pydantic import JsonValue

from tracer.errors import InputError, UnknownNameError
from tracer.explain.base import Family, Method, Request

if TYPE_CHECKING:
    from tracer.replay.model import Replica

    Prepare = Callable[[Request, Replica], Request]

_FAMILIES = {
    "gradient": "tracer.explain.attribution.gradient",
    "rpi": "tracer.explain.attribution.path_attention",
    "attention": "tracer.explain.attribution.attention",
    "flow": "tracer.explain.attribution.flow",
    "ablation": "tracer.explain.attribution.ablation",
    "at2": "tracer.explain.attribution.at2",
    "contrastive": "tracer.explain.attribution.contrastive",
    "decomposition": "tracer.explain.attribution.decomposition",
    "reading": "tracer.explain.attribution.reading",
    "patching": "tracer.explain.attribution.patching",
    "chance": "tracer.explain.attribution.chance",
}
"""Modules whose ``run`` is the family's `tracer.explain.base.Family`."""
_PREPARED = frozenset({"at2"})
"""Families whose modules have a ``prepare`` as well."""

_NATS = "nats"
_SHARE = "share of attention"
_RESIDUAL = "share of the residual"

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(
            "grad_x_input",
            "gradient",
            "gradient of the target times the input embedding, summed over its width",
            _NATS,
            True,
            "moderate",
            "Denil et al. 2014, arXiv:1412.6815; Shrikumar et al. 2016, arXiv:1605.01713",
            follows=True,
        ),
        Method(
            "grad_l1",
            "gradient",
            "L1 norm of the target's gradient at the input embedding",
            "nats per unit of the embedding",
            False,
            "moderate",
            "Simonyan et al. 2013, arXiv:1312.6034",
            follows=True,
        ),
        Method(
            "grad_l2",
            "gradient",
            "L2 norm of the target's gradient at the input embedding",
            "nats per unit of the embedding",
            False,
            "moderate",
            "Simonyan et al. 2013, arXiv:1312.6034",
            follows=True,
        ),
        Method(
            "integrated_gradients",
            "gradient",
            "gradients on the straight path from a baseline to the input; they add up to the target's change on it",
            _NATS,
            True,
            "slow",
            "Sundararajan et al. 2017, arXiv:1703.01365, equation 1",
            {"points": 16, "baseline": "zero"},
            follows=True,
        ),
        Method(
            "rpi",
            "rpi",
            "gradients integrated over attention from randomised baselines",
            _NATS,
            True,
            "slow",
            "Barkan et al. 2024, Findings of EMNLP, 2024.findings-emnlp.551",
            {"samples": 24, "points": 30, "layer": -3},
            follows=True,
        ),
        Method(
            "attention",
            "attention",
            "attention weights of the tokens that predict the target, mean over heads and layers or one layer",
            _SHARE,
            False,
            "cheap",
            "Bahdanau et al. 2015, arXiv:1409.0473; Vaswani et al. 2017, arXiv:1706.03762, equation 1",
            {"layer": None},
        ),
        Method(
            "attention_rollout",
            "attention",
            "attention multiplied through the layers, half of each layer passing by; mostly rests on the first token",
            _SHARE,
            False,
            "cheap",
            "Abnar & Zuidema 2020, arXiv:2005.00928, section 3.1",
        ),
        Method(
            "attention_rollout_sinkless",
            "attention",
            "rollout with the columns of attention sinks removed and rows scaled back to one; early tokens still lead",
            _SHARE,
            False,
            "cheap",
            "Abnar & Zuidema 2020, arXiv:2005.00928; sinks: Xiao et al. 2023, arXiv:2309.17453",
            {"sink_share": 0.02, "sink_factor": 3.0},
        ),
        Method(
            "attention_product",
            "attention",
            "attention multiplied through the layers without the part that passes by; ends on the first token",
            _SHARE,
            False,
            "cheap",
            "Wu et al. 2025, arXiv:2502.01951 (position bias, cumulative product)",
        ),
        Method(
            "attention_resolvent",
            "attention",
            "attention over any number of hops, each hop weighing less",
            _SHARE,
            False,
            "cheap",
            "Fagnou et al. 2024, arXiv:2410.05565 (ChaCAL)",
            {"decay": 0.5},
        ),
        Method(
            "attention_flow",
            "flow",
            "largest flow from the target to a source through the layers; each source has the network for itself",
            "flow for each token of the target",
            False,
            "slow",
            "Abnar & Zuidema 2020, arXiv:2005.00928, section 3.2",
            {"max_tokens": 512},
        ),
        Method(
            "leave_one_out",
            "ablation",
            "what the target's log-probability loses when one source is taken away",
            _NATS,
            True,
            "moderate",
            "Li et al. 2016, arXiv:1612.08220",
            {"removal": "delete", "kinds": None, "backend": "replica"},
        ),
        Method(
            "contextcite",
            "ablation",
            "coefficients of a sparse linear model of the target's logit over random removals",
            "logits",
            True,
            "moderate",
            "Cohen-Wang et al. 2024, arXiv:2409.00729, section 3",
            {"ablations": 64, "penalty": 0.01, "removal": "delete", "kinds": None, "backend": "replica"},
        ),
        Method(
            "shapley",
            "ablation",
            "mean gain from adding a source, over all orders or a sample of them",
            _NATS,
            True,
            "slow",
            "Shapley 1953; Strumbelj & Kononenko 2014 (sampling)",
            {"orders": 32, "removal": "delete", "kinds": None, "backend": "replica"},
        ),
        Method(
            "at2",
            "at2",
            "attention with a weight for each head that was learned from ablations; of other models than the demo, by "
            "`tracer at2 fit`",
            "weighted share of attention",
            True,
            "cheap",
            "Cohen-Wang et al. 2025, arXiv:2504.13752, section 3",
            {"path": None, "fit": None},
        ),
        Method(
            "mirage",
            "contrastive",
            "tokens that documents and observations changed, each contrasted with what was likeliest without them, by "
            "the norm of the gradient",
            "logits per unit of the embedding",
            False,
            "moderate",
            "Qi et al. 2024, arXiv:2406.13663; Sarti et al. 2024, arXiv:2310.01188",
            {"deviations": 1.0, "threshold": None, "removal": "delete", "kinds": "document+observation"},
        ),
        Method(
            "mirage_signed",
            "contrastive",
            "mirage with gradient times input, so that what spoke for the likeliest other token counts against it",
            "logits",
            True,
            "moderate",
            "Qi et al. 2024, arXiv:2406.13663; Sarti et al. 2024, arXiv:2310.01188",
            {"deviations": 1.0, "threshold": None, "removal": "delete", "kinds": "document+observation"},
        ),
        Method(
            "alti",
            "decomposition",
            "each token's share in the residual stream behind attention, multiplied through the layers",
            _RESIDUAL,
            False,
            "moderate",
            "Ferrando et al. 2022, arXiv:2203.04212",
        ),
        Method(
            "alti_logit",
            "decomposition",
            "what attention added to the target's logits, handed on to the input; feed-forward parts are told apart",
            "logits",
            True,
            "moderate",
            "Ferrando et al. 2023, arXiv:2305.12535",
            follows=True,
        ),
        Method(
            "span",
            "decomposition",
            "share in the whole target's residual stream; what falls on earlier steps is handed on to what they read",
            _RESIDUAL,
            False,
            "cheap",
            "FlashTrace 2026 (span form with recursive hops)",
            {"hops": 1},
        ),
        Method(
            "two_hop",
            "reading",
            "what the target attends to, and what that attended to when it was read",
            _SHARE,
            False,
            "cheap",
            "two-hop reading (METHODS of this project)",
            {"first_hop": 8, "layer": None, "sink_share": 0.02, "sink_factor": 3.0},
        ),
        Method(
            "head_patching",
            "patching",
            "what the heads read that change the target when they are silenced, and the heads that change those",
            _SHARE,
            False,
            "slow",
            "Wang et al. 2022, arXiv:2211.00593, section 3.1 (path patching)",
            {
                "group_a": 8,
                "group_b": 8,
                "first_hop": 8,
                "ablation": "zero",
                "sink_share": 0.02,
                "sink_factor": 3.0,
            },
            follows=True,
        ),
        Method(
            "random",
            "chance",
            "values drawn at random, to compare the others with",
            "none",
            True,
            "cheap",
            "the baseline of every table",
        ),
    )
}

DEFAULT_METHODS = ("at2", "two_hop")
"""The most faithful for their cost on the bundled runs, of questions over documents and of reasoning, that run on every
architecture and are better than random on both: `make bench` measures it. Without fitted weights AT2 is left out."""


def find(name: str) -> Method:
    """The method of that name.

    Raises:
        UnknownNameError: There is none.
    """
    method = METHODS.get(name)
    if method is None:
        raise UnknownNameError("method", name, METHODS)
    return method


def request(name: str, parameters: Mapping[str, JsonValue] | None = None) -> Request:
    """A method with all of its parameters, those not given at their defaults.

    Raises:
        UnknownNameError: There is no such method.
        InputError: It has no such parameter.
    """
    method = find(name)
    given = dict(parameters or {})
    if unknown := sorted(set(given) - set(method.parameters)):
        known = ", ".join(method.parameters) or "none"
        raise InputError(f"the method {name} has no parameter {unknown[0]!r}; it has: {known}")
    return Request(method, {**method.parameters, **given})


def family_of(requests: Iterable[Request]) -> dict[str, list[Request]]:
    """Requests by family, in the order in which the families are first asked for."""
    families: dict[str, list[Request]] = {}
    for item in requests:
        families.setdefault(item.method.family, []).append(item)
    return families


def load_family(name: str) -> Family:
    """The function that runs a family; imports torch."""
    return cast("Family", importlib.import_module(_FAMILIES[name]).run)


def prepare(item: Request, replica: Replica) -> Request:
    """Fill in what a request leaves to the model at hand; imports torch.

    Raises:
        InputError: The method cannot be used with this model as it is.
    """
    if item.method.family not in _PREPARED:
        return item
    fill_in: Prepare = importlib.import_module(_FAMILIES[item.method.family]).prepare
    return fill_in(item, replica)
