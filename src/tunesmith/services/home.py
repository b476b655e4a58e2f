"""What a person looks at first: what serves, moves and waits for whom, and whether machine and project are well."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from tunesmith.core.clock import stamp
from tunesmith.core.errors import NextStep, Refused, TunesmithError
from tunesmith.core.reading.text_files import read_text_file
from tunesmith.core.system import machine as memory
from tunesmith.core.system.machine import wanted_threads
from tunesmith.core.text.names import Scope
from tunesmith.core.values import ScopedView, View
from tunesmith.monitoring.recall import PendingRetrain, list_pending_retrains
from tunesmith.project import Project
from tunesmith.registry.risk import Approvals
from tunesmith.registry.serving import approvals_of, permissions
from tunesmith.registry.versions import Version, readable_versions
from tunesmith.rollout.champions import Champion, list_champions
from tunesmith.services import monitoring
from tunesmith.services.actions import Acting
from tunesmith.services.monitoring import PartHealth, queue_health
from tunesmith.services.review import waiting_for
from tunesmith.services.rollouts import LISTED, RolloutLine, live_lines
from tunesmith.store import audit
from tunesmith.store.people.identities import User
from tunesmith.store.people.proposed_keys import ProposedKey, waiting_keys
from tunesmith.store.people.roles import ACTIONS
from tunesmith.store.store import Store
from tunesmith.store.tables import AuditRow, JobEventRow, JobRow, RecordRow, RequestRow, VersionRow
from tunesmith.store.until_changed import UntilChanged
from tunesmith.webhooks import deliveries

_VERSIONS = 12  # the newest ones, of which some may wait for an approval
_CHAMPIONS = 50
_COUNTED_SECONDS = 5.0  # requests are counted this seldom, however many look
_DUE_SECONDS = 300.0  # drift is measured this seldom
_ROLLOUTS, _OPERATIONS = "/console/rollouts", "/console/operations"


class ServingNow(ScopedView):
    """A champion. requests, failed: of the last hour, answered by it. refused: why it may not serve, "" if it may."""

    name: str
    version: str
    digest: str
    since: str
    refused: str
    requests: int
    failed: int


class Waiting(View):
    """Something that waits for people. says: with the command that does it. roles: of those who may do it.

    mine: whether the viewer is one of them. page: where in the console.
    """

    says: NextStep
    roles: tuple[str, ...]
    mine: bool
    page: str


class Home(View):
    """What concerns the viewer's tenant and region. waiting: those that wait for the viewer first.

    versions, champions, rollouts: how many are looked at, where there are more; else None.
    """

    serving: tuple[ServingNow, ...]
    moving: tuple[RolloutLine, ...]
    waiting: tuple[Waiting, ...]
    health: tuple[PartHealth, ...]
    versions: int | None
    champions: int | None
    rollouts: int | None


class _Kept(NamedTuple):
    """What only changes with the audit log, for every tenant and region. since: champion -> when it was set.

    first_versions, first_champions: how many were looked at, where there are more; else None.
    """

    champions: list[Champion]
    since: dict[tuple[str, Scope], str]
    unapproved: list[tuple[Version, Approvals]]
    pending: list[PendingRetrain]
    proposed: list[ProposedKey]
    first_versions: int | None
    first_champions: int | None


_Requests = Mapping[tuple[str, Scope], tuple[int, int]]
_KEPT: WeakKeyDictionary[Store, UntilChanged[_Kept]] = WeakKeyDictionary()
_DUE: WeakKeyDictionary[Store, tuple[float, tuple[NextStep, ...]]] = WeakKeyDictionary()
_DUE_LOCK = threading.Lock()
_REQUESTS: WeakKeyDictionary[Store, tuple[float, _Requests]] = WeakKeyDictionary()


def home(acting: Acting, project: Project | None = None) -> Home:
    """The first page for a user, without what takes long to find out (`due`). project: whose webhooks count."""
    store, scope = acting.store, acting.user.scope
    kept = _KEPT.setdefault(store, UntilChanged(store, _holds)).get("home", lambda session: _read(session, store))
    requests = _requests(store, kept.champions)
    with store.reading() as session:
        moving = live_lines(session, scope)
    # Those of the viewer, and those that serve what is the viewer's.
    theirs = (one for one in kept.champions if one.scope.covers(scope) or scope.covers(one.scope))
    return Home(
        serving=tuple(_serving(one, scope, kept, requests) for one in theirs),
        moving=tuple(moving),
        waiting=_viewers_first(_all_waiting(acting, kept, moving, project)),
        health=(PartHealth(part="database", ok=True, says="answers"), queue_health(store, scope)),
        versions=kept.first_versions,
        champions=kept.first_champions,
        rollouts=len(moving) if len(moving) == LISTED else None,
    )


def status(acting: Acting) -> Home:
    """The first page for a user with what is due."""
    page = home(acting, acting.project)
    return page.model_copy(update={"waiting": _viewers_first((*page.waiting, *due(acting)))})


def due(acting: Acting) -> tuple[Waiting, ...]:
    """What measurements of traffic and files say is due: drift, and retraining. Found out every five minutes.

    Empty for a user of one tenant or region: both concern the whole project.
    """
    if not acting.user.scope.unlimited:
        return ()
    with _DUE_LOCK:  # it may take seconds: once for all who look
        at, steps = _DUE.get(acting.store, (-_DUE_SECONDS, ()))
        if time.monotonic() - at >= _DUE_SECONDS:
            steps = tuple(_due(acting.project))
            _DUE[acting.store] = time.monotonic(), steps
    return tuple(_waiting(acting.user, says, "job.add", _OPERATIONS) for says in steps)


def last_changes(store: Store) -> tuple[object, ...]:
    """The newest audit entry, running jobs with their newest lines, the newest request: equal while nothing changed."""
    lines = select(func.max(JobEventRow.number)).where(JobEventRow.job == JobRow.id).scalar_subquery()
    running = select(JobRow.id, JobRow.progress, lines).where(JobRow.state == "running").order_by(JobRow.id)
    with store.reading() as session:
        jobs = str(session.execute(running).all())
        return audit.newest(session), jobs, session.scalar(select(func.max(RequestRow.at)))


def _read(session: Session, store: Store) -> _Kept:
    champions = list_champions(session, store, most=_CHAMPIONS + 1)
    newest = _newest(session)
    serving = {one.digest for one in champions}
    versions = readable_versions(store, set(newest[:_VERSIONS]) - serving, session)
    allowed = permissions(session, list(versions.values()))
    waiting = [digest for digest in newest if digest in allowed and allowed[digest].reason == "not_approved"]
    return _Kept(
        champions[:_CHAMPIONS],
        _since(session, champions),
        [(versions[digest], approvals_of(session, versions[digest])) for digest in waiting],
        list_pending_retrains(store),
        waiting_keys(store),
        _VERSIONS if len(newest) > _VERSIONS else None,
        _CHAMPIONS if len(champions) > _CHAMPIONS else None,
    )


def _since(session: Session, champions: list[Champion]) -> dict[tuple[str, Scope], str]:
    subjects = {f"{one.name}@champion" for one in champions}
    place = (AuditRow.subject, AuditRow.detail["tenant"].as_string(), AuditRow.detail["region"].as_string())
    query = select(*place, func.max(AuditRow.at)).where(AuditRow.action == "alias.set", AuditRow.subject.in_(subjects))
    rows = session.execute(query.group_by(*place))
    return {(subject.removesuffix("@champion"), Scope(tenant, region)): at for subject, tenant, region, at in rows}


def _holds(kept: _Kept) -> bool:
    return not any(one.refused is None and one.expired for one in kept.champions)


def _newest(session: Session) -> list[str]:
    """Digests of the versions that were registered last, and one more where there are more."""
    query = select(VersionRow.digest).join(RecordRow, RecordRow.digest == VersionRow.digest)
    ordered = query.order_by(RecordRow.created_at.desc(), VersionRow.number.desc())
    return list(session.scalars(ordered.limit(_VERSIONS + 1)))


def _requests(store: Store, champions: list[Champion]) -> _Requests:
    """(requests, failed) of the last hour by version and the caller's scope, counted again every few seconds."""
    at, counted = _REQUESTS.get(store, (-_COUNTED_SECONDS, {}))
    if time.monotonic() - at < _COUNTED_SECONDS:
        return counted
    since = stamp(-timedelta(hours=1))
    place = (RequestRow.version, RequestRow.tenant, RequestRow.region)
    counts = (func.count(), func.count().filter(~RequestRow.ok))
    mine = RequestRow.version.in_({one.digest for one in champions})
    query = select(*place, *counts).where(mine, RequestRow.at >= since).group_by(*place)
    with store.reading() as session:
        rows = session.execute(query).all()
    counted = {(version, Scope(tenant, region)): (n, failed) for version, tenant, region, n, failed in rows}
    _REQUESTS[store] = time.monotonic(), counted
    return counted


