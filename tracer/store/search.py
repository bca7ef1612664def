"""Finding traces by words of their steps and by parts of their names and questions.

On SQLite two contentless FTS5 tables hold the words of step texts and the trigrams of names and questions; where FTS5
is missing the same questions are answered by scanning. On PostgreSQL a GIN index holds the words. Text that a person
typed never reaches a query parser unquoted.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy import ColumnElement

from tracer.store import schema
from tracer.store.schema import SEQ_BITS, about, meta, step_texts, traces
from tracer.store.statement import Statement

SPARSE_LIMIT = 20_000
"""Up to this many hits, the hits are collected and sorted; beyond, recent traces are checked one by one."""

_TRIGRAM = 3
_SAMPLE = 1000
_PARTS = re.compile(r'"([^"]*)"|([^\s"]+)')
# Scripts written without spaces: each character is indexed as a word of its own and a query is a phrase of them.
_UNSPACED = re.compile(
    "([\u0e00-\u0e7f\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])"
)
_TABLES = ("step_fts", "about_fts")


def clean(text: str) -> str:
    """The text without NUL characters, which neither SQL text nor a query can hold everywhere."""
    return text.replace("\x00", "\ufffd")


def fold(text: str) -> str:
    """The form in which names and questions are compared."""
    return clean(unicodedata.normalize("NFC", text).casefold())


def words_of(text: str) -> str:
    """The form in which a step's text is indexed."""
    return _UNSPACED.sub(r" \1 ", clean(text))


def needs_index(engine: sa.Engine) -> bool:
    """Whether the full-text tables are missing or behind, or are there and this SQLite cannot use them."""
    with engine.connect() as connection:
        state = connection.execute(sa.select(meta.c.value).where(meta.c.key == "fts")).scalar()
    return state != ("current" if schema.has_fts5() else "stale")


def update_index(connection: sa.Connection) -> None:
    """Build the full-text tables, or note that they will be behind because this SQLite cannot write them."""
    state = connection.execute(sa.select(meta.c.value).where(meta.c.key == "fts")).scalar()
    wanted = "current" if schema.has_fts5() else "stale"
    if state == wanted:
        return
    if wanted == "current":
        _rebuild(connection)
    connection.execute(meta.delete().where(meta.c.key == "fts"))
    connection.execute(meta.insert().values(key="fts", value=wanted))


def _rebuild(connection: sa.Connection) -> None:
    for table in _TABLES:
        connection.exec_driver_sql(f"DROP TABLE IF EXISTS {table}")
    connection.exec_driver_sql(
        "CREATE VIRTUAL TABLE step_fts USING fts5(text, content='', tokenize='unicode61 remove_diacritics 2')"
    )
    connection.exec_driver_sql(
        "CREATE VIRTUAL TABLE about_fts USING fts5(text, content='', tokenize='trigram case_sensitive 1')"
    )
    for ref, text in connection.execute(sa.select(step_texts.c.ref, step_texts.c.text)).yield_per(1000):
        _ADD_STEP.run(connection, [{"ref": ref, "text": words_of(text)}])
    connection.exec_driver_sql("INSERT INTO about_fts(rowid, text) SELECT no, folded FROM about")


_FREQUENT_STEPS = sa.text("SELECT count(*) FROM (SELECT 1 FROM step_fts WHERE step_fts MATCH :match LIMIT :more)")
_FREQUENT_ABOUT = sa.text("SELECT count(*) FROM (SELECT 1 FROM about_fts WHERE about_fts MATCH :match LIMIT :more)")
_ADD_TEXT = Statement("INSERT INTO step_texts (ref, text) VALUES (:ref, :text)")
_ADD_STEP = Statement("INSERT INTO step_fts(rowid, text) VALUES (:ref, :text)")
_ADD_ABOUT = Statement("INSERT INTO about_fts(rowid, text) VALUES (:no, :text)")
_REMOVE_STEP = Statement("INSERT INTO step_fts(step_fts, rowid, text) VALUES ('delete', :ref, :text)")
_REMOVE_ABOUT = Statement("INSERT INTO about_fts(about_fts, rowid, text) VALUES ('delete', :no, :text)")


def reference(no: int, seq: int) -> int:
    """The key of a step's text."""
    return no << SEQ_BITS | seq


class Match(NamedTuple):
    """A condition on `traces` that a text search stands for."""

    condition: ColumnElement[bool]
    leads: bool
    """It names the traces that match, so that a query had best begin with them rather than with another index."""


