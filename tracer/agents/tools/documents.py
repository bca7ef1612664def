"""Reading a folder of text and markdown files as documents.

The folder is the boundary. Directories are opened relative to each other and never through a symbolic link, so that
nothing outside can be read even when the folder changes meanwhile. What is left out is counted by reason.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tracer.errors import InputError
from tracer.trace.trace import Document

SUFFIXES = frozenset({".md", ".markdown", ".txt", ".text"})
MAX_FILE_BYTES = 2_000_000
MAX_TOTAL_BYTES = 256_000_000
MAX_FILES = 20_000
MAX_DEPTH = 20

Stamp = tuple[str, int, int, int]


@dataclass(frozen=True)
class Corpus:
    """The readable documents of one folder.

    Args:
        folder: The folder, resolved.
        documents: Documents in the order of their paths; an id is the path without its ending.
        skipped: How many entries were left out, by reason.
    """

    folder: Path
    documents: tuple[Document, ...]
    skipped: dict[str, int]


@dataclass(frozen=True)
class _File:
    path: str
    directory: int
    info: os.stat_result


def _walk(root: Path, skipped: Counter[str]) -> Iterator[_File]:
    """Yield regular text files below a folder, in order, each with an open descriptor of its directory."""
    found = 0

    def count(_: OSError) -> None:
        skipped["unreadable"] += 1

    for where, directories, files, descriptor in os.fwalk(root, onerror=count, follow_symlinks=False):
        relative = Path(where).relative_to(root)
        for name in [*directories, *files]:
            if name.startswith("."):
                skipped["hidden"] += 1
            elif (root / relative / name).is_symlink():
                target = Path(os.path.realpath(root / relative / name))
                skipped["link inside the folder" if target.is_relative_to(root) else "link out of the folder"] += 1
        if len(relative.parts) >= MAX_DEPTH and directories:
            skipped["too deep"] += len(directories)
            directories.clear()
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        for name in sorted(files):
            if name.startswith("."):
                continue
            try:
                info = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            except OSError:
                skipped["unreadable"] += 1
                continue
            if stat.S_ISLNK(info.st_mode):
                continue
            if not stat.S_ISREG(info.st_mode) or PurePosixPath(name).suffix.lower() not in SUFFIXES:
                skipped["not a text or markdown file"] += 1
            elif info.st_size > MAX_FILE_BYTES:
                skipped["too large"] += 1
            elif found >= MAX_FILES:
                skipped["too many files"] += 1
            else:
                found += 1
                yield _File((relative / name).as_posix(), descriptor, info)


def _read(file: _File) -> str | None:
    """Read a file as UTF-8; ``None`` if it is binary or in another encoding."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(PurePosixPath(file.path).name, flags, dir_fd=file.directory), "rb") as opened:
        if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
            return None
        data = opened.read(MAX_FILE_BYTES + 1)
    if b"\0" in data or len(data) > MAX_FILE_BYTES:
        return None
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        return None


def _clean_name(path: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in path.encode("utf-8", "replace").decode())


def _split_title(path: str, text: str) -> tuple[str, str]:
    """Take the title off a text: its first heading if it starts with one, else its file's name."""
    head, _, rest = text.lstrip("\n").partition("\n")
    if found := re.match(r"#{1,6}\s+(\S.*)", head):
        return found[1].rstrip("# ").strip()[:200], rest.strip()
    return re.sub(r"[-_]+", " ", PurePosixPath(path).stem).strip() or path, text.strip()


def _root(folder: str | Path) -> Path:
    given = Path(folder)
    try:
        root = given.expanduser().resolve(strict=True)
    except (OSError, RuntimeError, ValueError):
        raise InputError(f"there is no folder {str(folder)!r}; give a folder of .md or .txt files") from None
    if not root.is_dir():
        raise InputError(f"{str(folder)!r} is a file; give the folder that holds it")
    if not os.access(root, os.R_OK | os.X_OK):
        raise InputError(f"the folder {str(folder)!r} may not be read; change its permissions or give another one")
    return root


def read_folder(folder: str | Path) -> Corpus:
    """Read the text and markdown files of a folder and its subfolders.

    Left out and counted: symbolic links, hidden files and folders, other kinds of files, binary files and files that
    are not UTF-8, files over 2 MB, and everything past 20,000 files, 256 MB or 20 levels.

    Args:
        folder: The folder; only files that are really inside it are read.

    Returns:
        The documents and the counts.

    Raises:
        InputError: If there is no such folder, or nothing in it can be read.
    """
    root = _root(folder)
    skipped: Counter[str] = Counter()
    texts: dict[str, str] = {}
    total = 0
    for file in _walk(root, skipped):
        total += file.info.st_size
        if total > MAX_TOTAL_BYTES:
            skipped["over 256 MB in all"] += 1
            continue
        try:
            text = _read(file)
        except OSError:
            skipped["unreadable"] += 1
            continue
        if text is None:
            skipped["binary or not UTF-8"] += 1
        elif not text.strip():
            skipped["empty"] += 1
        else:
            texts[_clean_name(file.path)] = text
    if not texts:
        why = "; left out: " + ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
        raise InputError(f"the folder {str(folder)!r} holds no readable .md or .txt file{why if skipped else ''}")
    stems = Counter(str(PurePosixPath(path).with_suffix("")) for path in texts)
    documents = []
    for path, text in sorted(texts.items()):
        stem = str(PurePosixPath(path).with_suffix(""))
        title, body = _split_title(path, text)
        documents.append(Document(id=stem if stems[stem] == 1 else path, title=title, text=body))
    return Corpus(root, tuple(documents), dict(skipped))


def load_documents(folder: str | Path) -> list[Document]:
    """Read a folder as documents of a task; see `read_folder` for what is left out and for the errors."""
    return list(read_folder(folder).documents)


def stamp_folder(folder: str | Path) -> tuple[Path, tuple[Stamp, ...]]:
    """Say which files a folder holds now, without reading them.

    Args:
        folder: The folder.

    Returns:
        The resolved folder, and path, modification time, size and inode of each file that would be read.

    Raises:
        InputError: If there is no such folder.
    """
    root = _root(folder)
    files = _walk(root, Counter())
    return root, tuple((f.path, f.info.st_mtime_ns, f.info.st_size, f.info.st_ino) for f in files)
