"""What is written for an event, a new run, an imported trace and a deletion, inside the caller's transaction."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from tracer.errors import StoreError, TraceFormatError, TraceNotFoundError
from tracer.store.owner import Owner
from tracer.store.rows import Batch, Delta, document_row, timestamp
from tracer.store.schema import SEQ_BITS, about, documents, events, traces
from tracer.store.search import Search, clean, reference
from tracer.store.statement import Statement
from tracer.trace.events import RunStarted
from tracer.trace.trace import Trace

_COUNTED = ("events", "steps", "calls", "errors", "prompt_tokens", "completion_tokens")
_STAMPED = ("updated_at", "owner_host", "owner_pid", "owner_started")
_SETS = [f"{name} = {name} + :{name}" for name in _COUNTED] + [f"{name} = :{name}" for name in _STAMPED]
# It touches no indexed column, so its cost does not grow with the number of indexes.
_UPDATE = Statement(
    f"UPDATE traces SET {', '.join(_SETS)} WHERE id = :trace_id RETURNING no, events, created_at"  # noqa: S608
)
_ADD_EVENT = Statement("INSERT INTO events (no, seq, payload, packed) VALUES (:no, :seq, :payload, :packed)")


class Writer:
    """Writes runs and keeps their summaries and the text index in step.

    Args:
        search: The store's text search.
    """

    def __init__(self, search: Search) -> None:
        self._search = search

    def create(self, connection: sa.Connection, trace_id: str, started: RunStarted) -> int:
        """Begin a run without any event yet, and return its number.

        Raises:
            TraceFormatError: The id cannot be stored.
            StoreError: There is a run of that id, or the event belongs to another one.
        """
        if not trace_id or "\x00" in trace_id:
            raise TraceFormatError(f"the trace id {trace_id!r} cannot be stored; give the trace a printable one")
        if started.trace_id != trace_id:
            raise StoreError(f"the first event of run {started.trace_id!r} cannot be stored for run {trace_id!r}")
        if connection.execute(sa.select(traces.c.no).where(traces.c.id == trace_id)).first() is not None:
            raise StoreError(f"run {trace_id} is stored already; start it under a new id")
        created = timestamp(started.at)
        row: dict[str, Any] = dict.fromkeys(_COUNTED, 0) | {
            "id": trace_id,
            "name": clean(started.name),
            "created_at": created,
            "updated_at": created,
            "status": "running",
            "agent": clean(started.agent.kind),
            "model": clean(started.model.name),
            "engine": clean(started.model.engine),
        }
        no: int = connection.execute(traces.insert().values(row).returning(traces.c.no)).scalar_one()
        self._search.add_about(connection, no, name=started.name, question=started.task.question)
        return no

    def append(self, connection: sa.Connection, trace_id: str, batch: Batch, *, owner: Owner | None, now: float) -> int:
        """Add events to a run and return the number of its last event.

        Raises:
            TraceNotFoundError: The run was not started.
            StoreError: The run is too long.
        """
        delta = batch.delta
        values: dict[str, Any] = {name: getattr(delta, name) for name in _COUNTED}
        values |= {"trace_id": trace_id, "updated_at": now, "owner_host": owner and owner.host}
        values |= {"owner_pid": owner and owner.pid, "owner_started": owner and owner.started}
        updated = _UPDATE.first(connection, values)
        if updated is None:
            raise TraceNotFoundError(f"no run has the id {trace_id!r}; its first event must be run_started")
        no, last, created = updated
        first = last - delta.events + 1
        if last >> SEQ_BITS:
            raise StoreError(f"run {trace_id} has more than {(1 << SEQ_BITS) - 1} events; no more can be stored")
        if batch.rows:
            rows = [{"no": no, "seq": seq, **row} for seq, row in enumerate(batch.rows, start=first)]
            _ADD_EVENT.run(connection, rows)
        self._search.add_steps(connection, [(reference(no, first + at), text) for at, text in delta.texts])
        self._finish(connection, no, delta, created=created)
        return int(last)

    def insert(self, connection: sa.Connection, trace: Trace, batch: Batch) -> None:
        """Store a complete trace, given with its events.

        Raises:
            StoreError: There is a run of that id.
        """
        if batch.started is None:
            raise TraceFormatError(f"trace {trace.id} does not begin with run_started")
        no = self.create(connection, trace.id, batch.started)
        now = batch.delta.ended or timestamp(trace.created_at)
        self.append(connection, trace.id, batch, owner=None, now=now)
        attached = [("explanation", document) for document in trace.explanations]
        attached += [("probe", document) for document in trace.probes]
        for index, (kind, document) in enumerate(attached):
            row = document_row(document)
            connection.execute(documents.insert().values(no=no, kind=kind, key=f"imported-{index}", **row))

    def remove(self, connection: sa.Connection, no: int) -> None:
        """Delete a trace with all that belongs to it."""
        self._search.remove(connection, no)
        for table in (events, documents, about, traces):
            connection.execute(table.delete().where(table.c.no == no))

    def _finish(self, connection: sa.Connection, no: int, delta: Delta, *, created: float) -> None:
        end = delta.finished
        if end is None:
            return
        seconds = (delta.ended or created) - created
        values: dict[str, Any] = {
            "status": clean(end.status),
            "answer": None if end.outcome.answer is None else clean(end.outcome.answer),
            "correct": end.outcome.correct,
            "error": None if end.error is None else clean(end.error),
            # An imported run without timed calls ends when it began: its duration is not known.
            "seconds": seconds if seconds > 0 and end.status != "running" else None,
        }
        connection.execute(traces.update().where(traces.c.no == no).values(values))
