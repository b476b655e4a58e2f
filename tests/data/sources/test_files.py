"""Files as they should not be: every one an error with its place, and no wait, crash or silent loss."""

import bz2
import errno
import gzip
import io
import json
import lzma
import os
import socket
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.rows import failure, jsonl, many_rows, read, row, write_jsonl
from tunesmith.core.errors import UsageError
from tunesmith.data.documents import DocumentSettings, document_files
from tunesmith.data.settings import Source
from tunesmith.data.sources.compression import COMPRESSIONS, content_of
from tunesmith.data.sources.file_types import BINARY
from tunesmith.data.sources.files import find_files, open_source

GOOD = json.dumps(row("hello", "hi"))


def test_rows_of_json_have_numbers_and_no_null_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{GOOD}\r\n\n  \n{GOOD}\n".encode())
    (tmp_path / "a.json").write_text(f"[{GOOD}, {GOOD}]")
    for name, numbers in (("a.jsonl", [1, 4]), ("a.json", [1, 2])):
        assert [(one.source, one.number) for one in read(tmp_path, name)] == [(name, number) for number in numbers]
        assert [one.fields for one in read(tmp_path, name)] == [json.loads(GOOD)] * 2
    line = '{"prompt": "a", "system": null, "completion": "b", "kept": {"c": null}}'
    for name, data in (("a.jsonl", line), ("a.json", f"[{line}]")):
        (tmp_path / name).write_text(data)
        assert [one.fields for one in read(tmp_path, name)] == [{"prompt": "a", "completion": "b", "kept": {"c": None}}]
    monkeypatch.setattr("tunesmith.data.formats.row_readers.LONGEST_ROW", 1000)
    assert "longer than" in failure(tmp_path, "a.jsonl", b'{"a": "' + b"x" * 5000).what, "not read into memory"


@pytest.mark.parametrize(
    ("name", "data", "what", "where"),
    [
        *(("a.jsonl", f"{GOOD}\n{line}\n".encode(), "", "a.jsonl, line 2")
          for line in (GOOD[:-9], f"\ufeff{GOOD}", '{"a": NaN}', '{"a": 1, "a": 2}', '{"a": "\0"}', "[1]", "null")),
        ("a.json", f"[{GOOD}, 3]".encode(), "", "a.json, row 2"),
        ("a.json", GOOD.encode(), "not a list", "a.json"),
        ("a.jsonl", GOOD.encode("utf-16"), "not UTF-8", "a.jsonl"),
        ("a.jsonl", GOOD.encode() + b"\n" + '{"a": "é"}'.encode("latin-1"), "not UTF-8", "a.jsonl"),
        *((f"a.{kind}", b"", "the file is empty", "a") for kind in ("jsonl", "json", "csv", "parquet")),
        *((f"a.{kind}", data, "the file holds no rows", "a")
          for kind, data in (("jsonl", b"\n\n"), ("json", b"[]"), ("csv", b"prompt,completion\n"))),
        ("a.parquet", b"PAR1 no", "broken Parquet", "a.parquet"),
    ],
)  # fmt: skip
def test_files_that_are_refused(tmp_path: Path, name: str, data: bytes, what: str, where: str) -> None:
    found = failure(tmp_path, name, data)
    assert what in found.what
    assert str(found.where).startswith(where)


def test_a_source_names_its_file_for_records(tmp_path: Path) -> None:
    """Wherever it lies, so that its rows keep their ids."""
    (tmp_path / "a.jsonl").write_text(f"{GOOD}\n")
    (tmp_path / "b.jsonl").write_text(f"{GOOD}\n")
    found = [find_files([Source(path=path, name="c.jsonl")], tmp_path)[0] for path in ("a.jsonl", "b.jsonl")]
    assert [file.name for file in found] == ["c.jsonl"] * 2
    with open_source(found[1]) as opened:
        assert [one.source for one in opened.rows()] == ["c.jsonl"]
    with pytest.raises(UsageError, match="two sources name the same file"):
        find_files([Source(path="*.jsonl", name="c.jsonl")], tmp_path)
    with pytest.raises(ValueError, match="by its URL"):
        Source(path="s3://bucket/a.jsonl", name="c.jsonl")


@pytest.mark.parametrize(
    ("name", "data", "rows"),
    [
        *((name, f'prompt{mark}completion\r\n"a, b; c\td"{mark}x\r\n', [{"prompt": "a, b; c\td", "completion": "x"}])
          for name, mark in (("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t"), ("a.csv", ","))),
        ("a.csv", 'prompt,completion\r\n"say ""hi"",\nplease",hi\r\nb,\r\n',
         [{"prompt": 'say "hi",\nplease', "completion": "hi"}, {"prompt": "b", "completion": ""}]),
        # Names in quotes do not say what separates the columns.
        ("a.csv", '"p; a\tb; ""c;"" d;",completion\nx,x\n', [{'p; a\tb; "c;" d;': "x", "completion": "x"}]),
        ("a.csv", '"a, b, c";completion\nx;x\n', [{"a, b, c": "x", "completion": "x"}]),
        ("a.csv", '5" screen;size;completion\nx;x;x\n', [{'5" screen': "x", "size": "x", "completion": "x"}]),
    ],
)  # fmt: skip
def test_csv_as_spreadsheets_write_it(tmp_path: Path, name: str, data: str, rows: list[dict[str, str]]) -> None:
    (tmp_path / name).write_bytes(data.encode())
    assert [one.fields for one in read(tmp_path, name)] == rows


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_csv_may_name_its_mark_and_have_empty_columns(tmp_path: Path, mark: str) -> None:
    text = "sep=;\r\nprompt;;completion;;\r\na,b;;x;;\r\nc;;y\r\n".replace(";", mark)
    (tmp_path / "a.csv").write_bytes(text.encode())
    assert [one.fields for one in read(tmp_path, "a.csv")] == [
        {"prompt": "a,b", "completion": "x"},
        {"prompt": "c", "completion": "y"},
    ]
    found = failure(tmp_path, "b.csv", f"{text}d{mark}e{mark}z\r\n".encode())
    assert found.where == "b.csv, line 5"
    assert "name it" in str(found.fix)


