"""`tunesmith forecast` on a tiny project: what it asks, what it says, and what stops it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.pipeline.large_project import write_large
from tunesmith.api import Project
from tunesmith.candidates.candidate import Candidate
from tunesmith.candidates.search import tried_rows
from tunesmith.cli.main import app
from tunesmith.core.errors import Inconclusive, Refused, TunesmithError, UsageError
from tunesmith.core.progress import Silent, Stopped, Task
from tunesmith.engines.in_process import InProcessEngine
from tunesmith.evaluation.forecasting import conclude as conclusions
from tunesmith.evaluation.forecasting.conclude import Wanted, conclude
from tunesmith.evaluation.forecasting.outcome import find_forecast
from tunesmith.evaluation.forecasting.plan import LEAST_ASKED
from tunesmith.evaluation.gates.settings import GATES
from tunesmith.pipeline import forecast as pipeline_forecast
from tunesmith.pipeline import held_out
from tunesmith.pipeline.candidates import untrained_candidate
from tunesmith.pipeline.context import PipelineContext
from tunesmith.pipeline.forecast import curve, lift_gate
from tunesmith.pipeline.forecast import forecast as run_forecast
from tunesmith.pipeline.stages import REVISIONS
from tunesmith.services.evaluations.evaluation import report, report_page
from tunesmith.services.runs.forecast import Expected, Forecast, forecast, forecast_page, forecast_view
from tunesmith.store.store import Store
from tunesmith.training import train as training_module
from tunesmith.training.recipe import usual_epochs
from tunesmith.training.scoring import BudgetTooShort
from tunesmith.training.settings import LEAST_SCORED
from tunesmith.training.spec import TrainingResult

BUDGET = 600.0  # ample: a tiny model takes seconds, on a machine that is busy too


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return write_large(tmp_path_factory.mktemp("forecast") / "p")


@pytest.fixture(scope="module")
def asked() -> list[str]:
    """Who was asked for `found`, in turn."""
    return []


@pytest.fixture(scope="module")
def found(project: Project, asked: list[str]) -> Forecast:
    """The project's first forecast: a test that makes another one takes this fixture too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tunesmith.pipeline.forecast.ask_held_out", noting(asked))
        return forecast(project, budget=BUDGET)


def noting(asked: list[str], stop_at: int | None = None) -> Any:
    """Asks held-out rows and notes whom; stops the process at one of the times."""
    ask = held_out.ask_held_out

    def counted(*given: Any, **more: Any) -> dict[str, Any]:
        asked.append(given[2].name)
        if len(asked) == stop_at:
            raise KeyboardInterrupt
        return ask(*given, **more)

    return counted


def test_every_number_has_an_interval(found: Forecast) -> None:
    assert found.score.low <= found.score.median <= found.score.high
    assert found.score.low < found.score.high
    assert found.lift is not None
    assert found.lift.low < found.lift.high
    assert found.confidence == 0.9
    assert not found.rival_named
    assert found.rival == "nearest", "a tiny random model answers nothing right, the nearest row does"
    held = sum(found.held.values())
    assert found.rival_counted == pytest.approx((held * found.rivals["nearest"] + 0.5) / (held + 1))
    assert found.decision == "don't", "and its losses fall too slowly to change that"
    assert found.likely is not None
    assert found.likely <= 0.1
    assert found.needed is not None
    assert found.goal == 0.05, "the lift gate's bound"
    assert next(each.rows for each in found.subsets) == 12
    assert 3 <= len(found.subsets) <= 4
    assert found.subsets[-1].rows <= found.rows // 2
    assert found.complete, "there was ample time"
    assert found.curve[0].rows < found.subsets[0].rows
    assert found.headline.startswith("Don't")


def test_costs_follow_from_what_was_measured(found: Forecast) -> None:
    assert found.training.epochs == 2.0
    money = pytest.approx(found.training.seconds / 1000, rel=1e-6, abs=1e-9)  # it is rounded to 9 places
    assert found.training.money == money, "3.6 an hour"
    assert found.currency == "USD"
    assert found.pays is not None
    assert found.pays.unit == "money"
    assert found.pays.requests_a_day is None, "the nearest row costs less than any model"


