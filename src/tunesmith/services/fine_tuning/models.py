"""Names of fine-tuned models, and the versions behind them."""

from __future__ import annotations

import re
from typing import Final

from sqlalchemy.orm import Session

from tunesmith.core.errors import UsageError
from tunesmith.core.scope import Scope
from tunesmith.jobs.state import Job, job_of
from tunesmith.services.fine_tuning.arguments import KIND, Arguments
from tunesmith.store.tables import JobRow

PREFIX: Final = "ft:"
JOB: Final = "ftjob-"
_NUMBER = re.compile("[1-9][0-9]{0,8}")


class NotYet(UsageError):
    """A job of this name exists, but no version came of it (yet)."""


def model_name(job: Job) -> str:
    """The name that a job's model has, or will have: ft:MODEL:PROJECT:SUFFIX:NUMBER."""
    arguments = Arguments.model_validate(job.arguments)
    return f"{PREFIX}{arguments.model}:{job.project}:{arguments.suffix or ''}:{job.id}"


def job_number(identifier: str) -> int | None:
    """The number in a job's id; None for what is no id."""
    found = identifier.removeprefix(JOB)
    return int(found) if identifier.startswith(JOB) and _NUMBER.fullmatch(found) else None


def version_behind(session: Session, name: str, scope: Scope) -> str:
    """The label of the version behind a `ft:` name. scope: the caller's.

    Raises NotYet where the job has none, UsageError where there is no such job for the caller.
    """
    number = name.rsplit(":", 1)[-1]
    row = session.get(JobRow, int(number)) if _NUMBER.fullmatch(number) else None
    visible = row is not None and row.tenant in ("", scope.tenant) and row.region in ("", scope.region)
    if row is None or not visible or row.kind != KIND or model_name(job_of(row)) != name:
        raise UsageError(f"there is no model {name!r}")
    if row.state == "succeeded":
        return str(row.result[KIND]["version"])
    why = f": {row.error['code']}" if row.error else ""
    raise NotYet(f"its fine-tuning job {JOB}{row.id} is {row.state}{why}")
