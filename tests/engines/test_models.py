"""Model names, conversions in the cache, identity hashes, and the demo model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tracer.engines import models
from tracer.engines.models import ResolvedModel, list_models, resolve, verify
from tracer.engines.weights.cache import MANIFEST, Progress
from tracer.engines.weights.fetch import DEMO
from tracer.errors import InputError, ModelError, UnknownNameError

WriteGguf = Callable[..., Path]
ROOT = Path(__file__).parents[2]
FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    MANIFEST,
}

pytestmark = pytest.mark.usefixtures("own_cache")


# Names


def test_a_folder_stands_for_itself(tiny_gguf: Path) -> None:
    folder = resolve(str(tiny_gguf)).path
    assert resolve(str(folder)) == ResolvedModel(str(folder), folder.resolve(), "folder", None)


@pytest.mark.parametrize("gone", ["config.json", "model.safetensors", "tokenizer.json"])
def test_an_incomplete_folder_is_refused(gone: str, tiny_gguf: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(resolve(str(tiny_gguf)).path, tmp_path / "mine")
    (folder / gone).unlink()
    with pytest.raises(ModelError, match=gone.split(".")[1] if "safe" in gone else gone):
        resolve(str(folder))


def test_a_folder_with_truncated_weights_is_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(resolve(str(tiny_gguf)).path, tmp_path / "mine")
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    with pytest.raises(ModelError, match="truncated or damaged"):
        resolve(str(folder))


def test_a_shard_that_the_index_names_must_be_there(tiny_gguf: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(resolve(str(tiny_gguf)).path, tmp_path / "mine")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ModelError, match="index"):
        resolve(str(folder))
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ModelError, match="model-00002-of-00002"):
        resolve(str(folder))


@pytest.mark.parametrize("name", ["../x", "./x", "/no/such/folder", "~/no-such-folder", "a/b/c", "x.gguf", "x/"])
def test_a_path_to_nothing_is_one_clear_line(name: str) -> None:
    with pytest.raises(InputError, match="there is no folder or file"):
        resolve(name)


@pytest.mark.parametrize("name", ["", "nothing", "dem", "a b/c", "ä/b", "\0", "x" * 5000])
def test_an_unknown_name_says_what_is_accepted(name: str) -> None:
    with pytest.raises(UnknownNameError, match=r"demo"):
        resolve(name)


def test_a_name_that_no_hub_model_can_have() -> None:
    with pytest.raises(InputError):
        resolve("org/a..b")


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"not a model")
    with pytest.raises(ModelError, match="not a GGUF file"):
        resolve(str(file))


# GGUF files


def test_a_gguf_file_is_converted_once(tiny_gguf: Path) -> None:
    first = resolve(str(tiny_gguf))
    assert {path.name for path in first.path.iterdir()} == FILES
    changed = (first.path / "model.safetensors").stat().st_mtime_ns
    seen: list[Progress] = []
    assert resolve(str(tiny_gguf), progress=seen.append, fetch=False) == first
    assert (first.path / "model.safetensors").stat().st_mtime_ns == changed
    # Neither hashed nor converted again.
    assert seen == []
    assert first.sha256 == hashlib.sha256(tiny_gguf.read_bytes()).hexdigest()


def test_a_changed_gguf_file_is_another_model(tiny_gguf: Path, gguf_writer: WriteGguf) -> None:
    first = resolve(str(tiny_gguf))
    gguf_writer(tiny_gguf, seed=1)
    assert resolve(str(tiny_gguf)).path != first.path


def test_without_fetch_the_command_is_named(tiny_gguf: Path) -> None:
    with pytest.raises(ModelError, match=f"run: tracer models fetch {tiny_gguf}"):
        resolve(str(tiny_gguf), fetch=False)


def test_a_truncated_cache_entry_is_found_and_rebuilt(tiny_gguf: Path) -> None:
    made = resolve(str(tiny_gguf))
    weights = made.path / "model.safetensors"
    content = weights.read_bytes()
    os.truncate(weights, 1000)
    with pytest.raises(ModelError, match="1000 bytes"):
        resolve(str(tiny_gguf), fetch=False)
    assert resolve(str(tiny_gguf)) == made
    assert weights.read_bytes() == content


def test_verify_finds_a_flipped_bit(tiny_gguf: Path) -> None:
    made = resolve(str(tiny_gguf))
    assert verify(str(tiny_gguf)) == made
    weights = made.path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert resolve(str(tiny_gguf)) == made
    with pytest.raises(ModelError, match="SHA-256"):
        verify(str(tiny_gguf))
    resolve(str(tiny_gguf), verify=True)
    verify(str(tiny_gguf))


def test_the_list_names_what_is_there(tiny_gguf: Path) -> None:
    assert [(entry.name, entry.fetched) for entry in list_models()] == [("demo", False)]
    made = resolve(str(tiny_gguf))
    demo, entry = list_models()
    assert (demo.name, entry.name, entry.path, entry.fetched) == ("demo", str(tiny_gguf), made.path, True)
    size = sum(path.stat().st_size for path in made.path.iterdir() if path.name != MANIFEST)
    assert entry.size_bytes == size


# Identity


def test_the_tokenizer_hash_ignores_formatting_and_padding(tiny_gguf: Path, tmp_path: Path) -> None:
    folder = resolve(str(tiny_gguf)).path
    other = tmp_path / "other"
    other.mkdir()
    content = json.loads((folder / "tokenizer.json").read_text())
    content["padding"] = {"strategy": "BatchLongest"}
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (other / "tokenizer.json").write_text(json.dumps(dict(reversed(content.items())), indent=4))
    assert models.tokenizer_sha256(other) == models.tokenizer_sha256(folder)
    content["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert models.tokenizer_sha256(other) != models.tokenizer_sha256(folder)


def test_the_template_hash_is_that_of_its_text_wherever_it_is(tiny_gguf: Path, tmp_path: Path) -> None:
    folder = resolve(str(tiny_gguf)).path
    text = (folder / "chat_template.jinja").read_text()
    assert models.chat_template_sha256(folder) == hashlib.sha256(text.encode()).hexdigest()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": text}))
    assert models.chat_template_sha256(tmp_path) == models.chat_template_sha256(folder)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert models.chat_template_sha256(tmp_path) is None


def test_a_folder_without_tokenizer_has_no_hash(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        models.tokenizer_sha256(tmp_path)


def test_naming_models_loads_no_torch() -> None:
    code = "import sys, tracer.engines.models as m; m.list_models(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# The demo model itself


@pytest.mark.model
def test_the_demo_answers() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    demo = resolve("demo")
    tokenizer: Any = AutoTokenizer.from_pretrained(demo.path)
    model: Any = AutoModelForCausalLM.from_pretrained(demo.path, dtype=torch.bfloat16)
    question = [{"role": "user", "content": "What is 2+2?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "4" in tokenizer.decode(answer)
    assert model.generation_config.eos_token_id == [151645, 151643]


@pytest.mark.model
def test_the_demo_tokenizer_is_qwen() -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(resolve("demo").path)
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [151643, 151644, 151645]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (151645, 151643)
    text = "  def f(x):\n\treturn x**2  # 12345 naïve 你好 👋🏽\r\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("Hello world")["input_ids"] == [9707, 1879]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.model
def test_the_demo_is_whole() -> None:
    verify("demo")
    assert DEMO.sha256 == resolve("demo").sha256 or resolve("demo").source.startswith("hub ")
