"""Verification of the audit log: against heads that were signed or kept elsewhere, and against the database's state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.core.digests import digest_file, short
from tunesmith.core.errors import TunesmithError
from tunesmith.registry.signing.signatures import RELEASE
from tunesmith.store import audit, database, identities
from tunesmith.store.audit import Head, Pin
from tunesmith.store.store import Store
from tunesmith.store.tables import AliasRow, UserRow, VersionRow

State = dict[tuple[str, ...], Mapping[str, Any]]


def verify_log(store: Store, heads: Iterable[Head] = ()) -> list[str]:
    """The problems of the audit log, one sentence each; empty if there are none.

    The chain must be whole. It must contain its own head, the head that each version and approval was signed with, and
    heads, which the caller kept elsewhere. Replaying it must give the users, versions and aliases of the database, so
    that a row that was changed without an entry is found.
    """
    pins = [Pin(witness="the head you gave", head=head) for head in heads]
    problems: list[str] = []
    for kind, digest in _signed_with_head(store):
        try:
            head = Head.model_validate(store.record(digest, kind=kind).body["audit"])
        except (TunesmithError, ValueError, KeyError) as error:
            what = error.what if isinstance(error, TunesmithError) else "it names no head of the log"
            problems.append(f"{kind} {short(digest)} cannot be compared with the log: {what}")
        else:
            pins.append(Pin(witness=f"{kind} {short(digest)}", head=head))
    with database.reading(store.engine) as session:
        problems += audit.verify(session, pins)
        if not problems:
            problems += _differences(_replay(session), _actual(session))
    return problems


def _signed_with_head(store: Store) -> list[tuple[str, str]]:
    """(kind, digest) of every record that was signed with a head of the log, by the index and by the version folders.

    An attacker who rewrites the log can also remove rows from the index, but a version that is served needs its folder.
    """
    versions = {digest_file(store.version_folder(ref) / RELEASE) for ref in store.version_folders()}
    versions.update(store.records_of("version"))
    approvals = store.records_of("approval")
    return [("version", digest) for digest in sorted(versions)] + [("approval", digest) for digest in approvals]


def _replay(session: Session) -> State:
    """The users, versions and aliases that result from the log's entries."""
    found: State = {}
    for row in audit.entries(session):
        detail = row.detail
        if row.action.startswith("user.") and isinstance(detail.get("user"), dict):
            found["user", row.subject] = detail["user"]
        elif row.action == "version.register" and isinstance(detail.get("version"), dict):
            version = detail["version"]
            found["version", f"{version.get('name')}@v{version.get('number')}"] = version
        elif row.action == "alias.set":
            place = "/".join(str(detail.get(part, "")) for part in ("tenant", "region"))
            found["alias", f"{row.subject} for {place}"] = detail
    return found


def _actual(session: Session) -> State:
    """The users, versions and aliases in the tables."""
    found: State = {}
    for user in session.scalars(select(UserRow)):
        found["user", user.name] = identities.state(user)
    for version in session.scalars(select(VersionRow)):
        found["version", f"{version.name}@v{version.number}"] = {
            "name": version.name,
            "number": version.number,
            "tenant": version.tenant,
            "region": version.region,
            "digest": version.digest,
        }
    for alias in session.scalars(select(AliasRow)):
        found["alias", f"{alias.name}@{alias.alias} for {alias.tenant}/{alias.region}"] = {
            "name": alias.name,
            "alias": alias.alias,
            "tenant": alias.tenant,
            "region": alias.region,
            "version": alias.version,
            "revision": alias.revision,
        }
    return found


def _differences(logged: State, actual: State) -> list[str]:
    problems = []
    for key in sorted(logged.keys() | actual.keys()):
        kind, name = key
        if key not in logged:
            problems.append(f"{kind} {name} is in the database but not in the log")
        elif key not in actual:
            problems.append(f"{kind} {name} is in the log but not in the database")
        elif logged[key] != actual[key]:
            parts = sorted(part for part in logged[key] if logged[key].get(part) != actual[key].get(part))
            problems.append(f"{kind} {name} differs between the log and the database: {', '.join(parts)}")
    return problems
