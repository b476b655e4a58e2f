"""Running one stage: memos, and two runs of the same stage at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_project import settings, write_project
from tunesmith.api import Project
from tunesmith.core.clock import stamp
from tunesmith.core.errors import Refused
from tunesmith.pipeline.context import PipelineContext
from tunesmith.pipeline.stages import Stages
from tunesmith.store import database
from tunesmith.store.records import Record
from tunesmith.store.store import Store
from tunesmith.store.tables import RecallRow


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project.load(write_project(tmp_path / "p"))


def _recall(store: Store, digest: str) -> None:
    with database.writing(store.engine) as session:
        session.add(RecallRow(cause="row 1", digest=digest, reason="asked to", at=stamp()))


def _run_two(project: Project, monkeypatch: pytest.MonkeyPatch, *, recall: bool) -> tuple[Stages, list[object]]:
    """Run one stage in two threads; the second waits for the first one's lock. Returns the second's stages and result.

    recall: whether the record is recalled while the second thread waits.
    """
    working, waiting, exclusive = threading.Event(), threading.Event(), threading.Lock()

    @contextmanager
    def waiting_lock(name: str, purpose: str) -> Iterator[None]:
        if working.is_set():
            waiting.set()
        with exclusive:
            yield

    store = project.store
    monkeypatch.setattr(store, "lock", waiting_lock)

    def make(_work: Path) -> str:
        working.set()
        assert waiting.wait(120)
        return store.put_record(Record(kind="answers", parents={}, blobs={}, body={"n": 1}))

    second, found = Stages(project), list[object]()

    def run_second() -> None:
        assert working.wait(120)
        try:
            found.append(second.run("answer plain", "answer", {"x": 1}, make))
        except Refused as error:
            found.append(error)

    keep = store.keep_memo

    def keep_and_recall(key: str, digest: str) -> None:
        keep(key, digest)
        if recall:
            _recall(store, digest)

    monkeypatch.setattr(store, "keep_memo", keep_and_recall)
    thread = threading.Thread(target=run_second)
    thread.start()
    made = Stages(project).run("answer plain", "answer", {"x": 1}, make)
    thread.join(120)
    if not recall:
        assert found == [made]
    return second, found


def test_a_second_run_takes_the_memo_that_it_waited_for_unless_it_was_recalled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project.load(write_project(tmp_path / "p"))
    with monkeypatch.context() as patch:
        second, _ = _run_two(project, patch, recall=False)
    assert [(stage.name, stage.skipped) for stage in second.done] == [("answer plain", True)]
    with monkeypatch.context() as patch:
        _, (error,) = _run_two(Project.load(write_project(tmp_path / "q")), patch, recall=True)
    assert isinstance(error, Refused)
    assert "was recalled: asked to" in str(error)


def test_what_was_made_from_a_recalled_record_is_refused(project: Project) -> None:
    """It may be recalled while the stage runs, so that the stage's own record is not marked."""
    store = project.store
    base = store.put_record(Record(kind="base", body={}))
    trained = store.put_record(Record(kind="training", parents={"base": base, "dataset": base}))

    def make(_work: Path) -> str:
        if not recalls:
            recalls.append(base)
            _recall(store, base)
        return store.put_record(Record(kind="answers", parents={"training": trained}))

    recalls = list[str]()
    with pytest.raises(Refused, match="something that it was made from, was recalled: asked to"):
        Stages(project).run("answer plain", "answer", {"x": 1}, make)
    assert Stages(project).known("answer", {"x": 1}) is None, "it is no result"
    recalls = [base]
    with pytest.raises(Refused, match="was recalled: asked to"):
        Stages(project).run("answer plain", "answer", {"x": 1}, make)


def test_a_stage_that_is_run_again_goes_on_where_it_was_stopped(project: Project) -> None:
    """Killed, or refused for a cause that may pass, such as too little memory. One that is refused at once keeps its
    earlier result."""
    store = project.store

    def run(make: Callable[[Path], str], *, again: bool = False) -> str:
        return Stages(project).run("answer plain", "answer", {"x": 1}, make, again=again)

    def record(n: int) -> str:
        return store.put_record(Record(kind="answers", parents={}, blobs={}, body={"n": n}))

    def killed(work: Path) -> str:
        (work / "half").touch()
        raise KeyboardInterrupt

    def refuse(_work: Path) -> str:
        raise Refused("there is no room")

    def go_on(work: Path) -> str:
        assert (work / "half").exists()
        return record(2)

    first = run(lambda _: record(1))
    with pytest.raises(Refused, match="no room"):
        run(refuse, again=True)
    assert run(refuse) == first
    with pytest.raises(KeyboardInterrupt):
        run(killed, again=True)
    assert Stages(project).known("answer", {"x": 1}) is None
    with pytest.raises(Refused, match="no room"):
        run(refuse)
    second = run(go_on)
    assert second == record(2) != first
    assert Stages(project).known("answer", {"x": 1}) == run(killed)


def test_a_named_source_counts_by_its_bytes_and_not_by_its_path(tmp_path: Path) -> None:
    """An upload has another path each time."""
    found = []
    data: Any = settings()["data"]
    for place, more in (("first.jsonl", ""), ("second.jsonl", ""), ("third.jsonl", "\n")):
        source = {"path": place, "name": "upload.jsonl", "licence": "CC0-1.0"}
        folder = write_project(tmp_path / "p", data={**data, "sources": [source]})
        (folder / place).write_text((folder / "rows.jsonl").read_text() + more)
        context = PipelineContext(Project.load(folder))
        digest = context.dataset.digest
        found.append((digest, [stage.skipped for stage in context.stages.done if stage.name == "data"]))
    assert found[0][0] == found[1][0] != found[2][0]
    assert [skipped for _, skipped in found] == [[False], [True], [False]]
