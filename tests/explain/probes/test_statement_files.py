"""Statements from a person's own files."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tracer.errors import InputError
from tracer.explain.probes.statement_files import read, read_csv, read_folder
from tracer.explain.probes.statements import Statement, partners, split

TRUTH = Path(__file__).parents[4] / "shared" / "data" / "truth"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_topic_and_polarity_come_from_the_columns(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.csv",
        "\ufeffStatement, Label ,topic,polarity,entity,source\n"
        '"Oslo, I hear, is in Norway.",1,towns,affirmative,oslo,me\n'
        "\n"
        "Oslo is hardly in Spain.,TRUE,towns,negated,oslo,me\n"
        "Iron is a gas.,0,,-1,,me\n",
    )
    assert read(path) == (
        Statement("Oslo, I hear, is in Norway.", True, "towns", False, "oslo"),
        Statement("Oslo is hardly in Spain.", True, "towns", True, "oslo"),
        Statement("Iron is a gas.", False, "mine", True, "iron"),
    )


def test_polarity_comes_from_the_sentence_where_no_one_says_it(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.csv",
        "statement,label\n"
        "The cat is not a fish.,1\n"
        "The cat isn't a fish.,1\n"
        "The Spanish word 'no' means 'not'.,1\n"
        "A notable cat knows nothing of it.,0\n"
        "Pigs never fly.,1\n",
    )
    assert [item.negated for item in read_csv(path)] == [True, True, False, False, True]


def test_a_folder_pairs_statements_with_their_negations(tmp_path: Path) -> None:
    write(tmp_path / "animals.csv", "statement,label\nThe salmon is a fish.,1\nThe frog says no.,0\n")
    write(tmp_path / "neg_animals.csv", "statement,label\nThe salmon is not a fish.,0\nThe frog does not say no.,1\n")
    found = read_folder(tmp_path)
    assert {item.topic for item in found} == {"animals"}
    assert [item.negated for item in found] == [False, False, True, True]
    assert partners(found).tolist() == [2, 3, 0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("statement,label\nA.,1\nB.,maybe\n", r"x\.csv, line 3: the label 'maybe' is neither"),
        ("statement,label\nA.,1,2\n", r"x\.csv, line 2: 3 columns where the first line has 2"),
        ("statement,label\n\n,1\n", r"x\.csv, line 3: the statement is empty"),
        ('statement,label\n"A\nB.",1\n"C,1\n', r"x\.csv, line 4: .*check the quotes"),
        ("statement,label,polarity\nA.,1,maybe\n", r"line 2: the polarity 'maybe' is unknown"),
        ("statement,label\nA.,1\nB.,0\nA.,0\n", r"line 4: 'A\.' has the other label in line 2"),
        ("text,label\nA.,1\n", r"line 1: it has no column 'statement'; it has: text, label"),
        ("statement,label,label\nA.,1,1\n", r"line 1: it has more than one column 'label'"),
        ("statement,label\n", r"holds no statement"),
        ("", r"holds no statement"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_csv(write(tmp_path / "x.csv", text))


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes("statement,label\nCaf\u00e9 is open.,1\n".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        read(tmp_path / "latin.csv")
    with pytest.raises(InputError, match="cannot read .*none.csv"):
        read(tmp_path / "none.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no \*\.csv"):
        read(tmp_path / "empty")
    with pytest.raises(InputError, match="no folder"):
        read_folder(tmp_path / "none")


TEXTS = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff"), min_size=1, max_size=30
).map(str.strip)
ROWS = st.lists(
    st.tuples(TEXTS.filter(bool), st.booleans(), TEXTS, st.booleans()),
    min_size=1,
    max_size=12,
    unique_by=lambda row: row[0],
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(rows=ROWS)
def test_what_is_written_is_read(tmp_path: Path, rows: list[tuple[str, bool, str, bool]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["statement", "label", "topic", "polarity"])
    for statement, label, topic, negated in rows:
        writer.writerow([statement, int(label), topic, "negated" if negated else "affirmative"])
    path = tmp_path / "any.csv"
    path.write_bytes(text.getvalue().encode())
    found = read_csv(path)
    assert [(item.text, item.label, item.topic, item.negated) for item in found] == [
        (statement, label, topic or "any", negated) for statement, label, topic, negated in rows
    ]
    assert all(item.entity for item in found)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(content=st.binary(max_size=80))
def test_bytes_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.csv"
    path.write_bytes(b"statement,label\n" + content)
    try:
        found = read_csv(path)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert found


@pytest.mark.skipif(not TRUTH.is_dir(), reason="the published statements are not here")
def test_the_published_statements_are_read_with_their_twins() -> None:
    found = read_folder(TRUTH)
    assert len(found) == 4400
    assert {item.topic for item in found} == {"animal_class", "cities", "element_symb", "sp_en_trans"}
    pairs = partners(found)
    assert (pairs >= 0).all()
    for row, item in enumerate(found):
        other = found[pairs[row]]
        assert item.entity == other.entity
        assert item.negated != other.negated
    # True and false statements about one city share their entity.
    assert {item.entity for item in found if "Krasnodar" in item.text} == {"krasnodar"}
    parts = split(found, by="entity")
    assert not {found[row].entity for row in parts.train} & {found[row].entity for row in parts.test}
