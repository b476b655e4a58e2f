"""Users' keys, those included that users propose for themselves, such as one made in a browser."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from pydantic import Field

from tunesmith.core.errors import NextStep, UsageError
from tunesmith.core.text.names import is_number
from tunesmith.core.view import View
from tunesmith.registry.history import lost_signatures
from tunesmith.registry.signing import keys
from tunesmith.services.actions import Acting, Named, Request, Short, action
from tunesmith.services.users import PublicKey, is_admin
from tunesmith.store.people import identities, user_keys
from tunesmith.store.people import proposed_keys as proposals
from tunesmith.store.people.identities import User
from tunesmith.store.people.trust import KeyStatus
from tunesmith.store.store import Store


class ProposedKeyView(View):
    """A key that waits for an admin. at: when it was proposed. link_by: who made the link to the session in which it
    was, and so may not confirm it; None for no link."""

    user: str
    fingerprint: str
    at: str
    link_by: str | None


class KeyView(View):
    """One enrolled public key. private: whether this machine holds its private half. active: whether its owner is.

    status: active, retired or revoked. until: the number of the audit entry from which on its signatures do not count,
    None while the key is active.
    """

    user: str
    label: str
    fingerprint: str
    roles: tuple[str, ...]
    active: bool
    status: KeyStatus
    enrolled: int
    until: int | None
    private: bool


class KeyList(View):
    """Every enrolled key, and those that users proposed and no admin has confirmed yet."""

    keys: tuple[KeyView, ...]
    proposed: tuple[ProposedKeyView, ...]


class EnrolledKey(View):
    """A new key. path: the file of its private half, where it was made here."""

    user: str
    label: str
    fingerprint: str
    path: Path | None = Field(default=None, exclude=True)


class EndedKey(View):
    """A key that was retired or revoked. until: the audit entry from which on its signatures do not count.

    also_revoked: labels of keys that were revoked with it, because their enrolment was proved with a stolen key.
    to_look_at: other keys that its user gave to anybody since then, which may be the thief's. They still count.
    invalidated: labels of the versions whose signature does not count any more. unapproved, unrefused: labels of the
    versions with an approval, or a refusal, that does not count any more.
    """

    user: str
    label: str
    fingerprint: str
    status: KeyStatus
    until: int | None
    also_revoked: tuple[str, ...] = ()
    to_look_at: tuple[str, ...] = ()
    invalidated: tuple[str, ...] = ()
    unapproved: tuple[str, ...] = ()
    unrefused: tuple[str, ...] = ()


class CreateKey(Request):
    """A key pair to make. user: by default whoever makes it. label: by default key-1, key-2 and so on."""

    user: Named | None = None
    label: Short | None = None


class EnrolKey(Request):
    """A public key, in PEM, that was made elsewhere, for a user. label: as for CreateKey."""

    user: Named
    public_key: PublicKey
    label: Short | None = None


class ProposeKey(Request):
    """A public key, in PEM, of one's own."""

    public_key: PublicKey


class NameProposal(Request):
    """A key that a user proposed. fingerprint: its first 20 digits or more, as the user told them."""

    user: Named
    fingerprint: Short


class RetireKey(Request):
    """A key of a user to end from now on."""

    user: Named
    label: Named


class RevokeKey(RetireKey):
    """A stolen key of a user. since: from when on it does not count, a time (ISO 8601 with a time zone) or the number
    of an audit entry."""

    since: Named


def list_keys(store: Store) -> KeyList:
    """Every enrolled key, retired and revoked ones included, and the proposed ones."""
    enrolled = (
        KeyView.of(key, user=user.name, roles=user.roles, active=user.active, private=key.fingerprint in private)
        for user in identities.list_users(store)
        for private in [keys.private_keys(store, user)]
        for key in user.keys
    )
    return KeyList(keys=tuple(enrolled), proposed=waiting(store))


def visible_keys(store: Store, viewer: User) -> KeyList:
    """The keys of the users whom the viewer may see, enrolled and proposed."""
    known, everybody = list_keys(store), is_admin(viewer)
    return KeyList(
        keys=tuple(key for key in known.keys if everybody or key.user == viewer.name),
        proposed=tuple(key for key in known.proposed if everybody or key.user == viewer.name),
    )


def waiting(store: Store, user: str | None = None) -> tuple[ProposedKeyView, ...]:
    """The keys that wait for an admin, the oldest first. user: only theirs."""
    return tuple(ProposedKeyView.of(key) for key in proposals.waiting_keys(store, user))


