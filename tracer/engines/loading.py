"""Loading a transformers model, with failures that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import logging as transformers_logging

from tracer.errors import EngineUnavailableError, InputError, ModelError

DTYPES = ("float32", "bfloat16", "float16")


def load_weights(folder: Path, *, dtype: str, device: torch.device) -> Any:
    """The causal language model of a folder, ready for inference; only safetensors are read, no code is run.

    Args:
        folder: Configuration and safetensors.
        dtype: One of `DTYPES`.
        device: Where to put it.

    Raises:
        ModelError: The weights are missing or incomplete, or transformers does not know the architecture.
        EngineUnavailableError: They do not fit in memory, or there is no such device.
    """
    auto: Any = AutoModelForCausalLM
    try:
        with _quiet():
            model, report = auto.from_pretrained(
                str(folder),
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
        if missing := sorted(report["missing_keys"]):
            raise ModelError(f"{folder} lacks the weight {missing[0]} ({len(missing)} in all); fetch the model again")
        model.requires_grad_(False)
        model = model.to(device).eval()
    except (MemoryError, RuntimeError, AssertionError) as error:
        if out_of_memory(error):
            raise EngineUnavailableError(
                f"{folder} does not fit in the memory of {device} as {dtype}; use dtype bfloat16 or a smaller model"
            ) from None
        raise ModelError(f"the model in {folder} cannot be loaded on {device}: {_first_line(error)}") from None
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the model in {folder} cannot be loaded: {_first_line(error)}") from None
    return model


def fast_dtype() -> str:
    """The precision in which this machine runs a model fastest: bfloat16 where it multiplies that in hardware."""
    if torch.cuda.is_available():
        return "bfloat16"
    known = torch.cpu.get_capabilities()
    return "bfloat16" if known.get("amx_bf16") or known.get("avx512_bf16") else "float32"


def use_batched_linear(model: torch.nn.Module) -> None:
    """Switch a float32 model on the CPU to linear layers that are fast for a few rows; it has no gradient then."""
    for module in model.modules():
        if type(module) is torch.nn.Linear and (module.weight.device.type, module.weight.dtype) == (
            "cpu",
            torch.float32,
        ):
            module.__class__ = BatchedLinear


class BatchedLinear(torch.nn.Linear):
    """A float32 linear layer for the CPU that is fast for a handful of rows, as decoding has them.

    The library's default product takes 2.6 times as long for 8 rows as for one; oneDNN's takes 1.8 times (measured on
    the demo model), and is no slower on long prompts. For one or two rows the default is the faster one.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply the layer; inference only, since the operator has no gradient."""
        if _ONEDNN_LINEAR is None or input.numel() < 3 * input.shape[-1]:
            return super().forward(input)
        output: torch.Tensor = _ONEDNN_LINEAR(input, self.weight, self.bias, "none", [], "")
        return output


# None in builds of torch without oneDNN.
_ONEDNN_LINEAR: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def layer_count(config: PreTrainedConfig) -> int:
    """How many layers keep keys and values.

    Raises:
        ModelError: Some layers keep something else, which cannot be cut back to a shared prefix.
    """
    layers = DynamicCache(config=config).layers
    odd = {type(layer).__name__ for layer in layers if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)}
    if odd:
        raise ModelError(
            f"the architecture {config.model_type} keeps a recurrent or indexed state, which the in-process engine "
            "does not support; serve it with vLLM"
        )
    return len(layers)


def context_length_of(config: PreTrainedConfig, limit: int | None) -> int:
    """Tokens that fit in the context.

    Args:
        config: The model's configuration.
        limit: A smaller number that the caller wants, or the only one where the configuration names none.

    Raises:
        InputError: The limit is not positive.
        ModelError: Neither names a number.
    """
    if limit is not None and limit < 1:
        raise InputError(f"context_length is {limit}; it must be at least 1")
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    known = [value for value in (own, limit) if value]
    if not known:
        raise ModelError("the model's configuration names no context length; give context_length")
    return int(min(known))


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on a GPU or in this machine."""
    text = str(error).lower()
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "not enough memory" in text
        or "allocate memory" in text
        or "out of memory" in text
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from writing to the terminal, which belongs to the caller."""
    logging: Any = transformers_logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
