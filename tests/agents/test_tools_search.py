"""Search finds the right passages and never leaves its folder."""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path

import pytest

from tracer.agents.tools import Corpus, load_documents, read_folder, search
from tracer.agents.tools.search import Index, index_folder, split_passages, words
from tracer.errors import InputError, ToolError
from tracer.trace.trace import Document


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "docs"
    root.mkdir()
    (root / "herons.md").write_text("# Herons\n\nHerons stand in rivers.\n\n## Food\n\nThey eat frogs.\n")
    (root / "oaks.txt").write_text("Oaks grow slowly and drop acorns.\n")
    return root


def found(folder: Path, query: str, *, top: int = 3) -> str:
    result = search(folder, top=top).invoke({"query": query})
    assert isinstance(result, str)
    return result


def test_documents_have_the_path_as_id_and_the_heading_as_title(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "red-fox.md").write_text("A fox.")
    assert [(d.id, d.title, d.text) for d in load_documents(folder)] == [
        ("herons", "Herons", "Herons stand in rivers.\n\n## Food\n\nThey eat frogs."),
        ("oaks", "oaks", "Oaks grow slowly and drop acorns."),
        ("sub/red-fox", "red fox", "A fox."),
    ]


def test_two_files_that_differ_in_their_ending_keep_it_in_their_ids(folder: Path) -> None:
    (folder / "oaks.md").write_text("More oaks.")
    assert [d.id for d in load_documents(folder)] == ["herons", "oaks.md", "oaks.txt"]


def test_results_carry_title_id_and_text(folder: Path) -> None:
    assert found(folder, "What do acorns do?") == "oaks [oaks]\nOaks grow slowly and drop acorns."


def test_a_heading_is_shown_and_searched(folder: Path) -> None:
    assert found(folder, "food", top=1) == "Herons > Food [herons]\nThey eat frogs."


def test_nothing_found_names_the_nearest_titles(folder: Path) -> None:
    answer = found(folder, "herrons")
    assert answer.startswith("No results for 'herrons'. Nearest titles: Herons; ")


@pytest.mark.parametrize("query", ["", "  \n"])
def test_an_empty_search_is_an_error(folder: Path, query: str) -> None:
    with pytest.raises(ToolError, match="empty"):
        found(folder, query)


def test_a_search_of_stop_words_alone_finds_nothing(folder: Path) -> None:
    assert found(folder, "the of and").startswith("No results")


def test_accents_case_and_plurals_do_not_matter(folder: Path) -> None:
    (folder / "cafe.txt").write_text("Das CAFÉ serves two berries.")
    assert "[cafe]" in found(folder, "cafe")
    assert "[cafe]" in found(folder, "Berry")


def test_scripts_without_spaces_are_found_by_part(folder: Path) -> None:
    (folder / "river.txt").write_text("長い川が町を流れる。")
    assert "[river]" in found(folder, "川")


def test_scores_are_those_of_bm25(folder: Path) -> None:
    texts = ["red fox runs", "red red barn", "quiet barn with a long red roof and a door", "blue lake"]
    documents = tuple(Document(id=str(i), title=f"t{i}", text=text) for i, text in enumerate(texts))
    index = Index(Corpus(folder, documents, {}))
    rows = [words(f"t{i} {text}") for i, text in enumerate(texts)]
    mean = sum(map(len, rows)) / len(rows)

    def score(query: str, row: list[str]) -> float:
        total = 0.0
        for word in words(query):
            holding = sum(word in other for other in rows)
            idf = math.log(1 + (len(rows) - holding + 0.5) / (holding + 0.5))
            frequency = Counter(row)[word]
            total += idf * frequency / (frequency + 1.5 * (0.25 + 0.75 * len(row) / mean))
        return total

    for query in ("red barn", "red", "blue fox"):
        scores = {str(i): score(query, row) for i, row in enumerate(rows)}
        expected = sorted((i for i in scores if scores[i] > 0), key=lambda i: -scores[i])
        assert [passage.doc_id for passage in index.find(query, 9)] == expected


