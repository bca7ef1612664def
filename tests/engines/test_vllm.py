"""The HTTP engine against a real vLLM with the demo model in float32."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Sequence

import httpx
import pytest

from tracer.engines.base import TokenChunk
from tracer.engines.models import ResolvedModel
from tracer.engines.vllm import VllmEngine
from tracer.engines.weights.identity import tokenizer_sha256
from tracer.errors import CancelledError, InputError
from tracer.trace.trace import Completion, Sampling, StructuredOutput

pytestmark = [pytest.mark.vllm, pytest.mark.model]

GREEDY = Sampling(max_tokens=12)


def ids(engine: VllmEngine, text: str) -> list[int]:
    return engine.tokenizer.encode(text).token_ids


def metric(engine: VllmEngine, name: str) -> float:
    text = httpx.get(f"{engine.url}/metrics", trust_env=False).text
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(f"vllm:{name}{{"))


def chat(engine: VllmEngine, question: str) -> list[int]:
    text = engine.tokenizer.render_chat([{"role": "user", "content": question}])
    return engine.tokenizer.encode(text, trusted=[(0, len(text))]).token_ids


def only(results: Sequence[Sequence[Completion]]) -> Completion:
    [[completion]] = results
    return completion


def test_identity(vllm_engine: VllmEngine, demo_model: ResolvedModel) -> None:
    info = vllm_engine.info
    assert (info.name, info.dtype, info.engine) == ("demo", "float32", "vllm")
    assert info.tokenizer_sha256 == tokenizer_sha256(demo_model.path)
    assert vllm_engine.context_length == 4096


def test_greedy_is_the_same_twice_and_stops_by_length(vllm_engine: VllmEngine) -> None:
    prompt = ids(vllm_engine, "The capital of France is")
    first = only(vllm_engine.generate([prompt], GREEDY))
    assert first.text.startswith(" Paris")
    assert first.finish_reason == "length"
    assert len(first.token_ids) == len(first.logprobs) == 12
    assert only(vllm_engine.generate([prompt], GREEDY)).token_ids == first.token_ids


def test_end_of_sequence_is_kept_as_a_token(vllm_engine: VllmEngine) -> None:
    completion = only(vllm_engine.generate([chat(vllm_engine, "Say only: yes")], Sampling(max_tokens=40)))
    assert completion.finish_reason == "stop"
    assert completion.stop_reason is None
    assert completion.token_ids[-1] in vllm_engine.tokenizer.eos_token_ids
    assert "<|im_end|>" not in completion.text


def test_streaming_gives_the_same(vllm_engine: VllmEngine) -> None:
    prompts = [ids(vllm_engine, "One two three"), chat(vllm_engine, "Draw three emoji")]
    chunks: list[TokenChunk] = []
    streamed = vllm_engine.generate(prompts, GREEDY, on_tokens=chunks.append)
    plain = vllm_engine.generate(prompts, GREEDY)
    for index, ([left], [right]) in enumerate(zip(streamed, plain, strict=True)):
        assert left.token_ids == right.token_ids
        assert left.logprobs == pytest.approx(right.logprobs, abs=1e-3)
        mine = [chunk for chunk in chunks if chunk.prompt == index]
        assert [token for chunk in mine for token in chunk.token_ids] == left.token_ids
        assert "".join(chunk.text for chunk in mine) == left.text
    assert len(chunks) > 4


def test_samples_differ_and_a_seed_repeats_them(vllm_engine: VllmEngine) -> None:
    prompt = ids(vllm_engine, "A random word:")
    sampling = Sampling(max_tokens=8, temperature=1.0, n=4, seed=11)
    [first] = vllm_engine.generate([prompt], sampling)
    [second] = vllm_engine.generate([prompt], sampling)
    assert [item.token_ids for item in first] == [item.token_ids for item in second]
    assert len({tuple(item.token_ids) for item in first}) > 1


def test_many_prompts_run_together_and_keep_their_order(vllm_engine: VllmEngine) -> None:
    prompts = [ids(vllm_engine, f"{number}, {number + 1}, {number + 2},") for number in range(0, 60, 10)]
    together = vllm_engine.generate(prompts, Sampling(max_tokens=3))
    for number, completions in zip(range(0, 60, 10), together, strict=True):
        assert str(number + 3) in completions[0].text


def test_choice_regex_and_schema(vllm_engine: VllmEngine) -> None:
    def run(kind: str, value: object) -> str:
        structured = StructuredOutput.model_validate({"kind": kind, "value": value})
        sampling = Sampling(max_tokens=60, structured=structured)
        completion = only(vllm_engine.generate([chat(vllm_engine, "How many legs has a cat?")], sampling))
        assert completion.finish_reason == "stop"
        return completion.text

    assert run("choice", ["four", "five"]) in ("four", "five")
    assert re.fullmatch(r"[0-9]{2}-[a-z]", run("regex", "[0-9]{2}-[a-z]"))
    schema = {
        "type": "object",
        "properties": {"legs": {"enum": [4, 5]}},
        "required": ["legs"],
        "additionalProperties": False,
    }
    assert json.loads(run("json_schema", schema))["legs"] in (4, 5)


def test_stop_string_keeps_its_tokens_even_inside_one(vllm_engine: VllmEngine) -> None:
    prompt = ids(vllm_engine, "The capital of France is")
    free = only(vllm_engine.generate([prompt], GREEDY))
    # The stop ends inside the token " located" of " Paris. Paris is located in".
    completion = only(vllm_engine.generate([prompt], Sampling(max_tokens=12, stop=["nothing", "ris is lo"])))
    assert (completion.finish_reason, completion.stop_reason) == ("stop", "ris is lo")
    assert completion.token_ids == free.token_ids[: len(completion.token_ids)]
    assert completion.text == vllm_engine.tokenizer.decode(completion.token_ids).text
    assert completion.text.endswith(" located")


def test_score_equals_what_generation_reported(vllm_engine: VllmEngine) -> None:
    prompts = [ids(vllm_engine, "The capital of France is"), chat(vllm_engine, "Say only: yes")]
    completions = [item for [item] in vllm_engine.generate(prompts, GREEDY)]
    scores = vllm_engine.score(prompts, [item.token_ids for item in completions])
    for values, completion in zip(scores, completions, strict=True):
        assert values == pytest.approx(completion.logprobs, abs=1e-3)


def test_score_of_one_token_equals_that_of_many(vllm_engine: VllmEngine) -> None:
    prompt, (first, second) = ids(vllm_engine, "The sky is"), ids(vllm_engine, " green today")[:2]
    [both] = vllm_engine.score([prompt], [[first, second]])
    [[one], [two]] = vllm_engine.score([prompt, [*prompt, first]], [[first], [second]])
    assert both == pytest.approx([one, two], abs=1e-3)


def test_what_the_server_refuses_is_one_line(vllm_engine: VllmEngine) -> None:
    broken = StructuredOutput(kind="regex", value="(")
    with pytest.raises(InputError, match="refuses the request") as caught:
        vllm_engine.generate([[1]], Sampling(max_tokens=2, structured=broken))
    assert "\n" not in str(caught.value)


def test_id_outside_the_vocabulary(vllm_engine: VllmEngine) -> None:
    with pytest.raises(InputError, match="out of vocabulary"):
        vllm_engine.generate([[10_000_000]], GREEDY)


@pytest.mark.parametrize("streaming", [False, True])
def test_cancelled_requests_free_the_server(vllm_engine: VllmEngine, streaming: bool) -> None:
    cancel = threading.Event()
    caught: list[BaseException] = []

    def work() -> None:
        try:
            vllm_engine.generate(
                [chat(vllm_engine, "Tell me a very long story")] * 3,
                Sampling(max_tokens=3000, temperature=1.0, n=2),
                cancel=cancel,
                on_tokens=(lambda chunk: None) if streaming else None,
            )
        except CancelledError as error:
            caught.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    # Not all six: a story told at temperature 1 can end before the last one has begun.
    wait_until(lambda: metric(vllm_engine, "num_requests_running") >= 2)
    cancel.set()
    thread.join(30)
    assert len(caught) == 1
    wait_until(lambda: metric(vllm_engine, "num_requests_running") == 0)


def test_a_growing_transcript_hits_the_prefix_cache(vllm_engine: VllmEngine) -> None:
    prompt = chat(vllm_engine, " ".join(f"fact {number}" for number in range(100, 220)))
    before = metric(vllm_engine, "prefix_cache_hits_total")
    first = only(vllm_engine.generate([prompt], Sampling(max_tokens=8)))
    longer = [*prompt, *first.token_ids, *ids(vllm_engine, "\nObservation: ten")]
    vllm_engine.generate([longer], Sampling(max_tokens=2))
    # All but the last block of 32 or, on servers started elsewhere, 128 tokens.
    assert metric(vllm_engine, "prefix_cache_hits_total") - before > len(prompt) - 128


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.1)
