"""`tunesmith data`: build dataset versions, inspect them, verify them, sign them off."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tunesmith import services
from tunesmith.cli import data_tables
from tunesmith.cli.terminal import Acting, Here, NotNegative, Positive, Terminal, add_commands, add_group, printed_text
from tunesmith.core.digests import short
from tunesmith.core.system.files import write_atomic

_Newest = Annotated[str | None, typer.Argument(help="A dataset version's digest or its start; by default the newest.")]
_Version = Annotated[str, typer.Argument(help="A dataset version's digest or its start.")]
_Output = Annotated[Path | None, typer.Option(help="Write it to this file instead.")]


def register(app: typer.Typer) -> None:
    """Add the `data` commands."""
    group = add_group(app, "data", "Build and inspect dataset versions.")
    add_commands(
        group, build, show, verify, originals, diff, removed, datasheet, croissant, sign, quality, list=list_datasets
    )


def build(here: Here, *, engine: Literal["local", "ray"] = "local") -> None:
    """Read, check, clean, split and freeze the project's sources.

    engine: What reads the rows. The dataset is the same.
    """
    here.emit(services.datasets.build(here.project, engine=engine, progress=Terminal()), data_tables.draw_summary)


def list_datasets(here: Here, *, page: Positive = 1) -> None:
    """List dataset versions, newest first, with the stewards who signed them off.

    page: 25 versions each.
    """
    here.emit(services.datasets.list_datasets(here.store, page), data_tables.draw_list)


def show(here: Here, dataset: _Newest = None, *, split: str = "train", limit: NotNegative = 10) -> None:
    """Show the summary of a dataset version and its first rows.

    split: train, validation, test or removed.
    limit: Rows to show; 0 shows all.
    """
    version = services.datasets.show(here.store, dataset, split=split, limit=limit)
    here.emit(version, lambda shown: [*data_tables.draw_summary(shown), *data_tables.draw_rows(shown)])


def verify(here: Here, dataset: _Newest = None) -> int:
    """Recompute a dataset version's digests, counts and leakage. Exit 3 on any difference from its record."""
    verification = services.datasets.verify(here.store, dataset)
    here.emit(verification, data_tables.draw_verification)
    return 0 if verification.ok else 3


def originals(here: Here, *, row: str | None = None, new_key: bool = False) -> None:
    """Show what pseudonyms stand for, if data.privacy.originals keeps it and you have the key.

    row ID: Only those of one example.
    new_key: Print a key for $TUNESMITH_ORIGINALS_KEY.
    """
    if new_key:
        made = services.datasets.new_originals_key()
        here.emit(made, made.key)
    else:
        here.emit(services.datasets.originals(here.project, row), data_tables.draw_originals)


def diff(here: Here, before: _Version, after: _Version) -> None:
    """Show what changed between two dataset versions: rows, splits, licences, balance."""
    here.emit(services.datasets.difference(here.store, before, after), data_tables.draw_difference)


def removed(here: Here, dataset: _Version, *, each: Positive = 5) -> None:
    """Show a sample of the rows that were left out, for each reason, read again from the sources.

    each: Rows of each reason.
    """
    here.emit(services.datasets.removed(here.store, dataset, here.directory, each), data_tables.draw_removed)


def datasheet(here: Here, dataset: _Version, *, output: _Output = None) -> None:
    """Write a datasheet in Markdown."""
    digest, text = services.datasets.datasheet(here.store, dataset, here.directory.absolute().name)
    _print_or_write(here, digest, "datasheet", text, output)


def croissant(here: Here, dataset: _Version, *, output: _Output = None) -> None:
    """Write Croissant 1.0 metadata (JSON-LD)."""
    digest, text = services.datasets.croissant(here.store, dataset, here.directory.absolute().name)
    _print_or_write(here, digest, "croissant", text, output)


def sign(here: Acting, dataset: _Version, *, reason: str) -> None:
    """Verify a dataset version and sign it off as its steward. The audit log records it.

    reason: What was looked at.
    """
    signed = here.do(services.datasets.sign)
    here.emit(signed, f"{signed.steward} signed off {short(signed.dataset)}")


def quality(
    here: Here,
    dataset: _Version,
    *,
    label_noise: Annotated[bool, typer.Option()] = False,
    language: Annotated[bool, typer.Option()] = False,
    names: Annotated[bool, typer.Option()] = False,
    alike: Annotated[bool, typer.Option()] = False,
    limit: NotNegative = 20,
) -> None:
    """Flag rows that a person should look at. Drops none. The store keeps the flags as a record.

    label_noise: Also look for wrong labels (extra: quality).
    language: Also look for other languages (extra: quality).
    names: Count people's names, by the scan's model (extra: privacy).
    alike: Find requests that say the same, by MiniLM (downloaded once).
    limit: Flags to show; 0 shows all.
    """
    here.emit(services.datasets.quality(here.store, **here.given, progress=Terminal()), data_tables.draw_quality)


def _print_or_write(here: Here, digest: str, what: str, text: str, output: Path | None) -> None:
    if output is not None:
        write_atomic(output, text.encode())
    shown = text if output is None else str(output)
    here.emit({"dataset": digest, what: shown}, printed_text(shown))
