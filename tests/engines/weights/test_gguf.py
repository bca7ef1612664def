"""GGUF reading, dequantisation and conversion, against the gguf package and transformers."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from tracer.engines.weights.cache import Progress
from tracer.engines.weights.convert import convert
from tracer.engines.weights.dequantise import DECODERS, to_bfloat16_bits, to_float32
from tracer.engines.weights.gguf import GgufFile
from tracer.errors import ModelError

Kind = GGMLQuantizationType
WriteGguf = Callable[..., Path]
UNDECODED = (Kind.IQ4_NL, Kind.TQ2_0)


@pytest.mark.parametrize("kind", [*DECODERS, *UNDECODED], ids=lambda kind: kind.name)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_decoders_equal_the_gguf_package_bit_for_bit(kind: Kind, data: st.DataObject) -> None:
    size = GGML_QUANT_SIZES[kind][1]
    n_blocks = data.draw(st.integers(1, 5))
    raw = data.draw(st.binary(min_size=n_blocks * size, max_size=n_blocks * size))
    blocks = np.frombuffer(raw, np.uint8).reshape(n_blocks, size)
    with np.errstate(all="ignore"):
        expected = dequantize(blocks, kind).reshape(n_blocks, -1)
        found = to_float32(blocks, kind)
    assert found.shape == expected.shape
    assert np.array_equal(found, expected, equal_nan=True)


@pytest.mark.parametrize("kind", DECODERS, ids=lambda kind: kind.name)
def test_decoders_equal_the_gguf_package_on_many_random_blocks(kind: Kind) -> None:
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (4096, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = dequantize(blocks, kind).reshape(4096, -1)
        assert np.array_equal(to_float32(blocks, kind), expected, equal_nan=True)


@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
@settings(deadline=None)
def test_bfloat16_rounding_equals_torch(bits: list[int]) -> None:
    import torch

    values = np.array(bits, np.uint32).view(np.float32)
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16)
    found = torch.from_numpy(to_bfloat16_bits(values).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(found.isnan(), expected.isnan())
    whole = ~expected.isnan()
    assert torch.equal(found.view(torch.int16)[whole], expected.view(torch.int16)[whole])


def test_reader_agrees_with_the_gguf_package(tiny_gguf: Path) -> None:
    theirs = GGUFReader(tiny_gguf)
    with GgufFile(tiny_gguf) as ours:
        assert {tensor.name: (tensor.shape, tensor.kind, tensor.offset, tensor.n_bytes) for tensor in ours.tensors} == {
            tensor.name: (
                tuple(int(size) for size in reversed(tensor.shape)),
                tensor.tensor_type,
                int(tensor.data_offset),
                int(tensor.n_bytes),
            )
            for tensor in theirs.tensors
        }
        fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
        assert ours.metadata == fields


def test_truncation_anywhere_is_one_clear_error(tiny_gguf: Path, tmp_path: Path) -> None:
    data = tiny_gguf.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [0, 3, 4, 20, 100, 2000, 5000, len(data) // 2, len(data) - 1]:
        cut.write_bytes(data[:size])
        with pytest.raises(ModelError, match=r"cut\.gguf") as caught:
            GgufFile(cut)
        assert "\n" not in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_headers_never_crash(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp()
    whole = folder / "whole.gguf"
    if not whole.exists():
        from gguf import GGUFWriter

        writer = GGUFWriter(whole, "qwen2")
        writer.add_token_list(["a", "b"])
        writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    content = bytearray(whole.read_bytes())
    at = data.draw(st.integers(4, len(content) - 9))
    content[at : at + 8] = data.draw(st.binary(min_size=8, max_size=8))
    damaged = folder / "damaged.gguf"
    damaged.write_bytes(content)
    try:
        with GgufFile(damaged) as file:
            for tensor in file.tensors:
                for start, stop in file.chunks(tensor):
                    file.blocks(tensor, start, stop)
    except ModelError:
        pass


def _library_model(path: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    with redirect_stderr(io.StringIO()):
        return AutoModelForCausalLM.from_pretrained(
            str(path.parent),
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_fast_conversion_equals_the_library_conversion(tied: bool, gguf_writer: WriteGguf, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    kinds = (Kind.Q5_0, Kind.Q8_0, Kind.Q4_K, Kind.Q6_K, Kind.Q4_0, Kind.Q4_1, Kind.Q5_1, Kind.Q5_K, Kind.F16)
    source = gguf_writer(tmp_path / "tiny.gguf", kinds=kinds, tied=tied)
    folder = tmp_path / "out"
    folder.mkdir()
    assert convert(source, folder)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    theirs = _library_model(source)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    assert ours.config.tie_word_embeddings is tied
    prompt = torch.tensor([[1, 5, 9, 30]])
    with torch.no_grad():
        assert torch.equal(ours(prompt).logits, theirs(prompt).logits)


def test_converted_config_equals_the_library_config(tiny_gguf: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    folder = tmp_path / "out"
    folder.mkdir()
    convert(tiny_gguf, folder)
    ours = AutoConfig.from_pretrained(folder).to_dict()
    theirs = AutoConfig.from_pretrained(str(tiny_gguf.parent), gguf_file=tiny_gguf.name).to_dict()
    names = (
        "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size vocab_size "
        "max_position_embeddings rope_parameters eos_token_id pad_token_id bos_token_id model_type layer_types"
    )
    for key in names.split():
        assert ours[key] == theirs[key], key
    assert ours["rms_norm_eps"] == pytest.approx(theirs["rms_norm_eps"], rel=1e-6)


def test_converted_tokenizer_gives_the_ids_of_the_library_tokenizer(tiny_gguf: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "out"
    folder.mkdir()
    convert(tiny_gguf, folder)
    ours = AutoTokenizer.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(str(tiny_gguf.parent), gguf_file=tiny_gguf.name)
    for text in ["hello world", "  hello\n\n\tx = 12", "<|im_start|>user\nhé 你好<|im_end|>", "don't 👋🏽", ""]:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == text
    assert (ours.eos_token, ours.pad_token, ours.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    assert ours.chat_template == theirs.chat_template
    # The padding of the vocabulary is not part of it.
    assert len(ours) == len(theirs) - 24


def test_generation_stops_at_the_end_of_a_turn_and_of_the_text(tiny_gguf: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    convert(tiny_gguf, folder)
    config = json.loads((folder / "generation_config.json").read_text())
    with GgufFile(tiny_gguf) as file:
        tokens = file.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    assert [tokens[i] for i in config["eos_token_id"]] == ["<|im_end|>", "<|endoftext|>"]
    assert "temperature" not in config


def test_progress_reaches_the_total(tiny_gguf: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    seen: list[Progress] = []
    convert(tiny_gguf, folder, progress=seen.append)
    done = [event.done for event in seen]
    assert done == sorted(done)
    assert seen[-1].done == seen[-1].total > 0


def test_other_architectures_go_through_the_library(gguf_writer: WriteGguf, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = gguf_writer(tmp_path / "tiny.gguf", arch="qwen3", layers=1)
    folder = tmp_path / "out"
    folder.mkdir()
    assert convert(source, folder) is None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert model.config.model_type == "qwen3"
    assert getattr(model.config, "quantization_config", None) is None
    assert model.config.head_dim == 64
    for name, tensor in _library_model(source).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    with torch.no_grad():
        assert model(torch.tensor([[1, 2]])).logits.isfinite().all()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode([tokenizer.eos_token_id]) == "<|im_end|>"


def test_a_model_that_the_library_would_fill_with_random_numbers_is_refused(
    gguf_writer: WriteGguf, tmp_path: Path
) -> None:
    # Without the head size, transformers assumes 128 and finds no tensor of the shapes it then expects.
    source = gguf_writer(tmp_path / "tiny.gguf", arch="qwen3", layers=1, head_size=False)
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(ModelError, match="do not fit"):
        convert(source, folder)


def test_an_architecture_that_nobody_knows_is_one_clear_error(gguf_writer: WriteGguf, tmp_path: Path) -> None:
    source = gguf_writer(tmp_path / "odd.gguf", arch="qwen3", layers=1)
    source.write_bytes(source.read_bytes().replace(b"qwen3", b"qwenZ"))
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(ModelError, match="cannot convert") as caught:
        convert(source, folder)
    assert "\n" not in str(caught.value)


def test_a_missing_tensor_is_named(gguf_writer: WriteGguf, tmp_path: Path) -> None:
    source = gguf_writer(tmp_path / "tiny.gguf")
    source.write_bytes(source.read_bytes().replace(b"blk.1.ffn_up", b"blk.7.ffn_up"))
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_up\.weight"):
        convert(source, folder)
