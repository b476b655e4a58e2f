"""Cases: served requests that a caller corrected, on their way to become test rows."""

from __future__ import annotations

from pathlib import Path

from tunesmith.core.errors import UsageError
from tunesmith.core.view import View
from tunesmith.data.governance.licences import permitted
from tunesmith.monitoring import cases
from tunesmith.monitoring.cases import Case
from tunesmith.project import Project
from tunesmith.store.identities import require
from tunesmith.store.store import Store


class CaseList(View):
    """The cases that are not rows of a source yet, oldest first."""

    cases: tuple[Case, ...]


class AddedCases(View):
    """How many cases were written to a source file. named: whether the project file lists that source."""

    added: int
    source: str
    named: bool


class DroppedCases(View):
    """How many cases were deleted."""

    dropped: int


def list_cases(store: Store, *, everything: bool = False) -> CaseList:
    """The cases that wait; with everything also those that were answered correctly."""
    return CaseList(cases=tuple(cases.list_cases(store, everything=everything)))


def add_cases(
    project: Project, target: Path, *, licence: str, everything: bool = False, actor: str | None = None
) -> AddedCases:
    """Append the cases that wait to a JSONL source file, each with its origin.

    Raises UsageError for a file outside the project, Refused for a licence that the project does not allow.
    """
    licence = permitted(licence, project.settings.data.licences, "--licence")
    root = project.root.resolve()
    path = (root / target).resolve()
    if not path.is_relative_to(root):
        raise UsageError("the file lies outside the project", where=str(path), fix="name a file inside it")
    waiting = cases.list_cases(project.store, everything=everything)
    added = cases.add_cases(
        project.store,
        waiting,
        path,
        licence=licence,
        split=project.settings.data.split,
        actor=project.actor(actor),
    )
    name = path.relative_to(root).as_posix()
    named = any(source.path == name for source in project.settings.data.sources)
    return AddedCases(added=added, source=name, named=named)


def drop_cases(project: Project, requests: list[str], *, actor: str | None = None) -> DroppedCases:
    """Delete cases by the ids of their requests. Raises UsageError for an id without a case."""
    require(project.store, project.actor(actor), "data.build")
    waiting = {case.request: case for case in cases.list_cases(project.store, everything=True)}
    unknown = [request for request in requests if request not in waiting]
    if unknown:
        raise UsageError(f"there is no case of request {unknown[0]!r}", fix="`tunesmith cases show --all` lists them")
    cases.drop_cases(project.store, [waiting[request] for request in requests])
    return DroppedCases(dropped=len(requests))
