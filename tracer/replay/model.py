"""The replica: a white-box transformers copy of the weights that served a trace."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import JsonValue
from torch import nn

from tracer.engines.loading import DTYPES, context_length_of, load_weights, out_of_memory
from tracer.engines.models import ProgressCallback, resolve
from tracer.engines.tokenizer import load_tokenizer
from tracer.engines.weights.cache import read_manifest, sha256_file
from tracer.engines.weights.identity import chat_template_sha256, tokenizer_sha256
from tracer.errors import EngineUnavailableError, InputError, ModelError
from tracer.replay.architectures import Architecture, architecture_of, part
from tracer.replay.attention import BACKEND, Plan, Slot
from tracer.trace.segments import Tokenizer

_CHECK_TOKENS = 7
_RELATIVE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far the table's sums may be off, relative to the largest value; rounding alone accounts for less."""


class Replica:
    """A causal language model that can be looked into.

    Attributes:
        model: The transformers model, without gradients for its weights.
        architecture: Where its parts are.
        tokenizer: Its tokenizer, or ``None`` for a model that was made in memory.
        identity: What tells these weights in this precision from others; part of every explanation.

    Args:
        model: A causal language model of transformers; its attention backend is replaced.
        tokenizer: Its tokenizer.
        identity: Name and hashes.
        context_length: A smaller limit than the model's own.

    Raises:
        ModelError: The architecture is unknown, or the table's entry does not reproduce what the model computes.
    """

    def __init__(
        self,
        model: Any,
        *,
        tokenizer: Tokenizer | None = None,
        identity: Mapping[str, str | None] | None = None,
        context_length: int | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        config = model.config.get_text_config()
        self.architecture: Architecture = architecture_of(config.model_type)
        self.context_length = context_length_of(model.config, context_length)
        self.layers: Sequence[Any] = list(part(model, self.architecture.layers))
        self.heads = int(config.num_attention_heads)
        self.width = int(config.hidden_size)
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._slot = Slot()
        self._lock = threading.RLock()
        model.set_attn_implementation(BACKEND)
        for number, layer in enumerate(self.layers):
            attention = part(layer, self.architecture.attention)
            attention.tracer_slot, attention.tracer_layer = self._slot, number
        self.identity: dict[str, str | None] = {
            "name": None,
            "weights_sha256": None,
            "tokenizer_sha256": None,
            "chat_template_sha256": None,
            **(identity or {}),
            "architecture": config.model_type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "transformers": transformers.__version__,
            "torch": str(torch.__version__),
        }
        self.additive = False
        self._check()

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: str = "float32",
        device: str | None = None,
        context_length: int | None = None,
        progress: ProgressCallback | None = None,
    ) -> Replica:
        """Load the weights of a model name.

        Args:
            name: ``demo``, a local folder, a GGUF file or a hub id.
            dtype: ``float32``, ``bfloat16`` or ``float16``.
            device: ``None`` takes the GPU where there is one.
            context_length: A smaller limit than the model's own.
            progress: Called often while weights are fetched, converted or hashed.

        Raises:
            InputError: There is no such dtype.
            ModelError: The weights cannot be had, or their architecture is unknown.
            EngineUnavailableError: They do not fit in memory.
        """
        if dtype not in DTYPES:
            raise InputError(f"unknown dtype {dtype!r}; use one of {', '.join(DTYPES)}")
        found = resolve(name, progress=progress)
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(
            load_weights(found.path, dtype=dtype, device=target),
            tokenizer=load_tokenizer(found.path),
            identity={
                "name": name,
                "weights_sha256": weights_sha256(found.path, progress=progress),
                "tokenizer_sha256": tokenizer_sha256(found.path),
                "chat_template_sha256": chat_template_sha256(found.path),
            },
            context_length=context_length,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        found: torch.dtype = self.model.get_input_embeddings().weight.dtype
        return found

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        found: torch.device = self.model.get_input_embeddings().weight.device
        return found

    @property
    def windowed(self) -> bool:
        """Whether some layers read through a sliding window."""
        return self._slot.windowed

    def attention(self, layer: int) -> Any:
        """The attention block of a layer."""
        return part(self.layers[layer], self.architecture.attention)

    def out_projection(self, layer: int) -> Any:
        """What mixes the heads of a layer back into the residual stream."""
        return part(self.layers[layer], f"{self.architecture.attention}.{self.architecture.out_projection}")

    def embed(self, token_ids: Any) -> torch.Tensor:
        """Input embeddings, ``(tokens, width)``, scaled where the architecture scales them."""
        ids = torch.as_tensor(token_ids, dtype=torch.long, device=self.device)
        embeddings: torch.Tensor = self.model.get_input_embeddings()(ids)
        return embeddings

    def forward(self, embeddings: torch.Tensor, positions: Any, plan: Plan) -> torch.Tensor:
        """Run packed tokens through all layers and the final norm.

        Args:
            embeddings: ``(tokens, width)``.
            positions: Position of each token in its own sequence, ``(tokens,)``.
            plan: Which token reads which.

        Returns:
            ``(tokens, width)``, what `unembed` turns into logits.

        Raises:
            EngineUnavailableError: Memory ran out.
        """
        where = torch.as_tensor(positions, dtype=torch.long, device=self.device)[None]
        with self.running(plan):
            output = self.model.base_model(inputs_embeds=embeddings[None], position_ids=where, use_cache=False)
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the norm before the unembedding to a layer output, ``(..., width)``."""
        path = self.architecture.final_norm
        module = None if path is None else part(self.model, path)
        normed: torch.Tensor = hidden if module is None else module(hidden)
        return normed

    def unembed(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``(..., vocabulary)`` in float32 of rows ``(..., width)`` that `forward` returned."""
        return self._capped(self.model.get_output_embeddings()(hidden).float())

    def unembed_tokens(self, hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Logit of one token for each row, in float32.

        Args:
            hidden: Rows that `forward` returned, ``(..., tokens, width)``.
            token_ids: The token of each row, ``(tokens,)``.

        Returns:
            ``(..., tokens)``.
        """
        head = self.model.get_output_embeddings()
        logits = (hidden.float() * head.weight[token_ids].float()).sum(-1)
        bias: torch.Tensor | None = getattr(head, "bias", None)
        return self._capped(logits if bias is None else logits + bias[token_ids].float())

    def _capped(self, logits: torch.Tensor) -> torch.Tensor:
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    @contextmanager
    def running(self, plan: Plan) -> Iterator[None]:
        """Let the attention layers follow a plan; one thread at a time."""
        with self._lock:
            before, self._slot.plan = self._slot.plan, plan
            try:
                yield
            except (MemoryError, RuntimeError) as error:
                if out_of_memory(error):
                    raise memory_error() from None
                raise
            finally:
                self._slot.plan = before

    @contextmanager
    def outputs_of(self, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
        """Collect the residual stream behind layers, each ``(tokens, width)``, before the final norm.

        The dictionary is filled anew by every pass that runs inside the context.
        """
        found: dict[int, torch.Tensor] = {}
        handles = [self.layers[layer].register_forward_hook(_store(found, layer)) for layer in layers]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _check(self) -> None:
        """Compare the table with what the model computes on a few tokens."""
        ids = torch.arange(_CHECK_TOKENS, device=self.device)[None] % self.vocabulary
        seen: dict[str, torch.Tensor] = {}
        last, names = len(self.layers) - 1, self.architecture
        layer = self.layers[last]
        projection = self.out_projection(last)
        handles = [
            layer.register_forward_pre_hook(_input(seen, "before"), with_kwargs=True),
            projection.register_forward_pre_hook(_input(seen, "heads"), with_kwargs=True),
            *(
                module.register_forward_hook(_store(seen, name))
                for name, module in {
                    "after": layer,
                    "attention": part(layer, names.attention),
                    "projected": projection,
                    "attention_out": part(layer, names.attention_out),
                    "mlp_out": part(layer, names.mlp_out),
                }.items()
            ),
        ]
        try:
            logits = self.model(input_ids=ids, use_cache=False).logits[0].float()
        finally:
            for handle in handles:
                handle.remove()
        self._close("the unembedding", self.unembed(self.final_norm(seen["after"])), logits)
        self._close("the out projection", seen["projected"], seen["attention"])
        if seen["heads"].shape[-1] % self.heads:
            raise ModelError("the heads do not divide what the out projection reads; tracer's table does not fit")
        # Post-norm models (OPT-350m) are not additive: methods that split the residual stream refuse them.
        total = seen["before"] + seen["attention_out"] + seen["mlp_out"]
        self.additive = self._distance(total, seen["after"]) <= _RELATIVE[self.dtype]

    def _distance(self, found: torch.Tensor, expected: torch.Tensor) -> float:
        return float((found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-6))

    def _close(self, what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
        distance = self._distance(found, expected)
        if not distance <= _RELATIVE[self.dtype]:
            raise ModelError(
                f"tracer's table of architectures does not fit this model: {what} is off by {distance:.1e} of its "
                "largest value; explanations of it would be wrong"
            )


def weights_sha256(folder: Path, *, progress: ProgressCallback | None = None) -> str:
    """SHA-256 over the weight files of a folder: taken from its manifest where there is one, computed otherwise."""
    manifest = read_manifest(folder)
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        known = manifest.files.get(path.name) if manifest else None
        digest.update(f"{path.name}:{known[1] if known else sha256_file(path, progress=progress)}\n".encode())
    return digest.hexdigest()


def identity_of(replica: Replica) -> dict[str, JsonValue]:
    """A replica's identity with the hash of its weights; those that came from no file are hashed as they are."""
    weights = replica.identity["weights_sha256"]
    return {**replica.identity, "weights_sha256": weights or _fingerprint(replica.model)}


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def memory_error() -> EngineUnavailableError:
    """What to raise where memory ran out, with what lowers the need for it."""
    return EngineUnavailableError(
        "memory ran out during the replay; explain fewer targets (--targets answer), use --dtype bfloat16, "
        "or set --low-memory, which recomputes instead of keeping"
    )


def first_tensor(output: Any) -> torch.Tensor:
    """The tensor of a module's output, without the batch dimension of one."""
    tensor = output[0] if isinstance(output, tuple) else output
    found: torch.Tensor = tensor[0] if tensor.dim() == 3 else tensor
    return found


def _store(found: dict[Any, torch.Tensor], key: Any) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        found[key] = first_tensor(output)

    return hook


def _input(found: dict[Any, torch.Tensor], key: Any) -> Any:
    def hook(_module: nn.Module, inputs: Any, kwargs: Any) -> None:
        found[key] = first_tensor(inputs[0] if inputs else kwargs["hidden_states"])

    return hook