def test_long_texts_are_split_and_nothing_is_lost() -> None:
    paragraphs = [f"Paragraph {i}. " + "Words follow words here. " * (i * 7 % 90) for i in range(40)]
    text = "\n\n".join(p.strip() for p in paragraphs) + "\n\n" + "x" * 3000
    passages = split_passages(Document(id="d", title="T", text=text))
    assert all(0 < len(passage.text) <= 1200 for passage in passages)
    assert "".join("".join(p.text for p in passages).split()) == "".join(text.split())


def test_a_comment_in_a_code_block_is_no_heading() -> None:
    text = "Before\n\n```\n# not a heading\n\n# nor this\n```\n\n# Real\n\nAfter"
    assert [passage.heading for passage in split_passages(Document(id="d", title="T", text=text))] == ["", "Real"]


def test_a_title_without_text_can_be_found(folder: Path) -> None:
    (folder / "stub.md").write_text("# Zebra\n")
    assert found(folder, "zebra") == "Zebra [stub]\nZebra"


def test_links_hidden_binary_and_huge_files_are_skipped_and_counted(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.md").write_text("# Secret\n\nthe treasure")
    (folder / "file-link.md").symlink_to(outside / "secret.md")
    (folder / "folder-link").symlink_to(outside)
    (folder / "dots.md").symlink_to("../outside/secret.md")
    (folder / "dangling.md").symlink_to(tmp_path / "nowhere")
    (folder / "again.md").symlink_to(folder / "oaks.txt")
    (folder / "loop.md").symlink_to(folder / "loop.md")
    (folder / ".hidden.md").write_text("the treasure")
    (folder / ".git").mkdir()
    (folder / ".git" / "note.md").write_text("the treasure")
    (folder / "binary.txt").write_bytes(b"the treasure \0\1\2")
    (folder / "latin.txt").write_bytes("the treasure é".encode("latin-1"))
    (folder / "huge.txt").write_bytes(b"the treasure " * 200_000)
    (folder / "program.py").write_text("the treasure")
    (folder / "blank.md").write_text(" \n")
    os.mkfifo(folder / "pipe.md")
    corpus = read_folder(folder)
    assert [document.id for document in corpus.documents] == ["herons", "oaks"]
    assert corpus.skipped == {
        "link out of the folder": 4,
        "link inside the folder": 2,
        "hidden": 2,
        "binary or not UTF-8": 2,
        "too large": 1,
        "not a text or markdown file": 2,
        "empty": 1,
    }
    assert found(folder, "treasure").startswith("No results")


def test_a_very_deep_folder_is_cut_off(folder: Path) -> None:
    deep = folder.joinpath(*["d"] * 60)
    deep.mkdir(parents=True)
    (deep / "far.md").write_text("far away")
    corpus = read_folder(folder)
    assert corpus.skipped == {"too deep": 1}
    assert len(corpus.documents) == 2


def test_names_that_cannot_be_shown_are_made_printable(folder: Path) -> None:
    (folder / "a\x1b[31m\nb.txt").write_text("odd")
    with open(os.fsencode(folder) + b"/\xff.txt", "w") as file:
        file.write("odder")
    assert all(document.id.isprintable() for document in load_documents(folder))


@pytest.mark.parametrize("name", ["missing", "oaks.txt", "empty", "bad\0name", "x" * 5000])
def test_an_unusable_folder_is_an_input_error(folder: Path, name: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match="no folder|is a file|no readable"):
        search(folder / name)


def test_a_folder_without_text_says_what_was_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_text("x")
    (tmp_path / ".b.md").write_text("x")
    with pytest.raises(InputError, match="1 hidden, 1 not a text or markdown file"):
        load_documents(tmp_path)


def test_an_index_is_made_once_until_a_file_changes(folder: Path) -> None:
    index = index_folder(folder)
    assert index_folder(folder) is index
    (folder / "oaks.txt").write_text("Oaks now have walnuts, oddly.")
    assert index_folder(folder) is not index
    assert "[oaks]" in found(folder, "walnuts")


def test_nothing_is_printed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found(folder, "acorns")
    assert capfd.readouterr() == ("", "")


def test_the_tool_says_what_it_covers(folder: Path) -> None:
    (folder / ".hidden.md").write_text("x")
    assert search(folder).metadata == {"documents": 2, "passages": 3, "skipped": {"hidden": 1}}
