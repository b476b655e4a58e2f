"""Shards and workers: any number gives the same dataset and the same first error, and leaves no files behind."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.data.rows import build, held, many_rows, row, settings, turns, write_jsonl
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.data.building import shards
from tunesmith.data.building.shards import LocalRunner
from tunesmith.data.building.staging import OUTSIDE_WORDING, WITHDRAWN
from tunesmith.data.formats.row_readers import Part
from tunesmith.data.governance.withdrawn import Withdrawn
from tunesmith.data.privacy.originals import KEY, new_key, read_originals
from tunesmith.data.settings import Source
from tunesmith.data.sources.files import find_files, open_source


def mixed(count: int) -> list[dict[str, Any]]:
    """Rows of every fate: kept, repeated, changed, in conflict, near another, without answer."""
    draw = random.Random(1)
    rows = [{**one, "part": f"p{n % 90}"} for n, one in enumerate(many_rows(count))]
    for one in draw.sample(rows, count // 10):
        rows.append(json.loads(json.dumps(one)))
        rows.append({**row(one["messages"][0]["content"] + "!", "another answer"), "part": one["part"]})
    rows += [{"messages": turns(f"no answer {n}"), "part": "p1"} for n in range(count // 20)]
    rows += [{**row(f"mail ada{n}@example.org", f"ok {n}"), "part": f"p{n}"} for n in range(count // 20)]
    draw.shuffle(rows)
    return rows


CHOSEN = {"split": {"group_by": "part"}, "privacy": {"entities": ["EMAIL_ADDRESS"]}}


@pytest.mark.parametrize(("size", "workers"), [(300, 1), (5000, 2), (1 << 30, 2)])
def test_any_shards_and_workers(tmp_path: Path, size: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "rows.jsonl", mixed(400))
    (tmp_path / "rows.jsonl").open("a").write("\n \n")
    whole = build(tmp_path, settings(**CHOSEN))
    assert len(whole.record.body["rows"]["removed"]) >= 3
    assert whole.record.body["conflicts"]["requests"] > 0
    monkeypatch.setattr(shards, "SHARD_BYTES", size)
    cut = build(tmp_path, settings(**CHOSEN), runner=LocalRunner(workers), work=tmp_path / "w")
    assert cut.digest == whole.digest
    assert not list((tmp_path / "w").iterdir())


def test_workers_do_all_that_a_build_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{**one, "subject": one["part"]} for one in mixed(400)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    write_jsonl(tmp_path / "bench.jsonl", many_rows(9))
    monkeypatch.setattr(shards, "SHARD_BYTES", 5000)
    monkeypatch.setenv(KEY, new_key())
    privacy = {**CHOSEN["privacy"], "originals": "back"}
    chosen = settings(**CHOSEN | {"privacy": privacy, "decontaminate": [{"path": "bench.jsonl"}]})
    recalled = Withdrawn({"subject": frozenset(["p13"])})
    one, two = (build(tmp_path, chosen, runner=LocalRunner(workers), withdrawn=recalled) for workers in (1, 2))
    assert one.digest == two.digest
    assert two.record.body["rows"]["removed"][WITHDRAWN] >= 3
    assert two.record.body["rows"]["removed"][OUTSIDE_WORDING] >= 9
    changed = [each.id for each in held(two) if "person1@" in each.messages[0].content]
    assert sorted(read_originals(tmp_path / "back")) == sorted(changed) != []
    with pytest.raises(TunesmithError, match="worker process died"):
        build(tmp_path, runner=LocalRunner(2), count_tokens=lambda _messages, _most: os._exit(9), max_tokens=9)


def test_every_type_of_file_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = many_rows(240)
    write_jsonl(tmp_path / "d" / "a.jsonl", rows[:100])
    (tmp_path / "d" / "b.jsonl.gz").write_bytes(gzip.compress(write_jsonl(tmp_path / "x", rows[100:140]).read_bytes()))
    table = pyarrow.Table.from_pylist(rows[140:200])
    pyarrow.parquet.write_table(table, tmp_path / "d" / "c.parquet", row_group_size=7)
    (tmp_path / "d" / "d.json").write_text(json.dumps(rows[200:]))
    whole = build(tmp_path, settings("d/*"))
    assert whole.record.body["rows"]["read"] == 240
    monkeypatch.setattr(shards, "SHARD_BYTES", 1500)
    assert build(tmp_path, settings("d/*"), runner=LocalRunner(2)).digest == whole.digest


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), max_size=30), min_size=1, max_size=40),
    st.integers(1, 120),
    st.booleans(),
)
@examples(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_parts_of_lines_are_all_lines(tmp_path: Path, texts: list[str], size: int, end: bool) -> None:
    data = "\n".join(json.dumps({"a": text}, ensure_ascii=False) if text else "" for text in texts)
    (tmp_path / "a.jsonl").write_text(data + "\n" * end or "\n", encoding="utf-8")
    (file,) = find_files([Source(path="a.jsonl", licence="MIT")], tmp_path)
    with open_source(file) as opened:
        whole = list(opened.read(Part()))
        parts = opened.parts(size)
        assert [one for part in parts for one in opened.read(part)] == whole
        stops = [part.stop for part in parts]
        assert stops[:-1] == [part.start for part in parts[1:]]
        assert stops[-1] is None


def test_the_first_bad_row_is_told_whoever_meets_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps(one) for one in many_rows(900)]
    lines[400], lines[899] = "{", "]"
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(shards, "SHARD_BYTES", 2000)
    for workers in (1, 2):
        with pytest.raises(UsageError) as caught:
            build(tmp_path, runner=LocalRunner(workers), work=tmp_path / "w")
        assert caught.value.where.startswith("rows.jsonl, line 401")
        assert not list((tmp_path / "w").iterdir())


KILLED = """
    import sys, time
    from pathlib import Path
    from tests.data.rows import build, settings
    from tunesmith.data.building import shards

    shards.SHARD_BYTES = 4000
    slow = lambda messages, most: time.sleep(0.05) or 1
    build(Path(sys.argv[1]), runner=shards.LocalRunner(2), count_tokens=slow, max_tokens=9)
"""


@pytest.mark.slow
def test_killed_it_leaves_no_worker_and_the_next_build_is_whole(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", many_rows(400))
    running = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)], cwd=Path(__file__).parents[3]
    )
    workers: list[psutil.Process] = []
    until = time.monotonic() + 300
    while len(workers) < 2 and time.monotonic() < until:
        time.sleep(0.05)
        workers = psutil.Process(running.pid).children()
    assert len(workers) == 2
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    _, left = psutil.wait_procs(workers, timeout=120)
    assert not left
    assert build(tmp_path).digest == build(tmp_path, work=tmp_path / "elsewhere").digest
