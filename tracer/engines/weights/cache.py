"""The model cache: where it is, and how a folder gets into it whole or not at all.

A folder is built beside its final place, written through to the disk and renamed once. One lock per model keeps two
processes from building the same folder, and lets the one that holds it remove what a killed process left behind.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final, Literal

from filelock import FileLock, Timeout
from platformdirs import user_cache_dir

from tracer.errors import ModelError

MANIFEST: Final = "tracer-model.json"
_FORMAT: Final = 1
# Left free beyond what a model needs: metadata, other programs.
_MARGIN_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a long operation is; ``total`` is 0 while unknown."""

    stage: str
    """``download``, ``unpack``, ``hash``, ``convert`` or ``waiting`` (another process builds the model)."""
    done: int
    total: int
    unit: Literal["bytes"] = "bytes"


ProgressCallback = Callable[[Progress], None]


def report(progress: ProgressCallback | None, stage: str, done: int, total: int) -> None:
    """Tell the caller how far a stage is, if it wants to know."""
    if progress is not None:
        progress(Progress(stage, done, total))


def cache_dir() -> Path:
    """Return the cache's folder: ``$TRACER_CACHE``, or the platform's cache folder for tracer."""
    chosen = os.environ.get("TRACER_CACHE")
    return Path(chosen).expanduser().resolve() if chosen else Path(user_cache_dir("tracer"))


def disk_error(path: Path, error: OSError, variable: str = "TRACER_CACHE") -> ModelError:
    """Describe a failure to write below a folder; ``variable`` names what moves that folder elsewhere."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ModelError(f"the disk that holds {path} is full; free some space or point {variable} at a larger disk")
    return ModelError(f"cannot write below {path}: {error.strerror or error}; {variable} chooses another place")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn failures to write below a folder into one clear ModelError."""
    try:
        yield
    except OSError as error:
        raise disk_error(path, error) from error


def require_space(path: Path, needed: int) -> None:
    """Raise unless a folder's disk has room.

    Args:
        path: A folder that exists.
        needed: Bytes that are about to be written, without any margin.

    Raises:
        ModelError: Less than that (and a margin of 64 MB) is free.
    """
    free = shutil.disk_usage(path).free
    if free < needed + _MARGIN_BYTES:
        raise ModelError(
            f"not enough disk space below {path}: {_megabytes(needed + _MARGIN_BYTES)} needed, "
            f"{_megabytes(free)} available; free some space or point TRACER_CACHE at a larger disk"
        )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


@contextmanager
def locked(target: Path, *, progress: ProgressCallback | None = None) -> Iterator[None]:
    """Hold the lock of a cache entry, and remove what killed builders of that entry left.

    Args:
        target: The entry's final folder; its parent is created.
        progress: Told stage ``"waiting"`` once if another process holds the lock.

    Raises:
        ModelError: The cache cannot be written.
    """
    with disk_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.parent / f"{target.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            report(progress, "waiting", 0, 0)
            lock.acquire()
    try:
        for stale in target.parent.glob(f".tmp-{target.name}-*"):
            if stale.is_dir():
                shutil.rmtree(stale, ignore_errors=True)
            else:
                stale.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Give a folder beside ``target`` that becomes ``target`` if the block succeeds and vanishes if it fails.

    Must run inside :func:`locked` for the same target. A folder already there is replaced.

    Raises:
        ModelError: The disk is full or cannot be written.
    """
    with disk_errors(target.parent):
        staging = Path(tempfile.mkdtemp(prefix=f".tmp-{target.name}-", dir=target.parent))
        try:
            folder = staging / "new"
            folder.mkdir()
            yield folder
            for file in folder.iterdir():
                _sync(file)
            _sync(folder)
            if target.exists():
                target.rename(staging / "old")
            folder.rename(target)
            _sync(target.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a finished folder of the cache says about itself."""

    name: str
    source: str
    sha256: str
    """SHA-256 of the GGUF file it was converted from."""
    dtype: str
    files: dict[str, tuple[int, str]]
    """File name to size in bytes and SHA-256."""
    created_by: str


def write_manifest(folder: Path, *, name: str, source: str, sha256: str, known: dict[str, str] | None = None) -> None:
    """Describe a folder in its ``tracer-model.json``.

    Args:
        folder: The folder, complete but for the manifest.
        name: The name it was asked for by.
        source: Where the weights came from.
        sha256: SHA-256 of the original file.
        known: SHA-256 of files that need not be read again.
    """
    files = {
        path.name: {"size": path.stat().st_size, "sha256": (known or {}).get(path.name) or sha256_file(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    content = {
        "format": _FORMAT,
        "name": name,
        "source": source,
        "sha256": sha256,
        "dtype": "bfloat16",
        "files": files,
        "created_by": f"tracer {_version()}",
    }
    (folder / MANIFEST).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest | None:
    """Return a folder's manifest, or None where there is none that can be read."""
    try:
        raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if raw["format"] != _FORMAT:
            return None
        files = {str(name): (int(item["size"]), str(item["sha256"])) for name, item in raw["files"].items()}
        name, source, sha256, dtype, by = (str(raw[key]) for key in ("name", "source", "sha256", "dtype", "created_by"))
        return Manifest(name, source, sha256, dtype, files, by)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def damage(
    folder: Path, manifest: Manifest, *, full: bool = False, progress: ProgressCallback | None = None
) -> str | None:
    """Say what is wrong with a cached folder, or return None.

    Args:
        folder: The folder.
        manifest: Its manifest.
        full: Compare SHA-256 sums as well as sizes.
        progress: Told stage ``"hash"`` when ``full``.
    """
    total, done = sum(size for size, _ in manifest.files.values()), 0
    for name, (size, expected) in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if full:
            if sha256_file(path, progress=progress, done=done, total=total) != expected:
                return f"{name} has the wrong SHA-256"
            done += size
    return None


def sha256_file(
    path: Path, *, progress: ProgressCallback | None = None, done: int = 0, total: int | None = None
) -> str:
    """Return the SHA-256 of a file in hexadecimal.

    Args:
        path: The file.
        progress: Told stage ``"hash"``.
        done: Bytes hashed before this file.
        total: Bytes in all; this file's size if None.
    """
    digest = hashlib.sha256()
    whole = path.stat().st_size if total is None else total
    buffer = memoryview(bytearray(4 << 20))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
            done += size
            report(progress, "hash", done, whole)
    return digest.hexdigest()


def _version() -> str:
    try:
        return version("tracer")
    except PackageNotFoundError:
        return "(not installed)"
