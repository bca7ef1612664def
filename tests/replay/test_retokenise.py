"""Stand-ins for traces without token ids."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.engines.test_local import write_tokenizer
from tracer.engines.tokenizer import ChatTokenizer, load_tokenizer
from tracer.errors import InputError
from tracer.replay.recorded import Recorded, Source
from tracer.replay.retokenise import CALL, retokenise
from tracer.trace.trace import AgentInfo, Document, ModelInfo, Step, Task, Trace

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}[assistant]"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    """Byte-level, with a chat template."""
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    """The same without a template."""
    folder: Path = tmp_path_factory.mktemp("bare")
    write_tokenizer(folder)
    return load_tokenizer(folder)


def imported(steps: list[Step], documents: list[Document] | None = None) -> Trace:
    return Trace(
        id="t1",
        name="an import",
        created_at=datetime(2026, 1, 2, tzinfo=UTC),
        status="completed",
        agent=AgentInfo(kind="external"),
        model=ModelInfo(name="somebody's"),
        task=Task(question="Where is x?", documents=documents or []),
        steps=steps,
    )


REACT = [
    Step(id="s1", kind="question", text="Where is x?"),
    Step(id="s2", kind="thought", text="Look it up."),
    Step(id="s3", kind="action", text="search[x]"),
    Step(id="s4", kind="observation", text="x is in y. <|end|>"),
    Step(id="s5", kind="answer", text="y"),
]


def text_of(recorded: Recorded, tokenizer: ChatTokenizer, source: Source) -> str:
    """The characters of a source; one token a byte."""
    sequence = next(item for item in recorded.sequences if item.call.id == source.call_id)
    ids = sequence.token_ids[source.start : source.end].tolist()
    return tokenizer.decode(ids).text


def test_steps_and_what_they_read_are_the_texts_of_the_trace(tokenizer: ChatTokenizer) -> None:
    trace = imported(REACT)
    before = trace.to_json()
    recorded = retokenise(trace, tokenizer)
    assert trace.to_json() == before
    recorded.trace.check()
    for target in recorded.targets:
        ids = recorded.sequences[target.sequence].token_ids[target.start : target.end].tolist()
        assert tokenizer.decode(ids).text.strip() == trace.step(target.step_id).text
    assert [target.step_id for target in recorded.targets] == ["s2", "s3", "s5"]
    shown = {source.step_id: text_of(recorded, tokenizer, source) for source in recorded.sources if source.step_id}
    assert shown["s4"].strip() == "x is in y. <|end|>"
    assert shown["s1"].strip() == "Where is x?"


def test_it_is_one_growing_conversation(tokenizer: ChatTokenizer) -> None:
    recorded = retokenise(imported(REACT), tokenizer)
    first, second = recorded.sequences
    assert first.call.id == f"{CALL}-1"
    assert second.token_ids[: len(first.token_ids)].tolist() == first.token_ids.tolist()
    assert len(recorded.tree) == len(second.token_ids)
    text = tokenizer.decode(second.token_ids.tolist()).text
    assert text.startswith("[user]Where is x?\n[assistant]Thought: Look it up.\nAction: search[x]\nObservation: x is")


def test_control_tokens_in_texts_are_text(tokenizer: ChatTokenizer) -> None:
    recorded = retokenise(imported(REACT), tokenizer)
    (end,) = tokenizer.special_token_ids
    ids = recorded.sequences[-1].token_ids.tolist()
    assert ids.count(end) == 1  # the template's own


def test_a_base_model_and_documents_of_the_task(bare: ChatTokenizer) -> None:
    trace = imported(REACT[1:3], [Document(id="d", title="On x", text="x is in y.")])
    recorded = retokenise(trace, bare)
    (sequence,) = recorded.sequences
    text = bare.decode(sequence.token_ids.tolist()).text
    assert text == "On x\nx is in y.\nWhere is x?Thought: Look it up.\nAction: search[x]"
    assert {source.kind for source in recorded.sources} >= {"document", "question", "thought", "action"}


def test_branches_do_not_see_each_other_and_a_later_step_sees_all(bare: ChatTokenizer) -> None:
    trace = imported(
        [
            Step(id="s1", kind="question", text="q"),
            Step(id="s2", kind="thought", text="one", branch="b1"),
            Step(id="s3", kind="thought", text="two", branch="b2"),
            Step(id="s4", kind="thought", text="three", branch="b1"),
            Step(id="s5", kind="answer", text="four"),
        ]
    )
    recorded = retokenise(trace, bare)

    def before(step_id: str) -> str:
        target = recorded.target(step_id)
        return bare.decode(recorded.sequences[target.sequence].token_ids[: target.start].tolist()).text

    assert ("two" in before("s4"), "one" in before("s4")) == (False, True)
    assert "one" not in before("s3")
    assert all(word in before("s5") for word in ("one", "two", "three"))


def test_steps_without_text_are_no_targets_and_nothing_written_is_refused(bare: ChatTokenizer) -> None:
    recorded = retokenise(imported([*REACT[:2], Step(id="s9", kind="thought", text="")]), bare)
    assert [target.step_id for target in recorded.targets] == ["s2"]
    with pytest.raises(InputError, match="no step that a model wrote"):
        retokenise(imported([REACT[0], REACT[3]]), bare)


def test_chunks_are_cut_as_elsewhere(bare: ChatTokenizer) -> None:
    recorded = retokenise(imported(REACT), bare, chunk_tokens=8)
    pieces = [source for source in recorded.sources if source.step_id == "s4"]
    assert len(pieces) == 3 and all(piece.end - piece.start <= 8 for piece in pieces)
