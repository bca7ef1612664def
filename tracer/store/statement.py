"""SQL on the path that every recorded event takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa


class Statement:
    """Portable SQL with ``:name`` parameters.

    On SQLite it goes straight to the driver: with SQLAlchemy's own execution around it, recording an event takes two
    to three times as long.

    Args:
        sql: The statement.
    """

    def __init__(self, sql: str) -> None:
        self._sql = sql
        self._text = sa.text(sql)

    def run(self, connection: sa.Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """Execute once for each row."""
        driver = _sqlite(connection)
        if driver is None:
            connection.execute(self._text, [dict(row) for row in rows])
        elif len(rows) == 1:
            driver.execute(self._sql, rows[0])
        else:
            driver.executemany(self._sql, rows)

    def first(self, connection: sa.Connection, row: Mapping[str, Any]) -> Sequence[Any] | None:
        """Execute and return the first row of the result."""
        driver = _sqlite(connection)
        if driver is None:
            return connection.execute(self._text, dict(row)).first()
        found: list[Sequence[Any]] = driver.execute(self._sql, row).fetchall()
        return found[0] if found else None


def _sqlite(connection: sa.Connection) -> Any:
    """The driver's connection on SQLite, else ``None``."""
    return connection.connection.driver_connection if connection.dialect.name == "sqlite" else None
