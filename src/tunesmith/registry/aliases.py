"""The alias champion: the version that a name means now, for a tenant and region.

An alias changes by compare-and-set on its revision, inside the caller's transaction. Each change writes an audit entry,
so the audit log is the alias's history.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.scope import Scope
from tunesmith.core.text.names import check_name
from tunesmith.registry.serving import may_serve
from tunesmith.registry.signing.release import Version
from tunesmith.store import audit, database
from tunesmith.store.store import Store
from tunesmith.store.tables import AliasRow

ALIASES = ("champion",)


class Alias(BaseModel):
    """Where an alias points. version: the version record's digest. revision: grows with each change.

    override_by: the user who lets the version serve without an approval, "" where nobody does.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    alias: str
    tenant: str
    region: str
    version: str
    override_by: str = ""
    revision: int


def get_alias(where: Store | Session, name: str, alias: str, scope: Scope = Scope()) -> Alias | None:
    """Where an alias points for exactly this scope; None where it points nowhere."""
    if not isinstance(where, Session):
        with database.reading(where.engine) as session:
            return get_alias(session, name, alias, scope)
    row = where.get(AliasRow, (name, alias, scope.tenant, scope.region), populate_existing=True)
    return _alias(row) if row is not None and row.version else None


def list_aliases(store: Store) -> list[Alias]:
    """Every alias that points at a version."""
    query = select(AliasRow).where(AliasRow.version != "").order_by(AliasRow.name, AliasRow.alias)
    with database.reading(store.engine) as session:
        return [_alias(row) for row in session.scalars(query)]


def revision_of(session: Session, name: str, alias: str, scope: Scope = Scope()) -> int:
    """The alias's revision, which set_alias expects; 0 if it was never set."""
    row = session.get(AliasRow, (name, alias, scope.tenant, scope.region), populate_existing=True)
    return row.revision if row is not None else 0


def set_alias(
    session: Session,
    *,
    name: str,
    alias: str,
    version: Version | None,
    expected: int,
    actor: str,
    scope: Scope = Scope(),
    override_by: str | None = None,
) -> Alias:
    """Point an alias at a version, or nowhere (None), if its revision is still the expected one.

    session: a write transaction (Store.change). expected: revision_of when the caller decided. override_by: the user
    who lets the version serve without an approval. Raises Refused where another change came first, where the version
    is another name's, or where it may not serve this scope (serving.py).
    """
    if alias not in ALIASES:
        raise UsageError(f"{alias[:80]!r} is not an alias", fix=f"the alias is {ALIASES[0]}")
    check_name(name, "version name")
    if version is not None:
        if version.name != name:
            raise Refused(f"{version.label} is not a version of {name}", fix="register it under that name")
        may_serve(session, version, scope=scope, override_by=override_by).require(version.label)
    points: dict[str, Any] = {"version": version.digest if version else "", "override_by": override_by or ""}
    place: dict[str, Any] = {"name": name, "alias": alias, **scope.fields()}
    if expected == 0 and session.get(AliasRow, tuple(place.values())) is None:
        session.add(AliasRow(**place, **points, revision=1))
        session.flush()
    else:
        query = update(AliasRow).filter_by(**place).where(AliasRow.revision == expected)
        changed = session.execute(query.values(**points, revision=expected + 1))
        if changed.rowcount != 1:  # type: ignore[attr-defined]
            raise Refused(
                f"{name}@{alias} was changed by somebody else",
                where=f"revision {expected}",
                fix="read the alias again, then decide again",
            )
    after = Alias(**place, **points, revision=expected + 1)
    audit.append(session, actor=actor, action="alias.set", subject=f"{name}@{alias}", detail=after.model_dump())
    return after


def _alias(row: AliasRow) -> Alias:
    return Alias.model_validate(row, from_attributes=True)