@pytest.mark.parametrize(
    "data", [b"a,b\n1,2\n1\n", b"a,b\n1,2\n1,2,3\n", b'a,b\n1,2\n"x,2\n', b"a,a\n1,2\n", b"a,\n1,2\n", b"a,b\n1,\xff\n"]
)
def test_broken_csv(tmp_path: Path, data: bytes) -> None:
    found = failure(tmp_path, "a.csv", data)
    assert found.where.startswith("a.csv")
    assert found.fix


def test_parquet_and_its_nulls(tmp_path: Path) -> None:
    whole = {"messages": row("a", "b")["messages"], "group": "g"}
    other = {"messages": row("c", "d")["messages"]}
    table = pyarrow.Table.from_pylist([whole, {**other, "group": None}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [one.fields for one in read(tmp_path, "a.parquet")] == [whole, other]
    assert "broken Parquet" in failure(tmp_path, "b.parquet", (tmp_path / "a.parquet").read_bytes()[:-20]).what


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_values_that_python_does_not_have(tmp_path: Path, kind: str) -> None:
    starts, letters = pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")
    columns = {
        "text": pyarrow.StringArray.from_buffers(1, starts, letters),
        "late": pyarrow.array([2**62], pyarrow.timestamp("us")),
        "nowhere": pyarrow.array([1], pyarrow.timestamp("us", tz="Nowhere/Nix")),
    }
    for name, column in columns.items():
        table = pyarrow.table({"good": ["a"], name: column})
        path = tmp_path / f"{name}.{kind}"
        if kind == "parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            with pyarrow.ipc.new_file(path, table.schema) as file:
                file.write_table(table)
        found = failure(tmp_path, path.name, path.read_bytes())
        assert "a value cannot be read" in found.what
        assert found.where == f"{name}.{kind}, in the 1 rows after row 0"


def test_what_stands_in_place_of_a_file(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "real.jsonl", [row("a", "b")])
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "fifo.jsonl")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.jsonl"))
        kinds = {"folder": "a folder", "link": "a link", "dangling": "a link", "fifo": "a FIFO", "socket": "a socket"}
        for name, kind in kinds.items():
            with pytest.raises(UsageError, match=kind):
                read(tmp_path, f"{name}.jsonl")
    with pytest.raises(UsageError, match="a device"):
        find_files([Source(path="/dev/zero", licence="MIT")], tmp_path)


def test_a_file_replaced_after_it_was_found_is_not_followed(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [row("a", "b")])
    (file,) = find_files([Source(path="a.jsonl", licence="MIT")], tmp_path)
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "b.jsonl")

    def attempt() -> str:
        with pytest.raises(UsageError) as caught, open_source(file):
            pass
        return caught.value.what

    attempt()
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "a.jsonl").mkdir()
    assert "directory" in attempt()
    (tmp_path / "a.jsonl").rmdir()
    os.mkfifo(tmp_path / "a.jsonl")
    answers: list[str] = []
    opening = threading.Thread(target=lambda: answers.append(attempt()), daemon=True)
    opening.start()
    opening.join(300)
    assert answers, "opening a FIFO waited for a writer"


def test_missing_files_and_permissions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no file matches"):
        read(tmp_path, "none/*.jsonl")
    (tmp_path / "closed").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda folder, *_, **__: Path(folder).name != "closed")
        with pytest.raises(UsageError) as caught:
            read(tmp_path, "closed/*.jsonl")
    assert caught.value.fix is not None
    assert "may not read the folder closed" in caught.value.fix
    write_jsonl(tmp_path / "a.jsonl", [row("a", "b")])

    def denied(*_: object) -> int:  # the tests' own user may be allowed everything
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("tunesmith.data.sources.files.os.open", denied)
    with pytest.raises(UsageError, match="Permission denied"):
        read(tmp_path, "a.jsonl")


def test_unknown_ending_and_overlapping_sources(tmp_path: Path) -> None:
    unknown = failure(tmp_path, "a.xlsx", b"x")
    assert "cannot be read from .xlsx" in unknown.what
    assert "convert it to one of .arrow, .csv" in str(unknown.fix)
    assert "the list under data" in str(failure(tmp_path, "a.json", b'{"version": 1, "data": []}').fix)
    write_jsonl(tmp_path / "a.jsonl", [row("a", "b")])
    write_jsonl(tmp_path / "a[1].jsonl", [row("a", "b")])
    assert [one.source for one in read(tmp_path, "a[1].jsonl")] == ["a[1].jsonl"], "a name is no pattern"
    both = [Source(path="a.jsonl", licence="MIT"), Source(path="*.jsonl", licence="MIT")]
    with pytest.raises(UsageError, match="two sources"):
        find_files(both, tmp_path)


# Compressed files: read as they are, and told for what they are where they are damaged, bombs or something else


Pack = Callable[[bytes], bytes]


def zstd(data: bytes) -> bytes:
    packed: bytes = pyarrow.Codec("zstd").compress(data, asbytes=True)
    return packed


PACKERS: dict[str, Pack] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
LINES = jsonl(many_rows(500))


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
        ("a.jsonl.gz", LINES, "the name says gzip, but the content is something else"),
        ("a.jsonl.gz", gzip.compress(_tar()), "the content is a tar archive"),
        ("a.jsonl", b"PAR1" + bytes(60), "the content is Parquet"),
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
