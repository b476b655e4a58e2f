"""Rows that lie elsewhere: folders of Hugging Face `datasets`, and URLs."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from tests.data.rows import build, failure, jsonl, many_rows, read, row, settings, write_jsonl
from tests.s3_server import s3_environment
from tunesmith.core.digests import digest_bytes
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.data.settings import Source
from tunesmith.data.sources import remote
from tunesmith.data.sources.files import find_files, open_source

ROWS = many_rows(2500)


def save_to_disk(folder: Path, rows: list[dict[str, Any]], files: int = 2) -> Path:
    """The layout that `datasets` 3 and 4 write: two JSON files and Arrow streams of 1,000 rows a batch."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05d}-of-{files:05d}.arrow" for n in range(files)]
    size = -(-len(rows) // files)
    for n, name in enumerate(names):
        table = pyarrow.Table.from_pylist(rows[n * size : (n + 1) * size])
        with pyarrow.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table, max_chunksize=1000)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"messages": []}}))
    return folder


def test_a_saved_dataset_is_read_in_order(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "set", ROWS)
    (tmp_path / "set" / "cache-12.arrow").write_bytes(b"left over by a map()")
    found = read(tmp_path, "set")
    assert [one.fields for one in found] == ROWS
    assert (found[0].source, found[0].number) == ("set/data-00000-of-00002.arrow", 1)
    assert (found[-1].source, found[-1].number) == ("set/data-00001-of-00002.arrow", 1250)
    for split in ("train", "test"):
        save_to_disk(tmp_path / "sets" / split, ROWS[:10], files=1)
    (tmp_path / "sets" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    error = failure(tmp_path, "sets")
    assert "train, test" in error.what
    assert "sets/train" in error.fix
    assert len(read(tmp_path, "sets/t*")) == 20
    table = pyarrow.Table.from_pylist(ROWS[:30])
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:  # Arrow's own file format
        writer.write_table(table, max_chunksize=7)
    assert [one.fields for one in read(tmp_path, "a.arrow")] == ROWS[:30]
    (tmp_path / "b.arrow").write_bytes((tmp_path / "a.arrow").read_bytes()[:-10])
    assert "broken Arrow" in failure(tmp_path, "b.arrow").what


def test_a_folder_whose_list_cannot_be_followed(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "set", ROWS[:20])
    (folder / "data-00001-of-00002.arrow").rename(tmp_path / "away.arrow")
    assert "data-00001-of-00002.arrow is listed but missing" in failure(tmp_path, "set").what
    (folder / "data-00001-of-00002.arrow").symlink_to(tmp_path / "away.arrow")
    assert "a link" in failure(tmp_path, "set").what
    for entry in ("../away.arrow", "/etc/passwd", "state.json", 3, None):
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": entry}]}))
        assert "not an .arrow file of this folder" in failure(tmp_path, "set").what
    for state in ("[", "[]", "{}", '{"_data_files": []}', '{"_indices_data_files": [{"filename": "a"}]}'):
        (folder / "state.json").write_text(state)
        assert failure(tmp_path, "set").where == "set/state.json"
    (folder / "dataset_info.json").unlink()
    assert "dataset_info.json" in failure(tmp_path, "set").what
    (folder / "state.json").unlink()
    assert "this is a folder" in failure(tmp_path, "set").what


def test_an_arrow_file_that_was_cut_off(tmp_path: Path) -> None:
    path = save_to_disk(tmp_path / "set", ROWS, files=1) / "data-00000-of-00001.arrow"
    whole = path.read_bytes()
    with pyarrow.ipc.open_stream(whole) as stream:
        schema, batch = stream.schema, stream.read_next_batch()
    target = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(target, schema) as writer:
        writer.write_batch(batch)
    between = target.getvalue().to_pybytes()[:-8]  # ends after a whole batch: Arrow itself reads this without a word
    for data in (between, whole[:-8], whole[:-9], whole[: len(whole) // 2], whole[:5]):
        path.write_bytes(data)
        assert "truncated" in failure(tmp_path, "set").what
    path.write_bytes(whole[:8] + bytes(32) + whole[40:])
    assert "broken Arrow" in failure(tmp_path, "set").what
    path.write_bytes(b"")
    assert failure(tmp_path, "set").what == "the file is empty"


@pytest.fixture
def bucket() -> Iterator[Any]:
    """fsspec's file system in memory, which all tests of this process share: emptied before and after."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def put(system: Any, name: str, data: bytes) -> None:
    with system.open(name, "wb") as stream:
        stream.write(data)


def test_urls_and_their_digests(tmp_path: Path, bucket: Any) -> None:
    put(bucket, "/b/rows-1.jsonl", jsonl(ROWS[:60]))
    put(bucket, "/b/rows-2.jsonl", jsonl(ROWS[60:120]))
    put(bucket, "/b/other.csv", b"a,b\n")
    table = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[:9]), table)
    put(bucket, "/b/rows.parquet", table.getvalue().to_pybytes())
    assert [one.fields for one in read(tmp_path, "memory://b/rows.parquet")] == ROWS[:9]
    sealed = build(tmp_path, settings("memory://b/rows-*.jsonl")).record.body
    assert [(one["path"], one["digest"]) for one in sealed["sources"]] == [
        ("memory:///b/rows-1.jsonl", digest_bytes(jsonl(ROWS[:60]))),
        ("memory:///b/rows-2.jsonl", digest_bytes(jsonl(ROWS[60:120]))),
    ]
    first = remote.state_of("memory://b/rows-1.jsonl")
    assert first
    assert remote.state_of("memory://b/rows-1.jsonl") == first
    put(bucket, "/b/rows-1.jsonl", jsonl([row("a", "b")]) + b"{")
    assert remote.state_of("memory://b/rows-1.jsonl") != first
    assert failure(tmp_path, "memory://b/rows-1.jsonl").where.startswith("memory:///b/rows-1.jsonl, line 2")
    path = write_jsonl(tmp_path / "a.jsonl", ROWS[:3])  # a file URL is a path, and held to its rules
    assert [one.source for one in read(tmp_path, f"file://{path}")] == ["a.jsonl"] * 3
    (tmp_path / "link.jsonl").symlink_to(path)
    assert "a link" in failure(tmp_path, f"file://{tmp_path}/link.jsonl").what


def test_wrong_urls_are_refused(tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put(bucket, "/b/empty.jsonl", b"")
    put(bucket, "/b/rows.jsonl", jsonl(ROWS[:3]))
    for url, what in (
        ("memory://b/none.jsonl", "no file matches"),
        ("memory://b/*.csv", "no file matches"),
        ("memory://b", "a folder"),
        ("memory://b/empty.jsonl", "the file is empty"),
        ("nosuch://b/a.jsonl", "cannot be parsed"),
        ("memory://b/rows.jsonl::zip://a", "chained"),
        ("https://ada:pass@example.com/a.jsonl", "credential"),
        ("https://example.com/a.jsonl?sig=abc", "credential"),
    ):
        refused = failure(tmp_path, url)
        assert what in refused.what
        assert not {"pass", "abc"} & set(re.findall("pass|abc", str(refused)))
    (file,) = find_files([Source(path="memory://b/rows.jsonl", licence="MIT")], tmp_path)
    for error, what in ((PermissionError("no"), "no"), (RuntimeError("reset"), "reset"), (OSError(28, "x"), "disk")):
        with monkeypatch.context() as patch:
            patch.setattr("fsspec.implementations.memory.MemoryFileSystem.open", mock.Mock(side_effect=error))
            with pytest.raises(TunesmithError, match=what), open_source(file):
                pass
    bucket.rm("/b/rows.jsonl")
    with pytest.raises(UsageError, match="does not exist"), open_source(file):
        pass
    with pytest.raises(UsageError, match="does not exist"):
        remote.state_of("memory://b/rows.jsonl")
    absent = mock.Mock(side_effect=ImportError("Install s3fs to access S3", name="s3fs"))
    monkeypatch.setattr("fsspec.core.url_to_fs", absent)
    assert "tunesmith[s3]" in failure(tmp_path, "s3://bucket/a.jsonl").fix


# Sources in a bucket, read by s3fs


BYTES = jsonl(ROWS[:120])


@pytest.fixture
def s3_bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An s3fs file system with the bucket `rows`, of a real S3 server in another process."""
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed (extra: s3)")
    for name, value in s3_environment(s3).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    if not system.exists("rows"):
        system.mkdir("rows")
    system.pipe("rows/a.jsonl", BYTES)
    return system


@pytest.mark.slow
def test_objects_are_rows_under_their_digest(tmp_path: Path, s3_bucket: Any) -> None:
    body = build(tmp_path, settings("s3://rows/*.jsonl")).record.body
    assert body["rows"]["kept"] == 120
    assert [(one["path"], one["digest"]) for one in body["sources"]] == [("s3://rows/a.jsonl", digest_bytes(BYTES))]
    for path in ("s3://rows/none.jsonl", "s3://nobucket/*.jsonl"):
        with pytest.raises(UsageError, match="no file matches") as caught:
            build(tmp_path, settings(path))
        assert caught.value.where == path


@pytest.mark.slow
def test_an_object_that_changes_while_it_is_fetched(s3_bucket: Any) -> None:
    s3_bucket.pipe("rows/large.bin", b"a" * (24 << 20))

    class Changing(io.BytesIO):
        def write(self, data: Any) -> int:
            if not self.tell():
                s3_bucket.pipe("rows/large.bin", b"b" * (24 << 20))
            return super().write(data)

    with pytest.raises(TunesmithError, match="changed while it was fetched") as caught:
        remote.fetch("s3://rows/large.bin", Changing())
    assert caught.value.where == "s3://rows/large.bin"


@pytest.mark.slow
def test_missing_credentials_are_named(tmp_path: Path, s3_bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    s3_bucket.clear_instance_cache()
    with pytest.raises(TunesmithError, match=r"(?i)credentials") as caught:
        build(tmp_path, settings("s3://rows/a.jsonl"))
    assert caught.value.exit_code == 1
