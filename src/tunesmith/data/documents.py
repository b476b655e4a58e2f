"""The user's documents: read, cut into passages, sealed as a record that candidates look things up in."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunesmith.core.digests import canonical, digest_of
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Message
from tunesmith.core.settings import Settings
from tunesmith.data.privacy.scan import Scanner
from tunesmith.data.settings import Privacy, Source
from tunesmith.data.sources.files import SourceFile, find_files, open_source
from tunesmith.store.records import Record
from tunesmith.store.store import Store

PASSAGES = "passages.jsonl"
_LARGEST = 64 << 20
_EXTRA = "pip install 'tunesmith[documents]'"


class DocumentSettings(Settings):
    """`documents:` of the project file."""

    paths: Annotated[
        tuple[str, ...], Field(min_length=1, description="files or globs from the project: .md, .txt, .html, .pdf")
    ]
    licence: Annotated[str | None, Field(description="SPDX expression, kept in the record")] = None
    words: Annotated[int, Field(ge=20, le=1000, description="most words of a passage")] = 160
    overlap: Annotated[int, Field(ge=0, le=500, description="words that a passage repeats of the one before")] = 24


class Passage(BaseModel):
    """A piece of a document. title: the headings above it. id: of its text and source."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    source: str
    title: str
    text: str


class Documents:
    """A documents record and its passages."""

    def __init__(self, store: Store, digest: str) -> None:
        self.digest, self._store = digest, store
        self.record = store.record(digest, kind="documents")

    @cached_property
    def passages(self) -> list[Passage]:
        """In the order of sources and of the text. Raises Refused where they cannot be read."""
        data = self._store.read_blob(self.record.blobs[PASSAGES])
        try:
            return [Passage.model_validate(json.loads(line)) for line in data.splitlines()]
        except (ValidationError, ValueError) as error:
            raise Refused(f"{PASSAGES} does not hold passages: {error}", where=self.digest) from error


def document_files(settings: DocumentSettings, root: Path) -> list[SourceFile]:
    """The files that the settings name. Raises UsageError for a pattern without files and a type that is not read."""
    files = find_files([Source(path=path, licence=settings.licence) for path in settings.paths], root)
    for file in files:
        if _suffix(file.name) not in READERS:
            known = ", ".join(sorted(READERS))
            raise UsageError("documents of this type are not read", where=file.name, fix=f"use one of {known}")
    return files


def build_documents(
    store: Store, settings: DocumentSettings, root: Path, privacy: Privacy, special_tokens: Sequence[str] = ()
) -> str:
    """Read, scan for personal data, cut and seal; returns the record's digest. The same input gives the same digest.

    Personal data is treated as in the rows (data.privacy); under `remove` the passage is left out and counted.
    special_tokens: the base's control tokens; a document that imitates one could speak in another's turn. Raises
    UsageError for documents that cannot be read or hold no text, Refused where they hold what they must not.
    """
    scanner = Scanner(privacy)
    found: Counter[str] = Counter()
    passages: dict[str, Passage] = {}
    described = []
    removed = 0
    for file in document_files(settings, root):
        with open_source(file) as opened:
            blocks = list(read_document(file))
            digest, size = opened.digest, opened.bytes
        _refuse_control_tokens(file.name, blocks, special_tokens)
        kept = 0
        for title, text in cut(blocks, settings.words, settings.overlap):
            scan = scanner.scan([Message(role="user", content=text)])
            found.update(scan.found)
            if scan.found and privacy.action == "refuse":
                raise Refused(f"a document holds {', '.join(sorted(scan.found))}", where=file.name)
            if (scan.found and privacy.action == "remove") or scan.messages is None:
                removed += 1
                continue
            text = scan.messages[0].content if privacy.action == "pseudonymise" else text
            name = digest_of({"source": file.name, "title": title, "text": text}).removeprefix("sha256:")[:20]
            passages.setdefault(name, Passage(id=name, source=file.name, title=title, text=text))
            kept += 1
        if not blocks:
            raise UsageError("the document holds no text", where=file.name, fix="leave it out, or give its text")
        described.append({"path": file.name, "digest": digest, "bytes": size, "passages": kept})
    if not passages:
        raise UsageError("no passage is left to look things up in", where="documents")
    body = {
        "settings": settings.model_dump(mode="json"),
        "files": described,
        "passages": len(passages),
        "removed": removed,
        "privacy": {"action": privacy.action, "found": dict(sorted(found.items()))},
    }
    data = b"".join(canonical(passage.model_dump(mode="json")) + b"\n" for passage in passages.values())
    return store.put_record(Record(kind="documents", blobs={PASSAGES: store.put_bytes(data)}, body=body))


def _refuse_control_tokens(name: str, blocks: Sequence[tuple[str, str]], special_tokens: Sequence[str]) -> None:
    for title, text in blocks:
        for token in filter(None, special_tokens):
            if token in text or token in title:
                raise Refused(
                    f"a document holds the base's control token {token!r}", where=name, fix="take it out of the text"
                )


