"""Which champions may not serve now, what could serve instead, and what must hold for a rollout to go on or promote."""

from __future__ import annotations

import contextlib
import logging

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.core.digests import short
from tunesmith.core.errors import NextStep, Refused, TunesmithError, UsageError
from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.core.text.names import CONTROLLER, Scope
from tunesmith.core.values import ScopedView
from tunesmith.registry.approvals import check_may_serve
from tunesmith.registry.opening import Verified
from tunesmith.registry.serving import permissions, set_alias, standing, standing_of
from tunesmith.registry.signing.release import is_over
from tunesmith.registry.versions import get_alias, load_version, readable_versions, revision_of
from tunesmith.rollout.state import Rollout, promoted_rollouts
from tunesmith.store.people.identities import require
from tunesmith.store.store import Store
from tunesmith.store.tables import CHAMPION, AliasRow, AuditRow, VersionRow
from tunesmith.store.until_changed import UntilChanged

_LOG = logging.getLogger("tunesmith.rollout")
_REFUSED, _RESTORED = "champion.refused", "champion.restored"


class Champion(ScopedView):
    """The champion of a name for a tenant and region. version: its label, empty if its record cannot be read.

    refused: why it may not serve now, None if it may. could_serve: labels of the versions that may serve in its place,
    newest first; only where it is refused.
    """

    name: str
    version: str
    digest: str
    expires_at: str | None
    refused: str | None
    could_serve: tuple[str, ...]

    @property
    def expired(self) -> bool:
        """Whether its version's time is over."""
        return is_over(self.expires_at)

    @property
    def warning(self) -> str | None:
        """One line for the operator where it may not serve: why, and what could serve. None if it may serve."""
        if self.refused is None:
            return None
        said = f"nothing serves {self.name}{self.scope.said}: {self.version or short(self.digest)} {self.refused}"
        return f"{said}; {advice(self.could_serve, self.scope)}"


def could_serve(session: Session, store: Store, name: str, scope: Scope) -> tuple[str, ...]:
    """Labels of the versions of a name that may serve a scope now, newest first."""
    query = select(VersionRow.digest).where(VersionRow.name == name).order_by(VersionRow.number.desc())
    labels = []
    for digest in session.scalars(query):
        with contextlib.suppress(TunesmithError):  # a record that cannot be read
            version = load_version(store, digest, session)
            if standing(session, version, scope).granted:
                labels.append(version.label)
    return tuple(labels)


def advice(versions: tuple[str, ...], scope: Scope) -> str:
    """What an operator can do where a champion may not serve. versions: as could_serve gives them."""
    if not versions:
        return "no version could serve now: register and approve one"
    could = f"could serve now: {', '.join(versions)}"
    return NextStep(could, "rollout start", version=versions[0], **scope.fields())


def champion_of(session: Session, store: Store, name: str, scope: Scope) -> Champion | None:
    """The champion of exactly this scope; None if there is none. Raises as list_champions does."""
    return next(iter(list_champions(session, store, name, scope)), None)


def list_champions(
    session: Session, store: Store, name: str | None = None, scope: Scope | None = None, *, most: int | None = None
) -> list[Champion]:
    """Every champion by name, tenant and region. name, scope: only of this one. most: only the first so many.

    Raises TunesmithError where the record of one cannot be read now.
    """
    query = select(AliasRow).where(AliasRow.alias == CHAMPION, AliasRow.version != "")
    query = query if name is None else query.where(AliasRow.name == name)
    query = query if scope is None else query.filter_by(**scope.fields())
    query = query.order_by(AliasRow.name, AliasRow.tenant, AliasRow.region).limit(most)
    rows = session.scalars(query.execution_options(populate_existing=True)).all()
    versions = readable_versions(store, {row.version for row in rows}, session)
    allowed = permissions(session, list(versions.values()))
    champions = []
    for row in rows:
        version, place = versions.get(row.version), Scope(row.tenant, row.region)
        permission = allowed.get(row.version)
        if version is None or permission is None or not (permission.granted and version.scope.covers(place)):
            permission = standing_of(session, store, row.version, place)  # by an override, or why not
        champions.append(
            Champion(
                name=row.name,
                **place.fields(),
                version=version.label if version else "",
                digest=row.version,
                expires_at=version.expires_at if version else None,
                refused=None if permission.granted else permission.message,
                could_serve=() if permission.granted else could_serve(session, store, row.name, place),
            )
        )
    return champions


# What the controller writes down


