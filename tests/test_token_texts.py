"""Texts of tokens: whole characters, the right vocabulary or none, and no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from tracer.engines import models
from tracer.engines.models import ResolvedModel
from tracer.errors import ModelError, TracerError
from tracer.token_texts import BROKEN, TokenTexts, token_texts
from tracer.trace.trace import ModelInfo, Trace

EXEMPLAR = Path(__file__).parents[1] / "examples" / "traces" / "copied_from_the_exemplar.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with one token a byte and a control token."""
    path = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={character: number for number, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    backend.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def backend(folder: Path) -> Tokenizer:
    """The same, to encode with."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@given(text=st.text(st.characters(codec="utf-8"), max_size=30))
def test_texts_joined_are_the_text(folder: Path, backend: Tokenizer, text: str) -> None:
    ids = backend.encode(text).ids
    found = TokenTexts(folder).texts(ids)
    assert len(found) == len(ids)
    assert "".join(found) == text


def test_a_character_of_several_tokens_is_at_its_last(folder: Path, backend: Tokenizer) -> None:
    texts = TokenTexts(folder)
    assert texts.texts(backend.encode("a🙂é").ids) == ["a", "", "", "", "🙂", "", "é"]
    assert texts.texts(backend.encode("a🙂").ids[:3]) == ["a", "", BROKEN]


def test_what_is_no_token_is_marked_and_control_tokens_can_be_read(folder: Path, backend: Tokenizer) -> None:
    end = backend.token_to_id("<|end|>")
    assert end is not None
    a = backend.encode("a").ids[0]
    assert TokenTexts(folder).texts([a, end, -1, 10**9, a]) == ["a", "<|end|>", BROKEN, BROKEN, "a"]
    assert TokenTexts(folder).texts([]) == []


def test_a_folder_without_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot read"):
        TokenTexts(tmp_path)


@pytest.mark.parametrize("name", ["nothing/here", "/nowhere/at/all", "no model"])
def test_a_model_that_is_not_here_says_what_to_do(name: str) -> None:
    with pytest.raises(TracerError, match="tracer models fetch|check the path|known: "):
        token_texts(ModelInfo(name=name, tokenizer_sha256="0" * 64))


def test_without_a_hash_nothing_is_guessed(folder: Path) -> None:
    with pytest.raises(ModelError, match="does not say which tokenizer"):
        token_texts(ModelInfo(name=str(folder)))


@pytest.mark.model
def test_another_vocabulary_is_refused(demo_model: ResolvedModel) -> None:
    with pytest.raises(ModelError, match="is not the one that the trace was recorded with"):
        token_texts(ModelInfo(name="demo", tokenizer_sha256="0" * 64))


@pytest.mark.model
def test_a_recorded_completion_reads_as_it_was_recorded(demo_model: ResolvedModel) -> None:
    trace = Trace.load(EXEMPLAR)
    texts = token_texts(trace.model)
    for call in trace.calls:
        found = texts.texts([*call.prompt_token_ids, *call.completions[0].token_ids])
        written = "".join(found[len(call.prompt_token_ids) :])
        assert written.replace("<|im_end|>", "") == call.completions[0].text
    exemplar = next(part for part in trace.calls[0].segments if part.kind == "exemplar")
    assert "She was born in Oslo, Norway." in "".join(found[exemplar.start : exemplar.end])


@pytest.mark.model
def test_neither_torch_nor_transformers_is_loaded(demo_model: ResolvedModel) -> None:
    sha256 = models.tokenizer_sha256(demo_model.path)
    code = (
        "import sys\nfrom tracer.token_texts import token_texts\nfrom tracer.trace.trace import ModelInfo\n"
        f"token_texts(ModelInfo(name='demo', tokenizer_sha256={sha256!r})).texts([1, 2])\n"
        "print([name for name in ('torch', 'transformers', 'streamlit') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
