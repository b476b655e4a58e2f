"""Readers of documents: text, Markdown, HTML and PDF. file_types.py lists them.

A reader takes the file's bytes and its name for error messages. It yields (headings above a paragraph, paragraph) and
raises UsageError for a file that it cannot read.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from tunesmith.core.errors import UsageError

_EXTRA = "pip install 'tunesmith[documents]'"
# Elements of HTML that begin a paragraph.
_BLOCKS = re.compile(
    "address|article|aside|blockquote|body|caption|d[dlt]|details|div|fieldset|figcaption|figure|footer|form|h[1-6]"
    "|header|li|main|[ou]l|p|pre|section|summary|table|t[dhr]"
)


def read_text(data: bytes, name: str) -> Iterator[tuple[str, str]]:
    """Paragraphs of plain text, which blank lines separate."""
    for paragraph in re.split(r"\n\s*\n", _decoded(data, name)):
        yield "", paragraph


def read_markdown(data: bytes, name: str) -> Iterator[tuple[str, str]]:
    """Paragraphs, list items, code blocks and table rows of CommonMark."""
    try:
        from markdown_it import MarkdownIt
    except ImportError as error:
        raise UsageError("Markdown needs markdown-it-py", where=name, fix=_EXTRA) from error
    headings: list[tuple[int, str]] = []
    tokens = MarkdownIt("commonmark").enable("table").parse(_decoded(data, name))
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


def read_html(data: bytes, name: str) -> Iterator[tuple[str, str]]:
    """Blocks of text of an HTML page, without scripts, styles and navigation."""
    try:
        from selectolax.lexbor import LexborHTMLParser
    except ImportError as error:
        raise UsageError("HTML needs selectolax", where=name, fix=_EXTRA) from error
    tree = LexborHTMLParser(_decoded(data, name))
    tree.strip_tags(["script", "style", "noscript", "template", "svg", "nav"])
    headings: list[tuple[int, str]] = []
    nodes = tree.body.traverse(include_text=True) if tree.body is not None else ()
    texts = ((_block_of(node), str(node.text(deep=False))) for node in nodes if node.tag == "-text")
    written = ((block, text) for block, text in texts if text.strip())
    for (_, tag), parts in groupby(written, key=lambda one: one[0]):
        text = " ".join(" ".join(part for _, part in parts).split())
        if re.fullmatch("h[1-6]", tag):
            level = int(tag[1])
            headings = [one for one in headings if one[0] < level] + [(level, text)]
        else:
            yield _title(headings), text


def _block_of(node: Any) -> tuple[int, str]:
    """The block of the page that a text stands in: its number and its tag."""
    while not _BLOCKS.fullmatch(node.tag):
        node = node.parent
    return node.mem_id, node.tag


def read_pdf(data: bytes, name: str) -> Iterator[tuple[str, str]]:
    """Paragraphs of a PDF; the page number serves as the heading."""
    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ImportError as error:
        raise UsageError("PDF needs pypdf", where=name, fix=_EXTRA) from error
    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise UsageError("the PDF is encrypted", where=name, fix="save it without a password")
        for number, page in enumerate(reader.pages, start=1):
            for paragraph in re.split(r"\n\s*\n", page.extract_text()):
                yield f"page {number}", paragraph
    except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise UsageError(f"not readable as PDF: {error}", where=name, fix="use its text instead") from error


def _title(headings: Sequence[tuple[int, str]]) -> str:
    return " / ".join(text for _, text in headings)


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8: {error.reason} at byte {error.start}", where=name) from error