def test_other_numbers_of_rows_are_read_as_often_as_they_would_be(project: Project, found: Forecast) -> None:
    """Without epochs and budget, few rows are read up to ten times and many three times."""
    store = project.store
    curve_record = store.record(store.record(found.forecast).parents["curve"], kind="curve")
    body = curve_record.body
    wanted = Wanted(goal=0.05, over=None, days=30, prices=None, tokens={})
    for usual in (False, True):
        changed = curve_record.model_copy(update={"body": {**body, "usual_epochs": usual}})
        made = conclude(store, store.put_record(changed), [], wanted)
        assert made["training"]["epochs"] == 2.0, "as many as the training of these rows has"
        for each in filter(None, (made["needed"][end] for end in ("low", "median", "high"))):
            assert each["epochs"] == pytest.approx(usual_epochs(each["rows"]) if usual else 2.0)


def test_a_score_is_extrapolated_from_the_subset_that_is_worth_most(
    project: Project, found: Forecast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where time is short that may be the first one, which is read three times."""
    store, seen = project.store, []
    curve_record = store.record(store.record(found.forecast).parents["curve"], kind="curve")
    first, *others = curve_record.body["subsets"]
    real = conclusions.extrapolate

    def extrapolate(measured: Any, *given: Any) -> dict[str, Any]:
        seen.append(measured)
        return real(measured, *given)

    monkeypatch.setattr(conclusions, "extrapolate", extrapolate)
    wanted = Wanted(goal=0.05, over=None, days=30, prices=None, tokens={})
    for share in (1.0, 0.01):
        shorter = [{**each, "epochs": share * each["epochs"]} for each in others]
        body = {**curve_record.body, "subsets": [first, *shorter]}
        conclude(store, store.put_record(curve_record.model_copy(update={"body": body})), [], wanted)
    before, after = seen
    assert list(after.sizes) == sorted(after.sizes)
    assert (after.losses[:, -1] == before.losses[:, 0]).all()
    assert (after.scores[:, -1] == before.scores[:, 0]).all()


def test_what_a_curve_says_of_budgets_and_servers_is_told(project: Project, found: Forecast) -> None:
    store = project.store
    curve_record = store.record(store.record(found.forecast).parents["curve"], kind="curve")
    wanted = Wanted(goal=0.05, over=None, days=30, prices=project.settings.prices, tokens={})
    body = {**curve_record.body, "on_server": ["nearest"], "settings": {**curve_record.body["settings"], "budget": 900}}
    made = conclude(store, store.put_record(curve_record.model_copy(update={"body": body})), [], wanted)
    assert (found.within, made["within"]) == (None, 900)
    assert found.pays is not None
    assert found.pays.rival_per_1000 is not None
    assert made["rival"] == "nearest"
    assert made["pays"]["rival_per_1000"] is None, "seconds of a server and of this process"
    assert made["pays"]["requests_a_day"] is None


def test_a_training_without_a_budget_takes_its_validations_too(project: Project, found: Forecast) -> None:
    store = project.store
    curve_record = store.record(store.record(found.forecast).parents["curve"], kind="curve")
    body, validation = curve_record.body, PipelineContext(project).dataset.splits["validation"]
    assert body["scored"] == (validation if validation >= LEAST_SCORED else 0)
    wanted = Wanted(goal=0.05, over=None, days=30, prices=None, tokens={})
    slow = {**body["subsets"][-1], "price": {**body["subsets"][-1]["price"], "seconds_per_1000": 2000.0}}
    seconds = []
    for scored in (0, 50):
        changed = {**body, "scored": scored, "subsets": [*body["subsets"][:-1], slow]}
        made = store.put_record(curve_record.model_copy(update={"body": changed}))
        seconds.append(conclude(store, made, [], wanted)["training"]["seconds"])
    assert seconds[0] == pytest.approx(body["rows"] * 2 * body["row_seconds"], rel=1e-6)
    assert seconds[1] == pytest.approx(seconds[0] + 4 * 50 * 2.0), "four validations of 50 rows, two seconds each"


def test_answers_take_as_long_as_in_the_largest_part() -> None:
    """Four answers may take half as long as thirty."""

    def part(rows: int, seconds: float) -> dict[str, Any]:
        largest = {"rows": rows, "seconds": seconds}
        return {"scores": [1.0] * rows, "prompt_tokens": 0, "completion_tokens": 0, "seconds": seconds,
                "largest": largest}  # fmt: skip

    asked = held_out.together([held_out.together([part(4, 4.0), part(12, 6.0)]), part(48, 9.6), part(3, 3.0)])
    assert asked["largest"] == {"rows": 48, "seconds": 9.6}
    assert pipeline_forecast._stated(asked)["price"]["seconds_per_1000"] == 200.0


def test_the_goal_is_that_of_a_gate_over_an_untuned_candidate() -> None:
    told = {
        "over-control": {"metric": "exact_match", "over": "control", "at_least": 0.5},
        "over-rag": {"metric": "exact_match", "over": "rag", "at_least": 0.1},
        "lift": {"metric": "exact_match", "over": "best-untuned", "at_least": 0.05},
    }
    gates = GATES.validate_python(told)
    for names, untuned, least in ((list(told), ["rag"], 0.1), (list(told), ["plain"], 0.05)):
        gate = lift_gate({name: gates[name] for name in names}, "exact_match", untuned)
        assert gate is not None
        assert gate.at_least == least
    assert lift_gate({"over-control": gates["over-control"]}, "exact_match", ["rag"]) is None
    assert lift_gate(gates, "json_match", ["rag"]) is None


def test_a_rival_that_the_gate_names_is_not_called_the_best(tmp_path: Path) -> None:
    named = {"lift": {"metric": "exact_match", "over": "plain", "at_least": 0.05}}
    project = write_large(tmp_path / "p", gates=named)
    found = forecast(project, budget=BUDGET)
    assert (found.rival, found.rival_named, list(found.rivals)) == ("plain", True, ["plain"])
    assert any("over plain, which the lift gate names" in sentence for sentence in found.reasons)
    (asked,) = project.store.record(project.store.record(found.forecast).parents["curve"]).body["untuned"].values()
    assert asked["asked"] == sum(found.held.values()), "as many as the subsets' models, though nearest is better"


def test_rows_that_chose_a_rival_s_prompt_are_not_asked(tmp_path: Path) -> None:
    candidates = {
        "plain": {"prompt": "prompt.txt", "search": {"rows": 10}, "max_tokens": 8},
        "tuned": {"prompt": "prompt.txt", "train": {"rank": 2, "epochs": 2}, "max_tokens": 8},
    }
    context = PipelineContext(write_large(tmp_path / "p", candidates=candidates)).without_test_rows()
    plain, tuned = (context.settings_of(name) for name in candidates)
    assert plain.search is not None
    assert tuned.train is not None
    validation = context.dataset.examples("validation")
    made = pipeline_forecast._reserved(context, tuned.train, [Candidate(name="plain", base="", max_tokens=8)])
    chose = {row.group for row in tried_rows(validation, plain.search)}
    assert chose
    assert not chose & {row.group for row in made.held}
    assert made.validation == sum(row.group not in chose for row in validation)


def test_test_rows_are_counted_and_not_read(project: Project, found: Forecast) -> None:
    store = project.store
    record = store.record(store.record(found.forecast).parents["curve"], kind="curve")
    dataset = PipelineContext(project).dataset
    asked = {json.loads(line)["id"] for line in store.read_blob(record.blobs["scores.jsonl"]).splitlines()}
    assert record.body["held"] == found.held
    assert record.body["splits"] == ["train", "validation"]
    assert found.held["test"] == 0
    assert found.held["validation"] == dataset.splits["validation"]
    assert sum(found.held.values()) == len(asked)
    assert not asked & {row.id for row in dataset.examples("test")}
    assert {row.id for row in dataset.examples("validation")} <= asked


def test_another_goal_trains_nothing(project: Project, found: Forecast, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr("tunesmith.pipeline.forecast.ask_held_out", fail)
    again = forecast(project, budget=BUDGET, goal=-0.99, days=7)
    assert again.decision == "train"
    assert again.goal == -0.99
    assert again.subsets == found.subsets
    assert forecast(project, budget=BUDGET) == found


def test_other_rules_for_answers_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation by the loss: max_tokens changes nothing of the training, and all of the answers."""
    monkeypatch.setattr(pipeline_forecast, "_measured", lambda made: ({"most": made.tuned.max_tokens}, b""))
    made = []
    for most in (8, 16, 8):
        tuned = {"prompt": "prompt.txt", "train": {"rank": 2, "epochs": 2, "validate_by": "loss"}, "max_tokens": most}
        plain = {"prompt": "prompt.txt", "max_tokens": 8}
        project = write_large(tmp_path / "p", candidates={"plain": plain, "tuned": tuned})
        made.append(project.store.record(curve(PipelineContext(project), "tuned", BUDGET)).body["most"])
    assert made == [8, 16, 8]


def test_a_forecast_of_another_prompt_base_or_rule_is_not_shown(project: Project, found: Forecast) -> None:
    context, store = PipelineContext(project), project.store
    settings = store.record(store.record(found.forecast).parents["curve"]).body["settings"]
    tuned = untrained_candidate(context, "tuned", context.settings_of("tuned"))
    trained = tuned.model_copy(update={"training": "sha256:0"})
    shown = find_forecast(store, context.dataset.digest, trained, settings)
    assert shown is not None
    assert shown["name"] == "tuned"
    for change in ({"prompt": "Another."}, {"base": "sha256:0"}, {"answer_schema": "{}"}, {"name": "other"}):
        assert find_forecast(store, context.dataset.digest, trained.model_copy(update=change), settings) is None


def test_another_rule_makes_the_forecast_again_of_the_same_curve(
    project: Project, found: Forecast, monkeypatch: pytest.MonkeyPatch
) -> None:
    concluded: list[str] = []
    real = pipeline_forecast.conclude

    def conclude(store: Store, curve: str, *given: Any) -> dict[str, Any]:
        concluded.append(curve)
        return {**real(store, curve, *given), "decision": "train"}

    monkeypatch.setattr(pipeline_forecast, "conclude", conclude)
    assert forecast(project, budget=BUDGET).decision == found.decision == "don't"
    assert not concluded
    monkeypatch.setitem(REVISIONS, "forecast", REVISIONS["forecast"] + 1)
    assert forecast(project, budget=BUDGET).decision == "train"
    assert concluded == [project.store.record(found.forecast).parents["curve"]]


def test_a_stopped_forecast_goes_on_with_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: Forecast, asked: list[str]
) -> None:
    project = write_large(tmp_path / "p")
    broken: list[str] = []
    monkeypatch.setattr("tunesmith.pipeline.forecast.ask_held_out", noting(broken, stop_at=7))
    with pytest.raises(KeyboardInterrupt):
        forecast(project, budget=BUDGET)
    again = forecast(project, budget=BUDGET)
    assert len(broken) == len(asked) + 1, "only the part that was stopped is asked again"
    assert (again.score, again.lift, again.subsets) == (found.score, found.lift, found.subsets)


