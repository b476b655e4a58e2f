"""`tunesmith train --search`: what it says and records, that test rows stay unread, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands import call, printed
from tests.tiny_project import settings, write_project
from tunesmith.core.errors import Refused, UsageError
from tunesmith.data.dataset import Example
from tunesmith.pipeline import training_search
from tunesmith.pipeline.context import PipelineContext
from tunesmith.pipeline.training import in_turns
from tunesmith.project import Project, parse_settings
from tunesmith.services.runs.training_search import settings_search
from tunesmith.store.records import Record
from tunesmith.store.store import Store
from tunesmith.training.search import halving
from tunesmith.training.search.halving import Measured, Rung, SearchDecisions, TrialResult
from tunesmith.training.search.search import SearchOutcome

TRAIN = {"rank": 2, "batch": 8, "rows": 24, "epochs": 2, "learning_rate": 1e-7}
WITHIN = ("--search", "--within", "2h")  # enough, so that no trial depends on the machine


def write(folder: Path, validation: float = 0.3, **train: Any) -> Path:
    data = {**settings()["data"], "split": {"validation": validation, "test": 0.3, "group_by": "template"}}  # type: ignore[dict-item]
    candidates = {
        "plain": {"prompt": "prompt.txt", "max_tokens": 4},
        "tuned": {"prompt": "prompt.txt", "train": {**TRAIN, **train}, "max_tokens": 4},
    }
    return write_project(folder, data=data, candidates=candidates)


@pytest.fixture(scope="module", autouse=True)
def three_others() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halving, "_OTHERS", (3,))
        yield


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose test rows cannot be read any more, and whose search has ended."""
    folder = write(tmp_path_factory.mktemp("search") / "p")
    context = PipelineContext(Project.load(folder))
    test = context.store.blob_path(context.dataset.record.blobs["test.jsonl"])
    test.write_bytes(b"")
    printed(folder, "train", *WITHIN)
    return folder


def record(folder: Path) -> Record:
    store = Store(folder / ".tunesmith")
    (digest,) = store.records_of("training_search")
    return store.record(digest, kind="training_search")


def test_the_record_holds_every_trial_and_no_test_row(project: Path) -> None:
    found, store = record(project), Store(project / ".tunesmith")
    body = found.body
    assert body["splits"] == ["train", "validation"]
    assert (body["rows"], body["validation_rows"], body["within"]) == (24, 38, 7200)
    assert "Jamieson and Talwalkar 2016" in body["method"]
    assert [each["rows"] for each in body["decisions"]["rungs"]] == [48], "as long as the training itself"
    assert body["decisions"]["measured"]["row"] > 0
    assert len(body["trials"]) == 4
    assert (body["failed"], body["not_run"]) == (0, 0)
    assert body["by"] == "probability"
    assert "every trial of the last rung has the score 0.0%" in body["why"]
    assert body["suggestion"]["learning_rate"] == 1e-3
    assert body["difference"]["real"]
    lines = [json.loads(line) for line in store.read_blob(found.blobs["trials.jsonl"]).splitlines()]
    dataset = store.record(found.parents["dataset"])
    validation = {json.loads(line)["id"] for line in store.read_blob(dataset.blobs["validation.jsonl"]).splitlines()}
    assert {line["id"] for line in lines} == validation
    assert len(lines) == 4 * 38
    assert all(line["score"] == 0.0 for line in lines)


def test_a_search_whose_time_is_used_by_one_trial_decides_nothing() -> None:
    def result(trial: int, **more: Any) -> TrialResult:
        return TrialResult(rung=0, trial=trial, rows=8, steps=2, seconds=1.0, **more)

    measured = Measured(row=0.1, loss=0.1, answer=0.1, total=1.0)
    rungs = (Rung(rows=16, trials=(0, 1), not_run=2),)
    made = SearchDecisions(
        environment={}, measured=measured, others=3, scored_rows=0, longest=99, rungs=rungs, ended="the time was used"
    )
    trials: list[dict[str, Any]] = [{"learning_rate": rate} for rate in (0.1, 0.2, 0.3, 0.4)]
    results = [
        result(0, probability=0.1, probabilities=(0.1,)),
        result(1, cut="ended at step 2 of 4: the time was used"),
    ]
    for found, cut in ((results, 1), (results[:1], 0), ([results[1]], 1)):
        body = training_search.search_body(SearchOutcome(made, trials, found), [], None)
        assert (body["by"], body["best"], body["suggestion"]) == (None, None, None)
        assert "before another setting could be compared" in body["why"]
        assert (body["failed"], body["cut"], body["not_run"]) == (0, cut, 4 - len(found))
    first, second = (
        result(trial, probability=each, probabilities=(each,) * len(ROWS)) for trial, each in ((0, 0.1), (2, 0.5))
    )
    body = training_search.search_body(SearchOutcome(made, trials, [first, second, results[1]]), ROWS, "too few")
    assert (body["best"], body["cut"], body["trials"][1]["cut"]) == (2, 1, results[1].cut)


