"""Which champions may not serve now, and which versions could serve in their place."""

from __future__ import annotations

import contextlib
import logging

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.core.digests import short
from tunesmith.core.errors import NextStep, TunesmithError
from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.core.text.names import CONTROLLER, Scope
from tunesmith.core.values import ScopedView
from tunesmith.registry.serving import permissions, standing, standing_of
from tunesmith.registry.signing.release import is_over
from tunesmith.registry.versions import load_version, readable_versions
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
    found = []
    for row in rows:
        version, place = versions.get(row.version), Scope(row.tenant, row.region)
        permission = allowed.get(row.version)
        if version is None or permission is None or not (permission.granted and version.scope.covers(place)):
            permission = standing_of(session, store, row.version, place)  # by an override, or why not
        found.append(
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
    return found


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
