"""`run` and `train`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.terminal import Acting, Here, Terminal, add_commands, draw_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from tunesmith.records.search import SettingsTrial
    from tunesmith.services.training import Repeated, RunSummary, SettingsSearch, TrainingSummary


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_commands(app, run, train)


def run(
    here: Acting,
    queue: Annotated[bool, typer.Option("--queue", help="Leave it to `tunesmith worker`, and return at once.")] = False,
    priority: Annotated[int, typer.Option("--priority", help="With --queue: higher ones are taken first.")] = 0,
    key: Annotated[
        str | None, typer.Option("--key", help="With --queue: the same key again gives the same job, not another one.")
    ] = None,
    changed: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME.KEY=VALUE",
            help="A training setting of candidate NAME for this run only: epochs, budget, learning_rate, rank, batch "
            "or seed.",
        ),
    ] = None,
) -> None:
    """Run every stage up to a registered version. Skips what is unchanged and continues what was stopped.

    The run is a job: `tunesmith jobs` shows it while it goes on and afterwards.
    """
    from tunesmith.cli.evaluation import EXITS
    from tunesmith.core.errors import UsageError
    from tunesmith.services import jobs, worker

    changes = _changes(changed or ())
    if queue:
        from tunesmith.cli.jobs import draw_job

        here.emit(here.do(jobs.add, kind="run", changes=changes, priority=priority, key=key), draw_job)
        return
    if priority or key is not None:
        raise UsageError("--priority and --key are for queued runs", fix="add --queue, or leave them out")
    done = worker.run_here(here.project, changes=changes, progress=Terminal(), actor=here.actor)
    here.emit(done, _draw_run)
    raise typer.Exit(EXITS[done.gate.verdict])


def _changes(given: Sequence[str]) -> dict[str, dict[str, str]]:
    """Changes from texts such as `tuned.epochs=2`. Raises UsageError for another form."""
    from tunesmith.core.errors import UsageError

    found: dict[str, dict[str, str]] = {}
    for text in given:
        place, is_there, value = text.partition("=")
        name, _, key = place.rpartition(".")
        if not (is_there and name and key):
            raise UsageError(f"{text[:80]!r} changes no setting", where="--set", fix="write NAME.KEY=VALUE")
        found.setdefault(name, {})[key] = value
    return found


def train(
    here: Here,
    candidate: Annotated[str | None, typer.Argument(help="Its name; by default the only one that is trained.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Train again from the start.")] = False,
    repeat: Annotated[
        bool, typer.Option("--repeat", help="Only train again as its record says, and compare the weights' bytes.")
    ] = False,
    search: Annotated[
        bool, typer.Option("--search", help="Only search for better training settings on validation rows.")
    ] = False,
    trials: Annotated[
        int | None, typer.Option("--trials", help="How many settings --search tries; 12 by default.")
    ] = None,
    within: Annotated[
        str | None, typer.Option("--within", metavar="TIME", help="After that --search begins no further trial.")
    ] = None,
    copies: Annotated[
        int, typer.Option("--copies", min=1, help="Copies of the model that torchrun's processes hold (HSDP).")
    ] = 1,
) -> None:
    """Train a candidate's adapter. Continues from the newest complete checkpoint. `torchrun --nproc-per-node N -m
    tunesmith train NAME` trains it on N processes together."""
    from tunesmith.core.errors import UsageError
    from tunesmith.core.system.machine import started_by_torchrun
    from tunesmith.services import training

    _check_train_options(restart, repeat, search, limited=trials is not None or within is not None)
    if copies > 1 and not started_by_torchrun():
        raise UsageError(
            "one process holds one copy of the model", where="--copies", fix="leave it out, or use torchrun"
        )
    if started_by_torchrun():
        made = training.train_together(
            lambda: here.project, candidate, copies=copies, restart=restart, progress=Terminal()
        )
        if made is not None:
            here.emit(made, _draw_training)
        return
    project = here.project
    if search:
        number = training.TRIALS if trials is None else trials
        found = training.search_settings(project, candidate, trials=number, within=within, progress=Terminal())
        here.emit(found, _draw_search)
        return
    if repeat:
        done = training.repeat(project, candidate, progress=Terminal())
        here.emit(done, _draw_repeated)
        raise typer.Exit(0 if done.same else 1)
    here.emit(training.train(project, candidate, restart=restart, progress=Terminal()), _draw_training)


def _check_train_options(restart: bool, repeat: bool, search: bool, *, limited: bool) -> None:
    """Raise UsageError for options of `train` that exclude each other. limited: --trials or --within is given."""
    from tunesmith.core.errors import UsageError
    from tunesmith.core.system.machine import started_by_torchrun

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


def _draw_training(console: Console, done: TrainingSummary) -> None:
    expected = done.estimate
    memory, expected_memory = done.peak_memory_bytes / 1e9, expected.peak_memory_bytes / 1e9
    checkpoint, expected_checkpoint = done.checkpoint_bytes / 1e6, expected.checkpoint_bytes / 1e6
    rows = (
        ("rows, epochs, steps", f"{done.rows}, {done.epochs:.2f}, {done.steps}"),
        *([("rehearsed", f"{done.rehearsed} answers of the base")] if done.rehearsed else []),
        ("final loss", f"{done.final_loss:.4f}"),
        *_validated(done),
        ("took", f"{done.seconds:.0f} s (expected {expected.seconds:.0f} s)"),
        ("speed", f"{done.examples_per_second:.1f} examples/s, {done.tokens_per_second:.0f} tokens/s"),
        ("peak memory", f"{memory:.2f} GB (expected {expected_memory:.2f} GB)"),
        ("checkpoint", f"{checkpoint:.0f} MB (expected {expected_checkpoint:.0f} MB)"),
        *(("notice", each) for each in done.notices),
        ("adapter", done.adapter),
        ("record", done.training),
    )
    draw_table(console, rows, title="training")


def _validated(done: TrainingSummary) -> list[tuple[str, str]]:
    """The kept weights' score on validation rows, why the training ended where it did, what more time would bring."""
    found = []
    if done.score is not None:
        kept = next((each for each in done.validation if each.step == done.kept), None)
        value = "none" if kept is None or kept.score is None else f"{kept.score:.1%}"
        found.append((f"validation {done.score.metric}", f"{value} over {done.score.rows} rows"))
    if done.decisions is not None and done.decisions.decays:
        found.append(("ended because", done.decisions.decays[-1].reason))
    if done.more_time is not None:
        found.append(("more time", done.more_time.text))
    return found


def _draw_repeated(console: Console, done: Repeated) -> None:
    said = "the same bytes" if done.same else "other bytes: another machine, library or number of threads?"
    draw_table(console, (("steps", str(done.steps)), ("weights", said), ("record", done.training)), title="repeated")


def _draw_search(console: Console, found: SettingsSearch) -> None:
    import yaml

    from tunesmith.training.settings import PROBABILITY

    keys, scored = list(found.trials[0].settings), found.scored_rows > 0
    names = (key.replace("learning_", "learning_\n") for key in keys)  # so that 80 columns suffice
    headings = ("#", *names, "outcome", *([found.metric] if scored else []), "probability")
    # Complete trials first, the best ones at the top.
    ordered = sorted(
        found.trials, key=lambda each: (each.outcome, -(each.score or 0.0), -(each.probability or 0.0), each.number)
    )
    title = f"settings of {found.candidate}, on {found.validation_rows} validation rows"
    draw_table(console, [_trial_row(each, keys, scored) for each in ordered], *headings, title=title)
    best = f", and trial {found.best} those that did best" if found.best else ""
    console.print(f"trial 0 has the present settings{best}", soft_wrap=True)
    for trial in ordered:
        if trial.why:
            console.print(f"trial {trial.number}: {trial.why}", soft_wrap=True)
    why = "" if found.unscored is None else f": {found.unscored}"
    console.print(f"compared by {'the score' if found.by == 'score' else PROBABILITY}{why}", soft_wrap=True)
    console.print(f"record {found.search}\n", soft_wrap=True)
    console.print(found.conclusion, soft_wrap=True)
    if found.suggestion is not None:
        text = yaml.safe_dump({"train": found.suggestion}, sort_keys=False, default_flow_style=None)
        console.print(
            f"\ncandidates.{found.candidate} in tunesmith.yaml, beside its other settings:\n{text}", soft_wrap=True
        )


def _trial_row(trial: SettingsTrial, keys: list[str], scored: bool) -> list[str]:
    """A trial's line: its settings, and how it did; of one that was pruned its last probability. Few rows are scored,
    so that tenths of points would say nothing."""
    values = [str(trial.number), *(f"{trial.settings[key]:g}" for key in keys), trial.outcome]
    probability = trial.probability if trial.probability is not None else next(reversed(trial.reports), None)
    score = [] if not scored else ["" if trial.score is None else f"{trial.score:.0%}"]
    return [*values, *score, "" if probability is None else f"{probability:.4f}"]


def _draw_run(console: Console, done: RunSummary) -> None:
    from tunesmith.cli.evaluation import draw_evaluation, draw_verdict

    draw_evaluation(console, done.evaluate)
    draw_verdict(console, done.gate)
    if done.registered is None:
        console.print("nothing was registered; `tunesmith report` says why and what to do")
        return
    label = done.registered.version
    console.print(f"registered {label}\n")
    console.print("next:")
    for command, why in (
        ("tunesmith report --output report.html", "the evidence on one page"),
        (f"tunesmith verify {label}", "recompute its whole lineage"),
        ("tunesmith users add ada --role approver", "the one who registered a version may not approve it"),
        (f"tunesmith approve {label} --as ada", "after reading the report"),
        (f"tunesmith rollout start {label}", "move traffic to it step by step"),
        ("tunesmith serve", "an OpenAI-compatible endpoint"),
    ):
        console.print(f"  {command:<52} {why}", soft_wrap=True)
