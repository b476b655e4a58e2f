"""The file types that rows and documents are read from. A new type is one reader function and one line here.

compression.py, files.py and documents.py look up everything they know about a type in these tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import BinaryIO, Final, NamedTuple

from tunesmith.data.formats import row_readers
from tunesmith.data.formats.row_readers import Part, Reader
from tunesmith.data.sources import document_readers


class RowFile(NamedTuple):
    """A type of files of rows.

    read: rows of a part of a stream. magics: the first bytes that every file of a binary type has (one of them). split:
    (stream, name, size) -> parts that can be read separately, of about size bytes; None: always read as one part.
    """

    name: str
    suffixes: tuple[str, ...]
    read: Reader
    magics: tuple[bytes, ...] = ()
    split: Callable[[BinaryIO, str, int], list[Part]] | None = None


class DocumentFile(NamedTuple):
    """A type of documents.

    read: (the file's bytes, its name) -> (headings above a paragraph, paragraph), in the order of the document. magics:
    as those of a RowFile.
    """

    name: str
    suffixes: tuple[str, ...]
    read: Callable[[bytes, str], document_readers.Paragraphs]
    magics: tuple[bytes, ...] = ()


_ROWS: Final = (
    RowFile("JSONL", (".jsonl", ".ndjson"), row_readers.read_jsonl, split=row_readers.line_parts),
    RowFile("JSON", (".json",), row_readers.read_json),
    RowFile("CSV", (".csv", ".tsv"), row_readers.read_csv),
    RowFile("Parquet", (".parquet",), row_readers.read_parquet, (b"PAR1",), row_readers.parquet_parts),
    RowFile("Arrow", (".arrow",), row_readers.read_arrow, (b"ARROW1\0\0", b"\xff\xff\xff\xff")),
)
_DOCUMENTS: Final = (
    DocumentFile("HTML", (".html", ".htm"), document_readers.read_html),
    DocumentFile("Markdown", (".md", ".markdown"), document_readers.read_markdown),
    DocumentFile("PDF", (".pdf",), document_readers.read_pdf, (b"%PDF-",)),
    DocumentFile("text", (".txt",), document_readers.read_text),
)
# Suffix -> type.
ROW_FILES: Final[Mapping[str, RowFile]] = {suffix: one for one in _ROWS for suffix in one.suffixes}
DOCUMENT_FILES: Final[Mapping[str, DocumentFile]] = {suffix: one for one in _DOCUMENTS for suffix in one.suffixes}
_ALL: Final[Mapping[str, RowFile | DocumentFile]] = {**ROW_FILES, **DOCUMENT_FILES}
BINARY: Final = {suffix: one for suffix, one in _ALL.items() if one.magics}
