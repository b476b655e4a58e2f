"""What people without the right, of another region, or with strange addresses get."""

from __future__ import annotations

import getpass
import re
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.attack_table import Happened
from tests.console.test_login import cookie_of, plain
from tests.fabricate import APPROVER, OPERATOR, OWNER
from tests.server.conftest import Served
from tunesmith.core.digests import digest_bytes
from tunesmith.core.errors import Inconclusive, Refused
from tunesmith.core.scope import Scope
from tunesmith.registry.signing.attestations import public_pem
from tunesmith.server.console.people.session import SECURE_COOKIE
from tunesmith.server.errors import not_stored, passes
from tunesmith.services.accounts import proposed_keys, users
from tunesmith.services.releases import version_pages
from tunesmith.store import audit, database
from tunesmith.store.people import sessions
from tunesmith.store.people.identities import add_user


@pytest.mark.attack("people", "a person of another region than the server's")
def test_a_person_of_another_region_sees_nothing(served: Served) -> None:
    add_user(served.scene.store, "rita", ["engineer"], actor=OWNER, scope=Scope("", "eu"))
    with plain(served, cookie_of(served, "rita")) as http:
        for path in ("/", "/console/evidence", "/console/versions", "/console/rollouts"):
            page = http.get(path)
            assert (page.status_code, "for the region eu" in page.text) == (403, True)


@pytest.mark.attack("input", "addresses and forms of the console with numbers and characters that nothing has")
def test_strange_addresses_are_no_faults_of_the_server(served: Served) -> None:
    strange = (
        "/console/rows/review/9223372036854775808",
        "/console/rollouts/9223372036854775808",
        "/console/rollouts/4000000000000000000",
        "/console/jobs/99999999999999999999",
        "/console/rollouts?page=9223372036854775808",
        "/console/rows/review?page=99999999999999999999999",
        "/console/versions?q=%00",
        "/console/versions/%00/1",
        "/console/jobs?by=%00",
        "/console/operations/recall?cause=x",
        "/console/operations/recall?cause=row%20",
        "/console/operations/impact?base=%FF",
        "/console/operations/audit?search=%00",
        "/console/evidence/zzz",
        "/console/evidence/zzz/matrix",
    )
    cookie = cookie_of(served, OWNER)
    with plain(served, cookie) as http:
        for path in strange:
            assert http.get(path).status_code < 500, path
        found = sessions.continue_session(served.scene.store, cookie)
        assert found is not None
        answer = http.post("/console/logout", content=b"csrf=%00")
        assert answer.status_code in (400, 403)


def test_the_cookie_goes_over_https_only_where_people_come_by_https(served: Served) -> None:
    link = sessions.make_link(served.scene.store, OPERATOR, actor=OPERATOR)
    host = served.url.partition("://")[2]
    with plain(served) as http:
        done = http.post(f"/console/login/{link}", headers={"Origin": f"https://{host}"})
        assert done.status_code == 303
        (cookie,) = done.headers.get_list("set-cookie")
        assert cookie.startswith(f"{SECURE_COOKIE}=")
        assert "Secure" in cookie
        secret = cookie.partition("=")[2].partition(";")[0]
        assert http.get("/", headers={"Cookie": f"{SECURE_COOKIE}={secret}"}).status_code == 200


@pytest.mark.attack("people", "live changes after the session has ended")
def test_changes_end_with_the_session(served: Served) -> None:
    store, cookie = served.scene.store, cookie_of(served)
    found = sessions.continue_session(store, cookie)
    assert found is not None
    with plain(served, cookie) as http, http.stream("GET", "/console/changes", timeout=120) as stream:
        lines = stream.iter_lines()
        assert next(lines) == ": open"
        sessions.end_session(store, found.id, actor=OPERATOR)
        assert not any(line.startswith("event:") for line in lines), "it ends, and tells nothing more"


def test_a_link_says_in_the_audit_log_who_made_it(served: Served) -> None:
    store = served.scene.store
    assert sessions.follow_link(store, sessions.make_link(store, OPERATOR, actor=OWNER)) is not None
    with database.reading(store.engine) as session:
        newest = audit.entries(session)[-1]
    assert (newest.action, newest.actor, newest.detail["by"]) == ("session.open", OPERATOR, OWNER)
    users.login_link(store, OPERATOR, url="http://127.0.0.1", actor=OPERATOR)
    with database.reading(store.engine) as session:
        newest = audit.entries(session)[-1]
    assert (newest.action, newest.actor, newest.detail["account"]) == ("session.link", OPERATOR, getpass.getuser())


def test_evidence_that_does_not_decide_is_no_trouble_of_the_database(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def undecided(*_: Any, **__: Any) -> None:
        raise Inconclusive("too few requests to say", fix="wait for more")

    monkeypatch.setattr(version_pages, "page_of_versions", undecided)
    with plain(served, cookie_of(served, OPERATOR)) as http:
        page = http.get("/console/versions")
    assert (page.status_code, "too few requests to say" in page.text) == (409, True)
    assert not passes(Inconclusive("too few requests to say"))
    assert not_stored(Inconclusive("too few requests to say")).status == 409


@pytest.mark.attack("people", "an admin proposes a key as an approver, by a link of their own making, and confirms it")
def test_the_maker_of_a_link_confirms_no_key_of_its_session(served: Served, happened: Happened) -> None:
    store = served.scene.store
    add_user(store, "amy", ["admin"], actor=OWNER)

    def begun(name: str, by: str) -> str:
        """A session of a user, by a link that another one made."""
        opened = sessions.follow_link(store, sessions.make_link(store, name, actor=by))
        assert opened is not None
        assert opened.secret is not None
        return opened.secret

    def proposed(cookie: str) -> str:
        pem = public_pem(ec.generate_private_key(ec.SECP256R1()).public_key())
        with plain(served, cookie) as http:
            assert http.post("/console/keys", data={"csrf": csrf(http), "public_key": pem}).status_code == 303
        return digest_bytes(pem.encode())

    def confirmed(cookie: str, fingerprint: str) -> bool:
        with plain(served, cookie) as http:
            fields = {"csrf": csrf(http), "user": APPROVER, "fingerprint": fingerprint}
            answer = http.post("/console/keys/confirm", data=fields)
        assert answer.status_code == 303 or "the two take different people" in answer.text
        return answer.status_code == 303

    mine = proposed(begun(APPROVER, OWNER))
    assert not confirmed(begun(OWNER, OWNER), mine)
    with plain(served, cookie_of(served, OWNER)) as http:
        page = http.get("/console/keys").text
        assert f"a link of {OWNER} opened" in page
        assert "another admin confirms this key" in page
    with pytest.raises(Refused, match=f"{OWNER} made the link"):
        proposed_keys.confirm(store, APPROVER, mine, actor=OWNER)  # on the command line
    assert not confirmed(begun("amy", OWNER), mine)  # one person, by links for two
    happened("refused", 3)
    assert confirmed(begun("amy", "amy"), mine)
    assert confirmed(begun(OWNER, "amy"), proposed(begun(APPROVER, APPROVER)))
    with database.reading(store.engine) as session:
        proposals = [row.detail for row in audit.entries(session) if row.action == "user.key.propose"]
    assert [detail["link_by"] for detail in proposals] == [OWNER, APPROVER]


def csrf(http: httpx.Client) -> str:
    """What the forms of a session carry."""
    found = re.search(r'name="csrf" value="([0-9a-f]+)"', http.get("/console/keys").text)
    assert found
    return found[1]
