"""`run` and `train`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.terminal import Acting, Here, Terminal, add_commands, draw_table

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.services.training import Repeated, RunSummary, TrainingSummary
    from tunesmith.training.range_test import RateSearch

_HEIGHT = 9  # lines of a curve


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_commands(app, run, train)


def run(here: Acting) -> None:
    """Run every stage up to a registered version. Skips what is unchanged and continues what was stopped."""
    from tunesmith.cli.evaluation import EXITS
    from tunesmith.services import training

    done = training.run(here.project, progress=Terminal(), actor=here.actor)
    here.emit(done, _draw_run)
    raise typer.Exit(EXITS[done.gate.verdict])


def train(
    here: Here,
    candidate: Annotated[str | None, typer.Argument(help="Its name; by default the only one that is trained.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Train again from the start.")] = False,
    find_rate: Annotated[
        bool, typer.Option("--find-rate", help="Only try 40 steps at rising learning rates, and suggest one.")
    ] = False,
    repeat: Annotated[
        bool, typer.Option("--repeat", help="Only train again as its record says, and compare the weights' bytes.")
    ] = False,
) -> None:
    """Train a candidate's adapter. Continues from the newest complete checkpoint."""
    from tunesmith.core.errors import UsageError
    from tunesmith.services import training

    if restart and (find_rate or repeat):
        which = "--find-rate" if find_rate else "--repeat"
        raise UsageError(f"{which} keeps nothing that could be restarted", fix="leave --restart out")
    project = here.project
    if repeat:
        done = training.repeat(project, candidate, progress=Terminal())
        here.emit(done, _draw_repeated)
        raise typer.Exit(0 if done.same else 1)
    if find_rate:
        here.emit(training.find_rate(project, candidate, progress=Terminal()), _draw_rates)
        return
    here.emit(training.train(project, candidate, restart=restart, progress=Terminal()), _draw_training)


def _draw_training(console: Console, done: TrainingSummary) -> None:
    expected = done.estimate
    memory, expected_memory = done.peak_memory_bytes / 1e9, expected.peak_memory_bytes / 1e9
    checkpoint, expected_checkpoint = done.checkpoint_bytes / 1e6, expected.checkpoint_bytes / 1e6
    rows = (
        ("rows, epochs, steps", f"{done.rows}, {done.epochs:.2f}, {done.steps}"),
        ("final loss", f"{done.final_loss:.4f}"),
        *_validated(done),
        ("took", f"{done.seconds:.0f} s (expected {expected.seconds:.0f} s)"),
        ("speed", f"{done.examples_per_second:.1f} examples/s, {done.tokens_per_second:.0f} tokens/s"),
        ("peak memory", f"{memory:.2f} GB (expected {expected_memory:.2f} GB)"),
        ("checkpoint", f"{checkpoint:.0f} MB (expected {expected_checkpoint:.0f} MB)"),
        ("adapter", done.adapter),
        ("record", done.training),
    )
    draw_table(console, rows, title="training")


def _validated(done: TrainingSummary) -> list[tuple[str, str]]:
    """The kept weights' score on validation rows, why the training ended where it did, what more time would bring."""
    found = []
    if done.score is not None:
        kept = next((each for each in done.validation if each["step"] == done.kept), None)
        value = "none" if kept is None else f"{kept['score']:.1%}"
        found.append((f"validation {done.score['metric']}", f"{value} over {done.score['rows']} rows"))
    if done.decisions is not None and done.decisions["decays"]:
        found.append(("ended because", done.decisions["decays"][-1]["reason"]))
    if done.more_time is not None:
        found.append(("more time", done.more_time["text"]))
    return found


def _draw_repeated(console: Console, done: Repeated) -> None:
    said = "the same bytes" if done.same else "other bytes: another machine, library or number of threads?"
    draw_table(console, (("steps", str(done.steps)), ("weights", said), ("record", done.training)), title="repeated")


def _draw_rates(console: Console, found: RateSearch) -> None:
    high, low = max(found.smoothed), min(found.smoothed)
    # A column for each step: its mark is in the line of its loss, the highest loss at the top.
    lines = [round((high - loss) / ((high - low) or 1.0) * (_HEIGHT - 1)) for loss in found.smoothed]
    console.print("smoothed loss by learning rate")
    for line in range(_HEIGHT):
        marks = "".join("*" if place == line else " " for place in lines)
        console.print(f"{high - (high - low) * line / (_HEIGHT - 1):8.3f} |{marks}".rstrip())
    console.print(f"{'':9}{found.rates[0]:.0e}{f'{found.rates[-1]:.0e}':>{max(6, len(found.rates) - 4)}}\n")
    if found.suggestion is None:
        console.print("no rate made the loss fall: look at the rows (`tunesmith data`), not at the rate")
        return
    console.print(f"train.learning_rate: {found.suggestion:.1e}   ({found.rule})")


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
