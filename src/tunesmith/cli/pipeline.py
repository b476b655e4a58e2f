"""`run` and `train`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith import services
from tunesmith.cli import evaluation
from tunesmith.cli.jobs import draw_job
from tunesmith.cli.terminal import Acting, Drawn, Here, Positive, Terminal, add_commands, table
from tunesmith.core.errors import UsageError
from tunesmith.core.system.machine import started_by_torchrun
from tunesmith.core.text.wording import gigabytes

if TYPE_CHECKING:
    from tunesmith.pipeline.run import RunSummary, TrainingSummary
    from tunesmith.pipeline.training import Repeated
    from tunesmith.records.training import SettingsTrial
    from tunesmith.services.training import SettingsSearch


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_commands(app, run, train)


def run(
    here: Acting,
    *,
    queue: bool = False,
    priority: int = 0,
    key: str | None = None,
    changed: Annotated[list[str] | None, typer.Option("--set")] = None,
) -> int:
    """Run every stage up to a registered version. Skips what is unchanged and continues what was stopped.

    The run is a job: `tunesmith jobs` shows it while it goes on and afterwards.

    queue: Leave it to `tunesmith worker`, and return at once.
    priority: With --queue: higher ones are taken first.
    key: With --queue: the same key again gives the same job, not another one.
    changed NAME.KEY=VALUE: A training setting of candidate NAME for this run only: epochs, budget, learning_rate, rank,
        batch or seed.
    """
    changes = _changes(changed or ())
    if queue:
        here.show(services.jobs.add, draw_job, kind="run", changes=changes)
        return 0
    if priority or key is not None:
        raise UsageError("--priority and --key are for queued runs", fix="add --queue, or leave them out")
    done = services.training.run_here(here.project, changes=changes, progress=Terminal(), actor=here.actor)
    here.emit(done, _draw_run)
    return evaluation.EXITS[done.gate.verdict]


def _changes(given: Sequence[str]) -> dict[str, dict[str, str]]:
    """Changes from texts such as `tuned.epochs=2`. Raises UsageError for another form."""
    changes: dict[str, dict[str, str]] = {}
    for text in given:
        place, is_there, value = text.partition("=")
        name, _, key = place.rpartition(".")
        if not (is_there and name and key):
            raise UsageError(f"{text[:80]!r} changes no setting", where="--set", fix="write NAME.KEY=VALUE")
        changes.setdefault(name, {})[key] = value
    return changes


def train(
    here: Here,
    candidate: str | None = None,
    *,
    restart: bool = False,
    repeat: bool = False,
    search: bool = False,
    trials: int | None = None,
    within: str | None = None,
    copies: Positive = 1,
) -> int:
    """Train a candidate's adapter. Continues from the newest complete checkpoint. `torchrun --nproc-per-node N -m
    tunesmith train NAME` trains it on N processes together.

    candidate: Its name; by default the only one that is trained.
    restart: Train again from the start.
    repeat: Only train again as its record says, and compare the weights' bytes.
    search: Only search for better training settings on validation rows.
    trials: How many settings --search tries; 12 by default.
    within TIME: After that --search begins no further trial.
    copies: Copies of the model that torchrun's processes hold (HSDP).
    """
    _check_train_options(restart, repeat, search, limited=trials is not None or within is not None)
    training, progress = services.training, Terminal()
    if started_by_torchrun():
        made = training.train_together(
            lambda: here.project, candidate, copies=copies, restart=restart, progress=progress
        )
        if made is not None:
            here.emit(made, _draw_training)
    elif copies > 1:
        fix = "leave it out, or use torchrun"
        raise UsageError("one process holds one copy of the model", where="--copies", fix=fix)
    elif search:
        number = training.TRIALS if trials is None else trials
        result = training.search_settings(here.project, candidate, trials=number, within=within, progress=progress)
        here.emit(result, _draw_search)
    elif repeat:
        done = training.repeat(here.project, candidate, progress=progress)
        here.emit(done, _draw_repeated)
        return 0 if done.same else 1
    else:
        here.emit(training.train(here.project, candidate, restart=restart, progress=progress), _draw_training)
    return 0


def _check_train_options(restart: bool, repeat: bool, search: bool, *, limited: bool) -> None:
    """Raise UsageError for options of `train` that exclude each other. limited: --trials or --within is given."""
    only = [name for name, given in (("--search", search), ("--repeat", repeat)) if given]
    if only and started_by_torchrun():
        raise UsageError(f"{only[0]} runs in one process", fix="start it without torchrun")
    if len(only) > 1:
        raise UsageError(f"{only[0]} and {only[1]} exclude each other", fix=f"run one after the other: {only[0]} first")
    if limited and not search:
        raise UsageError("--trials and --within are for --search", fix="add --search, or leave them out")
    if restart and search:
        raise UsageError(
            "a search cannot be restarted: a finished one is looked up, a stopped one goes on",
            fix="leave --restart out; another --trials searches again",
        )
    if restart and only:
        raise UsageError(f"{only[0]} keeps nothing that could be restarted", fix="leave --restart out")


def _draw_training(done: TrainingSummary) -> Drawn:
    expected = done.estimate
    checkpoint, expected_checkpoint = done.checkpoint_bytes / 1e6, expected.checkpoint_bytes / 1e6
    rows = [
        ("rows, epochs, steps", f"{done.rows}, {done.epochs:.2f}, {done.steps}"),
        *([("rehearsed", f"{done.rehearsed} answers of the base")] if done.rehearsed else []),
        ("final loss", f"{done.final_loss:.4f}"),
        *_validated(done),
        ("took", f"{done.seconds:.0f} s (expected {expected.seconds:.0f} s)"),
        ("speed", f"{done.examples_per_second:.1f} examples/s, {done.tokens_per_second:.0f} tokens/s"),
        ("peak memory", f"{gigabytes(done.peak_memory_bytes)} (expected {gigabytes(expected.peak_memory_bytes)})"),
        ("checkpoint", f"{checkpoint:.0f} MB (expected {expected_checkpoint:.0f} MB)"),
        *(("notice", each) for each in done.notices),
        ("adapter", done.adapter),
        ("record", done.training),
    ]
    yield table(rows, title="training")


def _validated(done: TrainingSummary) -> Iterator[tuple[str, str]]:
    """The kept weights' score on validation rows, why the training ended where it did, what more time would bring."""
    if done.score is not None:
        kept = next((each.score for each in done.validation if each.step == done.kept), None)
        value = "none" if kept is None else f"{kept:.1%}"
        yield f"validation {done.score.metric}", f"{value} over {done.score.rows} rows"
    if done.decisions is not None and done.decisions.decays:
        yield "ended because", done.decisions.decays[-1].reason
    if done.more_time is not None:
        yield "more time", done.more_time


def _draw_repeated(done: Repeated) -> Drawn:
    said = "the same bytes" if done.same else "other bytes: another machine, library or number of threads?"
    yield table((("steps", str(done.steps)), ("weights", said), ("record", done.training)), title="repeated")


def _draw_search(search: SettingsSearch) -> Drawn:
    import yaml

    keys, scored = list(search.trials[0].settings), search.scored_rows > 0
    names = (key.replace("learning_", "learning_\n") for key in keys)  # so that 80 columns suffice
    headings = ("#", *names, "outcome", *([search.metric] if scored else []), "probability")
    # Complete trials first, the best ones at the top.
    ordered = sorted(
        search.trials, key=lambda each: (each.outcome, -(each.score or 0.0), -(each.probability or 0.0), each.number)
    )
    title = f"settings of {search.candidate}, on {search.validation_rows} validation rows"
    yield table([_trial_row(each, keys, scored) for each in ordered], *headings, title=title)
    best = f", and trial {search.best} those that did best" if search.best else ""
    yield f"trial 0 has the present settings{best}"
    for trial in ordered:
        if trial.why:
            yield f"trial {trial.number}: {trial.why}"
    why = "" if search.unscored is None else f": {search.unscored}"
    yield f"compared by {search.compared_by}{why}"
    yield f"record {search.search}\n"
    yield search.conclusion
    if search.suggestion is not None:
        text = yaml.safe_dump({"train": search.suggestion}, sort_keys=False, default_flow_style=None)
        yield f"\ncandidates.{search.candidate} in tunesmith.yaml, beside its other settings:\n{text}"


def _trial_row(trial: SettingsTrial, keys: list[str], scored: bool) -> list[str]:
    """A trial's line: its settings, and how it did; of one that was pruned its last probability. Few rows are scored,
    so that tenths of points would say nothing."""
    values = [str(trial.number), *(f"{trial.settings[key]:g}" for key in keys), trial.outcome]
    probability = trial.probability if trial.probability is not None else next(reversed(trial.reports), None)
    score = [] if not scored else ["" if trial.score is None else f"{trial.score:.0%}"]
    return [*values, *score, "" if probability is None else f"{probability:.4f}"]


def _draw_run(done: RunSummary) -> Drawn:
    yield from evaluation.draw_evaluation(done.evaluate)
    yield from evaluation.draw_verdict(done.gate)
    if done.registered is None:
        yield "nothing was registered; `tunesmith report` says why and what to do"
        return
    label = done.registered.version
    yield f"registered {label}\n"
    yield "next:"
    for command, why in (
        ("tunesmith report --output report.html", "the evidence on one page"),
        (f"tunesmith verify {label}", "recompute its whole lineage"),
        ("tunesmith users add ada --role approver", "the one who registered a version may not approve it"),
        (f"tunesmith approve {label} --as ada", "after reading the report"),
        (f"tunesmith rollout start {label}", "move traffic to it step by step"),
        ("tunesmith serve", "an OpenAI-compatible endpoint"),
    ):
        yield f"  {command:<52} {why}"
