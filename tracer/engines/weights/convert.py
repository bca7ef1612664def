"""Turn a GGUF file into a folder of bfloat16 safetensors that vLLM and transformers load.

The qwen2 architecture has a streaming path of its own: chunks are decoded by a few threads and written in order, so
that memory stays small and two cores need seconds. Every other architecture goes through transformers' GGUF loader.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np

from tracer.engines.weights.cache import ProgressCallback, report
from tracer.engines.weights.dequantise import to_bfloat16_bits, to_float32
from tracer.engines.weights.gguf import GgufFile, GgufTensor
from tracer.errors import ModelError

WEIGHTS: Final = "model.safetensors"
# The published Qwen2 tokenizer's pre-tokenisation pattern.
_QWEN2_PATTERN: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TOP: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER: Final = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Token types, as text: control, user-defined, unused.
_CONTROL, _USER_DEFINED, _UNUSED = "3", "4", "5"
_IN_FLIGHT: Final = 8


def qwen2_name(name: str) -> str | None:
    """Return the transformers name of a qwen2 GGUF tensor, or None when it has none."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        part = _LAYER.get(match[2])
        return part and f"model.layers.{match[1]}.{part}.{match[3]}"
    if match := re.fullmatch(r"(\w+)\.weight", name):
        part = _TOP.get(match[1])
        return part and f"{part}.weight"
    return None


def has_fast_path(file: GgufFile) -> bool:
    """Whether the streaming path handles this file's architecture and tensors."""
    return file.architecture == "qwen2" and all(qwen2_name(tensor.name) is not None for tensor in file.tensors)


def _has_qwen2_tokenizer(file: GgufFile) -> bool:
    kind = (file.metadata.get("tokenizer.ggml.model"), file.metadata.get("tokenizer.ggml.pre"))
    return kind == ("gpt2", "qwen2")


def convert(gguf: Path, folder: Path, *, progress: ProgressCallback | None = None) -> str | None:
    """Write config, tokenizer, generation config and bfloat16 weights of a GGUF file into a folder.

    Args:
        gguf: The GGUF file.
        folder: An existing, empty folder.
        progress: Called with stage ``"convert"`` and the bytes of weights written.

    Returns:
        The SHA-256 of the weights file, where it was computed in passing.

    Raises:
        ModelError: The file is damaged, or its architecture is not supported.
    """
    with GgufFile(gguf) as file:
        if not has_fast_path(file):
            report(progress, "convert", 0, sum(2 * tensor.n_elements for tensor in file.tensors))
            _convert_with_library(file, folder)
            return None
        config = qwen2_config(file)
        _check_shapes(file, config)
        _write_json(folder / "config.json", config)
        _write_json(folder / "generation_config.json", _generation_config(file))
        if _has_qwen2_tokenizer(file):
            write_tokenizer(file, folder)
        else:
            _tokenizer_with_library(gguf, folder)
        return _write_weights(file, folder / WEIGHTS, progress)


def qwen2_config(file: GgufFile) -> dict[str, object]:
    """Return ``config.json`` in the form of the published Qwen2.5 models, which every loader reads.

    Args:
        file: A GGUF file of the qwen2 architecture.

    Raises:
        ModelError: A value is missing.
    """

    def whole(key: str) -> int:
        return int(file.number(f"qwen2.{key}"))

    def decimal(key: str) -> float:
        # The shortest decimal of the stored float32: 1e-06, not 9.999999974752427e-07.
        return float(str(np.float32(file.number(f"qwen2.{key}"))))

    heads = whole("attention.head_count")
    shapes = {tensor.name: tensor.shape for tensor in file.tensors}
    if "token_embd.weight" not in shapes:
        raise ModelError(f"{file.path} holds no token_embd.weight; it is not a complete model")
    config: dict[str, object] = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": _token_id(file, "bos"),
        "eos_token_id": _token_id(file, "eos"),
        "hidden_act": "silu",
        "hidden_size": whole("embedding_length"),
        "initializer_range": 0.02,
        "intermediate_size": whole("feed_forward_length"),
        "max_position_embeddings": whole("context_length"),
        "max_window_layers": whole("block_count"),
        "model_type": "qwen2",
        "num_attention_heads": heads,
        "num_hidden_layers": whole("block_count"),
        "num_key_value_heads": int(file.number("qwen2.attention.head_count_kv", heads)),
        "pad_token_id": _token_id(file, "padding"),
        "rms_norm_eps": decimal("attention.layer_norm_rms_epsilon"),
        "rope_theta": decimal("rope.freq_base"),
        "sliding_window": None,
        "tie_word_embeddings": "output.weight" not in shapes,
        "torch_dtype": "bfloat16",
        # The version whose format this is. Without it, transformers 5 takes a Qwen tokenizer for a Mistral one.
        "transformers_version": "4.44.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shapes["token_embd.weight"][0],
    }
    scaling = file.metadata.get("qwen2.rope.scaling.type", "none")
    if scaling != "none":
        config["rope_scaling"] = {
            "rope_type": scaling,
            "factor": decimal("rope.scaling.factor"),
            "original_max_position_embeddings": int(
                file.number("qwen2.rope.scaling.original_context_length", whole("context_length"))
            ),
        }
    return config


