"""The in-process engine, on tiny random models and on the demo model."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tracer.engines import local
from tracer.engines.base import TokenChunk
from tracer.engines.loading import BatchedLinear
from tracer.engines.local import LocalEngine
from tracer.engines.models import ResolvedModel, resolve
from tracer.engines.tokenizer import load_tokenizer
from tracer.errors import (
    CancelledError,
    EngineUnavailableError,
    InputError,
    ModelError,
    PromptTooLongError,
)
from tracer.trace.trace import Completion, Sampling, StructuredOutput

AUTO: Any = transformers.AutoModelForCausalLM
END = 256
VOCABULARY = 264
"""A few more logits than tokens, as real models have."""
CONTEXT = 160
SHORT, MIDDLE, LONG = [72], [10, 20, 30, 40, 50], [5, 4, 3, 2, 1, 0, 9, 8, 7, 6, 11, 12, 13]

LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "eos_token_id": END,
    "bos_token_id": None,
    "pad_token_id": None,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: transformers.Qwen2Config(**LLAMA_LIKE, tie_word_embeddings=False),
    "llama": lambda: transformers.LlamaConfig(**LLAMA_LIKE),
    # A window shorter than the prompts, so that a cache that dropped or misplaced columns would show.
    "mistral": lambda: transformers.MistralConfig(**LLAMA_LIKE, sliding_window=6),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=CONTEXT,
        initializer_range=0.3,
        eos_token_id=END,
        bos_token_id=END,
    ),
}


def write_tokenizer(folder: Path) -> None:
    """Byte-level, one token a byte, and ``<|end|>``."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    wrap: Any = transformers.PreTrainedTokenizerFast
    fast = wrap(tokenizer_object=tokenizer, eos_token="<|end|>")  # noqa: S106
    fast.save_pretrained(str(folder))


def write_model(folder: Path, kind: str = "qwen2", *, seed: int = 0) -> ResolvedModel:
    torch.manual_seed(seed)
    AUTO.from_config(CONFIGS[kind]()).save_pretrained(str(folder))
    write_tokenizer(folder)
    return ResolvedModel(kind, folder, "folder", None)


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ResolvedModel:
    return write_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> ResolvedModel:
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine(tiny_model: ResolvedModel) -> LocalEngine:
    return LocalEngine(tiny_model, device="cpu")


def without_end(engine: LocalEngine) -> LocalEngine:
    """Let nothing but the length end a completion."""
    engine.tokenizer._eos = frozenset()
    return engine


@pytest.fixture(autouse=True)
def fresh_tokenizers() -> None:
    """Loaded tokenizers are shared; tests that change one must not meet."""
    load_tokenizer.cache_clear()


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread for tiny models: handing out their work costs more than doing it."""
    before = torch.get_num_threads()
    if request.node.get_closest_marker("model") is None:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def reference(model: ResolvedModel) -> Any:
    return AUTO.from_pretrained(str(model.path), dtype=torch.float32).eval()


def reference_logprobs(model: Any, token_ids: list[int]) -> torch.Tensor:
    """Log-probability of every token but the first, by one plain forward pass."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(token_ids[1:])[:, None])[:, 0]


@contextmanager
def counted(engine: LocalEngine) -> Iterator[list[int]]:
    """Token positions of each forward pass."""
    passes: list[int] = []
    embeddings = engine._model.get_input_embeddings()
    handle = embeddings.register_forward_pre_hook(lambda _, inputs: passes.append(inputs[0].numel()))
    try:
        yield passes
    finally:
        handle.remove()


def ids(completions: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in group] for group in completions]


