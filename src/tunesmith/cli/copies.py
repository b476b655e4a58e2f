"""`backup`, `restore` and `migrate`: a whole store in one file, and from a folder to PostgreSQL and a bucket."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.terminal import Acting, Terminal, add_commands, printed

if TYPE_CHECKING:
    from tunesmith.services.audit import StoreCopy

File = Annotated[Path, typer.Argument(metavar="FILE", help="The backup.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_commands(app, backup, restore, migrate)


def backup(here: Acting, file: File) -> None:
    """Write the database and every object of the store into one new file. Private keys are not in it."""
    from tunesmith.services import audit

    _show(here, "wrote", audit.backup(here.store, file, actor=here.actor, progress=Terminal()))


def restore(here: Acting, file: File) -> None:
    """Fill an empty store from a backup, after every byte of it was checked. Killed, it continues."""
    from tunesmith.services import audit

    _show(here, "restored", audit.restore(here.store, file, actor=here.actor, progress=Terminal()))


def migrate(here: Acting) -> None:
    """Copy the store in .tunesmith to $TUNESMITH_DATABASE_URL and $TUNESMITH_BLOBS_URL. Killed, it continues.

    Stop what uses the store first. The folder stays as it is. Every object is read back and compared.
    """
    from tunesmith.services import audit

    _show(here, "copied", audit.migrate(here.store.root, actor=here.actor, progress=Terminal()))


def _show(here: Acting, done: str, copy: StoreCopy) -> None:
    sizes = f"{copy.rows:,} rows and {copy.objects:,} objects ({copy.bytes / 1e6:,.1f} MB)"
    gone = f"\nuploaded files whose bytes were gone already: {', '.join(copy.missing)}" if copy.missing else ""
    here.emit(copy, printed(f"{done} {sizes}: {copy.place}{gone}"))
