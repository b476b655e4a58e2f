"""Legal holds: while a version is held, nothing that it was made from is erased.

Each hold and each end is a signed statement beside the blobs, and an entry of the audit log. The newest about a version
says whether it is held. A statement that the log does not have is newer than it: the database was put back. Pruning
leaves what any version reaches, held or not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.core.digests import digest_bytes
from tunesmith.core.errors import NextStep, Refused
from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.core.values import Digest, Frozen, View
from tunesmith.registry.signing.attestations import open_envelope, stated
from tunesmith.registry.signing.signatures import check_may_sign
from tunesmith.store.people import identities
from tunesmith.store.people.roles import permits
from tunesmith.store.people.trust import TrustedKey, signature_entry
from tunesmith.store.store import HOLDS, Store
from tunesmith.store.tables import AuditRow, ErasureRow

HOLD, END = "version.hold", "hold.end"  # the action; who may end a hold that somebody else set
_KIND = "urn:tunesmith:hold:v1"


class Held(View):
    """A version that is held, or whose hold ended: since when, by whom and why. version: its label, NAME@v3."""

    version: str
    held: bool
    at: str
    by: str
    reason: str

    @property
    def said(self) -> str:
        """`home@v3 is held by sue (2026-01-31): a lawsuit`."""
        how = "is held" if self.held else "was released"
        return f"{self.version} {how} by {self.by} ({self.at[:10]}): {self.reason}"


class HoldStatement(Frozen):
    """What is signed. number: of the statements of a store; digest: the version's; set_by: whose hold ends. The rest is
    as in Held."""

    number: int
    version: str
    digest: Digest
    held: bool
    at: str
    by: str
    reason: str
    set_by: str = ""

    @property
    def key(self) -> str:
        """Where its envelope is kept."""
        return f"{HOLDS}{self.number}.json"

    @property
    def statement(self) -> JsonObject:
        """The in-toto statement."""
        return stated({self.version: self.digest}, _KIND, self.model_dump(mode="json"))


class Holds(NamedTuple):
    """The statements of a store by the digests of their envelopes, oldest first. problems: key -> why what is kept
    there does not count."""

    signed: Mapping[str, HoldStatement]
    problems: Mapping[str, str]


def read_holds(store: Store) -> Holds:
    """Every statement about a hold, verified."""
    signed, problems = dict[str, HoldStatement](), dict[str, str]()
    listed = list(store.blobs.keys(HOLDS))
    keys = identities.trusted_keys(store) if listed else ()
    for key in listed:
        try:
            raw = store.blobs.get(key)
            signed[digest_bytes(raw)] = read_hold(raw, keys, key)[0]
        except Refused as error:
            problems[key] = error.what
    return Holds(dict(sorted(signed.items(), key=lambda one: one[1].number)), problems)


def read_hold(raw: bytes, keys: Sequence[TrustedKey], where: str) -> tuple[HoldStatement, TrustedKey]:
    """A statement about a hold, verified, and the key that signed it. where: its key in the store. Raises Refused for
    one that does not count."""
    statement, by = open_envelope(raw, keys, where)
    try:
        hold = HoldStatement.model_validate(statement["predicate"])
    except (KeyError, TypeError, ValidationError) as error:
        raise Refused("not a statement about a hold", where=where) from error
    if statement != hold.statement or hold.key != where or hold.by != by.user:
        raise Refused("not a statement about a hold under its number, by the one who signed it", where=where)
    own = hold.held or hold.set_by == hold.by
    check_may_sign(by, HOLD if own else END, digest_bytes(raw), where, stands=True)
    return hold, by


def held_versions(store: Store, session: Session) -> dict[str, Held]:
    """The holds that are in force, by the digests of their versions."""
    newest: dict[str, Held] = {}
    files, recorded = read_holds(store).signed, set[str]()
    for row in session.scalars(select(AuditRow).where(AuditRow.action == HOLD).order_by(AuditRow.seq)):
        recorded.add(str(row.detail.get("signature", {}).get("digest")))
        stated = {name: row.detail[name] for name in ("version", "held", "reason")}
        newest[row.subject] = Held(by=row.actor, at=row.at, **stated)
    known = {each.digest: each.number for digest, each in files.items() if digest in recorded}
    for each in files.values():
        before = newest.get(each.digest)
        held_by = before.by if before is not None and before.held else ""
        if each.number > known.get(each.digest, 0) and held_by == ("" if each.held else each.set_by):
            newest[each.digest] = Held.of(each)
    return {digest: held for digest, held in newest.items() if held.held}


def refuse_held(store: Store, session: Session, digests: Collection[str]) -> None:
    """Raise Refused where one of these is a version that is held."""
    for digest, held in held_versions(store, session).items():
        if digest in digests:
            fix = NextStep("have the hold ended first", "hold", version=held.version, end=True, reason=...)
            raise Refused(f"{held.said}; nothing that it was made from is erased", where=held.version, fix=fix)


def state_hold(store: Store, session: Session, about: tuple[str, str], given: Held) -> HoldStatement:
    """What is signed for a hold or its end. about: the version's label and digest.

    A hold is ended by who set it, or by an admin who planned no erasure of the version. Raises Refused for others,
    where there is nothing to end, and for a version that is held already.
    """
    (label, digest), actor, set_by = about, given.by, ""
    held = held_versions(store, session).get(digest)
    user = identities.require(session, actor, HOLD)
    user.require_everything()
    if given.held and held is not None:  # it would be theirs to end
        raise Refused(held.said, where=label, fix=f"leave it, or have {held.by} end it first")
    if not given.held:
        if held is None:
            raise Refused(f"{label} is not held", where=label, fix=NextStep("see it", "show"))
        plans = session.scalars(select(ErasureRow).where(ErasureRow.planned_by == actor))
        planned = any(label in plan.plan.get("versions", ()) for plan in plans)
        if held.by != actor and (planned or not permits(user.roles, END)):
            fix = f"have {held.by} end it, or an admin who planned no erasure of it"
            raise Refused(f"{actor} may not end the hold of {held.by}", where=label, fix=fix)
        set_by = held.by
    numbers = (int(name) for key in store.blobs.keys(HOLDS) if (name := Path(key).stem).isdecimal())
    number = max(numbers, default=0) + 1
    return HoldStatement(number=number, digest=digest, set_by=set_by, **given.model_dump())


def set_hold(store: Store, about: tuple[str, str], given: Held, sign: Callable[[JsonObject], bytes]) -> Held:
    """Hold a version or end its hold. about, given: as for state_hold, which says what raises. sign: gives the envelope
    around a statement."""
    detail: JsonObject = given.model_dump(include={"version", "held", "reason"})
    with store.change(given.by, HOLD, about[1], detail) as session:
        hold = state_hold(store, session, about, given)
        envelope = sign(hold.statement)
        read, key = read_hold(envelope, identities.trusted_keys(session), hold.key)
        if read != hold:
            raise Refused(f"what {given.by} signed is not this hold", fix="have it stated again")
        detail |= signature_entry(key.fingerprint, digest_bytes(envelope))
        store.blobs.put(hold.key, envelope)
    identities.publish_trust(store)
    return given
