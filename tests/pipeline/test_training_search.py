"""`tunesmith train --search`, and what a training says of its validation."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.commands import call, printed
from tests.evaluation.probing import row
from tests.tiny_project import settings, write_project
from tunesmith.candidates.candidate import Candidate
from tunesmith.core.errors import Refused, UsageError
from tunesmith.data.dataset import Dataset, Example
from tunesmith.evaluation.settings import TaskSettings
from tunesmith.pipeline.context import PipelineContext
from tunesmith.pipeline.training import forbidden_answers, in_turns, validation_notices
from tunesmith.pipeline.training_search import compared
from tunesmith.project import Project, parse_settings
from tunesmith.records.training import SettingsTrial, TrainingSearchBody
from tunesmith.services.lineage import summary_line
from tunesmith.services.training import settings_search, train
from tunesmith.store.records import Record
from tunesmith.store.store import Store
from tunesmith.training.search import Trial
from tunesmith.training.settings import TrainSettings

TRAIN = {"rank": 2, "batch": 8, "rows": 24, "epochs": 2, "learning_rate": 1e-7}
SEARCH = ("--search", "--trials", "4")


def write(folder: Path, validation: float = 0.3, **train: Any) -> Path:
    data = {**settings()["data"], "split": {"validation": validation, "test": 0.3, "group_by": "template"}}
    candidates = {
        "plain": {"prompt": "prompt.txt", "max_tokens": 4},
        "tuned": {"prompt": "prompt.txt", "train": {**TRAIN, **train}, "max_tokens": 4},
    }
    return write_project(folder, data=data, candidates=candidates)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose test rows cannot be read any more, and whose search has ended."""
    folder = write(tmp_path_factory.mktemp("search") / "p")
    context = PipelineContext(Project.load(folder))
    test = context.store.blob_path(context.dataset.record.blobs["test.jsonl"])
    test.write_bytes(b"")
    printed(folder, "train", *SEARCH)
    return folder


def record(folder: Path) -> Record:
    store = Store(folder / ".tunesmith")
    (digest,) = store.records_of("training_search")
    return store.record(digest, kind="training_search")


def test_the_record_holds_every_trial_and_no_test_row(project: Path) -> None:
    found, store = record(project), Store(project / ".tunesmith")
    body = found.body
    assert body["splits"] == ["train", "validation"]
    assert (body["planned"], body["within"], body["validation_rows"], body["scored_rows"]) == (4, None, 38, 38)
    assert body["method"].startswith("Optuna ")
    assert [each["number"] for each in body["trials"]] == [0, 1, 2, 3]
    assert {each["score"] for each in body["trials"]} <= {0.0, None}
    assert (body["by"], body["unscored"], body["difference"]["real"]) == ("probability", None, True)
    assert body["suggestion"] == body["trials"][body["best"]]["settings"]
    assert body["suggestion"]["learning_rate"] >= 1e-3
    lines = [json.loads(line) for line in store.read_blob(found.blobs["trials.jsonl"]).splitlines()]
    dataset = store.record(found.parents["dataset"])
    validation = {json.loads(line)["id"] for line in store.read_blob(dataset.blobs["validation.jsonl"]).splitlines()}
    assert set(lines[0]["rows"]) == validation
    for line, trial in zip(lines[1:], body["trials"], strict=True):
        assert line["number"] == trial["number"]
        count = 38 if trial["outcome"] == "complete" else 0
        assert (len(line["probabilities"]), line["scores"]) == (count, [0.0] * count)
    assert summary_line(found) == "4 settings on 38 rows"


def test_a_finished_search_is_looked_up_and_shown(project: Path) -> None:
    before = (project / "tunesmith.yaml").read_bytes()
    document = call(project, "train", "tuned", *SEARCH)
    assert set(document["trials"][0]["settings"]) == {"learning_rate", "rank", "batch", "b_rate"}
    assert document["search"] == record(project).digest
    assert document["suggestion"] == record(project).body["suggestion"]
    shown = printed(project, "train", *SEARCH)
    assert f"trial 0 has the present settings, and trial {document['best']} those that did best" in shown
    assert "\u2026" not in shown, "a cell of the table is cut"
    assert "is optimistic, because the best was chosen by the same rows" in " ".join(shown.split())
    written = yaml.safe_load(shown[shown.index("train:") :])["train"]
    assert written == document["suggestion"]
    whole = yaml.safe_load(before)
    whole["candidates"]["tuned"]["train"] |= written
    assert parse_settings(yaml.safe_dump(whole), "page").candidates["tuned"].train
    assert (project / "tunesmith.yaml").read_bytes() == before, "the project file is the user's"


