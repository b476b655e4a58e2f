"""What people may read of a job's log and errors who do not run this server."""

from __future__ import annotations

import re

from tunesmith.core.scope import Scope
from tunesmith.services.jobs import JobLog, JobView
from tunesmith.store.people.identities import User

_TRACEBACK = "Traceback (most recent call last)"
_END = r"\s'\"`,;:()"  # what ends an unquoted path
# An absolute path: between quotes, after file://, or as a word. Not the path of another URL. Names of folders may have
# spaces: up to three words are part of the path where a slash follows in the last of them.
_MORE = rf"(?:(?: [^{_END}/]+){{1,3}}/[^{_END}]*)*"
_PATH = re.compile(
    rf"""(?<=')/[^'\n]+(?=')|(?<=")/[^"\n]+(?=")"""
    rf"""|(?:file://\S+|(?<![\w./:])/[^{_END}]+|(?<=:)/(?!/)[^{_END}]+){_MORE}"""
)


def for_client(text: str) -> str:
    """A text without what is the operators' alone: tracebacks, and paths of this machine."""
    return "an internal error; its traceback is in the operators' log" if _TRACEBACK in text else _PATH.sub("...", text)


def job_for(user: User, job: JobView) -> JobView:
    """A job as a user may read it."""
    if _reads_all(user) or not job.error:
        return job
    error = {name: for_client(said) if isinstance(said, str) else said for name, said in job.error.items()}
    if str(job.error.get("where")).startswith("/"):
        error["where"] = None
    return job.model_copy(update={"error": error})


def log_for(user: User, log: JobLog) -> JobLog:
    """A job's log as a user may read it."""
    if _reads_all(user):
        return log
    lines = tuple(line.model_copy(update={"message": for_client(line.message)}) for line in log.lines)
    return log.model_copy(update={"lines": lines})


def _reads_all(user: User) -> bool:
    return user.scope == Scope() and user.may("job.change")
