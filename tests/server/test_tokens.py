"""/api/tokens: tokens over HTTP, with those of whoever calls as the limit."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

import httpx
import pytest

from tests.attack_table import Happened
from tests.fabricate import OPERATOR, OWNER, Scene
from tests.server.conftest import Served, running
from tests.server.fake_engine import FakeEngine
from tests.waiting import until
from tunesmith.registry.history import verify_log
from tunesmith.server.answering.routing import Router
from tunesmith.server.errors import ApiError
from tunesmith.store.people.tokens import issue_token, list_tokens

DAY = 86_400


def made(served: Served, token: str, **body: Any) -> httpx.Response:
    with served.http(token) as http:
        return http.post("/api/tokens", json=body)


def listed(served: Served, token: str, **query: str) -> list[tuple[str, str, str]]:
    """(user, name, status) of the tokens that a token may see. The server's own one is called `own`."""
    with served.http(token) as http:
        found = http.get("/api/tokens", params=query)
    assert found.status_code == 200, found.text
    named = {
        each["name"]: "own" if each["name"].startswith("tests-") else each["name"] for each in found.json()["tokens"]
    }
    return [(each["user"], named[each["name"]], each["status"]) for each in found.json()["tokens"]]


def test_a_user_makes_lists_and_revokes_tokens_over_http(served: Served) -> None:
    answer = made(served, served.token, name="ci", scopes=["chat", "feedback"], expires="30d")
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    issued = answer.json()
    assert (issued["user"], issued["name"], issued["scopes"]) == (OPERATOR, "ci", ["chat", "feedback"])
    left = datetime.fromisoformat(issued["expires"]).timestamp() - time.time()
    assert 29.9 * DAY < left <= 30 * DAY
    assert served.client(issued["token"]).models.list().data
    assert "already has a token ci" in made(served, served.token, name="ci").json()["error"]["message"]
    assert listed(served, served.token) == [(OPERATOR, "own", "active"), (OPERATOR, "ci", "active")]
    with served.http(issued["token"]) as leaked:
        refused = leaked.delete(f"/api/tokens/{OPERATOR}/own")
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")
        ended = leaked.delete(f"/api/tokens/{OPERATOR}/ci")  # a leaked token ends itself whatever its scopes are
        assert (ended.status_code, ended.json()["status"]) == (200, "revoked")
        assert leaked.get("/v1/models").status_code == 401
    with served.http() as http:
        assert issued["token"] not in http.get("/api/tokens").text
        assert http.delete(f"/api/tokens/{OPERATOR}/nothing").json()["error"]["code"] == "token_not_found"
    assert made(served, served.token, name="ci").status_code == 200, "its name is free again"
    assert verify_log(served.scene.store) == []


def test_an_admin_sees_and_changes_everybodys_tokens_and_others_only_their_own(served: Served) -> None:
    admin = issue_token(served.scene.store, OWNER, actor=OWNER)
    assert {user for user, _, _ in listed(served, admin)} == {OWNER, OPERATOR}
    assert {user for user, _, _ in listed(served, admin, user=OPERATOR)} == {OPERATOR}
    assert {user for user, _, _ in listed(served, served.token)} == {OPERATOR}
    with served.http() as http:
        assert http.get("/api/tokens", params={"user": OWNER}).status_code == 403
    assert made(served, admin, name="ci", user="nobody").status_code == 400
    issued = made(served, admin, user=OPERATOR, name="given", scopes=["read"]).json()
    assert (issued["user"], issued["scopes"]) == (OPERATOR, ["read"])
    with served.http(admin) as http:
        assert http.delete(f"/api/tokens/{OPERATOR}/given").status_code == 200


@pytest.mark.attack("people", "a leaked token makes itself a wider or longer one")
def test_a_token_gives_no_more_than_it_has(served: Served, happened: Happened) -> None:
    store, end = served.scene.store, time.time() + 5 * DAY
    token = issue_token(store, OPERATOR, actor=OPERATOR, name="short", scopes=["tokens", "read"], expires=end)
    wider = ({"scopes": ["chat"]}, {"scopes": ["all"]}, {"scopes": ["read", "jobs"]})
    for body in (*wider, {"expires": "6d"}, {"expires": "never"}, {"expires": "99999d"}):
        answer = made(served, token, name="wide", **body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "permission_denied"), body
        happened("refused, 403")
    assert made(served, token, name="same").json()["scopes"] == ["read", "tokens"]
    assert made(served, token, name="shorter", scopes=["read"], expires="4d").status_code == 200
    assert [name for _, name, _ in listed(served, token)] == ["own", "short", "same", "shorter"]
    assert [one.expires for one in list_tokens(store, OPERATOR) if one.name == "same"] == [end]


def test_bad_requests_for_a_token_are_refused(shared: Served) -> None:
    before = listed(shared, shared.token)
    scopes, names = ({"scopes": ["root"]}, {"scopes": []}), ({"name": "A b"}, {"secret": "mine"})
    for body in (*scopes, *names, {"expires": "soon"}, {"expires": "0d"}):
        assert made(shared, shared.token, **{"name": "ci", **body}).status_code == 400, body
    assert made(shared, shared.token, scopes=["chat"]).json()["error"]["param"] == "name"
    assert listed(shared, shared.token) == before


def test_a_token_that_expires_between_two_requests_is_refused(served: Served) -> None:
    now, store = [2e9], served.scene.store
    router = Router(store, "", served.serving.router._versions, clock=lambda: now[0])
    token = issue_token(store, OPERATOR, actor=OPERATOR, name="ci", expires=2e9 + 10, now=2e9)
    for moment in (2e9, 2e9 + 9.9):
        now[0] = moment
        assert router.caller(token).token.name == "ci"
    now[0] = 2e9 + 10
    with pytest.raises(ApiError, match="expired on 2033-05-18") as caught:
        router.caller(token)
    assert caught.value.status == 401


@pytest.mark.parametrize("at_once", [False, True])
def test_when_a_token_was_used_is_written_while_the_server_runs_or_when_it_stops(
    scene: Scene, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    if at_once:
        monkeypatch.setattr("tunesmith.server.app._USED_SECONDS", 0.0)

    def used() -> dict[str, float]:
        return {one.name: one.used for one in list_tokens(scene.store, OPERATOR) if one.used}

    before = time.time()
    with running(scene, engine) as served:
        for name in ("one", "two"):
            with served.http(issue_token(scene.store, OPERATOR, actor=OPERATOR, name=name)) as http:
                assert http.get("/v1/models").status_code == 200
        issue_token(scene.store, OPERATOR, actor=OPERATOR, name="idle")
        if at_once:
            until(lambda: len(used()) == 2)
    assert used().keys() == {"one", "two"}
    assert all(before <= moment <= time.time() for moment in used().values())
    assert served.serving.used == {}
