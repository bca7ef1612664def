"""Connections, transactions and what goes wrong with them.

SQLite runs in WAL mode with ``synchronous=NORMAL``: what `write` has committed survives the death of the process
(``kill -9`` included) and never corrupts. A power cut can take back the last transactions since the last checkpoint,
always whole ones from the end.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs
import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from tracer.errors import StoreError
from tracer.store import schema, search

_MAGIC = b"SQLite format 3\x00"
_LOW_SPACE = 1 << 20
_RETRY_SECONDS = 0.02


class DiskFullError(StoreError):
    """There is no space left for what was to be stored.

    Args:
        space: How much is left, and where.
        kept: What was stored before.
    """

    def __init__(self, space: str, kept: str = "everything stored before is kept") -> None:
        super().__init__(f"the disk is full: {space}; {kept}; free some space and try again")
        self.space = space


def default_location() -> str | Path:
    """``TRACER_STORE`` (a path or a database URL), or ``runs.db`` in the user's data folder."""
    return os.environ.get("TRACER_STORE") or Path(platformdirs.user_data_dir("tracer")) / "runs.db"


class Database:
    """A lazily opened database that hands out short transactions and may be shared by threads.

    Args:
        location: A file, or an SQLAlchemy URL.
        timeout: Seconds to wait for another writer.
    """

    def __init__(self, location: str | Path, *, timeout: float) -> None:
        self._timeout = timeout
        self._lock = threading.Lock()
        self._engine: sa.Engine | None = None
        self._pid = os.getpid()
        self.path: Path | None = None
        try:
            url = sa.make_url(location) if isinstance(location, str) and "://" in location else None
        except ArgumentError:
            raise StoreError(f"{str(location)!r} is neither a path nor a database URL") from None
        if url is None or url.get_backend_name() == "sqlite":
            if url is not None and (not url.database or url.database == ":memory:" or url.query):
                raise StoreError(f"a store needs a plain file, found {str(location)!r}; give its path")
            name = url.database if url is not None else location
            self.path = Path(str(name)).expanduser().absolute()
            url = sa.URL.create("sqlite", database=str(self.path))
        self._url = url
        self.where = str(self.path) if self.path else url.render_as_string(hide_password=True)

    @property
    def is_sqlite(self) -> bool:
        """Whether this is a file rather than a server."""
        return self.path is not None

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A transaction that sees one state of the store throughout.

        Raises:
            StoreError: The store cannot be opened or read.
        """
        with self._transaction(writes=False) as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction that is committed if the block ends well, and else leaves the store as it was.

        Raises:
            StoreError: The store is locked, full, read-only or damaged.
        """
        with self._transaction(writes=True) as connection:
            yield connection

    def close(self) -> None:
        """Close all connections; the next use opens the store again."""
        with self._lock:
            if self._engine is not None:
                self._engine.dispose(close=self._pid == os.getpid())
                self._engine = None

    @contextmanager
    def _transaction(self, *, writes: bool) -> Iterator[sa.Connection]:
        with self._translated():
            engine = self._open()
            connection = self._begin(engine, writes=writes)
            try:
                yield connection
                connection.commit()
            finally:
                # After an exception this rolls back; a rollback that fails too must not hide the first error.
                connection.close()

    def _begin(self, engine: sa.Engine, *, writes: bool) -> sa.Connection:
        deadline = time.monotonic() + self._timeout
        while True:
            connection = engine.connect().execution_options(tracer_write=writes)
            try:
                connection.begin()
                return connection
            except DBAPIError as error:
                connection.close()
                # The busy handler does not cover every lock (recovery, a checkpoint at close), hence a second loop.
                if _code(error.orig) not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) or time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_SECONDS)

    def _open(self) -> sa.Engine:
        if self._engine is not None and self._pid == os.getpid():
            return self._engine
        with self._lock:
            if self._engine is not None and self._pid != os.getpid():
                # SQLite connections must not cross a fork; the parent still uses them, so they are not closed.
                self._engine.dispose(close=False)
                self._engine = None
            if self._engine is None:
                self._pid = os.getpid()
                self._prepare_file()
                engine = self._create_engine()
                try:
                    self._retry(lambda: self._initialise(engine))
                except BaseException:
                    engine.dispose()
                    raise
                self._engine = engine
            return self._engine

    def _prepare_file(self) -> None:
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self.path.exists():
                # Before SQLite sees it, so that the text of a run is never readable by others.
                os.close(os.open(self.path, os.O_CREAT | os.O_WRONLY, 0o600))
            with self.path.open("rb") as file:
                head = file.read(len(_MAGIC))
        except OSError as error:
            raise StoreError(
                f"cannot open the store {self.path}: {error.strerror or error}; name another one in TRACER_STORE"
            ) from None
        if head and head != _MAGIC:
            raise StoreError(f"{self.path} is not a tracer store (it is no database); it was left as it is")

    def _create_engine(self) -> sa.Engine:
        try:
            if not self.is_sqlite:
                return sa.create_engine(self._url, pool_pre_ping=True)
            # threads wait for each other inside SQLite, so the pool itself never makes one wait
            engine = sa.create_engine(self._url, connect_args={"timeout": self._timeout}, max_overflow=-1)
        except ModuleNotFoundError as error:
            raise StoreError(f"{self.where} needs the package {error.name}; pip install 'tracer[postgres]'") from None
        except NoSuchModuleError:
            raise StoreError(
                f"{self.where}: unknown kind of database; give a file or postgresql+psycopg://..."
            ) from None
        sa.event.listen(engine, "connect", _configure)
        sa.event.listen(engine, "begin", _begin_sqlite)
        return engine

    def _initialise(self, engine: sa.Engine) -> None:
        with engine.connect() as connection:
            version = schema.stored_version(connection)
            if version is not None:
                schema.check_version(version, self.where)
            if self.is_sqlite:
                self._check_ours(connection)
        if self.is_sqlite:
            _use_wal(engine)
        if version != schema.STORE_VERSION or (self.is_sqlite and search.needs_index(engine)):
            with engine.connect().execution_options(tracer_write=True) as connection, connection.begin():
                schema.create_or_migrate(connection, self.where)
                if self.is_sqlite:
                    search.update_index(connection)

    def _check_ours(self, connection: sa.Connection) -> None:
        objects = connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar_one()
        if objects and connection.exec_driver_sql("PRAGMA application_id").scalar() != schema.APPLICATION_ID:
            raise StoreError(f"{self.where} is a database of another program, not a tracer store; it was left as it is")

    def _retry(self, action: Callable[[], None]) -> None:
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                return action()
            except (DBAPIError, sqlite3.Error) as error:
                if (
                    _code(getattr(error, "orig", error)) not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
                    or time.monotonic() > deadline
                ):
                    raise
                time.sleep(_RETRY_SECONDS)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            raise self._explain(error.orig) from error
        except sqlite3.Error as error:
            raise self._explain(error) from error
        except OSError as error:
            raise StoreError(f"cannot use the store {self.where}: {error.strerror or error}") from error

    def _explain(self, error: BaseException | None) -> StoreError:
        code = _code(error)
        free = _free_bytes(self.path)
        if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and free is not None and free < _LOW_SPACE):
            folder = self.path.parent if self.path else self.where
            return DiskFullError(f"{(free or 0) / 2**20:.1f} MiB left in {folder}")
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return StoreError(
                f"the store {self.where} has been locked by another process for {self._timeout:g} s; "
                "end that process or try again"
            )
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return StoreError(
                f"the store {self.where} is damaged ({error}); move it away and import your exported traces, "
                "or recover it with sqlite3's .recover"
            )
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
            return StoreError(
                f"the store {self.where} cannot be written ({error}); make the file and its folder writable, "
                "or name another store in TRACER_STORE"
            )
        return StoreError(f"the store {self.where} failed: {next(iter(str(error).splitlines()), 'no reason given')}")


def _use_wal(engine: sa.Engine) -> None:
    raw = engine.raw_connection()
    try:
        cursor = raw.cursor()
        # Fetched to the end: the change is only committed when its statement has ended.
        if cursor.execute("PRAGMA journal_mode").fetchall() != [("wal",)]:
            cursor.execute("PRAGMA journal_mode = WAL").fetchall()
        cursor.close()
    finally:
        raw.close()


def _code(error: BaseException | None) -> int | None:
    """SQLite's primary result code; extended codes carry it in their low byte."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _free_bytes(path: Path | None) -> int | None:
    try:
        return shutil.disk_usage(path.parent).free if path else None
    except OSError:
        return None


def _configure(connection: sqlite3.Connection, _record: object) -> None:
    # Transactions are begun explicitly in `_begin_sqlite`, not by the driver's guess.
    connection.isolation_level = None
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.execute(f"PRAGMA journal_size_limit = {64 << 20}")


def _begin_sqlite(connection: sa.Connection) -> None:
    # Taking the write lock at once avoids the upgrade of a read transaction, which fails instead of waiting.
    writes = connection.get_execution_options().get("tracer_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
