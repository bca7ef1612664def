"""The store: runs as append-only events in one database, with a summary row and a text index beside them."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import platformdirs
import sqlalchemy as sa
from pydantic import JsonValue
from pydantic_core import from_json

from tracer.errors import StoreError, TraceNotFoundError
from tracer.store.arrays import SUFFIX, Arrays
from tracer.store.database import Database, DiskFullError, default_location
from tracer.store.owner import Owner, current_owner
from tracer.store.query import TraceFilter, TraceSummary, choose, listed, select_listed, select_rows, summary
from tracer.store.rows import Batch, decode, decode_event, document_row
from tracer.store.schema import documents, events, has_fts5, traces
from tracer.store.search import Search, clean
from tracer.store.write import Writer
from tracer.trace.events import Event, fold
from tracer.trace.trace import Trace

DocumentKind = Literal["explanation", "probe"]
Conflict = Literal["error", "new_id", "replace", "skip"]
Summaries = list[TraceSummary]
_BATCH = 200
_CANDIDATES = 5


class Store:
    """Keeps runs in SQLite, or in PostgreSQL given ``postgresql+psycopg://...``.

    Nothing is opened before the first use. A store may be shared by threads, and its file by processes. Events are
    committed one by one: whatever `append` has returned for survives the death of the process.

    Args:
        location: A file or a database URL; without one, ``TRACER_STORE`` or ``runs.db`` in the user's data folder.
        timeout: Seconds to wait for another writer before giving up.
    """

    def __init__(self, location: str | Path | None = None, *, timeout: float = 10.0) -> None:
        self._database = Database(default_location() if location is None else location, timeout=timeout)
        dialect = "sqlite" if self._database.is_sqlite else "postgresql"
        self._search = Search(dialect, indexed=self._database.is_sqlite and has_fts5())
        self._writer = Writer(self._search)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Store({self.where!r})"

    @property
    def where(self) -> str:
        """The file, or the URL without its password."""
        return self._database.where

    @property
    def arrays(self) -> Arrays:
        """Token-level scores: beside the database's file, or for a server's in the user's data folder."""
        path = self._database.path
        if path is not None:
            return Arrays.beside(path)
        name = hashlib.sha256(self.where.encode()).hexdigest()[:16]
        return Arrays(Path(platformdirs.user_data_dir("tracer")) / f"{name}{SUFFIX}")

    def close(self) -> None:
        """Close all connections; a later use opens the store again."""
        self._database.close()

    def append(self, trace_id: str, event: Event) -> int:
        """Append one event durably; ``run_started`` creates the trace and makes this process its owner.

        Returns:
            The event's number in its run, counted from 1.

        Raises:
            TraceNotFoundError: The run was not started.
            StoreError: It was started before, or the store cannot be written; nothing of the event is kept then.
        """
        return self.append_many(trace_id, [event])

    def append_many(self, trace_id: str, batch: Sequence[Event]) -> int:
        """Append events in one transaction: all of them or none.

        Returns:
            The number of the last event in its run, counted from 1.

        Raises:
            TraceNotFoundError: The run was not started.
            StoreError: It was started before, or the store cannot be written.
        """
        prepared = Batch.of(batch)
        owner = current_owner()
        try:
            with self._database.write() as connection:
                if prepared.started is not None:
                    self._writer.create(connection, trace_id, prepared.started)
                return self._writer.append(connection, trace_id, prepared, owner=owner, now=time.time())
        except DiskFullError as error:
            raise DiskFullError(error.space, self._kept(trace_id)) from None

    def load(self, trace_id: str) -> Trace:
        """The trace, folded from its events, with everything that was attached to it.

        Args:
            trace_id: An id, or the beginning of one if no other begins like it.

        Raises:
            TraceNotFoundError: No trace or several match.
            StoreError: The store cannot be read.
        """
        with self._consistent() as (connection, dead):
            row = self._find(connection, trace_id)
            chosen = sa.select(events.c.seq, events.c.payload, events.c.packed).where(events.c.no == row.no)
            stored = connection.execute(chosen.order_by(events.c.seq)).all()
            attached = self._attached(connection, row.no)
        trace = fold(decode_event(row.id, seq, (payload, packed)) for seq, payload, packed in stored)
        if trace.status == "running" and (row.no in dead or row.status == "interrupted"):
            trace.status = "interrupted"
        trace.explanations = [document for kind, _, document in attached if kind == "explanation"]
        trace.probes = [document for kind, _, document in attached if kind == "probe"]
        return trace

    def events(self, trace_id: str, *, after: int = 0) -> Iterator[tuple[int, Event]]:
        """The events of a run with their numbers, from the one after ``after`` to the newest.

        A live view polls with the last number that it has seen. No transaction stays open between two batches.

        Raises:
            TraceNotFoundError: No trace or several match.
            StoreError: The store cannot be read.
        """
        with self._database.read() as connection:
            row = self._find(connection, trace_id)
        columns = sa.select(events.c.seq, events.c.payload, events.c.packed).where(events.c.no == row.no)
        while True:
            with self._database.read() as connection:
                newer = columns.where(events.c.seq > after).order_by(events.c.seq).limit(_BATCH)
                batch = connection.execute(newer).all()
            for seq, payload, packed in batch:
                yield seq, decode_event(row.id, seq, (payload, packed))
                after = seq
            if len(batch) < _BATCH:
                return

    def list(
        self,
        wanted: TraceFilter | None = None,
        *,
        limit: int | None = 100,
        offset: int = 0,
        order: Literal["newest", "oldest"] = "newest",
    ) -> Summaries:
        """Summaries of the traces that a filter chooses.

        Raises:
            StoreError: The store cannot be read.
        """
        with self._consistent() as (connection, dead):
            key = (traces.c.created_at, traces.c.no)
            ordered = [column.desc() for column in key] if order == "newest" else [*key]
            page = self._choose(wanted, connection, dead=dead, recent=limit is not None)
            # Numbers first: that needs only an index, and the wide rows are then read for one page.
            numbers = page.order_by(*ordered).limit(limit).offset(offset).subquery()
            rows = select_rows().where(traces.c.no.in_(sa.select(numbers.c.no))).order_by(*ordered)
            found = connection.execute(rows).mappings().all()
            attached = listed(connection.execute(select_listed([row["no"] for row in found])))
            return [summary(row, dead=dead, attached=attached.get(row["no"])) for row in found]

    def count(self, wanted: TraceFilter | None = None) -> int:
        """How many traces a filter chooses.

        Raises:
            StoreError: The store cannot be read.
        """
        with self._consistent() as (connection, dead):
            chosen = self._choose(wanted, connection, dead=dead, recent=False).subquery()
            return connection.execute(sa.select(sa.func.count()).select_from(chosen)).scalar_one()

    def summary(self, trace_id: str) -> TraceSummary:
        """The summary of one trace, by its id or the beginning of it.

        Raises:
            TraceNotFoundError: No trace or several match.
            StoreError: The store cannot be read.
        """
        with self._consistent() as (connection, dead):
            row = self._find(connection, trace_id)
            found = connection.execute(select_rows().where(traces.c.no == row.no)).mappings().one()
            attached = listed(connection.execute(select_listed([row.no])))
            return summary(found, dead=dead, attached=attached.get(row.no))

    def import_trace(self, trace: Trace, *, on_conflict: Conflict = "error") -> str:
        """Store a trace that was recorded elsewhere; `load` gives it back to the byte.

        Args:
            trace: A complete trace.
            on_conflict: What to do if a trace of that id is there: refuse, store under a new id, replace it with all
                that was attached to it, or leave it as it is.

        Returns:
            The id under which it is stored.

        Raises:
            TraceFormatError: The trace contradicts itself.
            StoreError: There is one of that id already, or the store cannot be written.
        """
        trace.check()
        # Before the transaction: serialising a long run takes a while, and nobody else can write meanwhile.
        prepared = Batch.of_trace(trace)
        with self._database.write() as connection:
            no = connection.execute(sa.select(traces.c.no).where(traces.c.id == clean(trace.id))).scalar()
            if no is not None:
                match on_conflict:
                    case "skip":
                        return trace.id
                    case "replace":
                        self._writer.remove(connection, no)
                    case "new_id":
                        trace = trace.model_copy(update={"id": uuid.uuid4().hex})
                        prepared = Batch.of_trace(trace)
                    case "error":
                        raise StoreError(
                            f"there is a trace {trace.id} already; import it under a new id, replace or skip it"
                        )
            self._writer.insert(connection, trace, prepared)
        return trace.id

    def delete(self, trace_id: str) -> None:
        """Delete a trace with everything attached to it.

        Raises:
            TraceNotFoundError: No trace or several match.
            StoreError: The store cannot be written.
        """
        with self._database.write() as connection:
            row = self._find(connection, trace_id)
            self._writer.remove(connection, row.no)
        self.arrays.delete(row.id)

    def put_document(self, trace_id: str, kind: DocumentKind, *, key: str, document: dict[str, JsonValue]) -> None:
        """Attach an explanation or probe result to a trace, in place of the one of the same kind and key.

        Raises:
            InputError: The document is not plain JSON data.
            TraceNotFoundError: No trace or several match.
            StoreError: The store cannot be written.
        """
        self.put_documents(trace_id, kind, {key: document})

    def put_documents(
        self,
        trace_id: str,
        kind: DocumentKind,
        attached: Mapping[str, dict[str, JsonValue]],
        *,
        remove: Iterable[str] = (),
    ) -> None:
        """Attach several documents by their keys, all of them or none; see `put_document`.

        Args:
            trace_id: The trace.
            kind: What they are.
            attached: Documents by key.
            remove: Keys of documents that they replace.

        Raises:
            InputError: A document is not plain JSON data.
            TraceNotFoundError: No trace or several match.
            StoreError: The store cannot be written.
        """
        stored = {key: document_row(document) for key, document in attached.items()}
        with self._database.write() as connection:
            no = self._find(connection, trace_id).no
            own = (documents.c.no == no, documents.c.kind == kind)
            for key in set(remove) - set(stored):
                connection.execute(documents.delete().where(*own, documents.c.key == key))
            for key, row in stored.items():
                same = (*own, documents.c.key == key)
                if connection.execute(documents.update().where(*same).values(row)).rowcount == 0:
                    connection.execute(documents.insert().values(no=no, kind=kind, key=key, **row))
            _touch(connection, no)

    def documents(self, trace_id: str, kind: DocumentKind) -> dict[str, dict[str, JsonValue]]:
        """What was attached to a trace, by key, in the order in which it was first attached.

        Raises:
            TraceNotFoundError: No trace or several match.
            StoreError: The store cannot be read.
        """
        with self._database.read() as connection:
            attached = self._attached(connection, self._find(connection, trace_id).no)
        return {key: document for found, key, document in attached if found == kind}

    def delete_document(self, trace_id: str, kind: DocumentKind, *, key: str) -> bool:
        """Detach a document.

        Returns:
            Whether it was there.

        Raises:
            TraceNotFoundError: No trace or several match.
            StoreError: The store cannot be written.
        """
        with self._database.write() as connection:
            no = self._find(connection, trace_id).no
            same = (documents.c.no == no, documents.c.kind == kind, documents.c.key == key)
            found = connection.execute(documents.delete().where(*same)).rowcount > 0
            if found:
                _touch(connection, no)
            return found

    def resolve(self, prefix: str) -> str:
        """The full id of the one trace whose id is or begins with ``prefix``.

        Raises:
            TraceNotFoundError: No trace or several match.
            StoreError: The store cannot be read.
        """
        with self._database.read() as connection:
            return str(self._find(connection, prefix).id)

    def _choose(
        self, wanted: TraceFilter | None, connection: sa.Connection, *, dead: frozenset[int], recent: bool
    ) -> sa.Select[*tuple[int]]:
        every = sa.select(traces.c.no)
        if wanted is None:
            return every
        return choose(every, wanted, search=self._search, connection=connection, dead=dead, recent=recent)

    def _find(self, connection: sa.Connection, prefix: str) -> sa.Row[int, str, str]:
        wanted = clean(prefix)
        columns = sa.select(traces.c.no, traces.c.id, traces.c.status)
        exact = connection.execute(columns.where(traces.c.id == wanted)).first()
        if exact is not None:
            return exact
        # A range instead of LIKE: it uses the index of ids and tells upper from lower case.
        begins = (traces.c.id >= wanted, traces.c.id < wanted + "\U0010ffff")
        found = connection.execute(columns.where(*begins).order_by(traces.c.id).limit(_CANDIDATES + 1)).all()
        if not wanted or not found:
            raise TraceNotFoundError(f"no trace has the id {prefix!r}; `tracer list` shows those that are stored")
        if len(found) > 1:
            names = ", ".join(row.id for row in found[:_CANDIDATES]) + (", ..." if len(found) > _CANDIDATES else "")
            raise TraceNotFoundError(f"several trace ids begin with {prefix!r}: {names}; give more of the id")
        return found[0]

    def _attached(self, connection: sa.Connection, no: int) -> Sequence[tuple[str, str, dict[str, JsonValue]]]:
        chosen = sa.select(documents.c.kind, documents.c.key, documents.c.payload, documents.c.packed)
        rows = connection.execute(chosen.where(documents.c.no == no).order_by(documents.c.id)).all()
        return [(kind, key, from_json(decode(payload, packed))) for kind, key, payload, packed in rows]

    def _kept(self, trace_id: str) -> str:
        try:
            with self._database.read() as connection:
                last = connection.execute(sa.select(traces.c.events).where(traces.c.id == trace_id)).scalar()
        except StoreError:
            return "everything stored before is kept"
        return f"run {trace_id} is kept up to event {last}" if last else f"nothing of run {trace_id} was stored"

    @contextmanager
    def _consistent(self) -> Iterator[tuple[sa.Connection, frozenset[int]]]:
        """A read transaction, and the runs in it whose owner is dead although their rows say ``running``."""
        dead = self._reap()
        with self._database.read() as connection:
            yield connection, dead

    def _reap(self) -> frozenset[int]:
        """Mark runs whose process died as interrupted; where that cannot be written, only tell which they are."""
        here = current_owner().host
        columns = (traces.c.no, traces.c.owner_host, traces.c.owner_pid, traces.c.owner_started)
        running = sa.select(*columns).where(traces.c.status == "running", traces.c.owner_host == here)
        with self._database.read() as connection:
            owners = {row.no: Owner(*row[1:]) for row in connection.execute(running)}
        fate = {owner: owner.is_dead() for owner in set(owners.values())}
        dead = [no for no, owner in owners.items() if fate[owner]]
        if not dead:
            return frozenset()
        try:
            with self._database.write() as connection:
                for no in dead:
                    # Only as it was seen: meanwhile another process may have taken the run over or finished it.
                    same = (traces.c.no == no, traces.c.status == "running", traces.c.owner_pid == owners[no].pid)
                    connection.execute(traces.update().where(*same).values(status="interrupted"))
        except StoreError:
            return frozenset(dead)
        return frozenset()


def _touch(connection: sa.Connection, no: int) -> None:
    """Note that a trace changed, for those who keep what they loaded."""
    connection.execute(traces.update().where(traces.c.no == no).values(updated_at=time.time()))