@action("user.key.create")
def create(acting: Acting, asked: CreateKey) -> EnrolledKey:
    """Make a key pair. A user who has a key needs an active private key here, or an admin to act."""
    user = asked.user or acting.actor
    key = keys.create_key(acting.store, user, actor=acting.actor, label=asked.label)
    path = keys.private_key_path(acting.store, user, key.label)
    return EnrolledKey.of(key, user=user, path=path)


@action("user.key.enrol")
def enrol(acting: Acting, asked: EnrolKey) -> EnrolledKey:
    """Bind a public key that was made elsewhere to a user. Needs what a new key pair needs."""
    pem = asked.public_key.encode()
    key = keys.enrol_public_key(acting.store, asked.user, pem, actor=acting.actor, label=asked.label)
    return EnrolledKey.of(key, user=asked.user)


# No token proposes or confirms a key: nobody may have a hand in both, and a token does not say who made it.


@action("user.key.propose", says="proposed a key", at="/keys", form=True, api=False)
def propose(acting: Acting, asked: ProposeKey) -> ProposedKeyView:
    """Propose a key of one's own, whose private half may be in a browser. It counts once an admin confirmed it."""
    pem, session = keys.read_public_key(asked.public_key.encode()), acting.session or None
    key = proposals.propose_key(acting.store, acting.actor, pem, actor=acting.actor, session=session)
    return ProposedKeyView.of(key)


@action("user.key.confirm", permission="user.change", at="/keys/{user}/confirm", whole=True, form=True, api=False)
def confirm(acting: Acting, asked: NameProposal) -> EnrolledKey:
    """Let a key count that somebody else proposed, by the fingerprint that they told."""
    session = acting.session or None
    owner = proposals.confirm_key(acting.store, asked.user, asked.fingerprint, actor=acting.actor, session=session)
    return EnrolledKey.of(owner.keys[-1], user=owner.name)


@action("user.key.reject", says="rejected a proposed key", at="/keys/{user}/reject", form=True, api=False)
def reject(acting: Acting, asked: NameProposal) -> ProposedKeyView:
    """End a proposal: one's own or, as an admin, anybody's."""
    return ProposedKeyView.of(proposals.reject_key(acting.store, asked.user, asked.fingerprint, actor=acting.actor))


@action("user.key.retire", says="retired a key")
def retire(acting: Acting, asked: RetireKey) -> EndedKey:
    """End a key's use: what was recorded before keeps counting, what it signs from now on does not."""
    user = keys.retire_key(acting.store, asked.user, asked.label, actor=acting.actor)
    return _ended(acting.store, user, [asked.label])


@action("user.key.revoke", says="revoked a key", permission="user.change", whole=True)
def revoke(acting: Acting, asked: RevokeKey) -> EndedKey:
    """End a stolen key's use from a moment of the past on. What the audit log recorded from then on does not count.

    Keys that the thief gave to others, where the user is an admin, are named, not revoked.
    """
    store, since = acting.store, _moment(asked.since)
    user, revoked = user_keys.revoke_key(store, asked.user, asked.label, since=since, actor=acting.actor)
    ended = _ended(store, user, revoked)
    known = {key.fingerprint for key in user.keys if key.status == "revoked"}
    given = user_keys.enrolled_by(store, user.name, ended.until or 0)
    others = tuple(what for fingerprint, what in given.items() if fingerprint not in known)
    return ended.model_copy(update={"to_look_at": others})


def _moment(text: str) -> datetime | int:
    if is_number(text):
        return int(text)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise UsageError(
            f"{text[:80]!r} is neither a time nor the number of an audit entry",
            where="since",
            fix=NextStep("write 2030-01-31T00:00:00Z, or the number of an entry", "audit show"),
        )
    return moment


def _ended(store: Store, user: User, labels: list[str]) -> EndedKey:
    """The first key of labels, with what no longer counts because of all of them."""
    ended = {key.label: key for key in user.keys if key.label in labels}
    prints = {key.fingerprint for key in ended.values()}
    invalidated, unapproved, unrefused = lost_signatures(store, prints)
    return EndedKey.of(
        ended[labels[0]],
        user=user.name,
        also_revoked=tuple(labels[1:]),
        invalidated=tuple(invalidated),
        unapproved=tuple(unapproved),
        unrefused=tuple(unrefused),
    )
