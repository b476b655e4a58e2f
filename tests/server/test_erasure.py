"""An erasure over HTTP: a steward plans, what a server loaded stands in the way, a second person signs elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.attack_table import Happened
from tests.console.test_login import cookie_of, csrf, plain
from tests.fabricate import APPROVER, OPERATOR, OWNER
from tests.server.conftest import StartServer
from tests.server.test_decisions import Approver
from tunesmith.registry.verification import verify_version
from tunesmith.registry.versions import Version
from tunesmith.rollout.state import get_rollout
from tunesmith.services.audit import verify_audit
from tunesmith.store.people.identities import set_roles
from tunesmith.store.people.tokens import issue_token

ASKED = {"kind": "subject", "value": "person-1", "reason": "asked"}


@pytest.mark.attack("people", "erasures by the planner, by others, and with other signatures than were stated")
def test_two_people_erase_over_http(
    start_server: StartServer, versions: dict[int, Version], tmp_path: Path, happened: Happened
) -> None:
    first = start_server()
    store = first.scene.store
    second, planner = Approver(first, "stella", tmp_path), Approver(first, "paula", tmp_path)
    for name in ("stella", "paula"):
        set_roles(store, name, ["steward"], actor=OWNER)
    first.ask()
    tokens = {name: issue_token(store, name, actor=OWNER, name="e") for name in (APPROVER, OPERATOR)}
    tokens["paula"] = planner.token
    reads = issue_token(store, "paula", actor=OWNER, name="r", scopes=["read", "rows"])
    assert [first.send("/api/erasures", ASKED, each).status_code for each in (tokens[APPROVER], reads)] == [403, 403]
    assert first.send("/api/erasures", {**ASKED, "value": "nobody"}, tokens["paula"]).status_code == 400
    planned = first.send("/api/erasures", ASKED, tokens["paula"])
    assert (planned.status_code, planned.json()["state"], len(planned.json()["rows"])) == (200, "planned", 12)
    shown = first.get("/api/erasures", tokens[OPERATOR])
    assert shown.status_code == 200
    assert "switch on lamp" not in shown.text
    assert "a server that loaded home@v1" in shown.json()["erasures"][0]["in_use"][0]
    prepare, at = "/api/erasures/1/prepare", "/api/erasures/1/confirm"
    early = first.send(prepare, {}, second.token)
    assert (early.status_code, "aula has not signed it" in early.text) == (409, True)
    own = first.send(prepare, {}, planner.token).json()
    given = {"at": "2026-01-01T00:00:00.000000Z", **planner.signed(own)}
    del given["statement"]
    assert first.send(at, {**given, "signature": second.signed(own)["signature"]}, planner.token).status_code == 409
    happened("refused")
    assert first.send(at, given, planner.token).json()["signed"]
    for who in (tokens["paula"], tokens[OPERATOR], reads):
        assert first.send(prepare, {}, who).status_code in (403, 409)
        happened("refused")
    live = first.paused(versions[3], 50)
    waits = first.send(prepare, {}, second.token)
    assert get_rollout(store, live.id).status == "aborted"
    assert (waits.status_code, "has to be restarted" in waits.text) == (409, True)
    assert first.post().status_code == 404, "what was recalled serves nobody"
    first.stop()
    served = start_server()
    stated = served.send(prepare, {}, second.token)
    assert stated.status_code == 200, stated.text
    given = second.signed(stated.json())
    right: dict[str, Any] = {
        "at": stated.json()["statement"]["predicate"]["at"],
        "key": given["key"],
        "signature": given["signature"],
    }
    other = second.signed({**stated.json(), "payload": "eA=="})["signature"]
    wrong = {"signature": other}, {"at": "2026-01-01T00:00:00.000000Z"}, {"at": right["at"].replace("Z", "1Z")}
    for change in (*wrong, {"key": "sha256:" + "0" * 64}):
        assert served.send(at, {**right, **change}, second.token).status_code == 409, change
        happened("refused")
    assert served.send(at, right, tokens["paula"]).status_code == 409, "the planner sent what another one signed"
    for person, asks in (("stella", True), ("paula", False)):
        with plain(served, cookie_of(served, person)) as http:
            page = http.get("/console/operations").text
            assert ("/console/do/erasures/1/prepare" in page) is asks
            if asks:
                form = {"csrf": csrf(page), **right, "next": "/console/operations#erasures"}
                prepared = http.post("/console/do/erasures/1/prepare", data={"csrf": csrf(page)})
                assert f'data-keys="{right["key"]}"' in prepared.text
                assert "signing.js" in page, "the browser signs"
                done = http.post("/console/do/erasures/1/confirm", data=form)
                assert (done.status_code, done.headers.get("location")) == (303, form["next"]), done.text
                assert "switch on lamp" not in page + prepared.text
    assert served.get("/api/erasures", tokens[OPERATOR]).json()["erasures"][0]["state"] == "done"
    assert verify_audit(store).ok
    assert verify_version(store, "home@v1").ok
