"""Small random models of every supported family, made from their configurations; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 97
LAYERS = 3
HEADS = 4
WIDTH = 32

_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SHAPE: dict[str, Any] = {
    **_SPECIAL,
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 128,
}
_GROUPED: dict[str, Any] = {**_SHAPE, "num_key_value_heads": 2}
_GEMMA: dict[str, Any] = {**_GROUPED, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}

_MAKE: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, _GROUPED),
    "mistral_window": (MistralForCausalLM, MistralConfig, {**_GROUPED, "sliding_window": 6}),
    "qwen2_tied": (Qwen2ForCausalLM, Qwen2Config, {**_GROUPED, "tie_word_embeddings": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**_GROUPED, "head_dim": 8}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, _GEMMA),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {**_GEMMA, "sliding_window_pattern": 2}),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config,
        {
            **_SPECIAL,
            "vocab_size": VOCABULARY,
            "n_embd": WIDTH,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_positions": 128,
        },
    ),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, _SHAPE),
    "gpt_neox_serial": (GPTNeoXForCausalLM, GPTNeoXConfig, {**_SHAPE, "use_parallel_residual": False}),
    "opt": (
        OPTForCausalLM,
        OPTConfig,
        {
            **{key: value for key, value in _SHAPE.items() if key != "intermediate_size"},
            "ffn_dim": 48,
            "word_embed_proj_dim": WIDTH,
        },
    ),
    "phi": (PhiForCausalLM, PhiConfig, _GROUPED),
    "phi3": (Phi3ForCausalLM, Phi3Config, _GROUPED),
}
FAMILIES = tuple(_MAKE)


def tiny_model(family: str, *, seed: int = 0) -> Any:
    """A causal language model with random weights that are large enough for attention to be far from uniform."""
    kind, configuration, arguments = _MAKE[family]
    model = kind(configuration(**arguments)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(0.3 * noise)
            else:
                parameter.add_(0.1 * noise)
    return model
