"""The alias champion: the version that a name means now, for a tenant and region. `serving.set_alias` changes it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.core.scope import Scope
from tunesmith.store import database
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


def _alias(row: AliasRow) -> Alias:
    return Alias.model_validate(row, from_attributes=True)