def _check_shapes(file: GgufFile, config: dict[str, object]) -> None:
    """Fail before the conversion if a tensor that the model needs is missing or has another shape."""
    hidden, inner = int(str(config["hidden_size"])), int(str(config["intermediate_size"]))
    heads, kv_heads = int(str(config["num_attention_heads"])), int(str(config["num_key_value_heads"]))
    vocab, layers = int(str(config["vocab_size"])), int(str(config["num_hidden_layers"]))
    if not heads or hidden % heads:
        raise ModelError(f"{file.path}: {hidden} dimensions cannot be shared by {heads} attention heads")
    kv = hidden // heads * kv_heads
    expected = {"token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,)}
    layer = {
        "attn_norm.weight": (hidden,),
        "ffn_norm.weight": (hidden,),
        "attn_q.weight": (hidden, hidden),
        "attn_k.weight": (kv, hidden),
        "attn_v.weight": (kv, hidden),
        "attn_q.bias": (hidden,),
        "attn_k.bias": (kv,),
        "attn_v.bias": (kv,),
        "attn_output.weight": (hidden, hidden),
        "ffn_gate.weight": (inner, hidden),
        "ffn_up.weight": (inner, hidden),
        "ffn_down.weight": (hidden, inner),
    }
    expected |= {f"blk.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    found = {tensor.name: tensor.shape for tensor in file.tensors}
    if "output.weight" in found:
        expected["output.weight"] = (vocab, hidden)
    for name, shape in expected.items():
        if found.get(name) != shape:
            raise ModelError(f"{file.path}: tensor {name} should have shape {shape}, found {found.get(name)}")
    if extra := found.keys() - expected.keys():
        raise ModelError(f"{file.path} holds the unexpected tensor {min(extra)}")


def _token_id(file: GgufFile, role: str) -> int | None:
    value = file.metadata.get(f"tokenizer.ggml.{role}_token_id")
    return value if isinstance(value, int) else None


def _generation_config(file: GgufFile) -> dict[str, object]:
    """Stop at the end of a turn and at the end of the text; no sampling defaults, so that they stay explicit."""
    ends = [_token_id(file, role) for role in ("eos", "padding")]
    config = {
        "bos_token_id": _token_id(file, "bos"),
        "eos_token_id": list(dict.fromkeys(end for end in ends if end is not None)),
        "pad_token_id": _token_id(file, "padding"),
    }
    return {key: value for key, value in config.items() if value is not None}


def write_tokenizer(file: GgufFile, folder: Path) -> None:
    """Write tokenizer files equal in behaviour to the published Qwen2.5 ones.

    The vocabulary of a GGUF file is padded to the size of the embedding with tokens of type "unused"; the published
    tokenizer does not have them.

    Args:
        file: A GGUF file with a Qwen2 tokenizer.
        folder: Where ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja`` go.

    Raises:
        ModelError: The vocabulary is incomplete or contradicts itself.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE

    tokens, merges, types = (_strings(file, key) for key in ("tokens", "merges", "token_type"))
    kinds = dict(zip(tokens, types, strict=False))
    if not len(tokens) == len(types) == len(kinds):
        raise ModelError(f"{file.path}: {len(tokens)} tokens with {len(types)} types, {len(kinds)} distinct")
    vocab = {token: index for index, token in enumerate(tokens) if kinds[token] != _UNUSED}
    added = [token for token in vocab if kinds[token] in (_CONTROL, _USER_DEFINED)]
    base = {token: index for token, index in vocab.items() if kinds[token] not in (_CONTROL, _USER_DEFINED)}
    # The published layout keeps added tokens out of the model's vocabulary, which needs them to come last.
    last = [vocab[token] for token in added] == list(range(len(base), len(base) + len(added)))
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        tokenizer = Tokenizer(BPE(vocab=base if last else vocab, merges=pairs))
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"{file.path}: its vocabulary and merges do not fit: {error}") from error
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=kinds[token] == _CONTROL, normalized=False) for token in added])
    if wrong := [token for token in added if tokenizer.token_to_id(token) != vocab[token]]:
        raise ModelError(f"{file.path}: the token {wrong[0]!r} would get another id")
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(file, tokens))
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")


def _strings(file: GgufFile, key: str) -> list[str]:
    value = file.metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list):
        raise ModelError(f"{file.path} has no tokenizer.ggml.{key}")
    return [str(item) for item in value]


def _tokenizer_config(file: GgufFile, tokens: list[str]) -> dict[str, object]:
    def token(role: str) -> str | None:
        index = _token_id(file, role)
        return tokens[index] if index is not None and index < len(tokens) else None

    return {
        "add_prefix_space": False,
        "bos_token": token("bos") if file.metadata.get("tokenizer.ggml.add_bos_token") else None,
        "clean_up_tokenization_spaces": False,
        "eos_token": token("eos"),
        "model_max_length": int(file.number("qwen2.context_length")),
        "pad_token": token("padding"),
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _write_weights(file: GgufFile, path: Path, progress: ProgressCallback | None) -> str:
    """Stream all tensors as bfloat16 into one safetensors file and return the file's SHA-256."""
    directory: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in file.tensors:
        end = at + 2 * tensor.n_elements
        name = qwen2_name(tensor.name)
        directory[str(name)] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    header = json.dumps(directory, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    prefix = len(header).to_bytes(8, "little") + header
    digest, done = hashlib.sha256(prefix), 0
    with path.open("wb", buffering=0) as out:
        _write_all(out.fileno(), memoryview(prefix))
        for piece in _decoded(file):
            _write_all(out.fileno(), piece)
            digest.update(piece)
            done += len(piece)
            report(progress, "convert", done, at)
    return digest.hexdigest()


def _decoded(file: GgufFile) -> Iterator[memoryview]:
    """Yield the bfloat16 bytes of all tensors in order, decoded ahead by as many threads as there are cores."""
    jobs = ((tensor, start, stop) for tensor in file.tensors for start, stop in file.chunks(tensor))
    pool = ThreadPoolExecutor(max_workers=os.cpu_count() or 2, thread_name_prefix="dequantise")
    try:
        pending = deque(pool.submit(_decode, file, *job) for job in islice(jobs, _IN_FLIGHT))
        while pending:
            future: Future[memoryview] = pending.popleft()
            piece = future.result()
            pending.extend(pool.submit(_decode, file, *job) for job in islice(jobs, 1))
            yield piece
    finally:
        pool.shutdown(cancel_futures=True)


def _decode(file: GgufFile, tensor: GgufTensor, start: int, stop: int) -> memoryview:
    bits = to_bfloat16_bits(to_float32(file.blocks(tensor, start, stop), tensor.kind))
    return bits.reshape(-1).view(np.uint8).data


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _convert_with_library(file: GgufFile, folder: Path) -> None:
    """Convert through transformers, which dequantises everything in memory first."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    # Typed by the library as if the loading report did not exist.
    auto: Any = AutoModelForCausalLM
    source, gguf = str(file.path.parent), file.path.name
    with _library_errors(file.path):
        config = AutoConfig.from_pretrained(source, gguf_file=gguf)
        # transformers does not read the head size of every architecture and then assumes one.
        head_size = file.metadata.get(f"{file.architecture}.attention.key_length")
        if isinstance(head_size, int) and hasattr(config, "head_dim"):
            config.head_dim = head_size
        model, loading = auto.from_pretrained(
            source,
            gguf_file=gguf,
            config=config,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            output_loading_info=True,
        )
        # Left in, it makes loaders expect packed weights.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        with torch.device("meta"):
            plan = auto.from_config(model.config).state_dict()
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        misfits = {name for name, tensor in plan.items() if shapes.get(name) != tensor.shape}
        # What transformers could not read it fills with random numbers, and only logs it.
        misfits.update(str(name) for name in loading["missing_keys"])
        if misfits:
            raise ValueError(f"{len(misfits)} tensors do not fit its reading of the file, such as {min(misfits)}")
        model.save_pretrained(folder)
    _tokenizer_with_library(file.path, folder)


def _tokenizer_with_library(gguf: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    with _library_errors(gguf):
        AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(folder)


@contextmanager
def _library_errors(gguf: Path) -> Iterator[None]:
    """Turn whatever transformers raises into one line, and keep its progress bars off the terminal."""
    try:
        with redirect_stderr(io.StringIO()):
            yield
    except OSError:
        raise
    except Exception as error:
        line = " ".join(str(error).split())[:300]
        raise ModelError(f"transformers cannot convert {gguf}: {line or type(error).__name__}") from error
