"""Files as they should not be: every one an error with its place, and no wait, crash or silent loss."""

from __future__ import annotations

import csv
import errno
import json
import os
import socket
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.data.rows import failure, read, row, write_jsonl
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.data.settings import Source
from tunesmith.data.sources.files import find_files, open_source

GOOD = json.dumps(row("hello", "hi"))


def test_jsonl_rows_have_line_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f"{GOOD}\n\n  \n{GOOD}\n")
    assert [(one.source, one.number) for one in read(tmp_path, "a.jsonl")] == [("a.jsonl", 1), ("a.jsonl", 4)]


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
    "line", [GOOD[:-9], f"\ufeff{GOOD}", '{"a": NaN}', '{"a": 1, "a": 2}', '{"a": "\0"}', "[1]", "null", "[" * 100_000]
)
def test_what_strict_json_rows_are_not(tmp_path: Path, line: str) -> None:
    assert failure(tmp_path, "a.jsonl", f"{GOOD}\n{line}\n".encode()).where.startswith("a.jsonl, line 2")


def test_byte_order_mark_and_crlf_are_read_as_any_editor_would(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{GOOD}\r\n{GOOD}\r\n".encode())
    assert [one.fields for one in read(tmp_path, "a.jsonl")] == [json.loads(GOOD)] * 2


@pytest.mark.parametrize("data", [GOOD.encode("utf-16"), GOOD.encode() + b"\n" + '{"a": "é"}'.encode("latin-1")])
def test_other_and_mixed_encodings(tmp_path: Path, data: bytes) -> None:
    assert "not UTF-8" in failure(tmp_path, "a.jsonl", data).what


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_empty_file(tmp_path: Path, name: str) -> None:
    assert failure(tmp_path, name, b"").what == "the file is empty"


@pytest.mark.parametrize(("name", "data"), [("a.jsonl", b"\n\n"), ("a.json", b"[]"), ("a.csv", b"prompt,completion\n")])
def test_file_without_rows(tmp_path: Path, name: str, data: bytes) -> None:
    assert failure(tmp_path, name, data).what == "the file holds no rows"


def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.data.sources.row_readers.LONGEST_ROW", 1000)
    assert "longer than" in failure(tmp_path, "a.jsonl", b'{"a": "' + b"x" * 5000).what


def test_json_array_names_the_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(f"[{GOOD}, {GOOD}]")
    assert [one.number for one in read(tmp_path, "a.json")] == [1, 2]
    assert failure(tmp_path, "b.json", f"[{GOOD}, 3]".encode()).where == "b.json, row 2"
    assert "not a list" in failure(tmp_path, "c.json", GOOD.encode()).what


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t"), ("a.csv", ",")])
def test_csv_as_spreadsheets_write_it(tmp_path: Path, name: str, mark: str) -> None:
    (tmp_path / name).write_bytes(f'prompt{mark}completion\r\n"a, b; c\td"{mark}x\r\n'.encode())
    assert [one.fields for one in read(tmp_path, name)] == [{"prompt": "a, b; c\td", "completion": "x"}]


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
    ("header", "mark", "names"),
    [
        (b'"prompt; a\tb; ""c;"" d;",completion', b",", ['prompt; a\tb; "c;" d;', "completion"]),
        (b'"a, b, c";completion', b";", ["a, b, c", "completion"]),
        (b'5" screen;size;completion', b";", ['5" screen', "size", "completion"]),
    ],
)
def test_names_in_quotes_do_not_say_what_separates_columns(
    tmp_path: Path, header: bytes, mark: bytes, names: list[str]
) -> None:
    (tmp_path / "a.csv").write_bytes(header + b"\n" + mark.join([b"x"] * len(names)) + b"\n")
    assert [one.fields for one in read(tmp_path, "a.csv")] == [dict.fromkeys(names, "x")]


def test_csv_with_quotes_and_line_breaks(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["prompt", "completion"], ['say "hi",\nplease', "hi"], ["b", ""]])
    assert [one.fields for one in read(tmp_path, "a.csv")] == [
        {"prompt": 'say "hi",\nplease', "completion": "hi"},
        {"prompt": "b", "completion": ""},
    ]


