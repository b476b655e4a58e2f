"""Says why a new version of the project's champion is due, and queues a run for it.

A cause (monitoring/causes.py) names what it is about, so that the same cause queues one run only: drift of NAME@v3 is a
cause once, whatever comes of its run. Nothing here approves or serves a version.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

from tunesmith.core.digests import digest_of, now
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.values import View
from tunesmith.jobs import queue
from tunesmith.jobs.arguments import run_arguments
from tunesmith.monitoring.causes import CAUSES, Due, RetrainCause, RetrainingSettings, Seen
from tunesmith.project import Project
from tunesmith.registry.versions import Version, get_alias, load_version
from tunesmith.services.actions import Acting, Request, action
from tunesmith.store.tables import JobRow

_LOG = logging.getLogger("tunesmith.retraining")
_BUDGET = timedelta(days=30)
_LISTED = 1000  # jobs that are looked through for those that a cause queued


class DueCause(View):
    """A cause for a new version. job: the run that was queued for it; null where none was.

    waits: why no run may be queued for it now; "" where one may, or was.
    """

    cause: RetrainCause
    about: str
    says: str
    job: int | None
    waits: str


class Retraining(View):
    """Why a new version is due. version: the champion, "" where the name has none."""

    version: str
    causes: tuple[DueCause, ...]


class QueueRetraining(Request):
    """A run for the first cause of `retraining:` that has none yet."""


@action("job.retrain", permission="job.add", whole=True)
def retrain(acting: Acting, asked: QueueRetraining) -> Retraining:
    """Look for causes of a new version, and queue a run for the first that had none, if one may be queued."""
    return look(acting.project, by=acting.actor)


def look(
    project: Project,
    *,
    by: str | None = None,
    clock: Callable[[], datetime] = now,
    say: Callable[[str], None] = _LOG.warning,
) -> Retraining:
    """The causes of `retraining.causes` that are given now.

    by: queue a run as this person for the first that had none, if one may be queued. say: hears of causes that could
    not be looked for. Where no other one is given, the first such error is raised. Raises UsageError where the project
    file has no `retraining:`.
    """
    settings = project.settings.retraining
    if settings is None:
        raise UsageError(
            "the project does not say when to retrain",
            where="retraining",
            fix="add `retraining: {causes: [drift, rows]}`",
        )
    champion = _champion(project)
    if champion is None:
        return Retraining(version="", causes=())
    stated, causes = project.settings, list[DueCause]()
    place = project.store, project.root, stated.base, stated.data.sources, stated.monitoring
    seen = Seen(*place, settings, champion, clock())
    runs, errors = _runs(project), dict[RetrainCause, TunesmithError]()
    for cause in settings.causes:
        try:
            found = CAUSES[cause].look(seen)
        except TunesmithError as error:  # it must not hide the others
            errors[cause] = error
            continue
        if found is None:
            continue
        key = _key(project, cause, found)
        job = next((each.id for each in runs if each.key == key), None)
        waits = "" if job is not None else _waits(settings, seen.at, runs)
        if by is not None and job is None and not waits:
            arguments = run_arguments(project, {}) | {"cause": f"{cause}: {found.about}"}
            job = queue.add(project.store, "run", arguments, project=project.settings.name, actor=by, key=key).id
            runs = _runs(project)
        causes.append(DueCause(cause=cause, about=found.about, says=found.says, job=job, waits=waits))
    for cause, failure in errors.items():
        if not causes:
            raise failure
        say(f"the cause {cause} could not be looked for: {failure}")
    return Retraining(version=champion.label, causes=tuple(causes))


def look_again(root: Path, say: Callable[[str], None]) -> None:
    """Read the project file anew, and look and queue a run where one may be queued. For a worker."""
    project = Project.load(root)
    settings = project.settings.retraining
    if settings is None or _waits(settings, now(), before := _runs(project)):
        return  # causes cost time: drift is measured, and files are read
    known = {job.id for job in before}
    for each in look(project, by=project.actor(), say=say).causes:
        if each.job is not None and each.job not in known:
            say(f"job {each.job}: queued because of {each.cause}: {each.says}")


def _champion(project: Project) -> Version | None:
    """The version that the project's name means for callers without a tenant."""
    alias = get_alias(project.store, project.settings.name)
    return None if alias is None else load_version(project.store, alias.version)


def _runs(project: Project) -> list[JobRow]:
    """The project's runs that have not ended, and those that a cause queued; newest first."""
    found = queue.list_jobs(project.store, most=_LISTED)
    own = (job for job in found if (job.project, job.kind) == (project.settings.name, "run"))
    return [job for job in own if job.ended is None or job.cause]


def _key(project: Project, cause: str, found: Due) -> str:
    """Names a cause and the settings of its run: other settings may give what these did not."""
    stated = {"cause": cause, "about": found.about, "settings": project.settings.digest}
    return f"retrain {digest_of(stated)}"


def _waits(settings: RetrainingSettings, at: datetime, runs: list[JobRow]) -> str:
    """Why no run may be queued now; "" where one may."""
    unfinished = next((job for job in runs if job.ended is None), None)
    if unfinished is not None:
        return f"job {unfinished.id} is {unfinished.state}"
    queued = [datetime.fromtimestamp(job.created, tz=at.tzinfo) for job in runs]
    if queued and at < (until := max(queued) + timedelta(hours=settings.wait_hours)):
        return (
            f"the last was queued less than {settings.wait_hours:g} hours ago (wait_hours): from {until:%F %H:%M} UTC"
        )
    recent = sum(each > at - _BUDGET for each in queued)
    if recent >= settings.runs_in_30_days:
        return f"{recent} were queued in the last 30 days (runs_in_30_days)"
    return ""