def test_greedy_decoding_equals_the_librarys(any_model: ResolvedModel) -> None:
    engine = without_end(LocalEngine(any_model, device="cpu"))
    model = reference(any_model)
    got = engine.generate([SHORT, MIDDLE, LONG, MIDDLE], Sampling(max_tokens=40))
    for prompt, (completion,) in zip([SHORT, MIDDLE, LONG, MIDDLE], got, strict=True):
        prompt_ids = torch.tensor([prompt])
        whole = model.generate(
            prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            do_sample=False,
            max_new_tokens=40,
            eos_token_id=None,
            pad_token_id=0,
        )[0].tolist()
        assert completion.token_ids == whole[len(prompt) :]
        expected = reference_logprobs(model, whole)[len(prompt) - 1 :]
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_batch_gives_what_single_calls_give(any_model: ResolvedModel, temperature: float) -> None:
    prompts = [MIDDLE, LONG, SHORT, [*LONG, 99, 98]]
    engine = LocalEngine(any_model, device="cpu", prefix_cache_bytes=0)
    single = LocalEngine(any_model, device="cpu", prefix_cache_bytes=0, max_batch=1)
    sampling = Sampling(max_tokens=30, temperature=temperature, seed=5)
    together = engine.generate(prompts, sampling)
    for index, prompt in enumerate(prompts):
        # Position in the request is part of the seed, so the same prompt goes to the same position.
        alone = single.generate([prompt] * (index + 1), sampling)
        assert ids(together)[index] == ids(alone)[index]


def test_seeded_samples_do_not_depend_on_the_batch_size(tiny_model: ResolvedModel) -> None:
    sampling = Sampling(max_tokens=20, temperature=1.0, n=7, seed=11)
    results = [
        ids(LocalEngine(tiny_model, device="cpu", max_batch=size).generate([MIDDLE, LONG], sampling))
        for size in (1, 3, 64)
    ]
    assert results[0] == results[1] == results[2]
    assert len({tuple(row) for group in results[0] for row in group}) == 14


def test_without_a_seed_calls_differ(engine: LocalEngine) -> None:
    sampling = Sampling(max_tokens=20, temperature=1.5)
    assert ids(engine.generate([MIDDLE], sampling)) != ids(engine.generate([MIDDLE], sampling))


def test_samples_follow_the_models_distribution(tiny_model: ResolvedModel) -> None:
    engine = LocalEngine(tiny_model, device="cpu", max_batch=1000)
    draws = 4_000
    completions = engine.generate([MIDDLE], Sampling(max_tokens=1, temperature=1.3, n=draws, seed=1))[0]
    with torch.no_grad():
        expected = (reference(tiny_model)(torch.tensor([MIDDLE])).logits[0, -1] / 1.3).softmax(-1) * draws
    counts = torch.bincount(torch.tensor([each.token_ids[0] for each in completions]), minlength=VOCABULARY)
    often = expected >= 5
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    wanted = torch.cat([expected[often], expected[~often].sum()[None]])
    freedom = len(wanted) - 1
    # A chi-square has mean df and variance 2 df; four standard deviations fail for fewer than 1 seed in 1,000.
    assert float(((observed - wanted) ** 2 / wanted).sum()) < freedom + 4 * (2 * freedom) ** 0.5


def test_end_of_sequence_stops_and_stays_in_the_ids(engine: LocalEngine, tiny_model: ResolvedModel) -> None:
    free = engine.generate([MIDDLE], Sampling(max_tokens=12))[0][0]
    last = free.token_ids[4]
    assert last not in free.token_ids[:4]
    engine.tokenizer._eos = frozenset({last})
    stopped = engine.generate([MIDDLE], Sampling(max_tokens=12))[0][0]
    assert stopped.token_ids == free.token_ids[:5]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", None)
    assert len(stopped.logprobs) == 5


def test_length_ends_a_completion(engine: LocalEngine) -> None:
    completion = without_end(engine).generate([MIDDLE], Sampling(max_tokens=3))[0][0]
    assert (len(completion.token_ids), completion.finish_reason) == (3, "length")


def forced(text: str) -> StructuredOutput:
    return StructuredOutput(kind="choice", value=[text])


def test_a_stop_string_that_straddles_tokens_ends_the_completion(engine: LocalEngine) -> None:
    sampling = Sampling(max_tokens=60, stop=["never", "\nObs:"], structured=forced("one \nObs two \nObs: three"))
    completion = engine.generate([MIDDLE], sampling)[0][0]
    assert completion.text == "one \nObs two \nObs:"
    assert (completion.finish_reason, completion.stop_reason) == ("stop", "\nObs:")
    assert engine.tokenizer.decode(completion.token_ids).text == completion.text


