"""Who may do what, by use and by attack."""

import getpass
import json
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import select

from tests.acting import do
from tests.attack_table import Happened
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.text.names import Scope
from tunesmith.registry.signing.attestations import public_pem
from tunesmith.services import users
from tunesmith.store.people import identities, tokens, user_keys
from tunesmith.store.people.roles import ACTIONS, ROLES
from tunesmith.store.store import Store
from tunesmith.store.tables import AuditRow, TokenRow, UserRow


@pytest.fixture
def team(store: Store) -> Store:
    identities.ensure_owner(store)
    for role in ROLES:
        identities.add_user(store, f"the-{role}", [role], actor="olive")
    return store


def details(store: Store) -> str:
    with store.reading() as session:
        rows = session.scalars(select(AuditRow))
        return json.dumps([[row.actor, row.action, row.subject, row.detail] for row in rows])


def test_the_first_to_use_a_store_owns_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert identities.acting(store) == "olive"
    owner = identities.get_user(store, "olive")
    assert owner.roles == ("admin", "engineer")
    monkeypatch.setenv("TUNESMITH_USER", "mallory")
    assert identities.ensure_owner(store) == owner
    with pytest.raises(UsageError, match="there is no user mallory"):
        identities.acting(store)
    monkeypatch.delenv("TUNESMITH_USER")
    assert identities.acting(store) == "olive"
    identities.add_user(store, "ann", ["approver"], actor="olive")
    assert identities.acting(store, "ann") == "ann"
    assert len(identities.list_users(store)) == 2


@pytest.mark.parametrize(
    ("login", "name"),
    [("DOMAIN\\First Last", "domain-first-last"), ("..", "owner"), ("", "owner"), ("SYSTEM", "owner"), (None, "owner")],
)
def test_an_operating_systems_name_is_brought_to_our_spelling(
    store: Store, monkeypatch: pytest.MonkeyPatch, login: str | None, name: str
) -> None:
    absent = KeyError("getpwuid(): uid not found: 1234")  # as in a container
    monkeypatch.setattr(getpass, "getuser", mock.Mock(return_value=login, side_effect=None if login else absent))
    monkeypatch.setenv("TUNESMITH_USER", "system")
    with pytest.raises(UsageError, match="reserved"):
        identities.ensure_owner(store)
    monkeypatch.delenv("TUNESMITH_USER")
    assert identities.ensure_owner(store).name == name


def test_many_first_comers_make_one_owner(store: Store) -> None:
    _ = store.engine
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: identities.ensure_owner(Store(store.root)).name, range(4)))
    assert found == ["olive"] * 4
    with store.reading() as session:
        assert len(session.scalars(select(AuditRow)).all()) == 1


def test_each_role_may_exactly_what_the_table_says(team: Store) -> None:
    for action, roles in ACTIONS.items():
        for role in ROLES:
            if role in roles:
                assert identities.require(team, f"the-{role}", action).name == f"the-{role}"
            else:
                with pytest.raises(Refused, match="may not do this: it takes"):
                    identities.require(team, f"the-{role}", action)


def test_what_no_table_names_nobody_may(team: Store) -> None:
    for user in ("olive", "the-admin"):
        with pytest.raises(Refused, match="it takes no role"):
            identities.require(team, user, "store.destroy")
    with pytest.raises(Refused, match="not a user"):
        identities.require(team, "nobody", "model.use")
    for name, roles in (
        ("new", ["root"]),
        ("new", []),
        ("../x", ["admin"]),
        ("A", ["admin"]),
        ("the-admin", ["admin"]),
    ):
        with pytest.raises(UsageError):
            identities.add_user(team, name, roles, actor="olive")
    identities.add_user(team, "eve", ["engineer"], actor="olive", scope=Scope("acme", "eu"))
    identities.require(team, "eve", "version.register", scope=Scope("acme", "eu"))
    for scope in (Scope(), Scope("acme"), Scope("other", "eu"), Scope("acme", "us")):
        with pytest.raises(Refused, match="acme/eu"):
            identities.require(team, "eve", "version.register", scope=scope)
    with team.change("olive", "test.change", "x", {}) as session:  # what is taken away inside it counts at once
        identities.require(session, "the-operator", "rollout.change")
        session.get_one(UserRow, "the-operator").roles = ["engineer"]
        session.get_one(UserRow, "the-approver").active = False
        session.flush()
        with pytest.raises(Refused):
            identities.require(session, "the-operator", "version.approve")
        with pytest.raises(Refused, match="deactivated"):
            identities.require(session, "the-approver", "version.approve")


def test_only_admins_change_users(team: Store) -> None:
    for role in set(ROLES) - {"admin"}:
        actor = f"the-{role}"
        for change, *given in (
            (identities.add_user, "new", ["engineer"]),
            (identities.set_roles, "the-engineer", ["admin"]),
            (identities.set_roles, actor, ["admin"]),
            (identities.deactivate, "olive"),
            (tokens.issue_token, "olive"),
        ):
            with pytest.raises(Refused):
                change(team, *given, actor=actor)
    assert identities.get_user(team, "the-engineer").roles == ("engineer",)


