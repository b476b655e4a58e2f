"""`tunesmith forecast` on a tiny project: what it trains and asks, what it records, and what stops it."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.pipeline.large_project import write_large
from tunesmith.api import Project
from tunesmith.cli.main import app
from tunesmith.core.errors import Inconclusive, Refused, UsageError
from tunesmith.core.progress import Silent, Stopped, Task
from tunesmith.evaluation.learning_curve import Forecast
from tunesmith.pipeline.context import PipelineContext
from tunesmith.pipeline.forecast import lift_gate
from tunesmith.services.training import forecast, newest_forecast
from tunesmith.training.estimates.estimate import subset_settings, subset_sizes
from tunesmith.training.settings import TrainSettings


class Stopping(Silent):
    """Keeps the titles of tasks, and stops in the one that is named."""

    def __init__(self, at: str = "") -> None:
        self.at, self.titles = at, list[str]()

    @contextlib.contextmanager
    def task(self, title: str, total: float) -> Iterator[Task]:
        self.titles.append(title)
        if title == self.at:
            raise Stopped
        with super().task(title, total) as task:
            yield task


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return write_large(tmp_path_factory.mktemp("forecast") / "p")


@pytest.fixture(scope="module")
def held(project: Project) -> int:
    """How many validation rows there are."""
    return PipelineContext(project).dataset.splits["validation"]


@pytest.fixture(scope="module")
def found(project: Project, held: int) -> Forecast:
    """The project's first forecast, which was stopped on its way: a job that somebody pauses goes on, too."""
    stopping = Stopping(f"tuned on 50 rows answers {held} rows")
    with pytest.raises(Stopped):
        forecast(project, progress=stopping)
    assert len(project.store.records_of("training")) == 3
    again = Stopping()
    made = forecast(project, progress=again)
    assert again.titles == [
        f"tuned on 50 rows answers {held} rows",
        "training",
        f"tuned on 100 rows answers {held} rows",
    ]
    return made


def test_what_a_forecast_says(project: Project, found: Forecast, held: int) -> None:
    store, context = project.store, PipelineContext(project)
    assert found.rows == context.dataset.splits["train"]
    assert [each.rows for each in found.subsets] == [12, 25, 50, 100]
    assert found.score.low < found.score.median < found.score.high
    assert found.lift is not None
    assert (found.rival, set(found.rivals)) == ("nearest", {"nearest", "plain"}), "a tiny random model is never right"
    assert (found.goal, found.metric, found.held) == (0.05, "exact_match", {"validation": held})
    assert (found.said, found.decision) == (False, "undecided"), "all subsets score nothing"
    assert found.from_rows is None
    assert found.seconds > 0
    largest = store.record(store.records_of("training")[-1]).body
    assert (found.training.epochs, found.currency) == (2.0, "USD")
    assert found.training.seconds == pytest.approx(largest["seconds"] / 100 * found.rows, rel=1e-6)
    assert found.training.money == pytest.approx(found.training.seconds / 1000, rel=1e-6, abs=1e-9)
    assert found.break_even is not None
    assert found.break_even.requests is None, "the nearest row costs less than any model"
    subsets = [digest for name, digest in store.record(found.forecast).parents.items() if name.startswith("subset:")]
    assert len(subsets) == 4
    validation = {row.id for row in context.dataset.examples("validation")}
    for given in map(store.record, subsets):
        lines = map(json.loads, store.read_blob(given.blobs["answers.jsonl"]).splitlines())
        assert {line["id"] for line in lines} == validation, "no test row is read"
        training = store.record(store.record(given.parents["candidate"]).parents["training"]).body
        assert training["splits"] == ["train", "validation"]
        assert training["settings"]["rehearse"] == 0.0


def test_what_is_known_is_not_trained_again(project: Project, found: Forecast) -> None:
    before = project.store.records_of("training")
    assert forecast(project) == found
    again = forecast(project, goal=-0.99)
    assert (again.goal, again.subsets, again.forecast == found.forecast) == (-0.99, found.subsets, False)
    assert again.decision == "undecided"
    newest = newest_forecast(project)
    assert newest is not None
    assert newest.forecast.goal == -0.99
    larger = Stopping()
    assert [each.rows for each in forecast(project, rows=50, progress=larger).subsets] == [12, 25, 50]
    assert larger.titles == []
    assert project.store.records_of("training") == before


def test_the_command_says_it_and_exits_by_the_decision(project: Project, found: Forecast, held: int) -> None:
    done = CliRunner().invoke(app, ["forecast", "-C", str(project.root)])
    assert done.exit_code == 4
    text = " ".join(done.stdout.split())
    for words in (f"{held} validation rows", "trained on 100 rows", f"expected of {found.rows} rows", found.headline):
        assert words in text
    document = json.loads(CliRunner().invoke(app, ["forecast", "-C", str(project.root), "--json"]).stdout)
    assert document == found.model_dump(mode="json")
    assert {"forecast", "decision", "score", "lift", "subsets", "headline", "reasons"} <= document.keys()


