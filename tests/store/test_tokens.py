"""Tokens: what they permit and how long, who may make and end them, and what the log keeps of them."""

import pytest
from sqlalchemy import select

from tests.attack_table import Happened
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.text.names import Scope
from tunesmith.registry.history import verify_log
from tunesmith.store import audit
from tunesmith.store.people import tokens
from tunesmith.store.people.identities import add_user, deactivate, ensure_owner
from tunesmith.store.people.tokens import authenticate, issue_token, list_tokens, note_use, revoke_token
from tunesmith.store.store import Store
from tunesmith.store.tables import TokenRow

NOW = 2_000_000_000.0
DAY = 86_400.0


@pytest.fixture
def owned(store: Store) -> Store:
    """A store of olive's, with an operator app and an engineer eve."""
    ensure_owner(store)
    add_user(store, "app", ["operator"], actor="olive")
    add_user(store, "eve", ["engineer"], actor="olive")
    return store


def names(store: Store, user: str, at: float = NOW) -> dict[str, str]:
    """The tokens of a user, by name, with their status."""
    return {token.name: token.status(at) for token in list_tokens(store, user)}


def test_a_name_is_free_again_once_its_token_has_ended(owned: Store) -> None:
    old = issue_token(owned, "app", actor="app", name="ci", expires=NOW + DAY, now=NOW)
    with pytest.raises(UsageError, match="already has a token ci"):
        issue_token(owned, "app", actor="app", name="ci", now=NOW + DAY - 1)
    new = issue_token(owned, "app", actor="app", name="ci", now=NOW + DAY)
    assert authenticate(owned, old, now=NOW) is None
    assert authenticate(owned, new, now=NOW + DAY) is not None
    revoke_token(owned, "app", "ci", actor="app")
    issue_token(owned, "app", actor="app", name="ci")
    assert names(owned, "app") == {"ci": "active"}
    assert verify_log(owned) == []


def test_a_token_works_until_it_expires_or_is_revoked(owned: Store) -> None:
    secret = issue_token(owned, "app", actor="app", name="ci", expires=NOW + DAY, now=NOW)
    for moment in (NOW, NOW + DAY - 0.001):
        assert authenticate(owned, secret, now=moment) is not None
    for moment in (NOW + DAY, NOW + 100 * DAY):
        with pytest.raises(Refused, match="the token ci of app expired on 2033-05-19"):
            authenticate(owned, secret, now=moment)
    secret = issue_token(owned, "app", actor="app", name="other")
    ended = revoke_token(owned, "app", "other", actor="olive", now=NOW)
    assert ended.status(0) == "revoked"
    with pytest.raises(Refused, match="the token other of app was revoked on 2033-05-18"):
        authenticate(owned, secret)
    with pytest.raises(UsageError, match="was revoked on 2033-05-18"):
        revoke_token(owned, "app", "other", actor="olive")


def test_a_deactivated_users_tokens_all_end(owned: Store) -> None:
    secrets = [issue_token(owned, "app", actor="app", name=name) for name in ("one", "two")]
    revoke_token(owned, "app", "one", actor="app", now=NOW)
    deactivate(owned, "app", actor="olive")
    assert names(owned, "app") == {"one": "revoked", "two": "revoked"}
    assert {token.name: token.revoked for token in tokens.list_tokens(owned, "app")}["one"] == NOW
    assert [authenticate(owned, secret) for secret in secrets] == [None, None]
    for actor in ("app", "olive"):
        with pytest.raises(Refused, match="deactivated"):
            issue_token(owned, "app", actor=actor)
    assert verify_log(owned) == []


def test_tokens_of_one_user_are_bounded(owned: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_MOST", 2)
    for bad in (["root"], [], ["chat", ""]):
        with pytest.raises(UsageError, match="scope"):
            issue_token(owned, "app", actor="app", scopes=bad)
    with pytest.raises(UsageError, match="expired already"):
        issue_token(owned, "app", actor="app", expires=NOW, now=NOW)
    issue_token(owned, "app", actor="app", name="one", expires=NOW + 1, now=NOW)
    issue_token(owned, "app", actor="app", name="two", now=NOW)
    with pytest.raises(Refused, match="2 tokens that work"):
        issue_token(owned, "app", actor="app", name="three", now=NOW)
    issue_token(owned, "app", actor="app", name="three", now=NOW + 2)


@pytest.mark.attack("people", "a user, or an admin of one tenant, makes or ends another's token")
def test_only_its_user_and_admins_change_a_token(owned: Store, happened: Happened) -> None:
    add_user(owned, "part", ["admin"], actor="olive", scope=Scope("acme"))
    secret = issue_token(owned, "app", actor="app", name="ci")
    for actor in ("eve", "part"):
        for user in ("app", "olive"):
            with pytest.raises(Refused):
                issue_token(owned, user, actor=actor, name="mine")
            with pytest.raises(Refused):
                revoke_token(owned, user, "ci", actor=actor)
    assert authenticate(owned, secret) is not None
    assert len(list_tokens(owned)) == 1
    revoke_token(owned, "app", "ci", actor="olive")
    happened("refused", 8)


def test_the_log_says_who_issued_and_revoked_which_token_and_no_use(owned: Store) -> None:
    scopes = {"idle": ["all"], "notes": ["feedback", "read"], "ci": ["chat"]}
    for name, chosen in scopes.items():
        secret = issue_token(owned, "app", actor="olive", name=name, scopes=chosen, expires=NOW, now=NOW - DAY)
        found = authenticate(owned, secret, now=NOW - 1)
        assert found is not None
        assert (found.user.name, found.token.name) == ("app", name)
    revoke_token(owned, "app", "ci", actor="app")
    with owned.reading() as session:
        issued, revoked = audit.entries(session)[-2:]
        digest = session.scalars(select(TokenRow.digest).where(TokenRow.name == "ci")).one()
    assert (issued.actor, issued.action, issued.subject) == ("olive", "user.token", "app")
    assert (revoked.actor, revoked.action, revoked.subject) == ("app", "user.token.revoke", "app")
    (state,) = [one for one in issued.detail["tokens"] if one["name"] == "ci"]
    assert (state["scopes"], state["expires"]) == (["chat"], NOW)
    assert digest not in str(issued.detail)
    note_use(owned, {digest: NOW, "sha256:gone": NOW})
    assert {each.name: each.used for each in list_tokens(owned)} == {"ci": NOW, "idle": None, "notes": None}
    assert names(owned, "eve") == {}
    with owned.reading() as session:
        assert audit.newest(session).seq == revoked.seq, "a use leaves no entry"
    assert verify_log(owned) == []
