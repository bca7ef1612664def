"""Files that are full, damaged, foreign, newer, older or read-only."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.store.test_append import run_events
from tests.strategies import small_trace
from tracer.errors import StoreError, StoreVersionError
from tracer.store import DiskFullError, Store, TraceFilter, schema
from tracer.trace.events import StepAdded
from tracer.trace.trace import Step


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.5 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1536k", "tracer-test", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_what_was_stored_and_recovers(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(b"x" * (400 << 10))
    with Store(small_disk / "runs.db") as store:
        store.append("t1", run_events()[0])
        last = 1
        with pytest.raises(DiskFullError) as caught:  # noqa: PT012
            for number in range(10_000):
                step = Step(id=f"s{number}", kind="observation", text=os.urandom(8000).hex())
                last = store.append("t1", StepAdded(step=step))
        assert "MiB left in" in str(caught.value)
        assert f"run t1 is kept up to event {last}" in str(caught.value)
        assert len(store.load("t1").steps) == last - 1
        (small_disk / "ballast").unlink()
        assert store.append("t1", StepAdded(step=Step(id="more", kind="thought", text="after"))) == last + 1
    with Store(small_disk / "runs.db") as store:
        assert store.load("t1").steps[-1].id == "more"
        assert store.count(TraceFilter(text="after")) == 1


def test_a_read_only_disk_is_reported(small_disk: Path) -> None:
    with Store(small_disk / "runs.db") as store:
        store.import_trace(small_trace())
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with Store(small_disk / "runs.db") as store, pytest.raises(StoreError, match="cannot be written"):
        store.import_trace(small_trace("other"))


def test_a_folder_in_the_place_of_the_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="Is a directory"):
        Store(tmp_path).count()


def test_a_text_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database, whatever its name")
    with pytest.raises(StoreError, match="is no database"):
        Store(path).count()
    assert path.read_text() == "not a database, whatever its name"
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


def test_the_database_of_another_program_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE cookies (name TEXT)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match="another program"):
        Store(path).import_trace(small_trace())
    assert path.read_bytes() == before


def test_a_damaged_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    with Store(path) as store:
        store.import_trace(small_trace())
    damaged = path.read_bytes()[:100] + b"\xa5" * 20_000
    path.write_bytes(damaged)
    with pytest.raises(StoreError, match="is damaged"):
        Store(path).list()
    assert path.read_bytes() == damaged


def test_a_newer_store_is_refused_with_both_versions(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    with Store(path) as store:
        store.import_trace(small_trace())
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE meta SET value = '7' WHERE key = 'version'")
    connection.close()
    with pytest.raises(
        StoreVersionError, match=rf"version 7, this tracer reads up to version {schema.STORE_VERSION}; upgrade"
    ):
        Store(path).list()


def test_an_older_store_is_migrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runs.db"
    with Store(path) as store:
        store.import_trace(small_trace())
    steps: list[int] = []

    first = schema.STORE_VERSION + 1

    def add_column(connection: sa.Connection) -> None:
        steps.append(1)
        connection.exec_driver_sql("ALTER TABLE traces ADD COLUMN mood TEXT")

    def note(connection: sa.Connection) -> None:
        steps.append(2)

    monkeypatch.setattr(schema, "STORE_VERSION", first + 1)
    monkeypatch.setattr(schema, "MIGRATIONS", {first: add_column, first + 1: note})
    for _ in range(2):
        with Store(path) as store:
            assert store.load("t1").to_json() == small_trace().to_json()
    assert steps == [1, 2]


def test_a_store_of_version_1_is_listed_with_its_explanations(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    long = {"method": "alti", "values": [[0.5] * 40_000], "cost": {"seconds": 2.5}}
    with Store(path) as store:
        store.import_trace(small_trace(explanations=[long, {"method": "span", "cost": {"seconds": 1}}]))
        store.import_trace(small_trace("t2"))
        before = store.load("t1").to_json()
    with sqlite3.connect(path) as connection:
        connection.execute("DROP INDEX documents_listed")
        for column in ("name", "seconds"):
            connection.execute(f"ALTER TABLE documents DROP COLUMN {column}")
        connection.execute("UPDATE meta SET value = '1' WHERE key = 'version'")
    connection.close()
    with Store(path) as store:
        found = store.summary("t1")
        assert (found.methods, found.probes, found.explained_seconds) == (("alti", "span"), (), 3.5)
        assert store.load("t1").to_json() == before
        store.put_document("t2", "explanation", key="k", document={"method": "two_hop"})
        assert store.summary("t2").methods == ("two_hop",)


def test_a_failed_migration_leaves_the_store_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runs.db"
    with Store(path) as store:
        store.import_trace(small_trace())

    def halfway(connection: sa.Connection) -> None:
        connection.exec_driver_sql("DROP TABLE events")
        connection.exec_driver_sql("SELECT * FROM nowhere")

    with monkeypatch.context() as patch:
        newer = schema.STORE_VERSION + 1
        patch.setattr(schema, "STORE_VERSION", newer)
        patch.setattr(schema, "MIGRATIONS", {newer: halfway})
        with pytest.raises(StoreError, match="no such table: nowhere"):
            Store(path).count()
    with Store(path) as store:
        assert store.load("t1").to_json() == small_trace().to_json()


def test_others_cannot_read_the_store(tmp_path: Path) -> None:
    path = tmp_path / "data" / "runs.db"
    store = Store(path)
    store.import_trace(small_trace())
    modes = {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in path.parent.iterdir()}
    assert modes == dict.fromkeys(["runs.db", "runs.db-wal", "runs.db-shm"], 0o600)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_the_environment_names_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACER_STORE", str(tmp_path / "elsewhere.db"))
    assert Store().where == str(tmp_path / "elsewhere.db")
    monkeypatch.delenv("TRACER_STORE")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert Store().where == str(tmp_path / "data" / "tracer" / "runs.db")


def test_nothing_is_opened_before_the_first_use(tmp_path: Path) -> None:
    Store(tmp_path / "data" / "runs.db").close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["oracle-of-delphi://host/db", "sqlite://", "postgresql+psycopg://[bad"])
def test_an_unusable_url_is_refused(url: str) -> None:
    with pytest.raises(StoreError):
        Store(url).count()


def test_a_closed_store_opens_again(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/runs.db")
    store.import_trace(small_trace())
    store.close()
    assert store.count() == 1
