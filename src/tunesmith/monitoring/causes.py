"""The causes of retraining: what makes a new version of the champion due. Each is declared here, and nowhere else.

A cause is a function under `@cause`. Where it is given, it returns what it is about, and a sentence for people. The
same words about the same cause queue one run only. Its settings are fields of RetrainingSettings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from pydantic import Field

from tunesmith.core.digests import digest_file, digest_of, short
from tunesmith.core.values import Settings
from tunesmith.monitoring.settings import MonitoringSettings

if TYPE_CHECKING:
    from tunesmith.data.settings import Source
    from tunesmith.data.sources.files import SourceFile
    from tunesmith.registry.versions import Version
    from tunesmith.store.store import Store


class Seen(NamedTuple):
    """What causes are looked for in: the project's settings and store, its champion, and the time."""

    store: Store
    root: Path
    bases: Sequence[str]
    sources: Sequence[Source]
    monitoring: MonitoringSettings
    settings: RetrainingSettings
    champion: Version
    at: datetime


class Due(NamedTuple):
    """A cause that is given. about: what it is about. says: a sentence for people."""

    about: str
    says: str


Look: TypeAlias = Callable[[Seen], Due | None]


class Cause(NamedTuple):
    """A cause. says: when it is given, for the project file's reference."""

    says: str
    look: Look


CAUSES: dict[str, Cause] = {}


def cause(says: str) -> Callable[[Look], Look]:
    """Declare a function as the cause of its name."""

    def declare(look: Look) -> Look:
        CAUSES[look.__name__] = Cause(says, look)
        return look

    return declare


@cause("requests to the champion drifted")
def drift(seen: Seen) -> Due | None:
    from tunesmith.monitoring.drift import drift_report

    label, report = seen.champion.label, drift_report(seen.store, seen.monitoring, seen.champion)
    return Due(label, f"requests to {label} drifted: {report.reason}") if report.verdict == "drift" else None


@cause("a file of data.sources changed")
def rows(seen: Seen) -> Due | None:
    from tunesmith.data.sources.files import find_files
    from tunesmith.records.dataset import DatasetBody

    present = {file.name: _digest_of(file, seen.at) for file in find_files(seen.sources, seen.root)}
    evaluation = seen.store.record(seen.champion.evaluation, kind="evaluation")
    body = DatasetBody.read(seen.store, evaluation.parents["dataset"])
    built = {source.path: source.digest for source in body.sources}
    changed = sorted(name for name in {*present, *built} if present.get(name) != built.get(name))
    if not changed:
        return None
    more = f" and {len(changed) - 3} others" if len(changed) > 3 else ""
    named = f"{', '.join(changed[:3])}{more}"
    return Due(f"files {short(digest_of(present))}", f"changed since {seen.champion.label} was trained: {named}")


@cause("no `base` names the champion's model")
def base(seen: Seen) -> Due | None:
    from tunesmith.models.base import resolve_base

    candidate = seen.store.record(seen.champion.candidate, kind="candidate")
    present = [resolve_base(seen.store, spec, seen.root).digest for spec in seen.bases]
    if candidate.parents.get("base", present[0]) in present:
        return None
    return Due(f"base {short(present[0])}", f"{seen.bases[0]} is not the base of {seen.champion.label}")


@cause("the champion was recalled")
def recall(seen: Seen) -> Due | None:
    from tunesmith.monitoring.recall import list_pending_retrains

    for one in list_pending_retrains(seen.store, seen.champion.name):
        if one.replacement is None and not (one.tenant or one.region):
            about = f"{one.version} by {short(digest_of(list(one.causes)))}"
            return Due(about, f"{one.version} was recalled: {', '.join(one.causes)}")
    return None


@cause("its use ends soon")
def expiry(seen: Seen) -> Due | None:
    ends, label = seen.champion.expires_at, seen.champion.label
    if ends is None or datetime.fromisoformat(ends) > seen.at + timedelta(days=seen.settings.expires_within_days):
        return None
    return Due(label, f"the use of {label} ends at {ends}")


@cause("it was measured long ago")
def evidence(seen: Seen) -> Due | None:
    measured, label = datetime.fromisoformat(seen.champion.created_at), seen.champion.label
    if measured > seen.at - timedelta(days=seen.settings.evidence_days):
        return None
    return Due(label, f"{label} was measured and registered on {measured:%F}")


@cause("it is so many days old")
def schedule(seen: Seen) -> Due | None:
    label, days = seen.champion.label, seen.settings.every_days
    periods = int((seen.at - datetime.fromisoformat(seen.champion.created_at)) / timedelta(days=days))
    if periods < 1:
        return None
    return Due(f"{label}, {periods} times {days:g} days", f"{label} is {periods} times {days:g} days old")


if TYPE_CHECKING:
    RetrainCause: TypeAlias = str
else:
    RetrainCause = Literal[tuple(CAUSES)]


class RetrainingSettings(Settings):
    """When a worker queues a run by itself. What comes of it still needs its gates to pass and an approval to serve."""

    causes: tuple[RetrainCause, ...] = Field(
        description="causes that queue a run. " + "; ".join(f"{name}: {each.says}" for name, each in CAUSES.items())
    )
    expires_within_days: float = Field(default=30.0, gt=0, description="expiry: how long before the end of its use")
    evidence_days: float = Field(default=180.0, gt=0, description="evidence: how old it may become")
    every_days: float = Field(default=90.0, gt=0, description="schedule: the days between two runs")
    wait_hours: float = Field(
        default=24.0, ge=0, description="hours after such a run was queued in which no cause queues another"
    )
    runs_in_30_days: int = Field(default=4, ge=1, description="most runs that causes queue in 30 days")


# A file's name and path -> its state, and the digest of its bytes then.
_KNOWN: dict[tuple[str, Path | None], tuple[object, str]] = {}


def _digest_of(file: SourceFile, at: datetime) -> str:
    """The digest of a file, which is read or downloaded again only where its state is another. A file at a URL is
    downloaded once a day where its server states none."""
    from tunesmith.data.sources import remote

    place = file.name, file.path
    try:
        if file.path is None:
            state: object = remote.state_of(file.name) or f"{at:%F}"
        else:
            stat = file.path.stat()
            state = stat.st_size, stat.st_mtime_ns, stat.st_ino
        known = _KNOWN.get(place)
        if known is None or known[0] != state:
            known = _KNOWN[place] = state, file.digest() if file.path is None else digest_file(file.path)
        return known[1]
    except OSError:
        return file.digest()  # says what is wrong
