"""Stages: what is built without an engine, what is run again, and what a recall withdraws."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.fabricate import put_recall
from tests.tiny_project import settings, write_project
from tunesmith.api import Project
from tunesmith.core.errors import Refused
from tunesmith.data.documents import Documents
from tunesmith.monitoring.recall import Cause, recall, recall_status
from tunesmith.pipeline import context as context_module
from tunesmith.pipeline.candidates import answerer, better_settings, candidate, training, untrained_candidate
from tunesmith.pipeline.context import PipelineContext
from tunesmith.pipeline.stages import Stages
from tunesmith.pipeline.training import composed_rows
from tunesmith.store.records import Record


def _trained(**retrieve: Any) -> dict[str, Any]:
    train = {"epochs": 1, "rank": 2, "batch": 8}
    return {"prompt": "prompt.txt", "retrieve": {"k": 1, **retrieve}, "train": train, "max_tokens": 4}


CANDIDATES = {"tuned": _trained(**{"from": "documents"}), "shown": _trained()}
DOCUMENTS = {"paths": ["*.md"], "licence": "cc0-1.0"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project folder with documents."""
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "rooms.md").write_text("# Garage\n\nThe garage has a radio.\n")
    return tmp_path / "p"


def _build(folder: Path, **settings: Any) -> PipelineContext:
    """Build data, documents and the rows of both trained candidates."""
    write_project(folder, candidates=CANDIDATES, documents=DOCUMENTS, **settings)
    context = PipelineContext(Project.load(folder))
    assert context.dataset.digest.startswith("sha256:")
    assert context.documents.startswith("sha256:")
    for name, needle in (("tuned", "(rooms.md"), ("shown", "turn o")):
        wanted = context.settings_of(name)
        assert wanted.train is not None
        rows, validation = composed_rows(context, untrained_candidate(context, name, wanted), wanted.train)
        assert len(rows) == len(context.dataset.examples("train"))
        assert len(validation) == len(context.dataset.examples("validation"))
        assert all(row.messages[0].content.startswith("Answer with JSON.") for row in rows)
        assert all(needle in " ".join(turn.content for turn in row.messages[:-2]) for row in rows)
        shown = [turn for row in (*rows, *validation) for turn in row.messages[:-1]]
        assert all(turn.weight == 0 for turn in shown if turn.role == "assistant")
    return context


def test_rows_are_built_on_a_base_without_weights(folder: Path) -> None:
    write_project(folder)
    weights = folder / "model" / "model.safetensors"
    weights.rename(folder / "kept")
    context = _build(folder)
    for asks in (
        lambda: answerer(context, untrained_candidate(context, "plain", _plain(context))),
        lambda: training(context, "shown"),
    ):
        with pytest.raises(Refused, match="no safetensors weights"):
            asks()
    (folder / "kept").rename(weights)
    after = _build(folder)
    assert context.of().digest != after.of().digest
    assert (context.dataset.digest, context.documents) == (after.dataset.digest, after.documents)
    assert all(stage.skipped for stage in after.stages.done if stage.name in ("data", "documents"))
    base = Cause(kind="base", value=after.of().digest)
    recall(after.store, base, reason="its licence ended", actor=after.stages.acting)
    with pytest.raises(Refused, match="the base model was recalled: its licence ended"):
        training(after, "tuned")
    assert after.store.records_of("training") == []


def test_a_recalled_document_does_not_come_back(folder: Path) -> None:
    def built() -> tuple[PipelineContext, set[str]]:
        context = PipelineContext(Project.load(folder))
        return context, {passage.source for passage in Documents(context.store, context.documents).passages}

    (folder / "halls.md").write_text("# Hall\n\nThe hall has a lamp.\n")
    write_project(folder, candidates=CANDIDATES, documents=DOCUMENTS)
    first, sources = built()
    assert sources == {"halls.md", "rooms.md"}
    store, actor = first.store, first.stages.acting
    licence = recall(store, Cause(kind="licence", value="CC0-1.0"), reason="asked to", actor=actor, dry_run=True)
    assert "documents" in {one.kind for one in licence.reached}
    cause = Cause(kind="source", value="halls.md")
    recall(store, cause, reason="asked to", actor=actor)
    (folder / "rooms.md").write_text("# Garage\n\nThe garage has two radios.\n")
    second, sources = built()
    assert sources == {"rooms.md"}
    assert recall_status(store, cause).gone
    again, _ = built()
    assert again.documents == second.documents
    assert all(stage.skipped for stage in again.stages.done if stage.name == "documents")


