"""`tunesmith data`: build dataset versions, inspect them, verify them, sign them off."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tunesmith.cli import data_tables
from tunesmith.cli.terminal import Acting, Here, Terminal, add_commands, printed, printed_text

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.services.datasets import ShownDataset

_Newest = Annotated[str | None, typer.Argument(help="A dataset version's digest or its start; by default the newest.")]
_Version = Annotated[str, typer.Argument(help="A dataset version's digest or its start.")]
_Output = Annotated[Path | None, typer.Option(help="Write it to this file instead.")]


def register(app: typer.Typer) -> None:
    """Add the `data` commands."""
    data = typer.Typer(help="Build and inspect dataset versions.", no_args_is_help=True)
    add_commands(
        data, build, show, verify, originals, diff, removed, datasheet, croissant, sign, quality, list=list_datasets
    )
    app.add_typer(data, name="data")


def build(
    here: Here,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="What reads the rows. The dataset is the same.")
    ] = "local",
) -> None:
    """Read, check, clean, split and freeze the project's sources."""
    from tunesmith.services import datasets

    shards = None
    if engine == "ray":
        from tunesmith.data.building.ray_runner import RayRunner

        shards = RayRunner()
    built = datasets.build(here.project, progress=Terminal(), shards=shards)
    here.emit(built, data_tables.draw_summary)


def list_datasets(here: Here, page: Annotated[int, typer.Option(min=1, help="25 versions each.")] = 1) -> None:
    """List dataset versions, newest first, with the stewards who signed them off."""
    from tunesmith.services import datasets

    here.emit(datasets.list_datasets(here.store, page), data_tables.draw_list)


def show(
    here: Here,
    dataset: _Newest = None,
    split: Annotated[str, typer.Option(help="train, validation, test or removed.")] = "train",
    limit: Annotated[int, typer.Option(min=0, help="Rows to show; 0 shows all.")] = 10,
) -> None:
    """Show the summary of a dataset version and its first rows."""
    from tunesmith.services import datasets

    def draw(console: Console, found: ShownDataset) -> None:
        data_tables.draw_summary(console, found)
        data_tables.draw_rows(console, found)

    here.emit(datasets.show(here.store, dataset, split=split, limit=limit), draw)


def verify(here: Here, dataset: _Newest = None) -> None:
    """Recompute a dataset version's digests, counts and leakage. Exit 3 on any difference from its record."""
    from tunesmith.services import datasets

    found = datasets.verify(here.store, dataset)
    here.emit(found, data_tables.draw_verification)
    raise typer.Exit(0 if found.ok else 3)


def originals(
    here: Here,
    row: Annotated[str | None, typer.Option("--row", metavar="ID", help="Only those of one example.")] = None,
    new_key: Annotated[bool, typer.Option("--new-key", help="Print a key for $TUNESMITH_ORIGINALS_KEY.")] = False,
) -> None:
    """Show what pseudonyms stand for, if data.privacy.originals keeps it and you have the key."""
    from tunesmith.data.privacy.originals import new_key as make_key
    from tunesmith.services import datasets

    if new_key:
        key = make_key()
        here.emit({"key": key}, printed(key))
        return
    here.emit(datasets.originals(here.project, row), data_tables.draw_originals)


def diff(here: Here, before: _Version, after: _Version) -> None:
    """Show what changed between two dataset versions: rows, splits, licences, balance."""
    from tunesmith.services import datasets

    here.emit(datasets.difference(here.store, before, after), data_tables.draw_difference)


def removed(
    here: Here, dataset: _Version, each: Annotated[int, typer.Option(min=1, help="Rows of each reason.")] = 5
) -> None:
    """Show a sample of the rows that were left out, for each reason, read again from the sources."""
    from tunesmith.services import datasets

    here.emit(datasets.removed(here.store, dataset, here.directory, each), data_tables.draw_removed)


def datasheet(here: Here, dataset: _Version, output: _Output = None) -> None:
    """Write a datasheet in Markdown."""
    from tunesmith.services import datasets

    digest, text = datasets.datasheet(here.store, dataset, here.directory.absolute().name)
    _print_or_write(here, digest, "datasheet", text, output)


def croissant(here: Here, dataset: _Version, output: _Output = None) -> None:
    """Write Croissant 1.0 metadata (JSON-LD)."""
    from tunesmith.services import datasets

    digest, text = datasets.croissant(here.store, dataset, here.directory.absolute().name)
    _print_or_write(here, digest, "croissant", text, output)


def sign(here: Acting, dataset: _Version, reason: Annotated[str, typer.Option(help="What was looked at.")]) -> None:
    """Verify a dataset version and sign it off as its steward. The audit log records it."""
    from tunesmith.core.digests import short
    from tunesmith.services import datasets

    signed = here.do(datasets.sign, dataset=dataset, reason=reason)
    here.emit(signed, printed(f"{signed.steward} signed off {short(signed.dataset)}"))


def quality(
    here: Here,
    dataset: _Version,
    label_noise: Annotated[bool, typer.Option(help="Also look for wrong labels (extra: quality).")] = False,
    language: Annotated[bool, typer.Option(help="Also look for other languages (extra: quality).")] = False,
    names: Annotated[bool, typer.Option(help="Count people's names, by the scan's model (extra: privacy).")] = False,
    alike: Annotated[bool, typer.Option(help="Find requests that say the same, by MiniLM (downloaded once).")] = False,
    limit: Annotated[int, typer.Option(min=0, help="Flags to show; 0 shows all.")] = 20,
) -> None:
    """Flag rows that a person should look at. Drops none. The store keeps the flags as a record."""
    from tunesmith.services import datasets

    found = datasets.quality(
        here.store,
        dataset,
        label_noise=label_noise,
        language=language,
        names=names,
        alike=alike,
        limit=limit,
        progress=Terminal(),
    )
    here.emit(found, data_tables.draw_quality)


def _print_or_write(here: Here, digest: str, what: str, text: str, output: Path | None) -> None:
    from tunesmith.core.system.files import write_atomic

    if output is not None:
        write_atomic(output, text.encode())
    shown = text if output is None else str(output)
    here.emit({"dataset": digest, what: shown}, printed_text(shown))