def _serving(one: Champion, viewer: Scope, kept: _Kept, requests: _Requests) -> ServingNow:
    counted = [
        each
        for (digest, scope), each in requests.items()
        if digest == one.digest and one.scope.covers(scope) and viewer.covers(scope)
    ]
    return ServingNow.of(
        one,
        since=kept.since.get((one.name, one.scope), ""),
        refused=one.refused or "",
        requests=sum(n for n, _ in counted),
        failed=sum(failed for _, failed in counted),
    )


# What waits for whom


def _viewers_first(waiting: Iterable[Waiting]) -> tuple[Waiting, ...]:
    return tuple(sorted(waiting, key=lambda one: not one.mine))


def _waiting(user: User, says: NextStep, action: str, page: str, *, not_for: Iterable[str | None] = ()) -> Waiting:
    may = user.may(action) and user.name not in not_for
    return Waiting(says=says, roles=tuple(sorted(ACTIONS[action])), mine=may, page=page)


def _all_waiting(acting: Acting, kept: _Kept, moving: list[RolloutLine], project: Project | None) -> Iterator[Waiting]:
    user = acting.user
    for version, decided in kept.unapproved:
        if user.scope.covers(version.scope):
            words = f"{version.label} waits for {' and '.join(decided.missing)}"
            says = NextStep(words, "approve", version=version.label)
            page = f"/console/versions/{version.name}/{version.number}#decide"
            yield _waiting(user, says, "version.approve", page, not_for=(version.signer, *decided.approvers))
    if count := waiting_for(acting):
        says = NextStep(f"{count} held answer{' waits' if count == 1 else 's wait'} for a reviewer", "held list")
        yield _waiting(user, says, "answer.review", f"{_OPERATIONS}/held")
    for key in kept.proposed if user.scope.unlimited else ():
        says = NextStep(f"a key of {key.user} waits to be confirmed", "keys confirm", user=key.user)
        yield _waiting(user, says, "user.change", "/console/keys", not_for=(key.user, key.link_by))
    for rollout in moving:
        if rollout.waits:
            words = f"rollout {rollout.rollout} of {rollout.name} is paused: resume or abort it"
            says = NextStep(words, "rollout resume", rollout=rollout.rollout)
            yield _waiting(user, says, "rollout.change", f"{_ROLLOUTS}/{rollout.rollout}")
    for one in kept.champions:
        if one.refused and user.scope.covers(one.scope):
            words = f"nothing serves {one.name}{one.scope.said}: {one.version or 'its version'} {one.refused}"
            says = NextStep(words, "rollout rollback", rollout=one.name, **one.scope.fields())
            yield _waiting(user, says, "rollout.start", _ROLLOUTS)
    for retrain in kept.pending:
        if user.scope.covers(retrain.scope):
            words = f"{retrain.name}{retrain.scope.said} needs a new version: {retrain.version} was recalled"
            yield _waiting(user, NextStep(words, "recall", pending=True), "job.add", _OPERATIONS)
    counted = deliveries.count(acting.store, project.settings.name) if project and user.scope.unlimited else {}
    for (name, given_up), n in sorted(counted.items()):
        if given_up:
            words = f"{n} deliver{'y' if n == 1 else 'ies'} of the webhook {name} were given up"
            yield _waiting(user, NextStep(words, "webhooks retry", webhook=name), "webhook.retry", _OPERATIONS)


