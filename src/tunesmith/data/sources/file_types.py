"""The file types that rows and documents are read from. A new type is one reader function and one line here.

compression.py, files.py and documents.py look up everything they know about a type in these tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, Final

from tunesmith.data.formats import row_readers
from tunesmith.data.formats.row_readers import Part, Reader
from tunesmith.data.sources import document_readers


@dataclass(frozen=True, slots=True)
class FileType:
    """magics: the first bytes that every file of a binary type has (one of them); empty for a type that is text."""

    name: str
    suffixes: tuple[str, ...]
    magics: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class RowFile(FileType):
    """read: rows of a part of a stream. split: (stream, name, size) -> parts that can be read separately, of about
    size bytes; None: the file is always read as one part."""

    read: Reader = row_readers.read_jsonl
    split: Callable[[BinaryIO, str, int], list[Part]] | None = None


@dataclass(frozen=True, slots=True)
class DocumentFile(FileType):
    """read: (the file's bytes, its name) -> (headings above a paragraph, paragraph), in the order of the document."""

    read: Callable[[bytes, str], Iterator[tuple[str, str]]] = document_readers.read_text


_ROWS: Final = (
    RowFile("JSONL", (".jsonl", ".ndjson"), read=row_readers.read_jsonl, split=row_readers.line_parts),
    RowFile("JSON", (".json",), read=row_readers.read_json),
    RowFile("CSV", (".csv", ".tsv"), read=row_readers.read_csv),
    RowFile("Parquet", (".parquet",), (b"PAR1",), row_readers.read_parquet, row_readers.parquet_parts),
    RowFile("Arrow", (".arrow",), (b"ARROW1\0\0", b"\xff\xff\xff\xff"), row_readers.read_arrow),
)
_DOCUMENTS: Final = (
    DocumentFile("HTML", (".html", ".htm"), read=document_readers.read_html),
    DocumentFile("Markdown", (".md", ".markdown"), read=document_readers.read_markdown),
    DocumentFile("PDF", (".pdf",), (b"%PDF-",), document_readers.read_pdf),
    DocumentFile("text", (".txt",), read=document_readers.read_text),
)
# Suffix -> type.
ROW_FILES: Final[Mapping[str, RowFile]] = {suffix: one for one in _ROWS for suffix in one.suffixes}
DOCUMENT_FILES: Final[Mapping[str, DocumentFile]] = {suffix: one for one in _DOCUMENTS for suffix in one.suffixes}
BINARY: Final[Mapping[str, FileType]] = {
    suffix: one for suffix, one in (*ROW_FILES.items(), *DOCUMENT_FILES.items()) if one.magics
}