def test_a_finished_search_is_looked_up_and_shown(project: Path) -> None:
    before = (project / "tunesmith.yaml").read_bytes()
    document = call(project, "train", "tuned", *WITHIN)
    assert set(document["trials"][0]["settings"]) == {"learning_rate", "rank", "batch", "b_rate"}
    assert document["search"] == record(project).digest
    assert document["suggestion"] == record(project).body["suggestion"]
    shown = printed(project, "train", *WITHIN)
    assert f"trial 0 has the present settings, and trial {document['best']} those that did best" in shown
    assert "\u2026" not in shown, "a cell of the table is cut"
    assert "is optimistic, because the best was chosen by the same rows" in " ".join(shown.split())
    written = yaml.safe_load(shown[shown.index("train:") :])["train"]
    assert written == document["suggestion"]
    whole = yaml.safe_load(before)
    whole["candidates"]["tuned"]["train"] |= written
    assert parse_settings(yaml.safe_dump(whole), "page").candidates["tuned"].train
    assert (project / "tunesmith.yaml").read_bytes() == before, "the project file is the user's"


def test_test_rows_may_not_be_read() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "read_blob", lambda *_: b"")
        from tunesmith.data.dataset import Dataset

        whole = Dataset(Store(Path()), "sha256:0", Record(kind="dataset", blobs={"test.jsonl": "", "train.jsonl": ""}))
        assert whole.examples("test") == []
        assert whole.without_test_rows().examples("train") == []
        with pytest.raises(Refused, match="the test rows may not be read here"):
            whole.without_test_rows().examples("test")


