"""`run` and `train`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.terminal import HERE, As, Directory, Json, Terminal, emit

if TYPE_CHECKING:
    from rich.console import Console

_HEIGHT = 9  # lines of a curve
_EXITS = {"pass": 0, "fail": 3, "inconclusive": 4}


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command()(run)
    app.command()(train)


def run(directory: Directory = HERE, as_json: Json = False, actor: As = None) -> None:
    """Run the whole chain up to a registered version; skips what is unchanged, carries on where it was stopped."""
    from tunesmith.api import Project

    document = Project.load(directory).run(Terminal(), actor)
    emit(document, as_json, lambda console, _: _show_run(console, document))
    raise typer.Exit(_EXITS[document["gate"]["verdict"]])


def train(
    candidate: Annotated[str | None, typer.Argument(help="Its name; by default the only one that is trained.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Train again from the start.")] = False,
    find_rate: Annotated[
        bool, typer.Option("--find-rate", help="Only try 40 steps at rising rates, and say which to train at.")
    ] = False,
    directory: Directory = HERE,
    as_json: Json = False,
) -> None:
    """Train a candidate's adapter; carries on from the newest whole checkpoint."""
    from tunesmith import pipeline
    from tunesmith.core.errors import UsageError
    from tunesmith.project import open_project

    if find_rate and restart:
        raise UsageError("--find-rate keeps nothing that could be begun again", fix="leave --restart out")
    if find_rate:
        found = pipeline.find_rate(open_project(directory), Terminal(), candidate)
        emit(found, as_json, lambda console, _: _show_rates(console, found))
        return
    project = open_project(directory)
    document = pipeline.training_document(project, pipeline.train(project, Terminal(), candidate, restart))
    emit(document, as_json, lambda console, _: _show_training(console, document))


def _show_training(console: Console, document: Mapping[str, Any]) -> None:
    from rich.table import Table

    expected = document["estimate"]
    table = Table(title="training", show_header=False)
    for name, value in (
        ("rows, steps", f"{document['rows']}, {document['steps']}"),
        ("final loss", f"{document['final_loss']:.4f}"),
        ("took", f"{document['seconds']:.0f} s (expected {expected['seconds']:.0f} s)"),
        ("speed", f"{document['examples_per_second']:.1f} examples/s, {document['tokens_per_second']:.0f} tokens/s"),
        (
            "peak memory",
            f"{document['peak_memory_bytes'] / 1e9:.2f} GB (expected {expected['peak_memory_bytes'] / 1e9:.2f} GB)",
        ),
        *_checkpoint(document),
        ("adapter", document["adapter"]),
        ("record", document["training"]),
    ):
        table.add_row(name, value)
    console.print(table)


def _checkpoint(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Nothing of a training that was kept before this was written down."""
    if "checkpoint_bytes" in document:
        expected = document["estimate"]["checkpoint_bytes"]
        yield "checkpoint", f"{document['checkpoint_bytes'] / 1e6:.0f} MB (expected {expected / 1e6:.0f} MB)"


def _show_rates(console: Console, document: Mapping[str, Any]) -> None:
    rates, smoothed, suggestion = document["rates"], document["smoothed"], document["suggestion"]
    high, low = max(smoothed), min(smoothed)
    # A column a step: the mark stands in the line of its loss, the highest on top.
    lines = [round((high - loss) / ((high - low) or 1.0) * (_HEIGHT - 1)) for loss in smoothed]
    console.print("smoothed loss by learning rate")
    for line in range(_HEIGHT):
        marks = "".join("*" if place == line else " " for place in lines)
        console.print(f"{high - (high - low) * line / (_HEIGHT - 1):8.3f} |{marks}".rstrip(), markup=False)
    console.print(f"{'':9}{rates[0]:.0e}{f'{rates[-1]:.0e}':>{max(6, len(rates) - 4)}}\n")
    if suggestion is None:
        console.print("no rate made the loss fall: look at the rows (`tunesmith data`), not at the rate")
        return
    console.print(f"train.learning_rate: {suggestion:.1e}   ({document['rule']})", markup=False)


def _show_run(console: Console, document: Mapping[str, Any]) -> None:
    from tunesmith.cli.evaluation import show_evaluation, show_verdict

    show_evaluation(console, document["evaluate"])
    show_verdict(console, document["gate"])
    registered = document.get("register")
    if registered is None:
        console.print("nothing was registered; `tunesmith report` says why and what to do")
        return
    label = registered["version"]
    console.print(f"registered {label}\n")
    console.print("next:")
    for command, why in (
        ("tunesmith report --output report.html", "the evidence on one page"),
        (f"tunesmith verify {label}", "recompute its whole lineage"),
        ("tunesmith users add ada --role approver", "whoever registered a version may not approve it"),
        (f"tunesmith approve {label} --as ada", "after reading the report"),
        (f"tunesmith rollout start {label}", "move traffic to it step by step"),
        ("tunesmith serve", "an OpenAI-compatible endpoint"),
    ):
        console.print(f"  {command:<52} {why}", soft_wrap=True, markup=False)
