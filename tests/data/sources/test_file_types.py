"""The tables of file types and row formats: what they list, and that every entry is complete."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from tunesmith.data.documents import DocumentSettings, document_files
from tunesmith.data.formats.row_formats import AUTO, FORMATS
from tunesmith.data.settings import Rows
from tunesmith.data.sources.compression import COMPRESSIONS, content_of
from tunesmith.data.sources.file_types import BINARY
from tunesmith.data.sources.files import open_source


def test_every_binary_type_is_recognised_by_its_content() -> None:
    for kind in BINARY.values():
        for magic in kind.magics:
            assert content_of(magic + bytes(20)) == kind.name
    for packed in COMPRESSIONS.values():
        assert content_of(packed.magic + bytes(20)) == packed.name


def test_every_format_can_be_named_in_the_settings() -> None:
    for name in (AUTO, *FORMATS):
        assert Rows(path="a.jsonl", format=name).format == name
    with pytest.raises(ValidationError, match="there is no format 'alpaka'"):
        Rows(path="a.jsonl", format="alpaka")
    assert Rows.model_json_schema()["properties"]["format"]["enum"] == [AUTO, *FORMATS]


def test_a_pdf_with_binary_bytes_is_opened_as_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" + bytes(20))
    (file,) = document_files(DocumentSettings(paths=("a.pdf",)), tmp_path)
    with open_source(file) as opened:
        assert opened.bytes > 20