def test_the_goal_is_that_of_a_gate_over_an_untuned_candidate(tmp_path: Path) -> None:
    gates: dict[str, Any] = {
        f"over-{name}": {"metric": "exact_match", "over": name, "at_least": least}
        for name, least in (("control", 0.5), ("plain", 0.1), ("best-untuned", 0.05))
    }
    gates["other"] = {"metric": "json_valid", "over": "plain", "at_least": 0.0}
    control = {"prompt": "prompt.txt", "train": {"permute_answers": True}}
    for names, least in (
        (("other", *list(gates)[:3]), 0.1),
        (("over-control", "over-best-untuned"), 0.05),
        (("over-control",), None),
        (("other",), None),
    ):
        chosen = {name: gates[name] for name in names}
        candidates = {"plain": {"prompt": "prompt.txt"}, "control": control}
        gate = lift_gate(write_large(tmp_path / "p", candidates=candidates, gates=chosen).settings)
        assert (gate.at_least if gate else None) == least


def test_a_rival_that_the_gate_names_is_asked_alone(tmp_path: Path) -> None:
    named = {"lift": {"metric": "exact_match", "over": "plain", "at_least": 0.05}}
    asked = Stopping("training")
    with pytest.raises(Stopped):
        forecast(write_large(tmp_path / "p", gates=named), progress=asked)
    assert [title.split()[0] for title in asked.titles] == ["reading", "plain", "training"]


@pytest.mark.parametrize(
    ("rows", "largest", "sizes"),
    [
        (252, None, [12, 25, 50, 100]),
        (2869, None, [22, 44, 89, 179]),
        (2869, 800, [100, 200, 400, 800]),
        (100, 800, [12, 25, 50]),
        (95, None, [23, 47]),
    ],
)
def test_subsets_double_up_to_half_of_the_rows(rows: int, largest: int | None, sizes: list[int]) -> None:
    assert subset_sizes(rows, largest) == sizes


def test_a_subset_is_trained_by_the_recipe_of_the_whole() -> None:
    made = subset_settings(TrainSettings(budget=900, rehearse=0.02), 100, 1600)
    assert (made.budget, made.rows, made.batch, made.rehearse) == (56.25, 100, 2, 0.0)
    assert (made.schedule, made.keep, made.validate_by, made.validations) == ("wsd", "last", "loss", 1)
    assert "epochs" not in subset_settings(TrainSettings(rank=2), 50, 1600).model_fields_set, "they fit the subset"
    assert subset_settings(TrainSettings(epochs=7, batch=1), 50, 1600).batch == 1
    assert subset_settings(TrainSettings(epochs=7, batch=4), 50, 1600).batch == 2


def test_what_cannot_be_forecast(tmp_path: Path, project: Project) -> None:
    for name, what in (("nearest", "nothing to forecast"), ("missing", "no candidate")):
        with pytest.raises(UsageError, match=what):
            forecast(project, name)
    for train in ({"permute_answers": True}, {"canaries": {}}):
        candidates = {"tuned": {"prompt": "prompt.txt", "train": train}}
        with pytest.raises(UsageError, match="nothing to forecast"):
            forecast(write_large(tmp_path / "p", candidates=candidates, gates={}), "tuned")
    with pytest.raises(Inconclusive, match="too few to forecast from"):
        forecast(project, rows=20)
    with pytest.raises(Inconclusive, match="too few to forecast from"):
        forecast(write_large(tmp_path / "p", copies=0))
    data = {**project.settings.model_dump(mode="json", by_alias=True)["data"]}
    data["split"] = {"validation": 0.02, "test": 0.2, "group_by": "template"}
    with pytest.raises(Inconclusive, match="groups of validation rows are too few") as caught:
        forecast(write_large(tmp_path / "p", data=data))
    assert caught.value.where == "data.split.validation"
    judge = {"name": "kind", "judge": {"url": "http://127.0.0.1:9/v1", "model": "m"}, "question": "Is it kind?"}
    with pytest.raises(UsageError, match="judge"):
        forecast(write_large(tmp_path / "p", task={"scorers": [judge]}, gates={}))
    assert not Project.load(tmp_path / "p").store.records_of("answers")


def test_a_share_of_a_budget_may_be_too_short(tmp_path: Path) -> None:
    candidates = {"tuned": {"prompt": "prompt.txt", "train": {"rank": 2, "budget": 0.1}, "max_tokens": 8}}
    with pytest.raises(Refused, match="25 rows: its share of the budget, ") as caught:
        forecast(write_large(tmp_path / "p", candidates=candidates, gates={}))
    assert caught.value.where == "the largest subset", "the smallest of four was left out"


def test_without_an_untuned_candidate_there_is_no_decision(tmp_path: Path) -> None:
    tuned = {"prompt": "prompt.txt", "train": {"rank": 2, "epochs": 1}, "max_tokens": 2}
    found = forecast(write_large(tmp_path / "p", value="0.5", candidates={"tuned": tuned}), rows=50)
    assert (found.decision, found.lift, found.rival, found.break_even) == (None, None, None, None)
    assert found.score.low < 0.5 < found.score.high
    assert Project.load(tmp_path / "p").settings.tuned == ["tuned"]
