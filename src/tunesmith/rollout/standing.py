"""Whether champions and canaries may serve now, and which versions could serve in their place."""

from __future__ import annotations

import contextlib
import logging

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.core.digests import short
from tunesmith.core.errors import NextStep, Refused, TunesmithError, UsageError
from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.core.scope import Scope
from tunesmith.core.text.names import CONTROLLER
from tunesmith.core.view import View
from tunesmith.registry.aliases import get_alias
from tunesmith.registry.serving import Permission, may_serve, permissions
from tunesmith.registry.signing.release import is_over
from tunesmith.registry.versions import Version, load_version, readable_versions
from tunesmith.rollout.state import live_rollout
from tunesmith.store import database
from tunesmith.store.store import Store
from tunesmith.store.tables import AliasRow, AuditRow, VersionRow
from tunesmith.store.until_changed import UntilChanged

_LOG = logging.getLogger("tunesmith.rollout")
_REFUSED, _RESTORED = "champion.refused", "champion.restored"


class Champion(View):
    """The champion of a name for a tenant and region. version: its label, empty if its record cannot be read.

    refused: why it may not serve now, None if it may. could_serve: labels of the versions that may serve in its place,
    newest first; only where it is refused.
    """

    name: str
    tenant: str
    region: str
    version: str
    digest: str
    expires_at: str | None
    refused: str | None
    could_serve: tuple[str, ...]

    @property
    def scope(self) -> Scope:
        """Whom it serves."""
        return Scope(self.tenant, self.region)

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


def standing(session: Session, version: Version, scope: Scope) -> Permission:
    """Whether a version may answer requests of a scope now: by an approval, or by an override that is in force."""
    return may_serve(session, version, scope=scope, override_by=override_in_force(session, version, scope))


def standing_of(
    session: Session, store: Store, digest: str, scope: Scope, *, override_by: str | None = None
) -> Permission:
    """The standing of a version given by its digest. override_by: a user whose override counts, if none is in force.

    Raises TunesmithError where its record cannot be read now, as while a bucket cannot be reached.
    """
    try:
        version = load_version(store, digest, session)
    except (Refused, UsageError):
        return Permission("unknown", "is not in the registry", NextStep("check the audit log", "audit verify"))
    by = override_in_force(session, version, scope) or override_by
    return may_serve(session, version, scope=scope, override_by=by)


def override_in_force(session: Session, version: Version, scope: Scope) -> str | None:
    """The user by whose override a version serves a scope as champion or live canary. None where nobody's does."""
    for covering in scope.covering():
        alias = get_alias(session, version.name, "champion", covering)
        if alias is not None and alias.version == version.digest and alias.override_by:
            return alias.override_by
        rollout = live_rollout(session, version.name, covering)
        if rollout is not None and rollout.canary == version.digest and rollout.override is not None:
            return rollout.started_by
    return None


def could_serve(session: Session, store: Store, name: str, scope: Scope) -> tuple[str, ...]:
    """Labels of the versions of a name that may serve a scope now, newest first."""
    query = select(VersionRow.digest).where(VersionRow.name == name).order_by(VersionRow.number.desc())
    found = []
    for digest in session.scalars(query):
        with contextlib.suppress(TunesmithError):  # a record that cannot be read
            version = load_version(store, digest, session)
            if standing(session, version, scope).granted:
                found.append(version.label)
    return tuple(found)


def advice(versions: tuple[str, ...], scope: Scope) -> str:
    """What an operator can do where a champion may not serve. versions: as could_serve gives them."""
    if not versions:
        return "no version could serve now: register and approve one"
    could = f"could serve now: {', '.join(versions)}"
    return NextStep(could, "rollout start", version=versions[0], **scope.fields())


def champion_of(session: Session, store: Store, name: str, scope: Scope) -> Champion | None:
    """The champion of exactly this scope; None if there is none. Raises as standing_of does."""
    alias = get_alias(session, name, "champion", scope)
    if alias is None:
        return None
    label, expires_at = "", None
    with contextlib.suppress(Refused, UsageError):
        version = load_version(store, alias.version, session)
        label, expires_at = version.label, version.expires_at
    permission = standing_of(session, store, alias.version, scope)
    return Champion(
        name=name,
        tenant=scope.tenant,
        region=scope.region,
        version=label,
        digest=alias.version,
        expires_at=expires_at,
        refused=None if permission.granted else permission.message,
        could_serve=() if permission.granted else could_serve(session, store, name, scope),
    )


def list_champions(session: Session, store: Store, name: str | None = None) -> list[Champion]:
    """Every champion, of one name or of all, by name, tenant and region."""
    query = select(AliasRow).where(AliasRow.alias == "champion", AliasRow.version != "")
    rows = session.scalars(query.order_by(AliasRow.name, AliasRow.tenant, AliasRow.region)).all()
    wanted = [row for row in rows if name in (None, row.name)]
    versions = readable_versions(store, {row.version for row in wanted}, session)
    allowed = permissions(session, list(versions.values()))
    found: list[Champion | None] = []
    for row in wanted:
        version, scope = versions.get(row.version), Scope(row.tenant, row.region)
        if version is not None and allowed[version.digest].granted and version.scope.covers(scope):
            found.append(_serving(row, version))
        else:  # by an override, or why not
            found.append(champion_of(session, store, row.name, scope))
    return [champion for champion in found if champion is not None]


def _serving(row: AliasRow, version: Version) -> Champion:
    """A champion that may serve."""
    return Champion(
        name=row.name,
        tenant=row.tenant,
        region=row.region,
        version=version.label,
        digest=row.version,
        expires_at=version.expires_at,
        refused=None,
        could_serve=(),
    )


# What the controller writes down


class ChampionWatch:
    """Finds the champions that may not serve, and tells the operator of changes by the audit log and the server's log.

    Costs one look-up per call while nothing changes.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._found = store, UntilChanged[list[Champion]](store)
        self._noted: list[Champion] | None = None

    def refused(self) -> list[Champion]:
        """The champions that may not serve now, for all tenants and regions."""
        found = self._found.get(
            "champions",
            lambda session: list_champions(session, self._store),
            lambda champions: not any(one.refused is None and one.expired for one in champions),
        )
        if found is not self._noted:
            for champion in note_champions(self._store, found):
                _LOG.warning("%s", champion.warning or f"{champion.version} serves {champion.name} again")
            self._noted = found
        return [champion for champion in found if champion.refused is not None]


def note_champions(store: Store, champions: list[Champion]) -> list[Champion]:
    """Write an audit entry for each champion that lost its standing, or got it back; returns those champions.

    Several controllers may call it at once: each change is written once.
    """
    with database.reading(store.engine) as session:
        changed = [champion for champion in champions if _news(session, champion) is not None]
    noted = []
    for champion in changed:
        detail: JsonObject = {}
        with contextlib.suppress(_NothingNew):
            action = _RESTORED if champion.refused is None else _REFUSED
            with store.change(CONTROLLER, action, f"{champion.name}@champion", detail) as session:
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
        AuditRow.subject == f"{champion.name}@champion", AuditRow.action.in_((_REFUSED, _RESTORED))
    )
    logged: tuple[str, str | None, str | None] = _RESTORED, None, None
    for row in session.scalars(query.order_by(AuditRow.seq.desc())):
        if (row.detail.get("tenant"), row.detail.get("region")) == (champion.tenant, champion.region):
            logged = row.action, row.detail.get("digest"), row.detail.get("refused")
            break
    if champion.refused is None:
        return _RESTORED if logged[0] == _REFUSED else None
    return None if logged == (_REFUSED, champion.digest, champion.refused) else _REFUSED