def test_documents_are_followed_to_what_their_passages_went_into(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, search = {"prompt": "prompt.txt", "max_tokens": 4}, {"calls": 120, "rows": 30}
    candidates = {
        "tuned": {**CANDIDATES["tuned"], "train": {"epochs": 1, "rank": 2, "batch": 8, "rows": 16}},
        "reused": {**plain, "weights": "tuned"},
        "found": {**plain, "retrieve": {"from": "documents", "k": 1}, "optimise": search},
        "plain": plain,
    }
    data = {**settings()["data"], "split": {"validation": 0.3, "test": 0.1, "group_by": "template"}}
    write_project(folder, candidates=candidates, documents=DOCUMENTS, data=data)
    context = PipelineContext(Project.load(folder))
    store = context.store
    made = {name: candidate(context, name) for name in ("reused", "found")}
    monkeypatch.setattr("tunesmith.training.search.search", lambda *_, **__: [])
    searched = better_settings(context, "tuned", 2, None)
    for kind in ("training", "search", "training_search"):
        (digest,) = store.records_of(kind)
        assert store.record(digest).parents["documents"] == context.documents, kind
    cause = Cause(kind="source", value="rooms.md")
    found = recall(store, cause, reason="asked to", actor=context.stages.acting)
    assert {"documents", "training", "search", "training_search"} <= {one.kind for one in found.reached}
    assert len(found.adapters) == 1
    assert {*made.values(), searched} <= {one.digest for one in found.reached}
    with pytest.raises(Refused, match="was recalled"):
        candidate(context, "reused")
    assert candidate(context, "plain"), "it has nothing of them"


def test_rows_that_are_recalled_while_they_are_built_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_project(folder, candidates=CANDIDATES, documents=DOCUMENTS)
    first = PipelineContext(Project.load(folder))
    row = first.dataset.examples("train")[0]
    (folder / "rows.jsonl").write_text("\n" + (folder / "rows.jsonl").read_text())
    store, actor, build = first.store, first.stages.acting, context_module.build_dataset

    def slow(*given: Any, **more: Any) -> str:
        recall(store, Cause(kind="row", value=row.id), reason="asked to", actor=actor)
        return build(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(context_module, "build_dataset", slow)
        with pytest.raises(Refused, match="recalled while this was built"):
            _ = PipelineContext(Project.load(folder)).dataset
    dataset = PipelineContext(Project.load(folder)).dataset
    assert row.id not in {each.id for split in ("train", "validation", "test") for each in dataset.examples(split)}


def _plain(context: PipelineContext) -> Any:
    return context.settings_of("shown").model_copy(update={"train": None})


# Running one stage: memos, and two runs of the same stage at once


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project.load(write_project(tmp_path / "p"))


def test_a_second_run_takes_the_memo_that_it_waited_for_unless_it_was_recalled(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, second, made = project.store, Stages(project), list[str]()
    lock = store.lock

    def run(stages: Stages, number: int) -> str:
        def make(_work: Path) -> str:
            return store.put_record(Record(kind="answers", parents={}, blobs={}, body={"n": number}))

        return stages.run("answer plain", "answer", {"x": number}, make)

    def waiting(number: int, *, recall: bool) -> Any:
        @contextmanager
        def wait(name: str, purpose: str) -> Iterator[None]:
            """Another process runs the stage meanwhile."""
            with monkeypatch.context() as patch:
                patch.setattr(store, "lock", lock)
                made.append(run(Stages(project), number))
            if recall:
                put_recall(store, made[-1])
            with lock(name, purpose):
                yield

        return wait

    monkeypatch.setattr(store, "lock", waiting(1, recall=False))
    assert run(second, 1) == made[0]
    assert [(stage.name, stage.skipped) for stage in second.done] == [("answer plain", True)]
    monkeypatch.setattr(store, "lock", waiting(2, recall=True))
    with pytest.raises(Refused, match="was recalled: consent withdrawn"):
        run(second, 2)


def test_what_was_made_from_a_recalled_record_is_refused(project: Project) -> None:
    """It may be recalled while the stage runs, so that the stage's own record is not marked."""
    store = project.store
    base = store.put_record(Record(kind="base", body={}))
    trained = store.put_record(Record(kind="training", parents={"base": base, "dataset": base}))

    def make(_work: Path) -> str:
        if not recalls:
            recalls.append(base)
            put_recall(store, base)
        return store.put_record(Record(kind="answers", parents={"training": trained}))

    recalls = list[str]()
    with pytest.raises(Refused, match="something that it was made from, was recalled: consent withdrawn"):
        Stages(project).run("answer plain", "answer", {"x": 1}, make)
    assert Stages(project).known("answer", {"x": 1}) is None, "it is no result"
    recalls = [base]
    with pytest.raises(Refused, match="was recalled: consent withdrawn"):
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
