"""What people without the right, of another region, or with strange addresses get."""

from __future__ import annotations

import pytest

from tests.console.test_login import cookie_of, plain
from tests.fabricate import OPERATOR, OWNER
from tests.server.conftest import Served
from tunesmith.core.scope import Scope
from tunesmith.server.console.session import SECURE_COOKIE
from tunesmith.store import audit, database, sessions
from tunesmith.store.identities import add_user


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
        "/console/runs/99999999999999999999",
        "/console/rollouts?page=9223372036854775808",
        "/console/rows/review?page=99999999999999999999999",
        "/console/versions?q=%00",
        "/console/versions/%00/1",
        "/console/runs?by=%00",
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