def test_rows_stop_on_their_own(engine: LocalEngine) -> None:
    structured = StructuredOutput(kind="regex", value="[ab]{30}")
    sampling = Sampling(max_tokens=40, temperature=2.0, n=8, seed=2, stop=["ab"], structured=structured)
    for completion in engine.generate([MIDDLE], sampling)[0]:
        if completion.stop_reason:
            assert completion.text.index("ab") + 2 == len(completion.text)
        else:
            assert re.fullmatch("b*a*", completion.text)


def test_multi_byte_characters_stream_whole(engine: LocalEngine) -> None:
    text = "né 🙂 日本"
    chunks: list[TokenChunk] = []
    completion = engine.generate([MIDDLE], Sampling(max_tokens=60, structured=forced(text)), on_tokens=chunks.append)
    assert "".join(chunk.text for chunk in chunks) == text == completion[0][0].text
    assert not any("\ufffd" in chunk.text for chunk in chunks)
    assert [token_id for chunk in chunks for token_id in chunk.token_ids] == completion[0][0].token_ids


def test_a_character_cut_off_by_length_is_left_out(engine: LocalEngine) -> None:
    completion = engine.generate([MIDDLE], Sampling(max_tokens=3, structured=forced("a🙂")))[0][0]
    assert (completion.text, completion.finish_reason) == ("a", "length")