def test_test_rows_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "read_blob", lambda *_: b"")
    whole = Dataset(Store(Path()), "sha256:0", Record(kind="dataset", blobs={"test.jsonl": "", "train.jsonl": ""}))
    assert whole.examples("test") == []
    assert whole.without_test_rows().examples("train") == []
    with pytest.raises(Refused, match="the test rows may not be read here"):
        whole.without_test_rows().examples("test")


def test_too_few_validation_rows_go_by_the_probability_and_time_ends_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", validation=0.1, rows=8, epochs=1)
    found = call(folder, "train", "--search", "--within", "0.001s")
    assert (found["scored_rows"], found["by"], found["planned"], found["best"]) == (0, "probability", 12, 0)
    assert "validation rows are too few to choose by exact_match" in found["unscored"]
    assert [each["score"] for each in found["trials"]] == [None]
    assert "none of the other settings (11 not run for want of time)" in found["conclusion"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--search --restart", "cannot be restarted"),
        ("--repeat --restart", "--repeat keeps nothing that could be restarted"),
        ("--search --repeat", "--search and --repeat exclude each other"),
        ("--within 5m", "are for --search"),
        ("--search --trials 1", "2 to 100 trials"),
        ("--search --trials 101", "2 to 100 trials"),
        ("--search --within 0s", "more than no time"),
        ("--search --within 1000h", "at most 30 days"),
        ("plain --search", "candidate 'plain' has no training"),
    ],
)
def test_wrong_use_is_named(project: Path, words: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        printed(project, "train", *words.split())
    assert refused.value.fix or refused.value.where


def test_what_cannot_be_searched_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a search needs validation rows"):
        printed(write(tmp_path / "p", validation=0.0), "train", *SEARCH)
    with pytest.raises(UsageError, match="answers of this control are shuffled"):
        printed(write(tmp_path / "p", permute_answers=True), "train", "tuned", *SEARCH)


def test_validation_rows_come_from_as_many_groups_as_there_are() -> None:
    rows = [Example(id=f"r{n}", messages=(), source="", licence="", group=group) for n, group in enumerate("aaabac")]
    assert [row.id for row in in_turns(rows)] == ["r0", "r3", "r5", "r1", "r2", "r4"]


GROUPS = [f"g{n}" for n in range(60)]


def right(count: int) -> list[float]:
    return [1.0] * count + [0.0] * (60 - count)


def trial(number: int, probability: float | None, scores: list[float]) -> Trial:
    """None: it failed. Each row has a somewhat other probability."""
    values = {"number": number, "params": {}, "settings": {"rank": 8, "learning_rate": 10.0**-number}}
    if probability is None:
        return Trial(**values, outcome="failed", why="the loss became nan")  # type: ignore[arg-type]
    rows = tuple(probability + place / 100 for place in range(60))
    return Trial(**values, probability=probability, probabilities=rows, scores=tuple(scores))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("trials", "by", "best", "suggested", "said"),
    [
        ([(0.1, right(20)), (0.1, right(50))], "score", 1, True, r"higher by 50.0 points .* is optimistic"),
        ([(0.1, right(20)), (0.9, right(22))], "score", 1, False, r"Keep .* by 3.3 points, which is within noise"),
        ([(0.1, right(20)), (0.9, right(20)), (0.9, right(9))], "score", 1, False, r"higher by 0.0 points"),
        ([(0.1, right(20)), (0.9, right(19))], "score", 0, False, r"none of the other settings \(1 complete\)"),
        ([(0.2, right(60)), (0.7, right(60))], "probability", 1, True, "probability .* higher by 0.500"),
        ([(0.7, []), (0.2, [])], "probability", 0, False, "none of .* had a higher probability"),
        ([(None, []), (0.1, right(5)), (0.1, right(9))], "score", 2, True, "present settings could not be trained"),
        ([(0.5, right(5)), (None, [])], "probability", 0, False, r"\(1 failed\)"),
        ([(None, []), (None, [])], "probability", None, False, "no setting could be trained"),
    ],
)
def test_conclusions(trials: list[Any], by: str, best: int | None, suggested: bool, said: str) -> None:
    """A flat metric says nothing; noise, ties and failures leave what there is; never a random winner."""
    made = [trial(number, *each) for number, each in enumerate(trials)]
    stated = {"candidate": "tuned", "method": "m", "within": None, "splits": [], "validation_rows": 60, "metric": "m"}
    body = {**stated, "planned": len(made), "scored_rows": 60, "unscored": None, **dict(compared(made, GROUPS))}
    body["trials"] = [SettingsTrial(**each.model_dump(), score=each.score) for each in made]
    view = settings_search("sha256:0", TrainingSearchBody(**body))
    assert (view.by, view.best) == (by, best)
    assert view.suggestion == (made[best].settings if suggested and best is not None else None)
    assert re.search(said, view.conclusion), view.conclusion
    assert ("optimistic" in view.conclusion) == suggested