@pytest.mark.parametrize(
    "data", [b"a,b\n1,2\n1\n", b"a,b\n1,2\n1,2,3\n", b'a,b\n1,2\n"x,2\n', b"a,a\n1,2\n", b"a,\n1,2\n", b"a,b\n1,\xff\n"]
)
def test_broken_csv(tmp_path: Path, data: bytes) -> None:
    found = failure(tmp_path, "a.csv", data)
    assert found.where.startswith("a.csv")
    assert found.fix


def test_parquet_and_its_nulls(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"messages": row("a", "b")["messages"], "group": "g"},
        {"messages": row("c", "d")["messages"], "group": None},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [one.fields for one in read(tmp_path, "a.parquet")]
    assert found == [{"messages": row("a", "b")["messages"], "group": "g"}, {"messages": row("c", "d")["messages"]}]
    assert "broken Parquet" in failure(tmp_path, "b.parquet", (tmp_path / "a.parquet").read_bytes()[:-20]).what
    assert "broken Parquet" in failure(tmp_path, "c.parquet", b"PAR1 no").what


def test_keys_that_are_null_are_not_there(tmp_path: Path) -> None:
    line = '{"prompt": "a", "system": null, "completion": "b", "kept": {"c": null}}'
    for name, data in (("a.jsonl", line), ("a.json", f"[{line}]")):
        (tmp_path / name).write_text(data)
        assert [one.fields for one in read(tmp_path, name)] == [{"prompt": "a", "completion": "b", "kept": {"c": None}}]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_values_that_python_does_not_have(tmp_path: Path, kind: str) -> None:
    import pyarrow
    import pyarrow.parquet

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
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket.jsonl"))
    for name, kind in {
        "folder": "a folder", "link": "a link", "dangling": "a link", "fifo": "a FIFO", "socket": "a socket"
    }.items():  # fmt: skip
        with pytest.raises(UsageError, match=kind):
            read(tmp_path, f"{name}.jsonl")
    with pytest.raises(UsageError, match="a device"):
        find_files([Source(path="/dev/zero", licence="MIT")], tmp_path)
    listening.close()


def test_a_file_replaced_after_it_was_found_is_not_followed(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [row("a", "b")])
    (file,) = find_files([Source(path="a.jsonl", licence="MIT")], tmp_path)
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "b.jsonl")
    with pytest.raises(UsageError), open_source(file):
        pass
    (tmp_path / "a.jsonl").unlink()
    os.mkfifo(tmp_path / "a.jsonl")
    done = threading.Event()

    def attempt() -> None:
        with pytest.raises(UsageError), open_source(file):
            pass
        done.set()

    threading.Thread(target=attempt, daemon=True).start()
    assert done.wait(300), "opening a FIFO waited for a writer"


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


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row("a", "b")] * 5000)
    (file,) = find_files([Source(path="a.jsonl", licence="MIT")], tmp_path)
    with open_source(file) as opened:
        rows = opened.rows()
        next(rows)
        with path.open("r+b") as stream:
            stream.seek(-20, os.SEEK_END)
            stream.write(b"X")
        with pytest.raises(TunesmithError) as caught:
            list(rows)
    assert "changed while" in caught.value.what or "broken JSON" in caught.value.what


@given(st.binary(max_size=300), st.sampled_from(["a.jsonl", "a.json", "a.csv"]))
@examples(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_give_rows_or_an_error_with_a_place(tmp_path: Path, data: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(data)
    error, rows = None, []
    try:
        rows = read(tmp_path, name)
    except UsageError as raised:
        error = raised
    assert rows if error is None else (error.where or "").startswith(name)
    assert all(isinstance(one.fields, dict) for one in rows)


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none() | st.lists(st.text())), min_size=1))
@examples(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_written_is_read(tmp_path: Path, rows: list[dict]) -> None:
    write_jsonl(tmp_path / "a.jsonl", rows)
    written = [{key: value for key, value in row.items() if value is not None} for row in rows]
    assert [one.fields for one in read(tmp_path, "a.jsonl")] == written
