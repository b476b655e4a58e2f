"""Which rows of a table belong to a tenant and region."""

from __future__ import annotations

from sqlalchemy import ColumnElement

from tunesmith.core.scope import Scope
from tunesmith.store.tables import FileRow, HeldRow, JobRow, RequestRow, RolloutRow, VersionRow


def within(
    table: type[FileRow | HeldRow | JobRow | RequestRow | RolloutRow | VersionRow], scope: Scope
) -> list[ColumnElement[bool]]:
    """The conditions of a query for what belongs to a scope: rows of its tenant and region, where it names them."""
    pairs = ((table.tenant, scope.tenant), (table.region, scope.region))
    return [column == value for column, value in pairs if value]


def visible(table: type[VersionRow], scope: Scope) -> list[ColumnElement[bool]]:
    """The conditions of a query for what people of a scope may see: what belongs to it, and what is for all."""
    pairs = ((table.tenant, scope.tenant), (table.region, scope.region))
    return [column.in_(("", value)) for column, value in pairs if value]