@pytest.mark.attack("people", "the last admin goes, but for one of a tenant or region")
def test_an_admin_of_a_part_does_not_count_as_the_last(team: Store, happened: Happened) -> None:
    for name, scope in (("part", Scope("acme")), ("other", Scope("", "eu"))):
        identities.add_user(team, name, ["admin"], actor="olive", scope=scope)
    identities.deactivate(team, "the-admin", actor="olive")
    with pytest.raises(Refused, match="without an admin of all"):
        identities.set_roles(team, "olive", ["engineer"], actor="olive")
    with pytest.raises(Refused, match="without an admin of all"):
        identities.deactivate(team, "olive", actor="olive")
    assert identities.require(team, "olive", "user.change").active
    happened("refused", 2)


def test_a_deactivated_user_does_nothing_any_more(team: Store) -> None:
    user = "the-operator"
    identities.deactivate(team, user, actor="olive")
    with pytest.raises(Refused, match="deactivated"):
        identities.require(team, user, "model.use")
    with pytest.raises(Refused, match="deactivated"):
        user_keys.enrol_key(team, user, "key", actor=user)


# Tokens


def test_a_token_is_shown_once_and_nothing_else_is_one(team: Store) -> None:
    token = tokens.issue_token(team, "the-engineer", actor="the-engineer")
    assert len(token) >= 43
    found = tokens.authenticate(team, token)
    assert found is not None
    assert found.user.name == "the-engineer"
    with team.reading() as session:
        digest = session.scalars(select(TokenRow.digest)).one()
    pieces = [digest, token[:-1], token + "x", token.swapcase(), token.removeprefix("tsk_")]
    for guess in (*pieces, "", "tsk_", "x" * 10_000_000, "\0", "\ud800", "é", "' or 1=1 --"):
        assert tokens.authenticate(team, guess) is None
    with pytest.raises(TunesmithError) as caught:
        identities.require(team, token, "user.change")  # a client that mistook the token for a name
    assert token not in str(caught.value)
    assert token not in repr(found)
    assert token not in details(team)
    team.engine.dispose()
    for path in team.root.rglob("*"):
        assert path.is_dir() or token.removeprefix("tsk_").encode() not in path.read_bytes(), path


# What is published


def test_the_list_of_trusted_keys_follows_every_change(team: Store) -> None:
    trust = team.root / "trust"
    user_keys.enrol_key(team, "the-approver", "-----BEGIN PUBLIC KEY-----\n", actor="olive")
    identities.set_roles(team, "the-approver", ["approver", "steward"], actor="olive")
    [listed] = json.loads((trust / "keys.json").read_bytes())
    assert (listed["user"], listed["roles"], listed["active"]) == ("the-approver", ["approver", "steward"], True)
    assert (trust / "the-approver.pem").exists()
    identities.deactivate(team, "the-approver", actor="olive")
    [listed] = json.loads((trust / "keys.json").read_bytes())
    assert listed["active"] is False
    assert not (trust / "the-approver.pem").exists()


@pytest.mark.attack("people", "a user takes a name that stands for the system")
def test_names_of_automatic_actors_are_reserved(team: Store, happened: Happened) -> None:
    names = ("controller", "contr0ller", "control1er", "con-troller", "rollout_controller", "system", "sy.stem",
             "tunesrnith", "tunesmith", "server")  # fmt: skip
    for name in names:
        with pytest.raises(UsageError, match="is reserved"):
            identities.add_user(team, name, ["engineer"], actor="olive")
    happened("refused", len(names))


@pytest.mark.attack("people", "a user takes a name that looks like another's")
def test_twins_of_a_users_name_are_refused(team: Store, happened: Happened) -> None:
    identities.add_user(team, "wilma", ["engineer"], actor="olive")
    twins = ("0live", "o1ive", "ol.ive", "olive-", "vvilma", "wilrna", "the_admin", "theadmin")
    others = ("Olive", "OLIVE", "оlive", "ｏlive", "oli\u200bve", "olivé", "the\u2010admin", "ﬁsh", "olıve")
    for name in (*twins, *others):
        with pytest.raises(UsageError, match="looks like the user" if name in twins else "is not a user name"):
            identities.add_user(team, name, ["engineer"], actor="olive")
    happened("refused", len(twins) + len(others))


@pytest.mark.attack("people", "a user is added with a key that is refused")
def test_a_refused_key_leaves_no_user_behind(team: Store, happened: Happened) -> None:
    taken, free = (public_pem(ec.generate_private_key(ec.SECP256R1()).public_key()) for _ in range(2))
    do(team, users.enrol_key, user="the-approver", public_key=taken)
    before, eve = details(team), {"name": "eve", "roles": ["engineer"]}
    for pem, error in ((taken, Refused), ("no key", UsageError)):
        with pytest.raises(error):
            do(team, users.add_with_key, **eve, public_key=pem)
    assert details(team) == before
    with pytest.raises(UsageError, match="no user eve"):
        identities.get_user(team, "eve")
    happened("no user, no entry", 2)
    assert do(team, users.add_with_key, **eve, public_key=free).fingerprint is not None
    assert (team.root / "trust" / "eve.pem").read_text() == free
