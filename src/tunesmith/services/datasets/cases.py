"""Cases: served requests that callers asked to keep, on their way to become test rows."""

from __future__ import annotations

from pathlib import Path

from tunesmith.core.errors import UsageError
from tunesmith.core.view import View
from tunesmith.data.building.examine import listed_values
from tunesmith.data.governance.licences import permitted
from tunesmith.monitoring import cases
from tunesmith.monitoring.cases import Case
from tunesmith.monitoring.keeping import CaseKeeper
from tunesmith.project import Project
from tunesmith.store.store import Store


class CaseList(View):
    """The cases that are not rows of a source yet, oldest first."""

    cases: tuple[Case, ...]


class AddedCases(View):
    """How many cases were written to a source file. named: whether the project file lists that source.

    without_answer: how many were left, because nobody has said what the answer should have been.
    """

    added: int
    source: str
    named: bool
    without_answer: int


class DroppedCases(View):
    """How many cases were deleted."""

    dropped: int


def case_keeper(project: Project) -> CaseKeeper | None:
    """What keeps requests for a review; None where the project file has no `cases:`."""
    settings = project.settings
    if settings.cases is None:
        return None
    return CaseKeeper(project.store, settings.cases, settings.data.privacy, listed_values(project.schema))


def list_cases(store: Store, *, everything: bool = False) -> CaseList:
    """The cases that wait; with everything also those that were answered correctly.

    Deletes those whose time is over.
    """
    cases.delete_expired(store)
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
    waiting = list_cases(project.store, everything=everything).cases
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
    left = sum(case.expected is None for case in waiting)
    return AddedCases(added=added, source=name, named=named, without_answer=left)


def correct_case(project: Project, request: str, expected: str, *, actor: str | None = None) -> Case:
    """Set the expected answer of a case. Raises UsageError for a request without a case and for an empty answer."""
    if not expected.strip():
        raise UsageError("the expected answer is empty", fix="write it, or delete the case: tunesmith cases drop")
    return cases.correct_case(project.store, request, expected, actor=project.actor(actor))


def drop_cases(project: Project, requests: list[str], *, actor: str | None = None) -> DroppedCases:
    """Delete cases by the ids of their requests. Raises UsageError for an id without a case."""
    waiting = {case.request for case in cases.list_cases(project.store, everything=True)}
    unknown = [request for request in requests if request not in waiting]
    if unknown:
        raise UsageError(f"there is no case of request {unknown[0]!r}", fix="`tunesmith cases show --all` lists them")
    cases.drop_cases(project.store, requests, actor=project.actor(actor))
    return DroppedCases(dropped=len(requests))
