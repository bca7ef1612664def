"""Files from a browser stay in their folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest

from tracer.agents.tools import load_documents
from tracer.errors import InputError, StoreError
from tracer.jobs.documents import MAX_BYTES, confined, keep_documents


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("notes.md", "notes.md"),
        ("notes/deep/a.md", "notes/deep/a.md"),
        ("../../etc/passwd", "etc/passwd"),
        ("/etc/passwd", "etc/passwd"),
        ("..\\..\\windows\\x.txt", "windows/x.txt"),
        (".hidden/.ssh", "hidden/ssh"),
        ("a\0b\n.md", "a_b_.md"),
        ("...", "document"),
        ("", "document"),
        ("x" * 300 + ".md", "x" * 97 + ".md"),
        ("Überblick über Ø.md", "Überblick über Ø.md"),
    ],
)
def test_names_are_confined(name: str, expected: str) -> None:
    found = confined(name)
    assert found == PurePosixPath(expected)
    assert not found.is_absolute() and ".." not in found.parts


def test_an_agent_can_read_what_was_kept(tmp_path: Path) -> None:
    folder = keep_documents(tmp_path / "kept", [("b/two.md", b"# Two\nSecond."), ("one.txt", b"First.")])
    assert folder.parent == tmp_path / "kept"
    assert {(document.title, document.text) for document in load_documents(folder)} == {
        ("Two", "Second."),
        ("one", "First."),
    }
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_the_same_files_are_kept_once_and_others_apart(tmp_path: Path) -> None:
    first = keep_documents(tmp_path, [("a.md", b"1"), ("b.md", b"2")])
    assert keep_documents(tmp_path, [("b.md", b"2"), ("a.md", b"1")]) == first
    assert keep_documents(tmp_path, [("a.md", b"1"), ("b.md", b"3")]) != first


def test_names_that_collide_are_kept_apart(tmp_path: Path) -> None:
    files = [("a.md", b"1"), ("../a.md", b"2"), ("a.md/b.md", b"3"), ("x/y.md", b"4"), ("x", b"5")]
    folder = keep_documents(tmp_path, files)
    found = [path for path in folder.rglob("*") if path.is_file()]
    assert sorted(path.read_bytes() for path in found) == [b"1", b"2", b"3", b"4", b"5"]
    assert all(path.resolve().is_relative_to(folder.resolve()) for path in found)


def test_nothing_or_too_much_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 files"):
        keep_documents(tmp_path, [])
    with pytest.raises(InputError, match="64 MB"):
        keep_documents(tmp_path, [("a.md", b"x" * (MAX_BYTES + 1))])


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        keep_documents(tmp_path / "file", [("a.md", b"1")])