def test_every_chunk_names_its_prompt_and_completion(engine: LocalEngine) -> None:
    chunks: list[TokenChunk] = []
    got = engine.generate([MIDDLE, LONG], Sampling(max_tokens=9, temperature=1.0, n=3, seed=4), on_tokens=chunks.append)
    for prompt in range(2):
        for sample in range(3):
            mine = [chunk for chunk in chunks if (chunk.prompt, chunk.completion) == (prompt, sample)]
            assert [token_id for chunk in mine for token_id in chunk.token_ids] == got[prompt][sample].token_ids
            assert "".join(chunk.text for chunk in mine) == got[prompt][sample].text


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "vote": {"type": "integer", "minimum": 1, "maximum": 5},
        "sure": {"type": "boolean"},
        "kind": {"enum": ["search", "finish"]},
    },
    "required": ["vote", "sure", "kind"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_json_always_parses(any_model: ResolvedModel, temperature: float) -> None:
    engine = LocalEngine(any_model, device="cpu")
    structured = StructuredOutput(kind="json_schema", value=SCHEMA)
    sampling = Sampling(
        max_tokens=140, temperature=temperature, n=4 if temperature else 1, seed=8, structured=structured
    )
    finished = [each for each in engine.generate([MIDDLE], sampling)[0] if each.finish_reason == "stop"]
    # Whitespace may go on for ever in a random model; whatever ends must be right.
    assert finished or not temperature
    for completion in finished:
        value = json.loads(completion.text)
        assert set(value) == {"vote", "sure", "kind"}
        assert 1 <= value["vote"] <= 5
        assert completion.token_ids[-1] == END


def test_a_regex_always_matches(engine: LocalEngine) -> None:
    structured = StructuredOutput(kind="regex", value=r"[A-Z][a-z]{2,6}, \d{4}")
    sampling = Sampling(max_tokens=40, temperature=1.5, n=8, seed=3, structured=structured)
    for completion in engine.generate([MIDDLE], sampling)[0]:
        assert re.fullmatch(r"[A-Z][a-z]{2,6}, \d{4}", completion.text)


def test_logprobs_under_a_constraint_are_after_the_mask(engine: LocalEngine, tiny_model: ResolvedModel) -> None:
    structured = StructuredOutput(kind="choice", value=["a", "b"])
    completion = engine.generate([MIDDLE], Sampling(max_tokens=4, structured=structured))[0][0]
    with torch.no_grad():
        logits = reference(tiny_model)(torch.tensor([MIDDLE])).logits[0, -1]
    pair = [engine.tokenizer.encode(letter).token_ids[0] for letter in "ab"]
    expected = logits[pair].log_softmax(0).max()
    assert completion.logprobs[0] == pytest.approx(float(expected), abs=1e-5)
    assert completion.logprobs[1] == pytest.approx(0.0, abs=1e-6)


def test_a_bad_schema_is_refused_before_anything_runs(engine: LocalEngine) -> None:
    with counted(engine) as passes, pytest.raises(InputError, match="nonsense"):
        structured = StructuredOutput(kind="json_schema", value={"type": "nonsense"})
        engine.generate([MIDDLE], Sampling(max_tokens=9, structured=structured))
    assert passes == []


def test_samples_of_one_prompt_share_its_prefill(engine: LocalEngine) -> None:
    without_end(engine)
    with counted(engine) as passes:
        engine.generate([LONG], Sampling(max_tokens=5, temperature=1.0, n=6, seed=0))
    assert passes == [len(LONG) - 1, 6, 6, 6, 6, 6]


def test_a_common_beginning_of_prompts_is_computed_once(engine: LocalEngine) -> None:
    with counted(engine) as passes:
        engine.generate([[*LONG, 1, 2], [*LONG, 3, 4], [*LONG, 3, 5, 6]], Sampling(max_tokens=1))
    assert passes == [len(LONG) + 1, 1, 1, 3]


def test_finished_rows_cost_nothing(engine: LocalEngine) -> None:
    structured = StructuredOutput(kind="regex", value="a{1,20}")
    with counted(engine) as passes:
        completions = engine.generate(
            [MIDDLE], Sampling(max_tokens=30, temperature=1.0, n=8, seed=1, structured=structured)
        )[0]
    lengths = [len(completion.token_ids) for completion in completions]
    assert len(set(lengths)) > 2
    assert passes[1:] == [sum(length > step for length in lengths) for step in range(max(lengths))]


def test_a_growing_transcript_is_read_only_where_it_is_new(any_model: ResolvedModel) -> None:
    engine = without_end(LocalEngine(any_model, device="cpu"))
    model = reference(any_model)
    transcript = list(LONG)
    for step in range(4):
        with counted(engine) as passes:
            completion = engine.generate([transcript], Sampling(max_tokens=8))[0][0]
        if step:
            # The last token of the completion before, and the three new ones; the last of them is decoded.
            assert passes == [3] + [1] * 8
        whole = [*transcript, *completion.token_ids]
        expected = reference_logprobs(model, whole)[len(transcript) - 1 :]
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
        transcript = [*whole, 7 + step, 8, 9]


def test_a_transcript_that_turns_off_early_reuses_only_what_it_shares(
    engine: LocalEngine, tiny_model: ResolvedModel
) -> None:
    sampling = Sampling(max_tokens=6)
    cold = LocalEngine(tiny_model, device="cpu")
    engine.generate([LONG], sampling)
    other = [*LONG[:6], 101, 102, 103]
    with counted(engine) as passes:
        warm = engine.generate([other], sampling)
    assert passes[0] == 2
    assert ids(warm) == ids(cold.generate([other], sampling))


def test_the_prefix_cache_keeps_to_its_limit(tiny_model: ResolvedModel) -> None:
    engine = LocalEngine(tiny_model, device="cpu", prefix_cache_bytes=20_000)
    for start in range(8):
        engine.generate([[start, *LONG]], Sampling(max_tokens=4))
    assert 0 < sum(entry.size for entry in engine._prefixes._entries) <= 20_000


@pytest.mark.parametrize("elements", [1 << 26, VOCABULARY * 7, 1])
def test_scores_equal_a_plain_forward_pass(
    any_model: ResolvedModel, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_LOGIT_ELEMENTS", elements)
    engine = LocalEngine(any_model, device="cpu", max_batch=3)
    prompts = [LONG, SHORT, LONG, MIDDLE, SHORT]
    continuations = [[1, 2, 3], list(range(40)), [9], [60, 61, 62, 63, 64, 65, 66], [100, 101]]
    got = engine.score(prompts, continuations)
    model = reference(any_model)
    for prompt, continuation, values in zip(prompts, continuations, got, strict=True):
        expected = reference_logprobs(model, [*prompt, *continuation])[len(prompt) - 1 :]
        assert values == pytest.approx(expected.tolist(), abs=1e-4)


def test_scoring_reads_a_prompt_once(engine: LocalEngine) -> None:
    with counted(engine) as passes:
        engine.score([LONG, LONG, LONG], [[1, 2], [3, 4], [5]])
    assert passes == [len(LONG) - 1, 6]


def test_scores_agree_with_what_was_generated(engine: LocalEngine) -> None:
    completion = engine.generate([LONG], Sampling(max_tokens=20, temperature=1.0, seed=6))[0][0]
    assert engine.score([LONG], [completion.token_ids])[0] == pytest.approx(completion.logprobs, abs=1e-4)


def test_cancelling_stops_at_the_next_token(engine: LocalEngine) -> None:
    without_end(engine)
    cancel = threading.Event()
    chunks: list[TokenChunk] = []

    def receive(chunk: TokenChunk) -> None:
        chunks.append(chunk)
        if len(chunks) == 3:
            cancel.set()

    with pytest.raises(CancelledError):
        engine.generate([MIDDLE], Sampling(max_tokens=100), on_tokens=receive, cancel=cancel)
    assert len(chunks) == 3
    cancel.clear()
    assert len(engine.generate([MIDDLE], Sampling(max_tokens=5), cancel=cancel)[0][0].token_ids) == 5


def test_scoring_can_be_cancelled(engine: LocalEngine) -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(CancelledError):
        engine.score([LONG], [[1]], cancel=cancel)


def test_a_waiting_call_can_be_cancelled(engine: LocalEngine) -> None:
    without_end(engine)
    cancel = threading.Event()
    waiting = ThreadPoolExecutor(1)
    result: list[BaseException | None] = []

    def receive(_: TokenChunk) -> None:
        if not result:
            future = waiting.submit(engine.generate, [MIDDLE], Sampling(max_tokens=1), cancel=cancel)
            cancel.set()
            result.append(future.exception(timeout=30))

    engine.generate([MIDDLE], Sampling(max_tokens=2), on_tokens=receive)
    waiting.shutdown()
    assert isinstance(result[0], CancelledError)


def test_threads_may_share_an_engine(engine: LocalEngine) -> None:
    prompts = [[index, *MIDDLE] for index in range(6)]
    sampling = Sampling(max_tokens=15, temperature=1.0, seed=1)
    alone = [ids(engine.generate([prompt], sampling)) for prompt in prompts]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda prompt: ids(engine.generate([prompt], sampling)), prompts))
    assert together == alone


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(engine: LocalEngine) -> None:
    with counted(engine) as passes:
        with pytest.raises(PromptTooLongError, match=r"\b150 tokens and 20 more .* holds 160\b"):
            engine.generate([MIDDLE, [1] * 150], Sampling(max_tokens=20))
        with pytest.raises(PromptTooLongError, match=r"\b150 tokens and 11 more .* holds 160\b"):
            engine.score([[1] * 150], [[2] * 11])
    assert passes == []
    assert len(engine.generate([[1] * 150], Sampling(max_tokens=10))[0][0].token_ids) <= 10


