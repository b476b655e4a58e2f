"""Keys that users propose for themselves, such as one made in a browser, until an admin confirms them."""

from __future__ import annotations

from tunesmith.core.view import View
from tunesmith.registry.signing import keys
from tunesmith.store.people import proposed_keys as proposals
from tunesmith.store.people.identities import acting
from tunesmith.store.store import Store


class ProposedKeyView(View):
    """A key that waits for an admin. at: when it was proposed. link_by: who made the link to the session in which it
    was, and so may not confirm it; None for no link."""

    user: str
    fingerprint: str
    at: str
    link_by: str | None


class ConfirmedKey(View):
    """A key that counts now."""

    user: str
    label: str
    fingerprint: str


def waiting(store: Store, user: str | None = None) -> tuple[ProposedKeyView, ...]:
    """The keys that wait, the oldest first. user: only theirs."""
    return tuple(ProposedKeyView.of(key) for key in proposals.waiting_keys(store, user))


def propose(store: Store, public_key: str, *, actor: str, session: str | None = None) -> ProposedKeyView:
    """Propose a public key (PEM, P-256) of the actor's own. session: the console's, in which they do so."""
    pem = keys.read_public_key(public_key.encode())
    return ProposedKeyView.of(proposals.propose_key(store, actor, pem, actor=actor, session=session))


def confirm(
    store: Store, user: str, fingerprint: str, *, actor: str | None = None, session: str | None = None
) -> ConfirmedKey:
    """Let a proposed key count. fingerprint: its first 20 digits or more, as the user told them. session: as above."""
    owner = proposals.confirm_key(store, user, fingerprint, actor=acting(store, actor), session=session)
    return ConfirmedKey.of(owner.keys[-1], user=owner.name)


def reject(store: Store, user: str, fingerprint: str, *, actor: str | None = None) -> ProposedKeyView:
    """End a proposal, as its user or as an admin."""
    return ProposedKeyView.of(proposals.reject_key(store, user, fingerprint, actor=acting(store, actor)))
