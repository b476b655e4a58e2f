"""The alias champion: the version that a name means now, for a tenant and region. `serving.set_alias` changes it."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.core.scope import Scope
from tunesmith.core.view import ScopedView
from tunesmith.store.store import Store, session_of
from tunesmith.store.tables import CHAMPION, AliasRow


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
    return _alias(row) if row is not None and row.version else None


def list_aliases(store: Store) -> list[Alias]:
    """Every alias that points at a version."""
    query = select(AliasRow).where(AliasRow.version != "").order_by(AliasRow.name, AliasRow.alias)
    with store.reading() as session:
        return [_alias(row) for row in session.scalars(query)]


def revision_of(session: Session, name: str, scope: Scope = Scope()) -> int:
    """The champion's revision, which set_alias expects; 0 if it was never set."""
    row = _row(session, name, scope)
    return row.revision if row is not None else 0


def _row(session: Session, name: str, scope: Scope) -> AliasRow | None:
    return session.get(AliasRow, (name, CHAMPION, scope.tenant, scope.region), populate_existing=True)


def _alias(row: AliasRow) -> Alias:
    return Alias.model_validate(row, from_attributes=True)