def _due(project: Project) -> Iterator[NextStep]:
    """What is due, with the command that says more."""
    with contextlib.suppress(TunesmithError):  # nothing serves, or what it was measured with is gone: others say so
        report, label = monitoring.monitor(project)
        if report.verdict == "drift":
            yield NextStep(f"requests to {label} drifted: {report.reason}", "monitor")
        if project.settings.retraining is not None:
            for one in monitoring.look(project).causes:
                if one.cause != "drift" and one.job is None:
                    yield NextStep(f"retraining is due: {one.says}", "run")


# For quantize: 4bit, attention: flash_attention_2, and clusters.
_EXTRAS = ("bitsandbytes", "flash-attn", "liger-kernel", "ray")


class Check(View):
    """One thing that was checked. fix: what to do where it is not ok."""

    name: str
    ok: bool
    detail: str
    fix: NextStep | None = None


class Checks(View):
    """Every check. ok: whether all of them are."""

    ok: bool
    checks: tuple[Check, ...]


def examine(directory: Path) -> Checks:
    """Check this machine, the project, its base, its store, its audit log, and whether its champions may serve."""
    checks = (_python, _processor, _gpus, _extras, _memory, _cache, _disk, _project, _base, _store, _champions)
    checked = tuple(_checked(check, directory) for check in checks)
    return Checks(ok=all(check.ok for check in checked), checks=checked)