class Search:
    """The text searches of one store.

    Args:
        dialect: SQLAlchemy's name of the database.
        indexed: Whether the full-text index can be used.
    """

    def __init__(self, dialect: str, *, indexed: bool) -> None:
        self._fts5 = dialect == "sqlite" and indexed
        self._postgres = dialect == "postgresql"

    def add_steps(self, connection: sa.Connection, texts: list[tuple[int, str]]) -> None:
        """Make step texts findable, given as (reference, text)."""
        if not texts:
            return
        _ADD_TEXT.run(connection, [{"ref": ref, "text": clean(text)} for ref, text in texts])
        if self._fts5:
            _ADD_STEP.run(connection, [{"ref": ref, "text": words_of(text)} for ref, text in texts])

    def add_about(self, connection: sa.Connection, no: int, *, name: str, question: str) -> None:
        """Make a trace findable by its name and question."""
        folded = fold(f"{name}\n{question}")
        connection.execute(about.insert().values(no=no, question=clean(question), folded=folded))
        if self._fts5:
            _ADD_ABOUT.run(connection, [{"no": no, "text": folded}])

    def remove(self, connection: sa.Connection, no: int) -> None:
        """Forget everything about a trace."""
        mine = step_texts.c.ref.between(reference(no, 0), reference(no + 1, 0) - 1)
        if self._fts5:
            # A contentless index can only forget what it is shown again.
            for ref, text in connection.execute(sa.select(step_texts.c.ref, step_texts.c.text).where(mine)).all():
                _REMOVE_STEP.run(connection, [{"ref": ref, "text": words_of(text)}])
            folded = connection.execute(sa.select(about.c.folded).where(about.c.no == no)).scalar()
            if folded is not None:
                _REMOVE_ABOUT.run(connection, [{"no": no, "text": folded}])
        connection.execute(step_texts.delete().where(mine))
        connection.execute(about.delete().where(about.c.no == no))

    def about(self, connection: sa.Connection, part: str, *, recent: bool) -> Match:
        """The name or question contains ``part``, in any case.

        Args:
            connection: Where to look how frequent the part is.
            part: Any text.
            recent: Only the first few traces are wanted, so checking them one by one can be the shorter way.
        """
        folded = fold(part)
        position = sa.func.strpos if self._postgres else sa.func.instr
        contains = position(about.c.folded, folded) > 0
        one_by_one = Match(sa.exists().where(about.c.no == traces.c.no, contains).correlate(traces), leads=False)
        if not self._fts5 or len(folded) < _TRIGRAM:
            if recent and _common(connection, about.c.no, contains):
                return one_by_one
            return Match(traces.c.no.in_(sa.select(about.c.no).where(contains)), leads=True)
        if recent and _frequent(connection, _FREQUENT_ABOUT, _quote(folded)):
            return one_by_one
        fts = sa.table("about_fts", sa.column("rowid", sa.Integer))
        matches = sa.literal_column("about_fts").op("MATCH")(sa.bindparam("about_query", _quote(folded)))
        return Match(traces.c.no.in_(sa.select(fts.c.rowid).where(matches)), leads=True)

    def steps(self, connection: sa.Connection, query: str, *, recent: bool) -> Match:
        """One step contains all words and quoted phrases of ``query``.

        Args:
            connection: Where to look how frequent the words are.
            query: Any text; nothing in it is an operator except quotation marks around a phrase.
            recent: As for `about`.
        """
        terms = [clean(quoted or word) for quoted, word in _PARTS.findall(query) if (quoted or word).strip()]
        indexable = [term for term in terms if self._fts5 and _has_word(term)]
        scanned = [self._contains(term) for term in terms if term not in indexable]
        if not indexable:
            if recent and not self._postgres and _common(connection, step_texts.c.ref, sa.and_(*scanned)):
                return Match(sa.exists().where(_of_trace(step_texts.c.ref), *scanned).correlate(traces), leads=False)
            return Match(traces.c.no.in_(sa.select(step_texts.c.ref // (1 << SEQ_BITS)).where(*scanned)), leads=True)
        match = " AND ".join(_quote(words_of(term)) for term in indexable)
        fts = sa.table("step_fts", sa.column("rowid", sa.Integer))
        conditions: list[ColumnElement[bool]] = [
            sa.literal_column("step_fts").op("MATCH")(sa.bindparam("step_query", match))
        ]
        if scanned:
            conditions += [step_texts.c.ref == fts.c.rowid, *scanned]
        if recent and _frequent(connection, _FREQUENT_STEPS, match):
            here = sa.exists().where(*conditions, _of_trace(fts.c.rowid)).correlate(traces)
            return Match(here, leads=False)
        return Match(traces.c.no.in_(sa.select(fts.c.rowid // (1 << SEQ_BITS)).where(*conditions)), leads=True)

    def _contains(self, term: str) -> ColumnElement[bool]:
        if self._postgres and _has_word(term):
            words = sa.func.to_tsvector(sa.literal_column("'simple'"), step_texts.c.text)
            return words.op("@@")(sa.func.phraseto_tsquery(sa.literal_column("'simple'"), term))
        return step_texts.c.text.icontains(term, autoescape=True)


def _of_trace(ref: ColumnElement[int]) -> ColumnElement[bool]:
    """The text of that reference belongs to the current row of `traces`."""
    first = traces.c.no * (1 << SEQ_BITS)
    return ref.between(first, first + ((1 << SEQ_BITS) - 1))


def _common(connection: sa.Connection, key: ColumnElement[int], condition: ColumnElement[bool]) -> bool:
    """Whether a condition holds often enough among the newest rows to be checked one by one."""
    newest = sa.select(sa.case((condition, 1), else_=0).label("hit")).order_by(key.desc()).limit(_SAMPLE).subquery()
    hits = connection.execute(sa.select(sa.func.sum(newest.c.hit))).scalar() or 0
    return bool(hits * 20 >= _SAMPLE)


def _frequent(connection: sa.Connection, counted: sa.TextClause, match: str) -> bool:
    return bool(connection.execute(counted, {"match": match, "more": SPARSE_LIMIT + 1}).scalar_one() > SPARSE_LIMIT)


def _has_word(term: str) -> bool:
    return any(unicodedata.category(character)[0] in "LN" for character in term)


def _quote(text: str) -> str:
    escaped = text.replace('"', '""')
    return f'"{escaped}"'