def cut(blocks: Sequence[tuple[str, str]], words: int, overlap: int) -> Iterator[tuple[str, str]]:
    """(title, text) passages of at most so many words, out of (title, paragraph) blocks.

    Paragraphs under one heading are joined while they fit; a longer one is cut, each piece repeating the last words of
    the one before.
    """
    overlap = min(overlap, words // 2)
    title, held = "", list[str]()
    for heading, paragraph in [*blocks, ("", "")]:
        pieces = paragraph.split()
        if held and (heading != title or len(held) + len(pieces) > words):
            yield title, " ".join(held)
            held = []
        title = heading
        while len(pieces) > words:
            yield title, " ".join(pieces[:words])
            pieces = pieces[words - overlap :]
        held += pieces
    if held:
        yield title, " ".join(held)


def read_document(file: SourceFile) -> Iterator[tuple[str, str]]:
    """(headings above, paragraph) in order. Raises UsageError for what cannot be read as its ending says."""
    if os.stat(_path(file)).st_size > _LARGEST:
        raise UsageError(f"a document of more than {_LARGEST >> 20} MB", where=file.name, fix="split it")
    for title, text in READERS[_suffix(file.name)](file):
        plain = " ".join(text.encode("utf-8", "ignore").decode().replace("\0", " ").split())
        if plain:
            yield title, plain


def _path(file: SourceFile) -> Path:
    if file.path is None:
        raise UsageError("documents are read from this machine's disks", where=file.name, fix="fetch it first")
    return file.path


def _text(file: SourceFile) -> Iterator[tuple[str, str]]:
    for paragraph in re.split(r"\n\s*\n", _decoded(file)):
        yield "", paragraph


def _markdown(file: SourceFile) -> Iterator[tuple[str, str]]:
    from markdown_it import MarkdownIt

    headings: list[tuple[int, str]] = []
    tokens = MarkdownIt("commonmark").enable("table").parse(_decoded(file))
    row: list[str] = []
    for place, token in enumerate(tokens):
        if token.type in ("fence", "code_block"):
            yield _title(headings), token.content
        elif token.type == "tr_close":
            yield _title(headings), " | ".join(row)
            row = []
        elif token.type == "inline":
            text = "".join(_inline(child.type, child.content) for child in token.children or ())
            before = tokens[place - 1].type
            if before == "heading_open":
                level = int(tokens[place - 1].tag[1:])
                headings = [one for one in headings if one[0] < level] + [(level, " ".join(text.split()))]
            elif before in ("th_open", "td_open"):
                row.append(text)
            else:
                yield _title(headings), text


def _inline(kind: str, content: str) -> str:
    return " " if kind in ("softbreak", "hardbreak") else content if kind in ("text", "code_inline", "image") else ""


def _html(file: SourceFile) -> Iterator[tuple[str, str]]:
    try:
        from selectolax.lexbor import LexborHTMLParser
    except ImportError as error:
        raise UsageError("HTML needs selectolax", where=file.name, fix=_EXTRA) from error
    tree = LexborHTMLParser(_decoded(file))
    tree.strip_tags(["script", "style", "noscript", "template", "svg", "nav"])
    headings: list[tuple[int, str]] = []
    body = tree.body
    blocks = "h1,h2,h3,h4,h5,h6,p,li,pre,td,th,dt,dd,blockquote,figcaption"
    nodes = body.css(blocks) if body is not None else []
    for node in nodes:
        text = " ".join(node.text(separator=" ").split())
        if re.fullmatch("h[1-6]", node.tag or ""):
            level = int(str(node.tag)[1])
            headings = [one for one in headings if one[0] < level] + [(level, text)]
        elif not node.css(blocks)[1:]:  # an outer block's text comes with its inner ones; the first found is itself
            yield _title(headings), text
    if not nodes and body is not None:
        yield "", body.text(separator=" ")


def _pdf(file: SourceFile) -> Iterator[tuple[str, str]]:
    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ImportError as error:
        raise UsageError("PDF needs pypdf", where=file.name, fix=_EXTRA) from error
    try:
        reader = PdfReader(_path(file))
        if reader.is_encrypted and not reader.decrypt(""):
            raise UsageError("the PDF is encrypted", where=file.name, fix="give it without a password")
        for number, page in enumerate(reader.pages, start=1):
            for paragraph in re.split(r"\n\s*\n", page.extract_text()):
                yield f"page {number}", paragraph
    except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise UsageError(f"not readable as PDF: {error}", where=file.name, fix="give its text") from error


READERS: Mapping[str, Callable[[SourceFile], Iterator[tuple[str, str]]]] = {
    ".htm": _html,
    ".html": _html,
    ".markdown": _markdown,
    ".md": _markdown,
    ".pdf": _pdf,
    ".txt": _text,
}


def _title(headings: Sequence[tuple[int, str]]) -> str:
    return " / ".join(text for _, text in headings)


def _decoded(file: SourceFile) -> str:
    try:
        return _path(file).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8: {error.reason} at byte {error.start}", where=file.name) from error


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()
