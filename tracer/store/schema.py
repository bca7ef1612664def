"""The tables, and how a store of an older version becomes one of this version.

A fresh store is created whole; `MIGRATIONS` holds the numbered steps that lead there from every older version.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

import sqlalchemy as sa
from pydantic_core import from_json
from sqlalchemy import BigInteger, Boolean, Column, Float, Index, Integer, LargeBinary, MetaData, String, Table, Text

from tracer.errors import StoreVersionError
from tracer.store.rows import decode, listed

STORE_VERSION = 2
APPLICATION_ID = 0x54524352
"""Marks an SQLite file as a store ("TRCR"), so that another program's database is never written to."""

SEQ_BITS = 24
"""A step's text is found under ``trace number << SEQ_BITS | seq``, in one integer key for the full-text index."""

metadata = MetaData()
_Number = BigInteger().with_variant(Integer, "sqlite")
# Prefixes are looked up as ranges, so ids must sort by code point everywhere.
_Id = Text().with_variant(Text(collation="C"), "postgresql")

meta = Table("meta", metadata, Column("key", String(64), primary_key=True), Column("value", Text, nullable=False))

traces = Table(
    "traces",
    metadata,
    Column("no", _Number, primary_key=True, autoincrement=True),
    Column("id", _Id, nullable=False, unique=True),
    Column("name", Text, nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("updated_at", Float(53), nullable=False),
    Column("status", Text, nullable=False),
    Column("agent", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("engine", Text, nullable=False),
    Column("answer", Text),
    Column("correct", Boolean),
    Column("error", Text),
    Column("seconds", Float(53)),
    Column("events", Integer, nullable=False),
    Column("steps", Integer, nullable=False),
    Column("calls", Integer, nullable=False),
    Column("errors", Integer, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("owner_host", Text),
    Column("owner_pid", Integer),
    Column("owner_started", Float(53)),
    # Each covers all closed-list filters, so that even a filter that matches nothing reads only an index.
    Index("traces_recent", "created_at", "status", "agent", "model", "correct"),
    Index("traces_status", "status", "created_at", "agent", "model", "correct"),
    Index("traces_agent", "agent", "status", "created_at", "model", "correct"),
    Index("traces_model", "model", "created_at", "status", "agent", "correct"),
    sqlite_autoincrement=True,
)
Index(
    "traces_running",
    traces.c.owner_host,
    sqlite_where=traces.c.status == "running",
    postgresql_where=traces.c.status == "running",
)

# The question can be long and `traces` rows are rewritten with every event, so it lives on its own.
about = Table(
    "about",
    metadata,
    Column("no", _Number, primary_key=True, autoincrement=False),
    Column("question", Text, nullable=False),
    Column("folded", Text, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("no", _Number, primary_key=True, autoincrement=False),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("payload", Text),
    Column("packed", LargeBinary),
)

step_texts = Table(
    "step_texts",
    metadata,
    Column("ref", _Number, primary_key=True, autoincrement=False),
    Column("text", Text, nullable=False),
)

documents = Table(
    "documents",
    metadata,
    Column("id", _Number, primary_key=True, autoincrement=True),
    Column("no", _Number, nullable=False),
    Column("kind", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("payload", Text),
    Column("packed", LargeBinary),
    Column("name", Text),
    Column("seconds", Float(53)),
    Index("documents_key", "no", "kind", "key", unique=True),
    # Covers what a listing shows, so that the long payloads are not touched for it.
    Index("documents_listed", "no", "kind", "name", "seconds"),
    sqlite_autoincrement=True,
)

Migration = Callable[[sa.Connection], None]


def _list_documents(connection: sa.Connection) -> None:
    """What a listing shows of explanations and probe scores moves to columns of its own."""
    connection.exec_driver_sql("ALTER TABLE documents ADD COLUMN name TEXT")
    connection.exec_driver_sql("ALTER TABLE documents ADD COLUMN seconds DOUBLE PRECISION")
    connection.exec_driver_sql("CREATE INDEX documents_listed ON documents (no, kind, name, seconds)")
    for number in connection.execute(sa.select(documents.c.id)).scalars().all():
        own = documents.c.id == number
        payload, packed = connection.execute(sa.select(documents.c.payload, documents.c.packed).where(own)).one()
        shown = listed(from_json(decode(payload, packed)))
        connection.execute(documents.update().where(own).values(shown))


MIGRATIONS: dict[int, Migration] = {2: _list_documents}
"""Step ``n`` turns a store of version ``n - 1`` into one of version ``n``; all needed steps share one transaction."""


def stored_version(connection: sa.Connection) -> int | None:
    """The version of an existing store; ``None`` where there is none yet."""
    if not sa.inspect(connection).has_table("meta"):
        return None
    value = connection.execute(sa.select(meta.c.value).where(meta.c.key == "version")).scalar()
    return int(value) if value is not None else None


def check_version(found: int, where: str) -> None:
    """Refuse a store that a newer tracer has written.

    Raises:
        StoreVersionError: It is newer than this code.
    """
    if found > STORE_VERSION:
        raise StoreVersionError(
            f"the store {where} has version {found}, this tracer reads up to version {STORE_VERSION}; "
            "upgrade tracer, or name another store in TRACER_STORE"
        )


def create_or_migrate(connection: sa.Connection, where: str) -> None:
    """Bring the store to this version inside the caller's transaction.

    Raises:
        StoreVersionError: It is newer than this code.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(APPLICATION_ID)))
    # Another process may have been first, so the version is read again under the write lock.
    found = stored_version(connection)
    if found is None:
        metadata.create_all(connection)
        connection.execute(meta.insert().values(key="version", value=str(STORE_VERSION)))
        _create_indexes(connection)
        return
    check_version(found, where)
    for number in range(found + 1, STORE_VERSION + 1):
        MIGRATIONS[number](connection)
    if found < STORE_VERSION:
        connection.execute(meta.update().where(meta.c.key == "version").values(value=str(STORE_VERSION)))


def has_fts5() -> bool:
    """Whether this Python's SQLite has the full-text module."""
    connection = sqlite3.connect(":memory:")
    try:
        connection.execute("CREATE VIRTUAL TABLE probe USING fts5(text, content='', tokenize='trigram')")
    except sqlite3.OperationalError:
        return False
    finally:
        connection.close()
    return True


def _create_indexes(connection: sa.Connection) -> None:
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")
    elif connection.dialect.name == "postgresql":
        connection.exec_driver_sql(
            "CREATE INDEX step_texts_words ON step_texts USING gin (to_tsvector('simple', text))"
        )
