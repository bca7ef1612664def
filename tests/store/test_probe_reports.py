"""Reports on probes: found where probes are kept, whole or refused with a sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tracer.errors import InputError, StoreError, StoreVersionError
from tracer.store.probe_reports import list_reports, probes_folder, read_report, report_path, write_report
from tracer.trace.probe_report import Estimate, FirstErrors, FirstErrorTask, Located, ProbeReport

SHARE = Estimate(value=0.5, low=0.25, high=0.75)
LOCATED = Located(name="chance", overall=SHARE, named=SHARE, none=None)
MISTAKES = FirstErrors(
    protocol="by hand", tasks=(FirstErrorTask(task="sums", chains=4, with_mistake=2, methods=(LOCATED,)),)
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRACER_PROBES", str(tmp_path / "probes"))
    return tmp_path / "probes"


def report(weights: str, created_at: str) -> ProbeReport:
    return ProbeReport(model={"name": "m", "weights_sha256": weights}, created_at=created_at, mistakes=MISTAKES)


def test_reports_come_back_as_they_were_the_newest_first(folder: Path) -> None:
    old, new = report("a" * 64, "2026-01-01T00:00:00+00:00"), report("b" * 64, "2026-02-01T00:00:00+00:00")
    assert list_reports() == []
    for item in (new, old):
        path = report_path(item.model)
        assert path.parent == folder == probes_folder()
        write_report(path, item)
        assert read_report(path) == item
    assert list_reports() == [new, old]
    (folder / "broken.report.json").write_text("{")
    assert list_reports() == [new, old]


def test_what_is_no_report_is_refused(folder: Path) -> None:
    path = report_path({"weights_sha256": "c" * 64})
    with pytest.raises(StoreError, match="cannot read"):
        read_report(path)
    write_report(path, report("c" * 64, ""))
    path.write_text(path.read_text().replace('"value": 0.5', '"value": NaN', 1))
    with pytest.raises(StoreError, match="holds no report on probes; `tracer probe evaluate` writes one"):
        read_report(path)
    path.write_text('{"schema_version": 2}')
    with pytest.raises(StoreVersionError, match="has version 2 and this tracer reads 1"):
        read_report(path)
    with pytest.raises(InputError, match="have no hash"):
        report_path({"name": "m"})
    path.unlink()
    path.mkdir()
    with pytest.raises(StoreError, match="cannot write"):
        write_report(path, report("c" * 64, ""))


def test_reading_reports_needs_no_torch() -> None:
    code = (
        "import sys, tracer.store.probe_reports\n"
        "print([name for name in ('torch', 'transformers', 'sklearn', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
