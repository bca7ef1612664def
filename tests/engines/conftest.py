"""Small GGUF files of random weights, written by the ``gguf`` package; caches and disks of their own."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize
from numpy.typing import NDArray

from tracer.engines.weights.cache import cache_dir

Kind = GGMLQuantizationType
WriteGguf = Callable[..., Path]

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS = 256, 512, 4, 2, 2
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
_NO_QUANTISER = {Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K}
# Byte offsets of the float16 scales in blocks that the gguf package cannot quantise to.
_SCALES_AT = {Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)}


def byte_characters() -> list[str]:
    """The 256 characters by which byte-level BPE stands for bytes (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(shifted)}
    return [table[byte] for byte in range(256)]


def random_blocks(rng: np.random.Generator, kind: Kind, n_blocks: int) -> NDArray[np.uint8]:
    """Random blocks whose float16 scales are small and finite."""
    blocks = rng.integers(0, 256, (n_blocks, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    for at in _SCALES_AT[kind]:
        scale = rng.uniform(0.0001, 0.001, n_blocks).astype(np.float16)
        blocks[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
    return blocks


def _weights(rng: np.random.Generator, kind: Kind, shape: tuple[int, int]) -> NDArray[np.uint8]:
    if kind in _NO_QUANTISER:
        per_block = GGML_QUANT_SIZES[kind][0]
        return random_blocks(rng, kind, shape[0] * shape[1] // per_block).reshape(shape[0], -1)
    values = rng.standard_normal(shape).astype(np.float32) * 0.05
    return np.ascontiguousarray(quantize(values, kind)).view(np.uint8).reshape(shape[0], -1)


def _vocabulary(writer: GGUFWriter, padding: int) -> int:
    letters = byte_characters()
    merges = ["h e", "l l", "he ll", "hell o", "\u0120 w"]
    tokens = letters + [merge.replace(" ", "") for merge in merges] + list(SPECIAL)
    types = [1] * (len(tokens) - len(SPECIAL)) + [3] * len(SPECIAL)
    tokens += [f"[PAD{len(tokens) + i}]" for i in range(padding)]
    types += [5] * padding
    ids = {name: tokens.index(name) for name in SPECIAL}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(ids["<|im_end|>"])
    writer.add_pad_token_id(ids["<|endoftext|>"])
    writer.add_bos_token_id(ids["<|endoftext|>"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    return len(tokens)


def write_gguf(
    path: Path,
    *,
    arch: str = "qwen2",
    kinds: tuple[Kind, ...] = (Kind.Q5_0, Kind.Q8_0, Kind.Q4_K, Kind.Q6_K),
    tied: bool = False,
    seed: int = 0,
    padding: int = 24,
    layers: int = LAYERS,
    head_size: bool = True,
) -> Path:
    """Write a small random model; its matrices take the quantisation types in turn."""
    rng = np.random.default_rng(seed)
    writer = GGUFWriter(path, arch)
    vocab = _vocabulary(writer, padding)
    writer.add_name("tiny")
    writer.add_block_count(layers)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    if head_size:
        writer.add_key_length(HIDDEN // HEADS)
        writer.add_value_length(HIDDEN // HEADS)
    kv = HIDDEN // HEADS * KV_HEADS
    matrices: dict[str, tuple[int, int]] = {"token_embd": (vocab, HIDDEN)}
    vectors: dict[str, int] = {"output_norm.weight": HIDDEN}
    if not tied:
        matrices["output"] = (vocab, HIDDEN)
    for i in range(layers):
        matrices |= {
            f"blk.{i}.attn_q": (HIDDEN, HIDDEN),
            f"blk.{i}.attn_k": (kv, HIDDEN),
            f"blk.{i}.attn_v": (kv, HIDDEN),
            f"blk.{i}.attn_output": (HIDDEN, HIDDEN),
            f"blk.{i}.ffn_gate": (INNER, HIDDEN),
            f"blk.{i}.ffn_up": (INNER, HIDDEN),
            f"blk.{i}.ffn_down": (HIDDEN, INNER),
        }
        vectors |= {f"blk.{i}.attn_norm.weight": HIDDEN, f"blk.{i}.ffn_norm.weight": HIDDEN}
        if arch == "qwen2":
            vectors |= {f"blk.{i}.attn_{part}.bias": size for part, size in (("q", HIDDEN), ("k", kv), ("v", kv))}
        else:
            size = HIDDEN // HEADS
            vectors |= {f"blk.{i}.attn_q_norm.weight": size, f"blk.{i}.attn_k_norm.weight": size}
    for at, (name, shape) in enumerate(matrices.items()):
        kind = kinds[at % len(kinds)]
        writer.add_tensor(f"{name}.weight", _weights(rng, kind, shape), raw_dtype=kind)
    for name, size in vectors.items():
        writer.add_tensor(name, rng.standard_normal(size).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def gguf_writer() -> WriteGguf:
    """Gives :func:`write_gguf`."""
    return write_gguf


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    """A small qwen2 GGUF file."""
    return write_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """An empty cache, except for tests of the demo model itself."""
    if request.node.get_closest_marker("model") is None:
        monkeypatch.setenv("TRACER_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("TRACER_WHEELS_DIR", raising=False)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MB, too small for the tiny model."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def leftovers() -> Callable[[], set[str]]:
    """Gives the names among the cached models that are not locks."""

    def names() -> set[str]:
        top = cache_dir() / "models"
        return {path.name for path in top.iterdir() if path.suffix != ".lock"} if top.exists() else set()

    return names