class Stopping(Silent):
    """Stops a forecast once so many parts are done."""

    def __init__(self, parts: int) -> None:
        self.left, self.done = parts, 0.0

    @contextlib.contextmanager
    def task(self, title: str, total: float) -> Iterator[Task]:
        with super().task(title, total) as task:
            yield self if title == "forecast of tuned" else task

    def note(self, text: str) -> None:
        return None

    def advance(self, amount: float = 1.0) -> None:
        self.done += amount
        self.left -= 1
        if not self.left:
            raise Stopped


def test_a_forecast_can_be_stopped_between_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a job is that somebody pauses or cancels."""
    project, stopping, asked = write_large(tmp_path / "p"), Stopping(3), list[str]()
    ask = held_out.ask_held_out

    def counted(*given: Any, **more: Any) -> dict[str, Any]:
        asked.append(given[2].name)
        return ask(*given, **more)

    monkeypatch.setattr("tunesmith.pipeline.forecast.ask_held_out", counted)
    with pytest.raises(Stopped):
        forecast(project, budget=BUDGET, progress=stopping)
    assert asked == ["nearest", "plain"], "the third part is a training"
    assert stopping.done > 0
    found = forecast(project, budget=BUDGET, progress=stopping)
    assert stopping.done >= found.seconds


def test_building_a_baseline_is_spent_time_and_no_price(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serving builds a baseline once, however many requests come."""
    project, clock, make = write_large(tmp_path / "p"), Slow(1.0), held_out.make_baseline

    def slow(*given: Any) -> Any:
        clock.now += 100.0
        return make(*given)

    monkeypatch.setattr(held_out, "make_baseline", slow)
    context = PipelineContext(project)
    found = project.store.record(curve(context, "tuned", 100_000.0, clock=clock)).body["untuned"]["nearest"]
    assert found["seconds"] > 100.0
    assert found["price"]["seconds_per_1000"] < 500.0


