"""What a listing shows of a stored trace, and how one is asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa
from sqlalchemy import ColumnElement

from tracer.store.owner import Owner
from tracer.store.rows import timestamp
from tracer.store.schema import about, documents, traces
from tracer.store.search import Search, clean

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """One line of a listing, kept up to date with every event of the run."""

    id: str
    name: str
    status: str
    agent: str
    model: str
    engine: str
    question: str
    answer: str | None
    correct: bool | None
    error: str | None
    """Why the run failed, in one line."""
    created_at: datetime
    updated_at: datetime
    seconds: float | None
    """From start to end; ``None`` while it runs or where it is not known."""
    events: int
    """The ``seq`` of the last event."""
    steps: int
    calls: int
    errors: int
    """Failed calls, error steps and steps that carry an error."""
    prompt_tokens: int
    completion_tokens: int
    owner: Owner | None
    """The process that recorded last; ``None`` for imported traces."""
    methods: tuple[str, ...] = ()
    """Methods of explanation that were computed for it, in the order of their names."""
    probes: tuple[str, ...] = ()
    """Probes that scored its steps."""
    explained_seconds: float | None = None
    """What the explanations took; ``None`` where there are none or it is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceFilter:
    """Which traces to list; every field that is given narrows the choice.

    Args:
        agent: Kind of agent, such as ``"react"``.
        model: Name of the model.
        status: Status, ``"interrupted"`` included.
        correct: Whether the answer was right.
        about: Part of the name or question, in any case.
        text: Words that one step contains, in any order and case; a part in quotation marks is a phrase.
        since: Created at this time or later; without a zone, UTC.
        until: Created before this time.
    """

    agent: str | None = None
    model: str | None = None
    status: str | None = None
    correct: bool | None = None
    about: str | None = None
    text: str | None = None
    since: datetime | None = None
    until: datetime | None = None


def choose(
    chosen: sa.Select[*tuple[int]],
    wanted: TraceFilter,
    *,
    search: Search,
    connection: sa.Connection,
    dead: Collection[int],
    recent: bool,
) -> sa.Select[*tuple[int]]:
    """Narrow a query on ``traces`` by a filter.

    Args:
        chosen: The query.
        wanted: The filter.
        search: The store's text search.
        connection: Where to look how frequent a searched text is.
        dead: Numbers of runs that are interrupted although their rows still say ``running``.
        recent: Only the newest or oldest few are wanted.
    """
    matches = []
    if wanted.about:
        matches.append(search.about(connection, wanted.about, recent=recent))
    if wanted.text and wanted.text.strip():
        matches.append(search.steps(connection, wanted.text, recent=recent))
    # Without statistics SQLite would rather walk the index of, say, all completed runs than begin with the matches.
    # An expression in the place of a column cannot use that index.
    hidden = connection.dialect.name == "sqlite" and any(match.leads for match in matches)
    conditions = _conditions(wanted, dead, hidden=hidden)
    return chosen.where(*conditions, *(match.condition for match in matches))


def _conditions(wanted: TraceFilter, dead: Collection[int], *, hidden: bool) -> list[ColumnElement[bool]]:
    names = (traces.c.agent, traces.c.model, traces.c.status)
    agent, model, status = ((column + "" if hidden else column) for column in names)
    created = traces.c.created_at + 0 if hidden else traces.c.created_at
    found: list[ColumnElement[bool]] = []
    if wanted.agent is not None:
        found.append(agent == clean(wanted.agent))
    if wanted.model is not None:
        found.append(model == clean(wanted.model))
    if wanted.status is not None:
        is_status = status == clean(wanted.status)
        if dead and wanted.status == "interrupted":
            is_status = sa.or_(is_status, traces.c.no.in_(dead))
        elif dead and wanted.status == "running":
            is_status = sa.and_(is_status, traces.c.no.not_in(dead))
        found.append(is_status)
    if wanted.correct is not None:
        found.append(traces.c.correct == wanted.correct)
    if wanted.since is not None:
        found.append(created >= timestamp(wanted.since))
    if wanted.until is not None:
        found.append(created < timestamp(wanted.until))
    return found


def select_rows() -> sa.Select[tuple[object, ...]]:
    """All columns that `summary` needs."""
    return sa.select(*traces.c, about.c.question).join(about, about.c.no == traces.c.no)


@dataclass(frozen=True, slots=True)
class Listed:
    """What a listing shows of the documents that are attached to a trace."""

    methods: tuple[str, ...] = ()
    probes: tuple[str, ...] = ()
    seconds: float | None = None


def select_listed(numbers: Collection[int]) -> sa.Select[tuple[int, str, str | None, float | None]]:
    """What `listed` needs of the documents of some traces."""
    columns = sa.select(documents.c.no, documents.c.kind, documents.c.name, documents.c.seconds)
    return columns.where(documents.c.no.in_(numbers)).distinct()


def listed(rows: Iterable[sa.Row[int, str, str | None, float | None]]) -> dict[int, Listed]:
    """Rows of `select_listed` by the number of their trace."""
    found: dict[int, list[sa.Row[int, str, str | None, float | None]]] = {}
    for row in rows:
        found.setdefault(row.no, []).append(row)
    return {no: _listed(own) for no, own in found.items()}


def _listed(rows: Iterable[sa.Row[int, str, str | None, float | None]]) -> Listed:
    names: dict[str, set[str]] = {"explanation": set(), "probe": set()}
    seconds: set[float] = set()
    for _, kind, name, took in rows:
        names.setdefault(kind, set()).add(name or "unknown")
        if kind == "explanation" and took is not None:
            # Methods of one family share their passes and each carries the cost of all: it is counted once.
            seconds.add(took)
    return Listed(
        methods=tuple(sorted(names["explanation"])),
        probes=tuple(sorted(names["probe"])),
        seconds=sum(seconds) if seconds else None,
    )


def summary(row: sa.RowMapping, *, dead: Collection[int], attached: Listed | None = None) -> TraceSummary:
    """One row of `select_rows` as a summary."""
    attached = attached or Listed()
    owner = None
    if row["owner_host"] is not None:
        owner = Owner(host=row["owner_host"], pid=row["owner_pid"], started=row["owner_started"])
    return TraceSummary(
        id=row["id"],
        name=row["name"],
        status="interrupted" if row["no"] in dead else row["status"],
        agent=row["agent"],
        model=row["model"],
        engine=row["engine"],
        question=row["question"],
        answer=row["answer"],
        correct=row["correct"],
        error=row["error"],
        created_at=_moment(row["created_at"]),
        updated_at=_moment(row["updated_at"]),
        seconds=row["seconds"],
        events=row["events"],
        steps=row["steps"],
        calls=row["calls"],
        errors=row["errors"],
        prompt_tokens=row["prompt_tokens"],
        completion_tokens=row["completion_tokens"],
        owner=owner,
        methods=attached.methods,
        probes=attached.probes,
        explained_seconds=attached.seconds,
    )


def _moment(seconds: float) -> datetime:
    try:
        return _EPOCH + timedelta(seconds=seconds)
    except OverflowError:
        return datetime.max.replace(tzinfo=UTC) if seconds > 0 else datetime.min.replace(tzinfo=UTC)
