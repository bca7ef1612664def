"""Where reports on truth probes are kept: a JSON file for each model, beside its probes. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import platformdirs
from pydantic import JsonValue, ValidationError

from tracer.errors import InputError, StoreError, StoreVersionError
from tracer.files import write_atomic
from tracer.trace.probe_report import VERSION, ProbeReport

SUFFIX = ".report.json"
_LARGEST = 64 << 20
"""Bytes of a file that is read; reports are far smaller."""


def probes_folder() -> Path:
    """Where probes and their reports are kept: ``$TRACER_PROBES``, or a folder of the user's data folder."""
    chosen = os.environ.get("TRACER_PROBES")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_data_dir("tracer")) / "probes"


def model_mark(identity: Mapping[str, JsonValue]) -> str:
    """What the files of a model begin with: 16 digits of the hash of its weights.

    Raises:
        InputError: The model has no hash of its weights.
    """
    weights = identity.get("weights_sha256")
    if not isinstance(weights, str):
        raise InputError("the model's weights have no hash, so that no probe can be told to be its own")
    return weights[:16]


def report_path(identity: Mapping[str, JsonValue]) -> Path:
    """Where the report on a model's probes is kept.

    Raises:
        InputError: The model has no hash of its weights.
    """
    return probes_folder() / f"{model_mark(identity)}{SUFFIX}"


def read_report(path: Path) -> ProbeReport:
    """Read a report.

    Raises:
        StoreError: It is missing, cannot be read, or is no report.
        StoreVersionError: A newer tracer wrote it.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        if len(content) > _LARGEST:
            raise ValueError("too large")
        found = ProbeReport.model_validate_json(content)
    except (ValidationError, ValueError):
        raise StoreError(f"{path} holds no report on probes; `tracer probe evaluate` writes one") from None
    if found.schema_version > VERSION:
        raise StoreVersionError(f"{path} has version {found.schema_version} and this tracer reads {VERSION}; update it")
    return found


def list_reports(folder: Path | None = None) -> list[ProbeReport]:
    """All reports of a folder that can be read, the newest first; the usual folder if none is given."""
    found: list[ProbeReport] = []
    for path in sorted((folder or probes_folder()).glob(f"*{SUFFIX}")):
        try:
            found.append(read_report(path))
        except StoreError:
            continue
    return sorted(found, key=lambda report: report.created_at, reverse=True)


def write_report(path: Path, report: ProbeReport) -> None:
    """Write a report; the file appears whole or not at all.

    Raises:
        StoreError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, report.model_dump_json(indent=1) + "\n")
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from None
