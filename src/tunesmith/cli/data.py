"""`tunesmith data`: build dataset versions, inspect them, verify them, sign them off."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli import data_tables
from tunesmith.cli.terminal import HERE, As, Directory, Json, Terminal, emit, printed

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.services.data import ShownDataset

_Newest = Annotated[str | None, typer.Argument(help="A dataset version's digest or its start; by default the newest.")]
_Version = Annotated[str, typer.Argument(help="A dataset version's digest or its start.")]
_Output = Annotated[Path | None, typer.Option(help="Write it to this file instead.")]


def register(app: typer.Typer) -> None:
    """Add the `data` commands."""
    data = typer.Typer(help="Build and inspect dataset versions.", no_args_is_help=True)
    for command in (build, show, verify, originals, diff, removed, datasheet, croissant, sign, quality):
        data.command()(command)
    app.add_typer(data, name="data")


def build(
    engine: Annotated[str, typer.Option(help="What reads the rows: local or ray. The dataset is the same.")] = "local",
    directory: Directory = HERE,
    as_json: Json = False,
) -> None:
    """Read, check, clean, split and seal the project's sources."""
    from tunesmith.core.errors import UsageError
    from tunesmith.project import open_project
    from tunesmith.services import data

    if engine not in ("local", "ray"):
        raise UsageError(f"there is no engine {engine!r}", where="--engine", fix="local or ray")
    shards = None
    if engine == "ray":
        from tunesmith.data.building.ray_runner import RayRunner

        shards = RayRunner()
    built = data.build(open_project(directory), progress=Terminal(), shards=shards)
    emit(built, as_json, data_tables.draw_summary)


def show(
    dataset: _Newest = None,
    split: Annotated[str, typer.Option(help="train, validation, test or removed.")] = "train",
    limit: Annotated[int, typer.Option(min=0, help="Rows to show; 0 shows all.")] = 10,
    directory: Directory = HERE,
    as_json: Json = False,
) -> None:
    """Show the summary of a dataset version and its first rows."""
    from tunesmith.project import open_store
    from tunesmith.services import data

    def draw(console: Console, found: ShownDataset) -> None:
        data_tables.draw_summary(console, found)
        data_tables.draw_rows(console, found)

    emit(data.show(open_store(directory), dataset, split=split, limit=limit), as_json, draw)


def verify(dataset: _Newest = None, directory: Directory = HERE, as_json: Json = False) -> None:
    """Recompute a dataset version's digests, counts and leakage. Exit 3 on any difference from its record."""
    from tunesmith.project import open_store
    from tunesmith.services import data

    found = data.verify(open_store(directory), dataset)
    emit(found, as_json, data_tables.draw_verification)
    raise typer.Exit(0 if found.ok else 3)


def originals(
    row: Annotated[str | None, typer.Option("--row", metavar="ID", help="Only those of one example.")] = None,
    new_key: Annotated[bool, typer.Option("--new-key", help="Print a key for $TUNESMITH_ORIGINALS_KEY.")] = False,
    directory: Directory = HERE,
    as_json: Json = False,
) -> None:
    """Show what pseudonyms stand for, if data.privacy.originals keeps it and you have the key."""
    from tunesmith.data.privacy.originals import new_key as make_key
    from tunesmith.project import open_project
    from tunesmith.services import data

    if new_key:
        key = make_key()
        emit({"key": key}, as_json, printed(key))
        return
    emit(data.originals(open_project(directory), row), as_json, data_tables.draw_originals)


def diff(before: _Version, after: _Version, directory: Directory = HERE, as_json: Json = False) -> None:
    """Show what changed between two dataset versions: rows, splits, licences, balance."""
    from tunesmith.project import open_store
    from tunesmith.services import data

    emit(data.difference(open_store(directory), before, after), as_json, data_tables.draw_difference)


def removed(
    dataset: _Version,
    each: Annotated[int, typer.Option(min=1, help="Rows of each reason.")] = 5,
    directory: Directory = HERE,
    as_json: Json = False,
) -> None:
    """Show a sample of the rows that were left out, for each reason, read again from the sources."""
    from tunesmith.project import open_store
    from tunesmith.services import data

    emit(data.removed(open_store(directory), dataset, directory, each), as_json, data_tables.draw_removed)


def datasheet(dataset: _Version, output: _Output = None, directory: Directory = HERE, as_json: Json = False) -> None:
    """Write a datasheet in Markdown."""
    from tunesmith.project import open_store
    from tunesmith.services import data

    digest, text = data.datasheet(open_store(directory), dataset, directory.absolute().name)
    _print_or_write(digest, "datasheet", text, output, as_json)


def croissant(dataset: _Version, output: _Output = None, directory: Directory = HERE, as_json: Json = False) -> None:
    """Write Croissant 1.0 metadata (JSON-LD)."""
    from tunesmith.project import open_store
    from tunesmith.services import data

    digest, text = data.croissant(open_store(directory), dataset, directory.absolute().name)
    _print_or_write(digest, "croissant", text, output, as_json)


def sign(
    dataset: _Version,
    reason: Annotated[str, typer.Option(help="What was looked at.")],
    directory: Directory = HERE,
    as_json: Json = False,
    actor: As = None,
) -> None:
    """Verify a dataset version and sign it off as its steward. The audit log records it."""
    from tunesmith.core.digests import short
    from tunesmith.project import open_store
    from tunesmith.services import data

    signed = data.sign(open_store(directory), dataset, reason=reason, actor=actor)
    emit(signed, as_json, printed(f"{signed.steward} signed off {short(signed.dataset)}"))


def quality(
    dataset: _Version,
    label_noise: Annotated[bool, typer.Option(help="Also look for wrong labels (extra: quality).")] = False,
    language: Annotated[bool, typer.Option(help="Also look for other languages (extra: quality).")] = False,
    toxicity: Annotated[bool, typer.Option(help="Also look for toxic turns (extra: toxicity).")] = False,
    names: Annotated[bool, typer.Option(help="Count people's names, by the scan's model (extra: privacy).")] = False,
    alike: Annotated[bool, typer.Option(help="Find requests that say the same, by MiniLM (downloaded once).")] = False,
    limit: Annotated[int, typer.Option(min=0, help="Flags to show; 0 shows all.")] = 20,
    directory: Directory = HERE,
    as_json: Json = False,
) -> None:
    """Flag rows that a person should look at. Drops none. The store keeps the flags as a record."""
    from tunesmith.project import open_store
    from tunesmith.services import data

    found = data.quality(
        open_store(directory),
        dataset,
        label_noise=label_noise,
        language=language,
        toxicity=toxicity,
        names=names,
        alike=alike,
        limit=limit,
        progress=Terminal(),
    )
    emit(found, as_json, data_tables.draw_quality)


def _print_or_write(digest: str, what: str, text: str, output: Path | None, as_json: bool) -> None:
    from tunesmith.core.files import write_atomic

    if output is not None:
        write_atomic(output, text.encode())
    shown = text if output is None else str(output)
    emit({"dataset": digest, what: shown}, as_json, printed(shown))
