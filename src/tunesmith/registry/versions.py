"""Find registered versions: by what a person writes, by digest, or all of them; and what records were made from."""

from __future__ import annotations

import contextlib
from collections.abc import Collection

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from tunesmith.core.digests import is_digest, short
from tunesmith.core.errors import NextStep, NotThere, Refused, TunesmithError, UsageError
from tunesmith.core.text.names import Scope, VersionRef
from tunesmith.core.values import ScopedView
from tunesmith.registry.signing.release import Version as Version
from tunesmith.registry.signing.release import read_version
from tunesmith.store.database import covering
from tunesmith.store.store import Store, session_of
from tunesmith.store.tables import CHAMPION, AliasRow, RecordRow, VersionRow


def resolve(store: Store, text: str, *, scope: Scope = Scope(), session: Session | None = None) -> Version:
    """The version that text names: `name@v3`, `name@champion` or the start of a digest.

    scope: the caller's. A version of another tenant or region is treated like one that does not exist. session: read
    through the caller's. Raises NotThere where there is none, UsageError for several.
    """
    query = select(VersionRow.digest).where(*covering(VersionRow, scope))
    name, _, rest = text.partition("@")
    if rest == CHAMPION:
        alias = get_alias(session or store, name, scope)
        query = query.where(VersionRow.digest == (alias.version if alias else ""))
    elif rest:
        ref = VersionRef.parse(text)
        query = query.where(VersionRow.name == ref.name, VersionRow.number == ref.number)
    else:
        start = text.removeprefix("sha256:").lower()
        if len(start) < 4 or not is_digest("sha256:" + start.ljust(64, "0")):
            raise UsageError(f"{text[:80]!r} is not a version", fix="write NAME@vNUMBER, NAME@champion or a digest")
        query = query.where(VersionRow.digest.startswith(f"sha256:{start}"))
    with session_of(session or store) as current:
        digests = list(current.scalars(query.limit(2)))
    if not digests:
        raise NotThere(f"there is no version {text[:80]!r}", fix=NextStep("list the versions", "show"))
    if len(digests) > 1:
        raise UsageError(f"several versions start with {text[:80]!r}", fix="give more digits")
    return load_version(store, digests[0], session)


def load_version(store: Store, digest: str, session: Session | None = None) -> Version:
    """A registered version by its digest. Raises Refused if it is not registered, or its row contradicts its record."""
    with session_of(session or store) as current:
        row = current.scalars(select(VersionRow).where(VersionRow.digest == digest)).first()
    if row is None:
        raise Refused(f"{short(digest)} is not a registered version", fix=NextStep("register it", "register"))
    return version_of(store, row)


def version_of(store: Store, row: VersionRow) -> Version:
    """The version of a row. Raises Refused if the row contradicts the version's record."""
    version, _ = read_version(store.record(row.digest, kind="version"), store.record_where(row.digest), row.digest)
    stated = (version.name, version.number, version.tenant, version.region)
    if stated != (row.name, row.number, row.tenant, row.region):
        raise Refused(
            f"the database says {row.label}, the version's record says {version.label}",
            where="database, table versions",
            fix=NextStep("check the audit log", "audit verify"),
        )
    return version


def readable_versions(store: Store, digests: Collection[str], session: Session) -> dict[str, Version]:
    """Registered versions by digest, without those whose records cannot be read. One query for all.

    `tunesmith audit verify` says what is wrong with the others.
    """
    versions = {}
    for row in session.scalars(select(VersionRow).where(VersionRow.digest.in_(digests))).all():
        with contextlib.suppress(TunesmithError):
            versions[row.digest] = version_of(store, row)
    return versions


def list_versions(
    store: Store, name: str | None = None, *, containing: str = "", newest: int | None = None
) -> list[Version]:
    """Registered versions by name and number, of every tenant and region.

    name: only of this name. containing: only of names with this text in them. newest: only the last so many that were
    registered; without it every record is read.
    """
    chosen = _digests(name, containing)
    if newest is not None:
        chosen = chosen.join(RecordRow, RecordRow.digest == VersionRow.digest)
        chosen = chosen.order_by(RecordRow.created_at.desc(), VersionRow.digest).limit(newest)
    query = select(VersionRow).where(VersionRow.digest.in_(chosen)).order_by(VersionRow.name, VersionRow.number)
    with store.reading() as session:
        rows = list(session.scalars(query))
    return [version_of(store, row) for row in rows]


def count_versions(store: Store, *, containing: str) -> int:
    """How many versions are registered. containing: only of names with this text in them."""
    with store.reading() as session:
        return session.scalar(select(func.count()).select_from(_digests(None, containing).subquery())) or 0


def _digests(name: str | None, containing: str) -> Select[str]:
    query = select(VersionRow.digest)
    if name is not None:
        query = query.where(VersionRow.name == name)
    return query.where(VersionRow.name.contains(containing, autoescape=True)) if containing else query


class Alias(ScopedView):
    """Where an alias points. version: the version record's digest. revision: grows with each change.

    override_by: the user who lets the version serve without an approval, "" where nobody does.
    """

    name: str
    alias: str
    version: str
    override_by: str = ""
    revision: int


def get_alias(where: Store | Session, name: str, scope: Scope = Scope()) -> Alias | None:
    """Where the champion of a name points for exactly this scope; None where it points nowhere."""
    with session_of(where) as session:
        row = _row(session, name, scope)
    return Alias.of(row) if row is not None and row.version else None


def list_aliases(store: Store) -> list[Alias]:
    """Every alias that points at a version."""
    query = select(AliasRow).where(AliasRow.version != "").order_by(AliasRow.name, AliasRow.alias)
    with store.reading() as session:
        return [Alias.of(row) for row in session.scalars(query)]


def revision_of(session: Session, name: str, scope: Scope) -> int:
    """The champion's revision, which set_alias expects; 0 if it was never set."""
    row = _row(session, name, scope)
    return row.revision if row is not None else 0


def _row(session: Session, name: str, scope: Scope) -> AliasRow | None:
    return session.get(AliasRow, (name, CHAMPION, scope.tenant, scope.region), populate_existing=True)