def test_time_before_a_kill_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that goes on from its checkpoint states seconds in which this process did not run."""
    run = training_module.run_training

    def resumed(*given: Any, **more: Any) -> TrainingResult:
        made = run(*given, **more)
        made.state.seconds += 1000.0
        return made

    monkeypatch.setattr(training_module, "run_training", resumed)
    assert forecast(write_large(tmp_path / "p"), budget=BUDGET).seconds >= 1000.0


class Slow:
    """A clock of a slow machine. Each reading takes time, of which a training step makes a few."""

    def __init__(self, slowness: float) -> None:
        self.slowness, self.now = slowness, 0.0

    def __call__(self) -> float:
        self.now += 0.05 * self.slowness
        return self.now

    def time_answers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let answers take time, few of them nearly as much as many."""
        for name, once, each in (("generate", 1.0, 0.06), ("choose", 0.2, 0.01)):
            monkeypatch.setattr(InProcessEngine, name, self._timed(getattr(InProcessEngine, name), once, each))

    def _timed(self, answer: Any, once: float, each: float) -> Any:
        def timed(engine: Any, requests: Any, *given: Any, **more: Any) -> Any:
            self.now += self.slowness * (once + each * len(requests))
            return answer(engine, requests, *given, **more)

        return timed


@pytest.mark.parametrize("slowness", [1.0, 3.0])
def test_a_slow_machine_gives_a_forecast_with_an_interval_within_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slowness: float
) -> None:
    project, clock = write_large(tmp_path / "p"), Slow(30.0)
    context = PipelineContext(project)
    clock.time_answers(monkeypatch)
    with pytest.raises(Refused, match="too short"):
        run_forecast(context, "tuned", budget=24.0, goal=None, days=30.0, clock=clock)
    clock.slowness = slowness  # what was measured while the machine was busier counts no more
    found = forecast_view(project.store, run_forecast(context, "tuned", budget=24.0, goal=None, days=30.0, clock=clock))
    assert found.seconds <= found.budget == 24.0
    assert found.score.low < found.score.median < found.score.high
    assert found.lift is not None
    assert sum(found.held.values()) == LEAST_ASKED
    assert len(found.subsets) == (1 if slowness == 3.0 else 4), "where time is short there are fewer"
    assert not found.complete


