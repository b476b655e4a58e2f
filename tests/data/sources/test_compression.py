"""Compressed files: read as they are, and told for what they are where they are damaged, bombs or something else."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest

from tests.data.rows import failure, many_rows, read
from tunesmith.data.documents import DocumentSettings, document_files
from tunesmith.data.sources.compression import COMPRESSIONS, content_of
from tunesmith.data.sources.file_types import BINARY
from tunesmith.data.sources.files import open_source

Pack = Callable[[bytes], bytes]


def zstd(data: bytes) -> bytes:
    packed: bytes = pyarrow.Codec("zstd").compress(data, asbytes=True)
    return packed


PACKERS: dict[str, Pack] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
LINES = "".join(json.dumps(one) + "\n" for one in many_rows(500)).encode()


@pytest.mark.parametrize("ending", PACKERS)
def test_a_compressed_file_has_the_rows_it_had(tmp_path: Path, ending: str) -> None:
    pack = PACKERS[ending]
    (tmp_path / f"a.jsonl{ending}").write_bytes(pack(LINES))
    (tmp_path / f"twice.jsonl{ending}").write_bytes(pack(LINES) + pack(LINES))  # as `cat` joins them
    rows = read(tmp_path, f"a.jsonl{ending}")
    assert [one.fields for one in rows] == many_rows(500)
    assert [one.number for one in rows] == list(range(1, 501))
    assert len(read(tmp_path, f"twice.jsonl{ending}")) == 1000
    (tmp_path / f"a.csv{ending}").write_bytes(pack(b"prompt,completion\na,b\n"))
    (tmp_path / f"a.json{ending}").write_bytes(pack(b'[{"prompt": "a", "completion": "b"}]'))
    for kind in ("csv", "json"):
        assert read(tmp_path, f"a.{kind}{ending}")[0].fields == {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize("ending", PACKERS)
def test_damaged_files_and_bombs(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = PACKERS[ending](LINES)
    name = f"a.jsonl{ending}"
    assert "truncated" in failure(tmp_path, name, whole[: len(whole) // 2]).what
    assert "truncated" in failure(tmp_path, name, whole[:-3]).what
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    damaged[len(whole) // 2 + 1] ^= 0xFF
    failure(tmp_path, name, bytes(damaged))
    assert failure(tmp_path, name, b"").what == "the file is empty"
    assert failure(tmp_path, name, PACKERS[ending](b"")).what == "the file holds no rows"
    assert failure(tmp_path, name, PACKERS[ending](LINES + b'{"a": ]\n')).where.startswith(f"{name}, line 501")
    monkeypatch.setattr("tunesmith.data.sources.compression.LITTLE", 1 << 20)
    line = json.dumps(many_rows(1)[0]).encode() + b"\n"
    bomb = PACKERS[ending](line * 30_000)
    assert len(bomb) * 200 < 30_000 * len(line)
    error = failure(tmp_path, f"bomb.jsonl{ending}", bomb)
    assert "over 200 times its size" in error.what
    assert int(error.where.split("after ")[1].split()[0]) < 30_000 * len(line)


def _tar() -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        facts = tarfile.TarInfo("rows.jsonl")
        facts.size = len(LINES)
        archive.addfile(facts, io.BytesIO(LINES))
    return target.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.jsonl", gzip.compress(LINES), "the name says jsonl, but the content is gzip"),
        ("a.json", bz2.compress(LINES), "the content is bzip2"),
        ("a.jsonl.gz", LINES, "the name says gzip, but the content is something else"),
        ("a.jsonl.gz", gzip.compress(gzip.compress(LINES)), "the content is gzip"),
        ("a.jsonl.gz", gzip.compress(_tar()), "the content is a tar archive"),
        ("a.jsonl", _tar(), "the content is a tar archive"),
        ("a.jsonl", b"PAR1" + bytes(60), "the content is Parquet"),
        ("a.parquet", gzip.compress(LINES), "the content is gzip"),
        ("a.tar.gz", gzip.compress(_tar()), ".tar may hold several files"),
        ("a.parquet.gz", gzip.compress(LINES), "Parquet is compressed inside"),
        ("a.gz", gzip.compress(LINES), "rows cannot be read from a file without a suffix"),
    ],
)
def test_a_wrong_suffix_is_refused(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    assert said in failure(tmp_path, name, data).what


def test_every_type_is_recognised_by_its_content(tmp_path: Path) -> None:
    named = [(kind.name, magic) for kind in BINARY.values() for magic in kind.magics]
    for name, magic in (*named, *((packed.name, packed.magic) for packed in COMPRESSIONS.values())):
        assert content_of(magic + bytes(20)) == name
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" + bytes(20))
    (file,) = document_files(DocumentSettings(paths=("a.pdf",)), tmp_path)
    with open_source(file) as opened:  # with binary bytes, as a document
        assert opened.bytes > 20


def test_json_of_the_other_kind_is_told_and_a_table_may_begin_with_any_letters(tmp_path: Path) -> None:
    assert "name the file .jsonl" in failure(tmp_path, "a.json", LINES).fix
    assert "name the file .json" in failure(tmp_path, "a.jsonl", b'[\n{"a": 1}\n]').fix
    for first in ("BZh9 columns", "PAR1", "%PDF-"):
        (tmp_path / "a.csv").write_text(f"{first},completion\n1,2\n")
        assert len(read(tmp_path, "a.csv")) == 1