class ChampionWatch:
    """Finds the champions that may not serve, and tells the operator of changes by the audit log and the server's log.

    Costs one look-up per call while nothing changes.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._champions = UntilChanged[list[Champion]](
            store, lambda champions: not any(one.refused is None and one.expired for one in champions)
        )
        self._noted: list[Champion] | None = None

    def refused(self) -> list[Champion]:
        """The champions that may not serve now, for all tenants and regions."""
        listed = self._champions.get("champions", lambda session: list_champions(session, self._store))
        if listed is not self._noted:
            for champion in note_champions(self._store, listed):
                _LOG.warning("%s", champion.warning or f"{champion.version} serves {champion.name} again")
            self._noted = listed
        return [champion for champion in listed if champion.refused is not None]


def note_champions(store: Store, champions: list[Champion]) -> list[Champion]:
    """Write an audit entry for each champion that lost its standing, or got it back; returns those champions.

    Several controllers may call it at once: each change is written once.
    """
    with store.reading() as session:
        changed = [champion for champion in champions if _news(session, champion) is not None]
    noted = []
    for champion in changed:
        detail: JsonObject = {}
        with contextlib.suppress(_NothingNew):
            action = _RESTORED if champion.refused is None else _REFUSED
            with store.change(CONTROLLER, action, f"{champion.name}@{CHAMPION}", detail) as session:
                now = champion_of(session, store, champion.name, champion.scope)
                if now is None or (now.refused is None) != (champion.refused is None) or _news(session, now) is None:
                    raise _NothingNew
                detail |= now.model_dump(mode="json", exclude={"name", "expires_at"})
                noted.append(now)
    return noted


class _NothingNew(Exception):
    """Another controller wrote it, or it is over."""


def _news(session: Session, champion: Champion) -> str | None:
    """The action to log for a champion; None if the log says so already."""
    query = select(AuditRow).where(
        AuditRow.subject == f"{champion.name}@{CHAMPION}", AuditRow.action.in_((_REFUSED, _RESTORED))
    )
    logged: tuple[str, str | None, str | None] = _RESTORED, None, None
    for row in session.scalars(query.order_by(AuditRow.seq.desc())):
        if (row.detail.get("tenant"), row.detail.get("region")) == (champion.tenant, champion.region):
            logged = row.action, row.detail.get("digest"), row.detail.get("refused")
            break
    if champion.refused is None:
        return _RESTORED if logged[0] == _REFUSED else None
    return None if logged == (_REFUSED, champion.digest, champion.refused) else _REFUSED


def broken_precondition(session: Session, store: Store, rollout: Rollout, override_by: str | None = None) -> str | None:
    """Why a live rollout cannot go on, None if it can: an arm may not serve any more, or the champion changed.

    override_by: a user who lets the canary serve without an approval.
    """
    for arm, digest, by in (("canary", rollout.canary, override_by), ("champion", rollout.stable, None)):
        permission = standing_of(session, store, digest, rollout.scope, override_by=by)
        if not permission.granted:
            return f"the {arm} {permission.message}"
    champion = get_alias(session, rollout.name, rollout.scope)
    if champion is None:
        return "the champion was removed during the rollout"
    if champion.version != rollout.stable:
        return f"the champion was changed during the rollout, to {short(champion.version)}"
    return None


def promotion_problem(
    session: Session, store: Store, rollout: Rollout, override_by: str | None, verified: Verified
) -> str | None:
    """Why the canary may not become champion now, None if it may.

    The user who started the rollout must still be allowed to, and the canary may serve: by an approval, or by an
    override of the user override_by. verified: as of check_may_serve. Raises TunesmithError where that cannot be
    decided now, since the disk is full or a bucket cannot be reached.
    """
    try:
        require(session, rollout.started_by, "rollout.start", scope=rollout.scope)
        canary = load_version(store, rollout.canary, session)
        check_may_serve(session, store, canary, rollout.scope, override_by, verified)
    except (Refused, UsageError) as error:
        return error.what
    return None


def verify_files(store: Store, version: str, scope: Scope) -> Verified:
    """Verify the files of a version (its digest) that may serve a scope, before a transaction that needs it.

    Its weights are copied for that, and all other writers would wait. What may not serve is left for the transaction to
    refuse. Raises TunesmithError where the files cannot be read or copied now.
    """
    verified: Verified = {}
    with contextlib.suppress(Refused, UsageError), store.reading() as session:
        known = load_version(store, version, session)
        check_may_serve(session, store, known, scope, verified=verified)
    return verified


def point_champion(
    session: Session, store: Store, rollout: Rollout, version: str, actor: str, override_by: str | None
) -> None:
    """Make a version (its digest) the champion of a rollout's name, tenant and region.

    override_by: the user who lets it serve without an approval. Raises Refused if it may not serve.
    """
    expected = revision_of(session, rollout.name, rollout.scope)
    set_alias(
        session,
        name=rollout.name,
        version=load_version(store, version, session),
        expected=expected,
        actor=actor,
        scope=rollout.scope,
        override_by=override_by,
    )


def promotions_to_undo(
    session: Session,
    store: Store,
    name: str,
    scope: Scope,
    override_by: str | None,
    verified: Verified,
) -> tuple[list[Rollout], str, str | None]:
    """The promotions that a rollback undoes, newest first, the digest of the version that served before them, and the
    user by whose override it serves.

    There are several if the version that the newest one replaced may not serve any more. override_by: a user who lets
    it serve without an approval. verified: as of check_may_serve. Raises Refused, with the versions that could serve
    now, if no version that served before may serve, or if a person set the champion by hand; TunesmithError if that
    cannot be decided now: a version that may serve must not be passed over.
    """
    champion = get_alias(session, name, scope)
    current, undone = champion.version if champion else "", list[Rollout]()
    problem = f"{name} has no champion" if champion is None else ""
    for promotion in promoted_rollouts(session, name, scope):
        if not problem and not undone and promotion.canary != current:
            break  # set by hand: no rollout knows what it replaced
        undone.append(promotion)
        if not promotion.stable:
            problem = problem or "nothing served before it"
            break
        if promotion.stable == promotion.canary:  # the champion was started again, under an override
            continue
        # An explicit override counts only where the version has no standing of its own.
        before_by = promotion.stable_override_by or None
        for by in dict.fromkeys((before_by, override_by or before_by)):
            try:
                before = load_version(store, promotion.stable, session)
                check_may_serve(session, store, before, scope, by, verified)
                return undone, promotion.stable, by
            except (Refused, UsageError) as error:
                problem = problem or f"the version that served before may not serve now: {error.what}"
    fix = advice(could_serve(session, store, name, scope), scope)
    if undone:
        words = f"{fix}; an admin may go back to a version that is only not approved, by an override"
        fix = NextStep(words, "rollout rollback", rollout=name, **scope.fields(), override=...)
    raise Refused(
        problem or f"no rollout promoted the champion of {name}, so it is not known what served before",
        where=f"champion {short(current)}" if current else None,
        fix=fix,
    )