def test_too_few_validation_rows_go_by_the_probability(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", validation=0.1, rows=8, epochs=1)
    found = call(folder, "train", *WITHIN)
    assert found["scored_rows"] == 0
    assert found["by"] in ("probability", None)
    assert "validation rows are too few to choose by exact_match" in found["why"] or found["by"] is None
    assert all(run["score"] is None for trial in found["trials"] for run in trial["runs"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--search", "--restart"), "cannot be restarted"),
        (("--search", "--find-rate"), "--search and --find-rate exclude each other"),
        (("--search", "--repeat"), "--search and --repeat exclude each other"),
        (("--find-rate", "--repeat"), "exclude each other"),
        (("--within", "5m"), "--within says how long --search may take"),
        (("--search", "--within", "soon"), "write a duration such as 20m"),
        (("--search", "--within", "0s"), "more than no time"),
        (("--search", "--within", "-5m"), "write a duration such as 20m"),
        (("--search", "--within", "1000h"), "at most 30 days"),
        (("plain", "--search"), "candidate 'plain' has no training"),
        (("nobody", "--search"), "there is no candidate 'nobody'"),
    ],
)
def test_wrong_use_is_named(project: Path, words: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        printed(project, "train", *words)
    assert refused.value.fix or refused.value.where


def test_what_cannot_be_searched_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "p")
    with pytest.raises(Refused, match="s are too short for a search") as refused:
        printed(folder, "train", "--search", "--within", "0.1s")
    assert "--within" in str(refused.value.fix)
    with pytest.raises(UsageError, match="a search needs validation rows"):
        printed(write(tmp_path / "p", validation=0.0), "train", *WITHIN)
    with pytest.raises(UsageError, match="answers of this control are shuffled"):
        printed(write(tmp_path / "p", permute_answers=True), "train", "tuned", *WITHIN)


def test_validation_rows_come_from_as_many_groups_as_there_are() -> None:
    known = [row.model_copy(update={"group": group}) for row, group in zip(ROWS, "aaabac", strict=False)]
    assert [row.id for row in in_turns(known)] == ["r0", "r3", "r5", "r1", "r2", "r4"]


ROWS = [Example(id=f"r{n}", messages=(), source="", licence="", group=f"g{n}") for n in range(60)]


def outcome(*trials: tuple[float | None, list[float]]) -> SearchOutcome:
    """A search of one rung: each trial's probability (None: it failed), which the loss rises with, and scores."""
    measured = Measured(row=0.1, loss=1.0, answer=0.0, total=1.0)
    results = [
        TrialResult(
            rung=0,
            trial=number,
            rows=80,
            steps=10,
            seconds=8.0,
            loss=probability,
            probability=probability,
            probabilities=() if probability is None else tuple(probability + place / 100 for place in range(60)),
            scores=() if probability is None else tuple(scores),
            failed="the loss became nan" if probability is None else None,
            expected_bytes=1,
            peak_bytes=1,
        )
        for number, (probability, scores) in enumerate(trials)
    ]
    rung = Rung(rows=80, trials=tuple(range(len(trials))))
    decisions = SearchDecisions(
        environment={},
        measured=measured,
        others=len(trials) - 1,
        scored_rows=60,
        longest=1000,
        rungs=(rung,),
        ended="x",
    )
    return SearchOutcome(decisions, [{"learning_rate": 10.0**-n, "rank": 8} for n in range(len(trials))], results)


def right(count: int) -> list[float]:
    return [1.0] * count + [0.0] * (60 - count)


@pytest.mark.parametrize(
    ("trials", "by", "best", "suggested", "said"),
    [
        ([(1.0, right(20)), (1.0, right(50))], "score", 1, True, r"better by 50.0 points .* is optimistic"),
        ([(1.0, right(20)), (0.1, right(22))], "score", 1, False, r"Keep .* differs by 3.3 points .* within noise"),
        ([(0.1, right(20)), (0.9, right(20)), (0.9, right(9))], "score", 1, False, r"differs by 0.0 points"),
        (
            [(1.0, right(20)), (0.1, right(19))],
            "score",
            0,
            False,
            "none of the other settings that were tried",
        ),
        ([(0.2, right(60)), (0.7, right(60))], "probability", 1, True, "by 0.500 in the probability of a token"),
        ([(0.7, right(0)), (0.2, right(0))], "probability", 0, False, "none of .* had a higher probability"),
        ([(0.7, right(0)), (0.7, right(0))], None, None, False, "the expected answers the same probability"),
        ([(None, []), (1.0, right(5)), (1.0, right(9))], "score", 2, True, "present settings could not be trained"),
        ([(None, []), (1.0, right(5))], "probability", 1, True, "present settings could not be trained"),
        ([(1.0, right(5)), (None, [])], "probability", 0, False, "Keep what you have"),
        ([(None, []), (None, [])], None, None, False, "no setting could be trained"),
    ],
)
def test_conclusions(trials: list[Any], by: str | None, best: int | None, suggested: bool, said: str) -> None:
    """A flat metric says nothing; noise, ties and failures leave what there is; never a random winner."""
    found = outcome(*trials)
    body = training_search.search_body(found, ROWS, None)
    stated = {"candidate": "tuned", "within": 99.0, "splits": [], "rows": 9, "validation_rows": 60, "metric": "m"}
    view = settings_search("sha256:0", Record(kind="training_search", body={**stated, **body}))
    assert (view.by, view.best) == (by, best)
    assert view.suggestion == (found.trials[best] if suggested and best is not None else None)
    import re

    assert re.search(said, view.conclusion), view.conclusion
    assert ("optimistic" in view.conclusion) == suggested


def test_a_conclusion_counts_the_settings_that_were_tried() -> None:
    """The time allowed one of four other settings; the correction is for all that might have been tried."""
    stated = {"candidate": "tuned", "within": 99.0, "splits": [], "rows": 9, "validation_rows": 60, "metric": "m"}
    for scores, said in (
        (right(19), "none of the other settings that were tried (1, and 3 not) had a higher score"),
        (right(22), "the best of the other settings that were tried (1, and 3 not) differs by 3.3 points"),
        (right(60), "The best of the other settings that were tried (1, and 3 not) is better by 66.7 points"),
    ):
        found = outcome((1.0, right(20)), (1.1, scores), (1.0, []), (1.0, []), (1.0, []))
        cut = found.decisions.model_copy(update={"rungs": (Rung(rows=80, trials=(0, 1), not_run=3),)})
        body = training_search.search_body(SearchOutcome(cut, found.trials, found.results[:2]), ROWS, None)
        view = settings_search("sha256:0", Record(kind="training_search", body={**stated, **body}))
        assert said in view.conclusion
        assert body["best"] == 0 or "after correction for 4 settings" in view.conclusion


def test_validation_rows_of_one_group_are_within_noise() -> None:
    """Also a single row, as with `validation_rows: 1`."""
    together = [row.model_copy(update={"group": "g"}) for row in ROWS]
    body = training_search.search_body(outcome((0.5, []), (1.0, [])), together, "too few")
    assert (body["by"], body["difference"]["p"], body["suggestion"]) == ("probability", 1.0, None)


def test_many_settings_are_corrected_for() -> None:
    """The same difference is real for one other setting, and noise for the best of twenty."""
    pair = ((1.0, right(20)), (1.0, right(28)))
    one = training_search.search_body(outcome(*pair), ROWS, None)
    many = training_search.search_body(outcome(*pair, *[(1.0, right(3))] * 19), ROWS, None)
    assert one["difference"]["real"]
    assert not many["difference"]["real"]
    assert many["difference"]["p"] == pytest.approx(20 * one["difference"]["p"])
