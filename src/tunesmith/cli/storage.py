"""`store usage`, `store prune` and `hold`: what a store keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from tunesmith import services
from tunesmith.cli.terminal import Acting, Drawn, Here, add_commands, add_group, table
from tunesmith.core.digests import short

if TYPE_CHECKING:
    from tunesmith.monitoring.pruning import Pruned, Usage


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_commands(add_group(app, "store", "What takes the store's space, and what may go."), usage, prune)
    add_commands(app, hold)


def usage(here: Here) -> None:
    """List what takes the space: trainings by candidate, other records' files, versions, work folders."""
    here.emit(services.storage.usage(here.store), _draw)


def prune(here: Acting, *, dry_run: bool = False) -> None:
    """Delete what `keep` of the project file does not keep, and what nothing names. What a version reaches stays.

    dry_run: Only show what would go.
    """
    here.show(services.storage.prune, _draw_pruned)


def hold(here: Acting, version: str, *, reason: str, end: bool = False) -> None:
    """Hold a version: nothing that it was made from is erased until the hold ends.

    version: NAME@v3, or the start of a version's digest.
    reason: Why; kept in the audit log.
    end: End the hold.
    """
    here.show(services.storage.hold, lambda done: done.said)


def _draw(usage: Usage) -> Drawn:
    rows = [(place.place, place.count, f"{place.bytes:,}") for place in usage.places]
    yield table([*rows, ("in all", "", f"{usage.bytes:,}")], "place", "number", "bytes", right=(1, 2))


def _draw_pruned(done: Pruned) -> Drawn:
    for user in done.in_use:
        yield f"no training goes: in use by {user}", "bold red"
    yield f"trainings that {'went' if done.done else 'would go'}: {', '.join(map(short, done.trainings)) or 'none'}"
    yield from _draw(done) if done.places else ("there is nothing to delete",)