def test_a_machine_that_becomes_slow_trains_on_fewer_subsets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context, clock, plan = PipelineContext(write_large(tmp_path / "p")), Slow(1.0), pipeline_forecast.subset_plan
    clock.time_answers(monkeypatch)

    def slower_afterwards(*given: Any, **more: Any) -> tuple[list[int], int]:
        clock.slowness = 5.0
        return plan(*given, **more)

    monkeypatch.setattr(pipeline_forecast, "subset_plan", slower_afterwards)
    digest = run_forecast(context, "tuned", budget=60.0, goal=None, days=30.0, clock=clock)
    found = forecast_view(context.store, digest)
    assert len(found.subsets) == 2, "four were planned"
    assert found.seconds <= 60.0
    assert not found.complete
    assert found.score.low < found.score.high


def test_the_report_shows_the_forecast_next_to_what_came(project: Project, found: Forecast, tmp_path: Path) -> None:
    project.run()
    shown = report(project)
    assert shown.forecast is not None
    assert shown.forecast["name"] == found.name
    outcome = shown.forecast_outcome
    assert outcome is not None
    came = next(row for row in shown.candidates if row.name == "tuned").metrics["exact_match"].mean
    assert outcome["score_error"] == pytest.approx(came - found.score.median, abs=1e-6)
    assert outcome["seconds"] > 0
    trained = project.store.record(project.store.records_of("training")[-1], kind="training")
    assert trained.body["splits"] == ["train", "validation"], "test rows could not be read"
    report_page(shown, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert 'id="forecast"' in page
    assert "points from the forecast" in page
    forecast_page(found, tmp_path / "forecast.html")
    assert "<svg" in (tmp_path / "forecast.html").read_text()


def _command(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    done = CliRunner().invoke(app, ["forecast", "-C", str(folder), "--json", *arguments])
    if isinstance(done.exception, TunesmithError):
        return done.exception.exit_code, done.exception.as_json()
    return done.exit_code, json.loads(done.stdout)


def test_exit_codes_say_the_decision(project: Project, found: Forecast) -> None:
    code, document = _command(project.root, "--budget", "10m")
    assert (code, document["decision"]) == (3, "don't")
    assert document == found.document()
    code, document = _command(project.root, "--budget", "never")
    assert (code, document["error"]["where"]) == (2, "--budget")
    code, document = _command(project.root, "--output", str(project.root))
    assert (code, document["error"]["where"]) == (2, "--output")


@pytest.mark.usefixtures("found")
def test_the_table_shows_the_numbers_of_the_sentences(
    project: Project, found: Forecast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.04% is 0.1% in both, and not 0.0% in one of them."""
    little = found.model_copy(update={"score": Expected(median=0.0004, low=0.0, high=0.9997)})
    monkeypatch.setattr("tunesmith.services.runs.forecast.forecast", lambda *_given, **_more: little)
    shown = CliRunner().invoke(app, ["forecast", "-C", str(project.root)]).stdout
    assert shown.startswith(f"up to {sum(found.held.values())} held-out rows"), "plain was asked fewer than nearest"
    (line,) = (line for line in shown.splitlines() if "forecast for all" in line)
    assert [cell.strip() for cell in line.split("│")[2:4]] == ["0.1%", "0% to 99.9%"]


def test_too_few_rows_are_inconclusive(tmp_path: Path) -> None:
    code, document = _command(write_large(tmp_path / "p", copies=0).root)
    assert code == 4
    assert "too few" in document["error"]["what"]


@pytest.mark.usefixtures("found")
def test_a_budget_that_is_too_short_is_refused_with_what_is_needed(project: Project) -> None:
    with pytest.raises(Refused, match="too short") as caught:
        forecast(project, budget=0.05)
    assert "set it to" in str(caught.value.fix)


def test_a_budget_of_which_the_first_steps_take_too_much_is_refused_with_what_is_needed(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*_: object, **__: object) -> None:
        raise BudgetTooShort("the budget is too short", least=300.0, fix="")

    monkeypatch.setattr(training_module, "run_training", slow)
    with pytest.raises(Refused, match="four steps on 12 rows take 5 min 0 s") as caught:
        forecast(project, budget=300.0)
    assert str(caught.value.fix) == "set it to 3750s or more", "a tenth of which is a quarter more than five minutes"


def test_a_judge_as_the_primary_metric_is_refused_before_anybody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = {"name": "quality", "judge": {"url": "http://127.0.0.1:9/v1", "model": "judge"}}
    project = write_large(tmp_path / "p", task={"scorers": [judge]}, gates={})
    monkeypatch.setattr("tunesmith.pipeline.forecast.ask_held_out", None)
    with pytest.raises(UsageError, match="quality is a judge") as caught:
        forecast(project, budget=BUDGET)
    assert (caught.value.where, caught.value.fix) == ("task.primary", "name a scorer that is no judge")


def test_models_trained_in_full_leave_memory_once_they_have_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, load = list[int](), InProcessEngine.load_adapter

    def watched(engine: Any, name: str, folder: Path) -> None:
        load(engine, name, folder)
        held.append(len(engine._whole))

    monkeypatch.setattr(InProcessEngine, "load_adapter", watched)
    train = {"method": "full", "epochs": 1}
    candidates = {"tuned": {"prompt": "prompt.txt", "train": train, "max_tokens": 8}}
    found = forecast(write_large(tmp_path / "p", candidates=candidates, gates={}), budget=BUDGET)
    assert len(found.subsets) > 1
    assert held == [1] * len(found.subsets)


def test_a_score_that_is_no_number_is_inconclusive(tmp_path: Path) -> None:
    project = write_large(tmp_path / "p", value="float('nan')")
    with pytest.raises(Inconclusive, match="nan"):
        forecast(project, budget=BUDGET)
    assert not project.store.records_of("forecast")


def test_a_loss_that_is_not_finite_is_inconclusive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a training whose last step ruined the weights."""
    project = write_large(tmp_path / "p")
    monkeypatch.setattr(InProcessEngine, "choose", lambda _engine, asked, *_given: [[float("nan")] for _ in asked])
    with pytest.raises(Inconclusive, match="expected answer is nan") as caught:
        forecast(project, budget=BUDGET)
    assert "learning_rate" in str(caught.value.fix)
    assert not project.store.records_of("forecast")


def test_a_damaged_part_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "parts" / "12-rows.json"
    for damaged in (b"", b'{"scores": [0.5', b"\xff"):
        assert held_out.kept(path, lambda: {"scores": [0.5]}) == {"scores": [0.5]}
        assert held_out.kept(path, dict) == {"scores": [0.5]}, "what is whole is kept"
        path.write_bytes(damaged)
    assert held_out.kept(path, lambda: {"scores": [1.0]}) == {"scores": [1.0]}


def test_a_score_of_one_from_the_start_leaves_nothing_to_gain(tmp_path: Path) -> None:
    found = forecast(write_large(tmp_path / "p", value="1.0"), budget=BUDGET, goal=0.02)
    assert found.rivals["plain"] == 1.0
    assert found.decision == "don't"
    assert found.needed is not None
    assert found.needed.median is None
    assert found.score.low < found.score.high


def test_a_flat_score_has_an_interval_and_is_not_expected_to_pay(tmp_path: Path) -> None:
    found = forecast(write_large(tmp_path / "p", value="0.5"), budget=BUDGET, goal=0.2)
    assert found.score.low < 0.5 < found.score.high
    assert found.decision != "train"


def test_a_goal_is_a_number(project: Project) -> None:
    with pytest.raises(UsageError, match="from -1 to 1, not nan"):
        forecast(project, budget=BUDGET, goal=float("nan"))


def test_only_a_trained_candidate_is_forecast(project: Project) -> None:
    for name, what in (("nearest", "nothing to forecast"), ("missing", "no candidate")):
        with pytest.raises(UsageError, match=what):
            forecast(project, name, budget=BUDGET)


@pytest.mark.usefixtures("found")
def test_a_row_is_asked_of_a_baseline_that_did_not_learn_its_group(project: Project) -> None:
    context = PipelineContext(project)
    store: Store = project.store
    body = store.record(curve(context, "tuned", BUDGET)).body
    assert body["untuned"]["nearest"]["mean"] < 0.95, "it would find the row itself"