def test_a_smaller_context_can_be_asked_for(tiny_model: ResolvedModel) -> None:
    engine = LocalEngine(tiny_model, device="cpu", context_length=20)
    with pytest.raises(PromptTooLongError, match="holds 20"):
        engine.generate([LONG], Sampling(max_tokens=8))
    assert LocalEngine(tiny_model, device="cpu", context_length=9999).context_length == CONTEXT


@pytest.mark.parametrize("bad", [-1, VOCABULARY])
def test_token_ids_outside_the_vocabulary_are_refused(engine: LocalEngine, bad: int) -> None:
    with pytest.raises(InputError, match=f"token id {bad} is outside"):
        engine.generate([[1, bad]], Sampling(max_tokens=1))


def test_identity_is_recorded(engine: LocalEngine) -> None:
    assert (engine.info.engine, engine.info.engine_version) == ("local", transformers.__version__)
    assert (engine.info.name, engine.info.dtype) == ("qwen2", "float32")
    assert re.fullmatch("[0-9a-f]{64}", engine.info.tokenizer_sha256 or "")
    assert "cpu" in engine.description and "float32" in engine.description


def test_bfloat16_runs(tiny_model: ResolvedModel) -> None:
    engine = without_end(LocalEngine(tiny_model, device="cpu", dtype="bfloat16"))
    assert len(engine.generate([MIDDLE, LONG], Sampling(max_tokens=6))[1][0].logprobs) == 6


