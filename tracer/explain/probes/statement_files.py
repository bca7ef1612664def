"""Statements from a person's own files: ``statement,label[,topic,polarity,entity]``, a file or a folder of them.

A folder may hold ``x.csv`` and ``neg_x.csv``: then the second has the negations of the first, and both are topic ``x``
(the form in which Bürger et al. 2024, arXiv:2407.12831, published theirs).
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tracer.errors import InputError
from tracer.explain.probes.statements import Statement, words_of

_NEGATED_FILE = "neg_"
_LABELS = {"1": True, "true": True, "0": False, "false": False, "1.0": True, "0.0": False}
_POLARITIES = {"negated": True, "-1": True, "negative": True, "affirmative": False, "1": False, "+1": False}
_QUOTED = re.compile(r"(?<!\w)(['\"‘“«]).*?['\"’”»](?!\w)")
_DENIES = re.compile(r"\b(?:not|never|cannot|no)\b|n['’]t\b", re.IGNORECASE)
_RARE, _FEW = 0.1, 4
"""A word names the entity if no more than this share of a topic's statements have it, or no more than so many."""


def read_csv(path: Path) -> tuple[Statement, ...]:
    """Statements of a file.

    Columns are ``statement`` and ``label`` (1 or 0, true or false), and optionally ``topic`` (default: the file's
    name), ``polarity`` (affirmative or negated; default: what the file's name or the sentence says) and ``entity``
    (default: the first word that is rare in its topic). Other columns are left alone.

    Raises:
        InputError: The file cannot be read, a column is missing, or a line is not of that form.
    """
    return _with_entities(_read(path, None))


def read_folder(folder: Path) -> tuple[Statement, ...]:
    """Statements of all ``*.csv`` files of a folder, those of ``neg_x.csv`` in the topic of ``x.csv``.

    Raises:
        InputError: There is no such folder or no such file in it, or one cannot be read.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give one with CSV files of statements")
    paths = sorted(folder.glob("*.csv"))
    if not paths:
        raise InputError(f"{folder} holds no *.csv; statements are read from files with columns statement and label")
    names = {path.name for path in paths}
    found: list[tuple[Statement, bool]] = []
    for path in paths:
        # Where there is a file for the negations, the other one has none of them, whatever its words.
        found.extend(_read(path, False if _NEGATED_FILE + path.name in names else None))
    return _with_entities(found)


def read(path: Path) -> tuple[Statement, ...]:
    """Statements of a CSV file or of a folder of them.

    Raises:
        InputError: They cannot be read.
    """
    return read_folder(path) if path.is_dir() else read_csv(path)


def _read(path: Path, negated: bool | None) -> list[tuple[Statement, bool]]:
    """Statements, each with whether the file names its entity."""
    found: list[tuple[Statement, bool]] = []
    seen: dict[tuple[str, str], tuple[int, bool]] = {}
    for line, row in _rows(path):
        item = _statement(path, line, row, negated)
        before = seen.setdefault((item.topic, item.text), (line, item.label))
        if before[1] != item.label:
            raise InputError(f"{path.name}, line {line}: {item.text!r} has the other label in line {before[0]}")
        found.append((item, bool(item.entity)))
    if not found:
        raise InputError(f"{path} holds no statement; write one a line below the line with the columns' names")
    return found


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, str]]]:
    """Lines of a file as columns, each with its number; empty lines are skipped."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise InputError(f"{path.name}, line {first}: {error}; check the quotes") from None
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            continue
        if not header:
            header = _header(path, cells)
            continue
        if len(cells) != len(header):
            raise InputError(
                f"{path.name}, line {first}: {len(cells)} columns where the first line has {len(header)}; "
                "put quotes around a statement with a comma"
            )
        yield first, dict(zip(header, (cell.strip() for cell in cells), strict=True))


def _header(path: Path, cells: Sequence[str]) -> list[str]:
    header = [cell.strip().casefold() for cell in cells]
    for name in ("statement", "label"):
        if header.count(name) != 1:
            problem = "has no" if name not in header else "has more than one"
            raise InputError(f"{path.name}, line 1: it {problem} column {name!r}; it has: {', '.join(header)}")
    return header


def _statement(path: Path, line: int, row: Mapping[str, str], negated: bool | None) -> Statement:
    where = f"{path.name}, line {line}"
    text, label, polarity = row["statement"], row["label"].casefold(), row.get("polarity", "").casefold()
    if not text:
        raise InputError(f"{where}: the statement is empty")
    if label not in _LABELS:
        raise InputError(f"{where}: the label {row['label']!r} is neither true nor false; write 1 or 0")
    if polarity and polarity not in _POLARITIES:
        raise InputError(f"{where}: the polarity {row['polarity']!r} is unknown; write affirmative or negated")
    if polarity:
        negated = _POLARITIES[polarity]
    elif path.stem.startswith(_NEGATED_FILE):
        negated = True
    elif negated is None:
        negated = _DENIES.search(_QUOTED.sub("", text)) is not None
    topic = row.get("topic") or path.stem.removeprefix(_NEGATED_FILE)
    return Statement(text, _LABELS[label], topic, negated, row.get("entity", ""))


def _with_entities(found: Sequence[tuple[Statement, bool]]) -> tuple[Statement, ...]:
    """Statements with an entity each: the file's, or the first word that few statements of the topic have.

    Two entities that begin with the same rare word count as one, which keeps more together than need be, never less.
    """
    topics: Counter[str] = Counter(item.topic for item, _ in found)
    common: Counter[tuple[str, str]] = Counter(
        (item.topic, word) for item, _ in found for word in set(words_of(item.text))
    )
    done: list[Statement] = []
    for item, named in found:
        words = words_of(item.text)
        rare = [word for word in words if common[item.topic, word] <= max(_FEW, _RARE * topics[item.topic])]
        done.append(item if named else replace(item, entity=rare[0] if rare else " ".join(words) or item.text))
    return tuple(done)