# What a training says of its validation, and where people read it


def _notices(rows: int, scorer: Any = "exact_match", **settings: Any) -> list[str]:
    held = [row(f"request {n}", "answer") for n in range(rows)]
    task = TaskSettings(scorers=[scorer])  # type: ignore[arg-type]
    context: Any = SimpleNamespace(
        dataset=SimpleNamespace(examples=lambda _split: held),
        project=SimpleNamespace(settings=SimpleNamespace(task=task)),
    )
    return validation_notices(context, TrainSettings(**settings))


def test_it_says_what_validation_rows_are_missing() -> None:
    judge = {"name": "quality", "judge": {"url": "http://127.0.0.1:9/v1", "model": "judge"}}
    for found, said in (
        (_notices(0, budget=60), "no validation rows: the last weights are kept"),
        (_notices(29, budget=60), "29 validation rows are too few to choose by exact_match"),
        (_notices(40, judge, budget=60), "quality is a judge: a model scores it, not a function"),
    ):
        assert [said in each for each in found] == [True]
    assert _notices(10, budget=60, validate_by="loss") == _notices(30, budget=60) == []


def test_a_metric_that_cannot_run_stops_a_training_before_it_begins(tmp_path: Path) -> None:
    """Validation by the loss instead would hide it until the evaluation, after the training."""
    data = {**settings()["data"], "split": {"validation": 0.5, "test": 0.2, "group_by": "template"}}
    task = {"scorers": [{"name": "own", "function": "scorer.py:score"}]}
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "scorer.py").write_text("def score(answer, reference, request):\n    return 1.0\n")
    project = Project.load(write_project(tmp_path / "p", data=data, task=task, gates={}))
    (tmp_path / "p" / "scorer.py").write_text("def score(answer, reference, request:\n")
    with pytest.raises(UsageError, match=r"scorer.py cannot be run: SyntaxError"):
        train(project)
    (tmp_path / "p" / "scorer.py").unlink()
    with pytest.raises(UsageError, match="there is no file"):
        train(project)


def test_it_says_which_answers_decoding_cannot_give() -> None:
    schema = {"type": "object", "properties": {"who": {"type": "string"}, "at": {"type": "string", "format": "time"}}}
    held = [row("for Ann", '{"who": "Ann"}'), row("for Bob", '{"who": "Eve"}'), row("at 10", '{"at": "10:30"}')]
    project = SimpleNamespace(settings=SimpleNamespace(server=None))
    context: Any = SimpleNamespace(dataset=SimpleNamespace(examples=lambda _split: held), project=project)
    facts: dict[str, Any] = {"name": "c", "base": "b", "max_tokens": 9}
    copying = Candidate(**facts, answer_schema=json.dumps(schema), copied=("who",))
    counts, notices = forbidden_answers(context, copying, "train")
    assert counts == {"undecodable": 1, "uncopied": 1}
    assert notices[0].startswith(f"decoding cannot give 1 of 3 train answers, such as that of row {held[2].id}: ")
    assert notices[1].startswith("copied fields: 1 of 3 train answers hold a value that is not words of the request")
    turns = (*row("for Ann", '{"who": "Eve"}').messages, *held[0].messages)
    talk = [held[0].model_copy(update={"messages": turns})]
    context.dataset = SimpleNamespace(examples=lambda _split: talk)
    assert forbidden_answers(context, copying, "train")[0]["uncopied"] == 0
    counts, notices = forbidden_answers(context, copying, "train", earlier=True)
    assert counts["uncopied"] == 1, "an answer that is learned, though another one is last"
    assert notices[0].startswith("copied fields: 1 of 2 train answers")
    context.dataset = SimpleNamespace(examples=lambda _split: held)
    del held[1]
    counts, notices = forbidden_answers(context, copying, "train")
    assert (counts["uncopied"], len(notices)) == (0, 1), "nothing is said of copied fields where all can be given"
    assert forbidden_answers(context, Candidate(**facts), "train") == ({}, [])
    project.settings.server = "vllm"
    assert forbidden_answers(context, copying, "train") == ({}, [])
