"""Where decoder-only architectures keep their parts: the one table, checked numerically when a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tracer.errors import ModelError


@dataclass(frozen=True, slots=True)
class Architecture:
    """Paths to the parts of a causal language model; those below ``layers`` start at a layer.

    Args:
        layers: The list of decoder layers, from the causal model.
        final_norm: The norm before the unembedding, from the causal model; ``None`` where there is none.
        attention: The attention block.
        out_projection: From the attention block: what mixes the concatenated heads back into the residual stream.
        attention_norm: The norm of what attention reads.
        attention_out: What is added to the residual stream for attention.
        mlp_out: What is added to it for the feed-forward block.
        gated_rms: Whether the layer is a pre-norm RMSNorm one whose attention has separate projections ``q_proj``,
            ``k_proj``, ``v_proj``, ``o_proj`` and adds straight to the residual stream, as ALTI's derivation needs.
    """

    layers: str
    final_norm: str | None
    attention: str
    out_projection: str
    attention_norm: str
    attention_out: str
    mlp_out: str
    gated_rms: bool = False


_LLAMA = Architecture(
    layers="model.layers",
    final_norm="model.norm",
    attention="self_attn",
    out_projection="o_proj",
    attention_norm="input_layernorm",
    attention_out="self_attn",
    mlp_out="mlp",
    gated_rms=True,
)
_GEMMA = replace(
    _LLAMA, attention_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm", gated_rms=False
)
_TABLE: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": replace(_LLAMA, gated_rms=False),
    "phi": replace(_LLAMA, final_norm="model.final_layernorm", out_projection="dense", gated_rms=False),
    "gpt2": Architecture(
        layers="transformer.h",
        final_norm="transformer.ln_f",
        attention="attn",
        out_projection="c_proj",
        attention_norm="ln_1",
        attention_out="attn",
        mlp_out="mlp",
    ),
    "gpt_neox": Architecture(
        layers="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        attention="attention",
        out_projection="dense",
        attention_norm="input_layernorm",
        attention_out="attention",
        mlp_out="mlp",
    ),
    "opt": Architecture(
        layers="model.decoder.layers",
        final_norm="model.decoder.final_layer_norm",
        attention="self_attn",
        out_projection="out_proj",
        attention_norm="self_attn_layer_norm",
        attention_out="self_attn",
        mlp_out="fc2",
    ),
}


def architecture_of(model_type: str) -> Architecture:
    """The table's entry for a model type of transformers.

    Raises:
        ModelError: There is none.
    """
    found = _TABLE.get(model_type)
    if found is None:
        raise ModelError(
            f"the architecture {model_type!r} cannot be replayed; known: {', '.join(sorted(_TABLE))}. "
            "Others need an entry in tracer/replay/architectures.py"
        )
    return found


def part(module: Any, path: str) -> Any:
    """The submodule at a dotted path.

    Raises:
        ModelError: There is none, so the table is wrong about this model.
    """
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            raise ModelError(f"the model has no part {path!r}; tracer's table does not fit this version of it")
    return module
