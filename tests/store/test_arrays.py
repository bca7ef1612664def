"""Token scores beside the database."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from tests.strategies import small_trace
from tracer.errors import InputError, StoreError
from tracer.store import Arrays, Store

KEY = "0a" * 32
SCORES = {"s1": np.array([0.1, -2.5e-8, 0.0], dtype=np.float32), "s2#0": np.array([1.0], dtype=np.float32)}


def test_what_is_written_is_read_and_is_a_safetensors_file(tmp_path: Path) -> None:
    arrays = Arrays.beside(tmp_path / "runs.db")
    written = arrays.write("t1", KEY, SCORES)
    path = tmp_path / "runs.db.arrays" / "t1" / f"{KEY}.safetensors"
    assert arrays.root / written.file == path and written.bytes == path.stat().st_size
    found = arrays.read("t1", KEY, written)
    for plain in (found, safetensors.numpy.load_file(path)):
        assert sorted(plain) == ["s1", "s2#0"]
        np.testing.assert_array_equal(plain["s1"], SCORES["s1"])
        assert plain["s1"].dtype == np.float32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == [path.name]


def test_writing_again_replaces(tmp_path: Path) -> None:
    arrays = Arrays(tmp_path)
    first = arrays.write("t1", KEY, SCORES)
    second = arrays.write("t1", KEY, {"s9": SCORES["s1"]})
    assert list(arrays.read("t1", KEY, second)) == ["s9"]
    with pytest.raises(StoreError, match="were changed since"):
        arrays.read("t1", KEY, first)


def test_missing_and_changed_files_are_told(tmp_path: Path) -> None:
    arrays = Arrays(tmp_path)
    written = arrays.write("t1", KEY, SCORES)
    path = arrays.path("t1", KEY)
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(StoreError, match="were changed since they were written"):
        arrays.read("t1", KEY, written)
    path.unlink()
    with pytest.raises(StoreError, match="cannot be read: No such file"):
        arrays.read("t1", KEY, written)


@pytest.mark.parametrize("trace_id", ["../up", "/etc", "..", ".", "", "a/b", "a\x00b", "x" * 300, "é", "-rf", "_x"])
def test_no_id_leads_out_of_the_folder(tmp_path: Path, trace_id: str) -> None:
    root = tmp_path / "arrays"
    arrays = Arrays(root)
    written = arrays.write(trace_id, KEY, SCORES)
    assert arrays.path(trace_id, KEY).resolve().parent.parent == root.resolve()
    assert sorted(arrays.read(trace_id, KEY, written)) == ["s1", "s2#0"]
    assert os.listdir(tmp_path) == ["arrays"] and len(os.listdir(root)) == 1
    arrays.delete(trace_id)
    assert os.listdir(root) == []


def test_two_ids_never_share_a_folder(tmp_path: Path) -> None:
    arrays = Arrays(tmp_path)
    hashed = arrays.path("a/b", KEY).parent.name
    assert len({arrays.path(name, KEY) for name in ("a/b", "a_b", hashed, "a", "A")}) == 5


def test_names_that_cannot_be_used(tmp_path: Path) -> None:
    arrays = Arrays(tmp_path)
    for key in ("../" + "0" * 61, "0" * 63, "A" * 64, ""):
        with pytest.raises(StoreError, match="is not the key"):
            arrays.path("t1", key)
    with pytest.raises(InputError, match="__metadata__"):
        arrays.write("t1", KEY, {"__metadata__": SCORES["s1"]})
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        Arrays(tmp_path / "file").write("t1", KEY, SCORES)


def test_adopting_copies_once(tmp_path: Path) -> None:
    one, other = Arrays(tmp_path / "one"), Arrays(tmp_path / "other")
    other.adopt(one, "t1")
    assert not other.root.exists()
    written = one.write("t1", KEY, SCORES)
    other.adopt(one, "t1")
    assert sorted(other.read("t1", KEY, written)) == ["s1", "s2#0"]
    newer = other.write("t1", KEY, {"s9": SCORES["s1"]})
    other.adopt(one, "t1")
    other.adopt(other, "t1")
    assert list(other.read("t1", KEY, newer)) == ["s9"]


def test_a_deleted_trace_takes_its_arrays_along(tmp_path: Path) -> None:
    with Store(tmp_path / "runs.db") as store:
        for name in ("t1", "t2"):
            store.import_trace(small_trace(name))
            store.arrays.write(name, KEY, SCORES)
        store.delete("t1")
        assert os.listdir(store.arrays.root) == ["t2"]
        store.delete("t2")
        assert store.arrays.root == tmp_path / "runs.db.arrays"


def test_a_server_s_arrays_are_in_the_user_s_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    one = Store("postgresql+psycopg://me:secret@host/runs").arrays.root
    assert one.is_relative_to(tmp_path) and "secret" not in str(one)
    assert one == Store("postgresql+psycopg://me:changed@host/runs").arrays.root
    assert one != Store("postgresql+psycopg://me:secret@host/others").arrays.root
