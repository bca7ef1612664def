"""A search tool: BM25 over the passages of a folder of text and markdown files."""

from __future__ import annotations

import difflib
import re
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tracer.agents.tools.documents import Corpus, Stamp, read_folder, stamp_folder
from tracer.errors import InputError, ToolError
from tracer.trace.trace import Document

if TYPE_CHECKING:
    from langchain_core.tools import BaseTool

PASSAGE_CHARS = 1200
TOP = 3


@dataclass(frozen=True)
class Passage:
    """A stretch of a document that is found and returned as one.

    Args:
        doc_id: Id of the document.
        title: Title of the document.
        heading: The nearest heading above it, or ``""``.
        text: The text itself, without headings.
    """

    doc_id: str
    title: str
    heading: str
    text: str


def _pieces(text: str) -> Iterator[str]:
    """Cut a paragraph that is too long for one passage at sentence ends, else at spaces, else anywhere."""
    while len(text) > PASSAGE_CHARS:
        window = text[:PASSAGE_CHARS]
        sentence = max((found.end() for found in re.finditer(r"[.!?]\s", window)), default=0)
        cut = sentence if sentence > PASSAGE_CHARS // 3 else window.rfind(" ") + 1
        cut = cut or PASSAGE_CHARS
        yield text[:cut].strip()
        text = text[cut:].lstrip()
    if text:
        yield text


def split_passages(document: Document) -> list[Passage]:
    """Split a document at headings and blank lines, and join short paragraphs under the same heading.

    Args:
        document: The document.

    Returns:
        Passages of at most 1,200 characters that together hold all of its text but the heading lines; one passage
        with the title alone if there is no text.
    """
    sections: list[tuple[str, list[str]]] = [("", [])]
    fenced = False
    for block in re.split(r"(?:\n[ \t]*){2,}", document.text):
        lines: list[str] = []
        for line in block.split("\n"):
            fenced ^= line.lstrip().startswith(("```", "~~~"))
            heading = None if fenced else re.match(r" {0,3}#{1,6}\s+(\S.*)", line)
            if heading:
                sections[-1][1].append("\n".join(lines))
                lines = []
                sections.append((heading[1].rstrip("# ").strip(), []))
            else:
                lines.append(line)
        sections[-1][1].append("\n".join(lines))
    passages: list[Passage] = []
    for title, paragraphs in sections:
        held = ""
        for piece in (piece for paragraph in paragraphs for piece in _pieces(paragraph.strip())):
            if held and len(held) + len(piece) + 2 > PASSAGE_CHARS:
                passages.append(Passage(document.id, document.title, title, held))
                held = ""
            held = f"{held}\n\n{piece}" if held else piece
        if held:
            passages.append(Passage(document.id, document.title, title, held))
    return passages or [Passage(document.id, document.title, "", document.title)]


# Scripts without spaces are indexed by character; everything else by word.
_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """Split a text into search words: lower case, without accents, plural endings and English stop words."""
    from bm25s.stopwords import STOPWORDS_EN

    plain = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    plain = re.sub(r"['’]s\b", "", plain)
    found = []
    for word in _WORD.findall(plain):
        if word in STOPWORDS_EN:
            continue
        if len(word) > 4 and word.endswith("ies"):
            word = word[:-3] + "y"
        elif len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
            word = word[:-1]
        found.append(word)
    return found