def examine_gpu() -> Checks:
    """Compute a training step of a tiny random base on the GPU and on the CPU, and compare its figures. Downloads
    nothing. Raises Refused where torch sees no GPU."""
    from tunesmith.engines.device import computing_device, describe_gpus, device_name, gpu_present
    from tunesmith.training.gpu_step import ACCEPTED, compare_step

    described, fix = describe_gpus()
    if not gpu_present():
        fix = fix or "run it on a machine with a GPU and a build of PyTorch for it"
        raise Refused(f"torch sees no GPU ({described})", where="gpu", fix=fix)
    checked = [_check("gpu", device_name(computing_device()))]
    for precision, figures in compare_step().items():
        most = max(figure.difference for figure in figures)
        said = "; ".join(f"{each.name} {each.gpu:.6g}, on the CPU {each.cpu:.6g}" for each in figures)
        accepted = ACCEPTED[precision]
        detail = f"{said}: they differ by at most {most:.1e} (accepted: {accepted:g})"
        fix = "try another driver or build of PyTorch: what this GPU trains is not what the CPU would"
        checked.append(_check(f"a step in {precision}", detail, most <= accepted, fix))
    return Checks(ok=all(check.ok for check in checked), checks=tuple(checked))


def _installed_version(name: str) -> str | None:
    """The version of a package in this environment; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _checked(check: Callable[[Path], Check], directory: Path) -> Check:
    try:
        return check(directory)
    except TunesmithError as error:
        where = f" ({error.where})" if error.where else ""
        return _check(check.__name__.strip("_"), f"{error.what}{where}", False, error.fix)


def _check(name: str, detail: str, ok: bool = True, fix: str | None = None) -> Check:
    return Check.model_validate({"name": name, "ok": ok, "detail": detail, "fix": None if ok else fix})


def _python(_directory: Path) -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return _check("python", version, sys.version_info >= (3, 11), "install Python 3.11 or newer")


def _processor(_directory: Path) -> Check:
    from tunesmith.engines.factory import describe_processor

    threads = wanted_threads()
    limit = "" if threads is None else f"; TUNESMITH_THREADS: {threads}"
    return _check("processor", describe_processor() + limit)


def _gpus(_directory: Path) -> Check:
    from tunesmith.engines.device import describe_gpus

    described, wrong = describe_gpus()
    return _check("gpus", described, wrong is None, wrong)


def _extras(_directory: Path) -> Check:
    """Which libraries are there that only some settings need."""
    installed = (f"{name} {_installed_version(name) or '(not installed)'}" for name in _EXTRAS)
    return _check("extras", ", ".join((*installed, f"vllm {shutil.which('vllm') or '(not on PATH)'}")))


def _memory(_directory: Path) -> Check:
    free = memory.available_memory()
    return _check("memory", f"{free / 1e9:.1f} GB free", free > 3 << 30, "training a 135M model takes 3 GB")


def _cache(_directory: Path) -> Check:
    from tunesmith.core.system.files import cache_folder

    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return _check("cache", str(folder), os.access(folder, os.W_OK), "set TUNESMITH_CACHE to a folder of yours")


def _disk(directory: Path) -> Check:
    free = shutil.disk_usage(directory).free
    return _check("disk", f"{free / 1e9:.1f} GB free", free > 2 << 30, "free some space for weights and checkpoints")


def _project(directory: Path) -> Check:
    from tunesmith.pipeline.candidates import read_prompt
    from tunesmith.registry.papers.facts import PERSON_FILE, read_person

    project = Project.load(directory)
    for name, each in project.settings.candidates.items():
        for file in filter(None, [each.prompt, *(each.optimise.prompts if each.optimise else ())]):
            read_prompt(project.root, name, file)
    if (person := project.root / PERSON_FILE).exists():
        read_person(read_text_file(person, PERSON_FILE).encode(), str(person))
    return _check("project", f"{project.settings.name}, {len(project.settings.candidates)} candidates")


def _base(directory: Path) -> Check:
    """Which engine runs each base in a local folder. Downloads nothing."""
    from tunesmith.engines.settings import SLOW, is_native
    from tunesmith.models.base import check_spec, read_config

    project, said = Project.load(directory), list[str]()
    tuned = project.settings.fine_tuning.models.values() if project.settings.fine_tuning else ()
    for spec in dict.fromkeys([*project.settings.bases, *filter(None, tuned)]):
        if isinstance(folder := check_spec(spec, project.root), Path):
            family = str(read_config(folder).get("model_type"))
            spec += f": {family}, {'on the native engine' if is_native(family) else f'which {SLOW}'}"
        said.append(spec)
    return _check("base", "; ".join(said))


def _store(directory: Path) -> Check:
    from tunesmith.store import audit
    from tunesmith.store.people.trust import TRUST_KEY

    project = Project.load(directory)
    if not project.store.is_made:
        return _check("store", "not made yet: a run makes it")
    with project.store.reading() as session:
        problems = audit.verify(session)
    if problems:
        raise Refused(problems[0], fix=NextStep("list all problems", "audit verify"))
    project.store.blobs.exists(TRUST_KEY)  # raises where a bucket cannot be used
    return _check(
        "store", f"the database opens and the audit log verifies; objects are in {project.store.blobs.where('')}"
    )


def _champions(directory: Path) -> Check:
    from tunesmith.services.rollouts import refused_champions

    project = Project.load(directory)
    refused = refused_champions(project.store) if project.store.is_made else []
    if refused:
        warnings = "; ".join(str(champion.warning) for champion in refused)
        raise Refused(warnings, fix=NextStep("list the rollouts", "rollout status"))
    return _check("champions", "all may serve")