def test_nothing_is_printed(tiny_model: ResolvedModel, capfd: pytest.CaptureFixture[str]) -> None:
    LocalEngine(tiny_model, device="cpu").generate([MIDDLE], Sampling(max_tokens=2))
    assert capfd.readouterr() == ("", "")


def test_running_out_of_memory_says_what_to_lower(engine: LocalEngine) -> None:
    def allocate(_: TokenChunk) -> None:
        torch.empty(1 << 48)

    # The allocator's own failure, reached from inside the call.
    with pytest.raises(EngineUnavailableError, match=r"lower max_batch \(now 16\)"):
        engine.generate([MIDDLE], Sampling(max_tokens=2), on_tokens=allocate)
    assert engine.generate([MIDDLE], Sampling(max_tokens=2))


def test_a_closed_engine_says_so(tiny_model: ResolvedModel) -> None:
    with LocalEngine(tiny_model, device="cpu") as engine:
        pass
    with pytest.raises(EngineUnavailableError, match="closed"):
        engine.generate([MIDDLE], Sampling(max_tokens=1))


def test_an_unknown_dtype_is_refused(tiny_model: ResolvedModel) -> None:
    with pytest.raises(InputError, match="float32, bfloat16, float16"):
        LocalEngine(tiny_model, dtype="int3")


def test_missing_weights_are_a_clear_error(tmp_path: Path) -> None:
    model = write_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        LocalEngine(model)


def test_a_missing_tensor_is_never_made_up(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = write_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks the weight model\.layers\.1\.mlp\.up_proj\.weight"):
        LocalEngine(model)


def test_weights_of_another_shape_are_a_clear_error(tmp_path: Path) -> None:
    model = write_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        LocalEngine(model)


def test_code_in_a_model_folder_is_not_run(tmp_path: Path) -> None:
    model = write_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError):
        LocalEngine(model)
    assert not (tmp_path / "ran").exists()


def test_recurrent_architectures_are_refused(tmp_path: Path) -> None:
    config = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4)
    AUTO.from_config(config).save_pretrained(str(tmp_path))
    write_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="serve it with vLLM"):
        LocalEngine(ResolvedModel("mamba", tmp_path, "folder", None))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (3, 1), (8, 1), (1, 40), (3, 5)])
def test_the_fast_linear_layer_equals_the_plain_one(shape: tuple[int, int], bias: bool) -> None:
    fast = BatchedLinear(48, 33, bias=bias)
    hidden_states = torch.randn(*shape, 48)
    with torch.inference_mode():
        expected = torch.nn.functional.linear(hidden_states, fast.weight, fast.bias)
        assert torch.allclose(fast(hidden_states), expected, atol=1e-5)


@pytest.fixture(scope="module")
def demo() -> LocalEngine:
    return LocalEngine(resolve("demo"), device="cpu")


def chat(engine: LocalEngine, question: str) -> list[int]:
    text = engine.tokenizer.render_chat([{"role": "user", "content": question}])
    return engine.tokenizer.encode(text, trusted=[(0, len(text))]).token_ids


@pytest.mark.model
def test_the_demo_model_answers(demo: LocalEngine) -> None:
    completion = demo.generate([chat(demo, "What is 2 + 2? Answer with one number.")], Sampling(max_tokens=12))[0][0]
    assert "4" in completion.text
    assert completion.finish_reason == "stop"


@pytest.mark.model
def test_the_demo_model_batches_like_it_runs_alone(demo: LocalEngine) -> None:
    prompts = [chat(demo, question) for question in ("Name a river.", "Count from one to five, please, in words.")]
    together = demo.generate(prompts, Sampling(max_tokens=16))
    demo._prefixes.clear()
    assert ids(together) == [ids(demo.generate([prompt], Sampling(max_tokens=16)))[0] for prompt in prompts]


@pytest.mark.model
def test_the_demo_model_votes_in_json(demo: LocalEngine) -> None:
    structured = StructuredOutput(kind="json_schema", value=SCHEMA)
    sampling = Sampling(max_tokens=60, structured=structured)
    completion = demo.generate([chat(demo, "Vote for plan 3, surely, and finish. Reply in JSON.")], sampling)[0][0]
    assert set(json.loads(completion.text)) == {"vote", "sure", "kind"}