class Index:
    """A BM25 index (Lucene's variant, k1=1.5, b=0.75) over the passages of a corpus.

    Args:
        corpus: What to index.
    """

    def __init__(self, corpus: Corpus) -> None:
        from bm25s import BM25

        self.corpus = corpus
        self.passages = [passage for document in corpus.documents for passage in split_passages(document)]
        vocabulary: dict[str, int] = {"": 0}
        rows = [
            [vocabulary.setdefault(word, len(vocabulary)) for word in words(f"{p.title} {p.heading} {p.text}")]
            for p in self.passages
        ]
        # The numpy backend by name: "auto" would compile with numba where that happens to be installed.
        self._bm25: Any = BM25(method="lucene", backend="numpy", csc_backend="numpy")
        self._bm25.index((rows, vocabulary), show_progress=False)
        self._vocabulary = vocabulary

    def find(self, query: str, top: int = TOP) -> list[Passage]:
        """Rank passages for a query.

        Args:
            query: Words to look for, in any order.
            top: The most passages to return.

        Returns:
            The best passages first; only those that share a word with the query.
        """
        ids = [self._vocabulary[word] for word in words(query) if word in self._vocabulary]
        if not ids:
            return []
        scores = self._bm25.get_scores_from_ids(ids)
        order = sorted(range(len(self.passages)), key=lambda i: (-scores[i], i))
        return [self.passages[i] for i in order[:top] if scores[i] > 0]

    def nearest_titles(self, query: str, top: int = TOP) -> list[str]:
        """Give the titles that look most like a query that found nothing."""
        wanted = query.casefold()

        def likeness(title: str) -> float:
            names = [title.casefold(), *title.casefold().split()]
            return max(difflib.SequenceMatcher(None, name, wanted).ratio() for name in names)

        titles = list(dict.fromkeys(document.title for document in self.corpus.documents))[:1000]
        return sorted(titles, key=likeness, reverse=True)[:top]


_CACHE: OrderedDict[tuple[Path, tuple[Stamp, ...]], Index] = OrderedDict()
_CACHE_LOCK = threading.Lock()
_CACHE_SIZE = 4


def index_folder(folder: str | Path) -> Index:
    """Index a folder, or return the index made earlier if no file has changed since.

    Args:
        folder: A folder of text and markdown files.

    Returns:
        The index; it is not changed later, so threads may share it.

    Raises:
        InputError: If there is no such folder, or nothing in it can be read.
    """
    key = stamp_folder(folder)
    with _CACHE_LOCK:
        index = _CACHE.get(key)
        if index is None:
            index = _CACHE[key] = Index(read_folder(folder))
            while len(_CACHE) > _CACHE_SIZE:
                _CACHE.popitem(last=False)
        _CACHE.move_to_end(key)
        return index


def format_passages(passages: list[Passage]) -> str:
    """Write passages as plain text, each under its title and document id."""
    blocks = []
    for passage in passages:
        where = f"{passage.title} > {passage.heading}" if passage.heading else passage.title
        blocks.append(f"{where} [{passage.doc_id}]\n{passage.text}")
    return "\n\n".join(blocks)


def _answer(index: Index, query: str, top: int) -> str:
    shown = " ".join(query.split())
    if not shown:
        raise ToolError("the search is empty; give the name or words to look for")
    if len(query) > 2000:
        raise ToolError(f"the search has {len(query)} characters; give a few words")
    if passages := index.find(query, top):
        return format_passages(passages)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return f"No results for {shown!r}. Nearest titles: {'; '.join(index.nearest_titles(shown))}."


def search(folder: str | Path, *, top: int = TOP) -> BaseTool:
    """Build a search tool over a folder, which takes one ``query``.

    The folder is read and indexed now; later changes to it are seen by the next tool that is built. The tool's
    ``metadata`` says how many documents and passages it covers and what was left out.

    Args:
        folder: A folder of text and markdown files, and the boundary of what can be found.
        top: The most passages to return for one query.

    Returns:
        The tool.

    Raises:
        InputError: If there is no such folder, or nothing in it can be read.
    """
    from langchain_core.tools import StructuredTool

    if top < 1:
        raise InputError(f"a search must return at least 1 passage; got top={top}")
    index = index_folder(folder)

    def find(query: Annotated[str, "A name or a few words to look for"]) -> str:
        return _answer(index, query, top)

    return StructuredTool.from_function(
        func=find,
        name="search",
        description="Searches the documents and returns the passages that fit best.",
        metadata={
            "documents": len(index.corpus.documents),
            "passages": len(index.passages),
            "skipped": dict(index.corpus.skipped),
        },
    )
