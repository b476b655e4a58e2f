"""Readers of documents: text, Markdown, HTML and PDF. file_types.py lists them.

A reader takes the file's bytes and its name for error messages. It yields (headings above a paragraph, paragraph) and
raises UsageError for a file that it cannot read, ImportError without its library.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from tunesmith.core.errors import UsageError
from tunesmith.data.formats.row_readers import decoded

Paragraphs = Iterator[tuple[str, str]]  # (headings above a paragraph, paragraph)
# Elements of HTML that begin a paragraph.
_BLOCKS = re.compile(
    "address|article|aside|blockquote|body|caption|d[dlt]|details|div|fieldset|figcaption|figure|footer|form|h[1-6]"
    "|header|li|main|[ou]l|p|pre|section|summary|table|t[dhr]"
)


def read_text(data: bytes, name: str) -> Paragraphs:
    """Paragraphs of plain text, which blank lines separate."""
    for paragraph in re.split(r"\n\s*\n", decoded(data, name)):
        yield "", paragraph


def read_markdown(data: bytes, name: str) -> Paragraphs:
    """Paragraphs, list items, code blocks and table rows of CommonMark."""
    from markdown_it import MarkdownIt

    headings: dict[int, str] = {}
    tokens = MarkdownIt("commonmark").enable("table").parse(decoded(data, name))
    row: list[str] = []
    for place, token in enumerate(tokens):
        if token.type in ("fence", "code_block"):
            yield " / ".join(headings.values()), token.content
        elif token.type == "tr_close":
            yield " / ".join(headings.values()), " | ".join(row)
            row = []
        elif token.type == "inline":
            text = "".join(_inline(child.type, child.content) for child in token.children or ())
            before = tokens[place - 1].type
            if before == "heading_open":
                headings = _below(headings, tokens[place - 1].tag, " ".join(text.split()))
            elif before in ("th_open", "td_open"):
                row.append(text)
            else:
                yield " / ".join(headings.values()), text


def _inline(kind: str, content: str) -> str:
    return " " if kind in ("softbreak", "hardbreak") else content if kind in ("text", "code_inline", "image") else ""


def read_html(data: bytes, name: str) -> Paragraphs:
    """Blocks of text of an HTML page, without scripts, styles and navigation."""
    from selectolax.lexbor import LexborHTMLParser

    tree = LexborHTMLParser(decoded(data, name))
    tree.strip_tags(["script", "style", "noscript", "template", "svg", "nav"])
    headings: dict[int, str] = {}
    nodes = tree.body.traverse(include_text=True) if tree.body is not None else ()
    texts = ((_block_of(node), str(node.text(deep=False))) for node in nodes if node.tag == "-text")
    written = ((block, text) for block, text in texts if text.strip())
    for (_, tag), parts in groupby(written, key=lambda one: one[0]):
        text = " ".join(" ".join(part for _, part in parts).split())
        if re.fullmatch("h[1-6]", tag):
            headings = _below(headings, tag, text)
        else:
            yield " / ".join(headings.values()), text


def _block_of(node: Any) -> tuple[int, str]:
    """The block of the page that a text stands in: its number and its tag."""
    while not _BLOCKS.fullmatch(node.tag):
        node = node.parent
    return node.mem_id, node.tag


def read_pdf(data: bytes, name: str) -> Paragraphs:
    """Paragraphs of a PDF; the page number serves as the heading."""
    from pypdf import PdfReader
    from pypdf.errors import PyPdfError

    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise UsageError("the PDF is encrypted", where=name, fix="save it without a password")
        for number, page in enumerate(reader.pages, start=1):
            for paragraph in re.split(r"\n\s*\n", page.extract_text()):
                yield f"page {number}", paragraph
    except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise UsageError(f"not readable as PDF: {error}", where=name, fix="use its text instead") from error


def _below(headings: Mapping[int, str], tag: str, text: str) -> dict[int, str]:
    """The headings above what follows a new one, by their levels. tag: as h2."""
    level = int(tag[1:])
    return {**{above: said for above, said in headings.items() if above < level}, level: text}
