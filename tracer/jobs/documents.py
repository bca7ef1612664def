"""Documents that somebody dropped into the app, as a folder that an agent can be given."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Final

from tracer.errors import InputError, StoreError

MAX_FILES: Final = 2_000
MAX_BYTES: Final = 64_000_000
"""Of all files together."""
_DEPTH: Final = 8
_UNSAFE: Final = re.compile(r"[^\w .,()+-]")


def keep_documents(folder: Path, files: Sequence[tuple[str, bytes]]) -> Path:
    """Write files below a folder, under names that cannot leave it.

    The same files are written once only.

    Args:
        folder: Where folders of documents are kept.
        files: Names, which may hold folders and come from a browser, and contents.

    Returns:
        The folder that holds just these files.

    Raises:
        InputError: There are none, or too many.
        StoreError: They cannot be written.
    """
    if not files or len(files) > MAX_FILES or sum(len(content) for _, content in files) > MAX_BYTES:
        raise InputError(
            f"{len(files)} files cannot be given to an agent; give one to {MAX_FILES:,d}, of {MAX_BYTES / 1e6:.0f} MB "
            "in all"
        )
    digest = hashlib.sha256()
    names = _Names()
    placed: dict[PurePosixPath, bytes] = {}
    for name, content in sorted(files):
        path = names.free(confined(name))
        placed[path] = content
        digest.update(f"{path}\0{len(content)}\0".encode() + content)
    kept = folder / digest.hexdigest()[:20]
    if not kept.is_dir():
        _write(kept, placed)
    return kept


def confined(name: str) -> PurePosixPath:
    """A relative path made of a name from elsewhere, without hidden parts, links upwards or odd characters."""
    parts = [_UNSAFE.sub("_", part).strip(" .")[-100:] for part in re.split(r"[/\\]", name)]
    return PurePosixPath(*[part for part in parts if part][-_DEPTH:] or ["document"])


class _Names:
    """Gives every file a path of its own; a file cannot stand where another one needs a folder."""

    def __init__(self) -> None:
        self._files: set[PurePosixPath] = set()
        self._folders: set[PurePosixPath] = set()

    def free(self, path: PurePosixPath) -> PurePosixPath:
        """The path, or one like it that is free."""
        if self._files & set(path.parents):
            path = PurePosixPath(path.name)
        number, free = 2, path
        while free in self._files or free in self._folders:
            free = path.with_name(f"{path.stem} {number}{path.suffix}")
            number += 1
        self._files.add(free)
        self._folders.update(free.parents)
        return free


def _write(target: Path, files: dict[PurePosixPath, bytes]) -> None:
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=target.parent))
        try:
            for path, content in files.items():
                place = part / path
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content)
            os.replace(part, target)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    except OSError as error:
        if not target.is_dir():
            raise StoreError(f"the documents cannot be written below {target.parent}: {error.strerror}") from None
