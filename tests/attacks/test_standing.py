"""Standing that is lost under a running server: each input of the decision in turn, through every way to a version."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.attack_table import Happened
from tests.commands import Forked, first_line
from tests.fabricate import APPROVER, NAME, OPERATOR, OWNER, STEWARD, Scene, approve, put_chain
from tests.rollout.conftest import made, scene, versions
from tests.server.conftest import HELLO, Served, engine, running, served
from tests.server.fake_engine import FakeEngine
from tests.server.test_costs import neighbour
from tests.server.test_serve_command import command, folder
from tests.waiting import SECONDS, until
from tunesmith.core.clock import now
from tunesmith.core.scope import Scope
from tunesmith.monitoring.recall import Cause, recall
from tunesmith.registry.aliases import get_alias, set_alias
from tunesmith.registry.registration import register
from tunesmith.registry.signing import release
from tunesmith.registry.versions import Version, resolve
from tunesmith.rollout.standing import ChampionWatch
from tunesmith.services.releases.versions import refuse
from tunesmith.store import audit, database
from tunesmith.store.people.identities import add_user, deactivate, get_user, set_roles
from tunesmith.store.people.tokens import issue_token
from tunesmith.store.people.user_keys import retire_key, revoke_key
from tunesmith.store.store import Store

__all__ = ["engine", "folder", "made", "scene", "served", "versions"]

Versions = dict[int, Version]
ADMIN = "ada"


def roles(user: str, *given: str) -> Callable[[Store], object]:
    return lambda store: set_roles(store, user, given, actor=ADMIN)


def deactivated(user: str) -> Callable[[Store], object]:
    return lambda store: deactivate(store, user, actor=ADMIN)


def revoked(user: str) -> Callable[[Store], object]:
    return lambda store: revoke_key(store, user, get_user(store, user).keys[0].label, since=1, actor=ADMIN)


def second_approval(store: Store) -> None:
    add_user(store, "cat", ["approver"], actor=OWNER)
    approve(store, resolve(store, f"{NAME}@champion"), approver="cat")


def refused(store: Store) -> None:
    add_user(store, "cat", ["approver"], actor=OWNER)
    refuse(store, f"{NAME}@champion", reason="names a customer", actor="cat")


def first_approver_again(store: Store) -> None:
    approve(store, resolve(store, f"{NAME}@champion"), approver=APPROVER)


def recalled(store: Store) -> None:
    champion = resolve(store, f"{NAME}@champion")
    recall(store, Cause(kind="version", value=champion.digest), reason="a licence ended", actor=STEWARD)


# What takes the standing away, what the caller reads, and what gives the standing back, where that is possible.
CHANGES: dict[str, tuple[Callable[[Store], object], str, Callable[[Store], object] | None]] = {
    "the signer loses the role": (
        roles(OWNER, "admin"),
        "has no trusted signature",
        roles(OWNER, "admin", "engineer"),
    ),
    "the signer is deactivated": (deactivated(OWNER), "has no trusted signature", None),
    "the signer's key is revoked": (revoked(OWNER), "has no trusted signature", None),
    "the approver loses the role": (roles(APPROVER, "operator"), "is not approved", roles(APPROVER, "approver")),
    "the approver is deactivated": (deactivated(APPROVER), "is not approved", second_approval),
    "the approver's key is revoked": (revoked(APPROVER), "is not approved", second_approval),
    "an approver refuses the version": (refused, "is not approved", first_approver_again),
    "the version is recalled": (recalled, "was recalled: a licence ended", None),
}


def ways(version: Version) -> list[dict[str, Any]]:
    """Every way to ask for the champion."""
    names = [NAME, f"{NAME}@champion", version.label]
    return [{"model": name} for name in names] + [{"user": "ida"}, {"stream": True}]


def listed(served: Served) -> set[str]:
    return {model.id for model in served.client().models.list()}


def logged(store: Store, action: str) -> list[dict[str, Any]]:
    with database.reading(store.engine) as session:
        return [dict(entry.detail) for entry in audit.entries(session) if entry.action == action]


@pytest.mark.attack("standing", "lost under a running server, asked in every way")
@pytest.mark.parametrize("change", CHANGES)
def test_a_champion_that_loses_its_standing_stops(
    served: Served, versions: Versions, change: str, happened: Happened
) -> None:
    take, why, give_back = CHANGES[change]
    # Another store on the same files, as another process has it.
    store, champion = Store(served.scene.store.root), versions[1]
    add_user(store, ADMIN, ["admin"], actor=OWNER)
    assert {served.post(**way).status_code for way in ways(champion)} == {200}
    assert {NAME, f"{NAME}@champion", champion.label} <= listed(served)
    take(store)
    calls = served.engine.calls
    for way in ways(champion):
        answer = served.post(**way)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (404, "model_not_available"), way
        assert error["message"].endswith(f"{champion.label} {why}.")
        happened("refused, 404")
    assert served.engine.calls == calls
    assert not {NAME, f"{NAME}@champion", champion.label} & listed(served)
    if give_back is not None:
        give_back(store)
        assert {served.post(**way).status_code for way in ways(champion)} == {200}
        assert {NAME, f"{NAME}@champion", champion.label} <= listed(served)
        happened("answers again once it is given back", len(ways(champion)))


@pytest.mark.attack("standing", "lost under a running server, asked in every way")
def test_a_version_that_expires_while_loaded_stops(
    scene: Scene, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, happened: Happened
) -> None:
    until = now() + timedelta(days=1)
    verdict = put_chain(scene.store, seed=9, name="tuned", base=scene.base, dataset=scene.dataset, tuned=True).verdict
    version = register(scene.store, name=NAME, verdict=verdict, actor=OWNER, expires_at=until.isoformat())
    approve(scene.store, version, approver=APPROVER)
    with running(scene, engine) as server:
        server.begin(version)
        assert {server.post(**way).status_code for way in ways(version)} == {200}
        moment: list[datetime] = [until]
        monkeypatch.setattr(release, "now", lambda: moment[0])
        for way in ways(version):
            error = server.post(**way).json()["error"]
            assert error["code"] == "model_not_available"
            assert f"{version.label} expired on" in error["message"]
            happened("refused, 404")
        assert NAME not in listed(server)


@pytest.mark.attack("standing", "an override whose user loses the right")
def test_a_withdrawn_override_stops_its_champion(served: Served, versions: Versions, happened: Happened) -> None:
    store = Store(served.scene.store.root)
    add_user(store, ADMIN, ["admin"], actor=OWNER)
    rollout = served.begin(versions[4], actor=ADMIN, override="a drill")
    served.until(rollout, lambda now: now.status == "promoted")
    assert {served.post(**way).status_code for way in ways(versions[4])} == {200}
    set_roles(store, ADMIN, ["operator"], actor=OWNER)
    for way in ways(versions[4]):
        error = served.post(**way).json()["error"]
        assert (error["code"], "is not approved" in error["message"]) == ("model_not_available", True)
        happened("refused, 404")
    set_roles(store, ADMIN, ["admin"], actor=OWNER)
    assert {served.post(**way).status_code for way in ways(versions[4])} == {200}
    set_roles(store, ADMIN, ["operator"], actor=OWNER)
    approve(store, versions[4], approver=APPROVER)  # an approval needs no override
    assert served.post().status_code == 200


@pytest.mark.attack("standing", "an alias that is moved or removed")
def test_a_moved_alias_counts_from_the_next_request(served: Served, versions: Versions, happened: Happened) -> None:
    store = Store(served.scene.store.root)
    for version in (versions[2], None, versions[1]):
        alias = get_alias(store, NAME, "champion")
        with store.change(OWNER, "test.point", NAME, {}) as session:
            expected = alias.revision if alias else 3
            set_alias(session, name=NAME, alias="champion", version=version, expected=expected, actor=OWNER)
        answer = served.post()
        if version is None:
            assert answer.json()["error"]["code"] == "model_not_found"
            assert NAME not in listed(served)
        else:
            assert answer.headers["x-tunesmith-version"] == version.label
        happened("counts from the next request on")


@pytest.mark.attack("standing", "a key that is retired: what it signed goes on")
def test_a_retired_key_changes_nothing(served: Served, versions: Versions, happened: Happened) -> None:
    store = Store(served.scene.store.root)
    for user in (OWNER, APPROVER):
        retire_key(store, user, get_user(store, user).keys[0].label, actor=OWNER)
        assert {served.post(**way).status_code for way in ways(versions[1])} == {200}
        happened("goes on", len(ways(versions[1])))


@pytest.mark.attack("standing", "a canary that loses it, for users who had it")
def test_users_of_a_canary_go_back_to_stable(served: Served, versions: Versions, happened: Happened) -> None:
    store = Store(served.scene.store.root)
    add_user(store, "cat", ["approver"], actor=OWNER)
    canary = served.scene.version(5, approved=False)
    approve(store, canary, approver="cat")
    rollout = served.begin(canary, {"setWeight": 50}, {"pause": {}}, {"setWeight": 100})
    served.until(rollout, lambda now: now.status == "paused")
    arms = {f"user-{n}": served.post(user=f"user-{n}").headers["x-tunesmith-arm"] for n in range(20)}
    users = [user for user, arm in arms.items() if arm == "canary"]
    assert users
    deactivate(store, "cat", actor=OWNER)
    for user in users:
        assert served.post(user=user).headers["x-tunesmith-version"] == versions[1].label
        happened("stable answers")
    assert served.post(model=canary.label).json()["error"]["code"] == "model_not_available"
    ended = served.until(rollout, lambda now: not now.live)
    assert (ended.status, "cat, who is deactivated" in ended.reason) == ("aborted", True)


@pytest.mark.attack("standing", "lost while a request waits, or while it is answered")
def test_a_waiting_request_is_refused_and_one_under_way_finishes(
    scene: Scene, engine: FakeEngine, versions: Versions, happened: Happened
) -> None:
    with running(scene, engine, together=1) as server:
        server.begin(versions[1])
        assert server.post().status_code == 200
        engine.gate.clear()
        answers: dict[str, Any] = {}

        def ask(which: str) -> None:
            answers[which] = server.post(user=which)

        threads = [threading.Thread(target=ask, args=(which,)) for which in ("under way", "waiting")]
        threads[0].start()
        until(lambda: engine.calls == 2)
        threads[1].start()
        until(lambda: server.worker.waiting() == 1)
        recalled(scene.store)
        engine.gate.set()
        for thread in threads:
            thread.join()
        assert answers["under way"].status_code == 200
        assert answers["waiting"].json()["error"]["code"] == "model_not_available"
        assert engine.calls == 2
        happened("the one under way finishes")
        happened("the waiting one is refused, 404")


@pytest.mark.attack("standing", "another tenant asks for a champion that lost it")
def test_another_tenant_learns_nothing(served: Served, happened: Happened) -> None:
    store = Store(served.scene.store.root)
    theirs = served.scene.version(21, name="theirs", scope=Scope("acme"))
    served.begin(theirs, scope=Scope("acme"))
    for user, tenant in (("al", "acme"), ("bo", "umbra")):
        add_user(store, user, ["operator"], actor=OWNER, scope=Scope(tenant))
    tokens = {user: issue_token(store, user, actor=OWNER) for user in ("al", "bo")}
    deactivate(store, APPROVER, actor=OWNER)
    for model in ("theirs", "theirs@champion", "theirs@v1"):
        said = {}
        for user, token in tokens.items():
            with served.http(token) as http:
                said[user] = http.post("/v1/chat/completions", json={"model": model, "messages": HELLO}).json()["error"]
        assert said["al"]["code"] == "model_not_available"
        assert APPROVER not in said["al"]["message"]
        assert said["bo"]["code"] == "model_not_found"
        happened("404 like a model that does not exist")


@pytest.mark.attack("standing", "digests and names of candidates as models")
def test_only_versions_answer(served: Served, versions: Versions, happened: Happened) -> None:
    version = versions[1]
    for digest in (
        version.digest,
        version.candidate,
        version.verdict,
        version.evaluation,
        served.scene.base,
        served.scene.dataset,
    ):
        for model in (digest, digest[7:71], digest[7:27]):
            assert served.post(model=model).json()["error"]["code"] == "model_not_found"
            happened("refused, 404")
    for model in ("tuned", f"{NAME}:1"):
        assert served.post(model=model).json()["error"]["code"] == "model_not_found"


@pytest.mark.attack("standing", "lost, and the operator is told once")
def test_the_operator_is_told_once(served: Served, happened: Happened) -> None:
    store = Store(served.scene.store.root)
    deactivate(store, APPROVER, actor=OWNER)
    until(lambda: "tunesmith_champions_refused 1.0" in _metrics(served))
    second = ChampionWatch(store)  # another server's controller
    assert [champion.name for champion in second.refused()] == [NAME]
    (entry,) = logged(store, "champion.refused")
    assert (entry["version"], entry["could_serve"]) == (f"{NAME}@v1", [])
    assert f"{APPROVER}, who is deactivated" in entry["refused"]
    with served.http() as http:
        (rollout,) = http.get("/api/rollouts").json()["rollouts"]
    assert rollout["champion"]["refused"] == entry["refused"]
    second_approval(store)
    until(lambda: "tunesmith_champions_refused 0.0" in _metrics(served))
    second.refused()
    assert len(logged(store, "champion.restored")) == 1
    assert NAME not in _metrics(served)
    happened("audit entry, metric and /api/rollouts")


@pytest.mark.attack("standing", "a champion whose files cannot be loaded")
def test_a_champion_that_cannot_be_loaded_is_not_listed(served: Served, versions: Versions, happened: Happened) -> None:
    served.engine.broken.add(served.scene.store.record(versions[1].candidate).parents["training"])
    assert served.post().json()["error"]["code"] == "model_not_available"
    assert not {NAME, f"{NAME}@champion", f"{NAME}@v1"} & listed(served)
    served.engine.broken.clear()
    assert served.post().status_code == 200
    assert NAME in listed(served)
    happened("404 and not listed")


def _metrics(served: Served) -> str:
    with served.http() as http:
        return http.get("/metrics").text


def _command(folder: Path, *words: str) -> tuple[int, str]:
    """(exit code, what it said on stderr) of a command in a process of its own."""
    process = Forked(folder, *words)
    said = process.communicate(SECONDS)[1]
    return process.wait(SECONDS), said


@pytest.mark.slow
@pytest.mark.attack("standing", "lost by a command of another process")
def test_commands_of_another_process_count_at_the_next_request(folder: Path, happened: Happened) -> None:
    with (folder / "tunesmith.yaml").open("a") as file:
        file.write("rollout: {steps: [{setWeight: 100}]}\n")
    process = command(folder, "--port", "0")
    try:
        url = first_line(process)["url"]
        headers = {"Authorization": f"Bearer {(folder / 'token').read_text()}"}
        body = {"model": NAME, "messages": HELLO, "max_tokens": 2}

        def code() -> str:
            document = httpx.post(f"{url}/chat/completions", headers=headers, json=body, timeout=120).json()
            return str(document.get("error", {}).get("code", "answered"))

        assert code() == "answered"
        ended, said = _command(folder, "users", "deactivate", APPROVER, "--as", OWNER)
        assert (ended, f"nothing serves {NAME}" in said) == (0, True), said
        assert code() == "model_not_available"
        assert _command(folder, "rollout", "start", f"{NAME}@v1", "--override", "drill", "--as", OWNER)[0] == 0
        assert code() == "answered"
        recalling = ("recall", "--version", f"{NAME}@v1", "--reason", "wrong", "--as", STEWARD)
        assert _command(folder, *recalling)[0] == 0
        assert code() == "model_not_available"
        assert httpx.get(f"{url}/models", headers=headers).json()["data"] == []
        happened("refused, 404", 2)
        happened("answered")
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)


SHUT_OUT: dict[str, tuple[Callable[[Store], object], int]] = {
    "deactivated": (lambda store: deactivate(store, "neighbour", actor=OWNER), 401),
    "new token": (lambda store: issue_token(store, "neighbour", actor=OWNER), 401),
}


@pytest.mark.attack("people", "a user is shut out while their request waits")
@pytest.mark.parametrize("change", SHUT_OUT)
def test_who_is_shut_out_while_waiting_is_not_answered(
    scene: Scene, engine: FakeEngine, versions: dict[int, Version], happened: Happened, change: str
) -> None:
    shut_out, status = SHUT_OUT[change]
    with running(scene, engine, together=1) as served, ThreadPoolExecutor(2) as pool:
        served.begin(versions[1])
        served.ask()
        token = neighbour(served)

        def ask(token: str) -> httpx.Response:
            with served.http(token) as http:
                return http.post("/v1/chat/completions", json={"model": NAME, "messages": HELLO})

        engine.gate.clear()
        first = pool.submit(ask, served.token)
        until(lambda: engine.calls == 2)
        second = pool.submit(ask, token)
        until(lambda: served.worker.waiting() == 1)
        shut_out(scene.store)
        engine.gate.set()
        assert first.result(300).status_code == 200
        assert second.result(300).status_code == status
        assert engine.calls == 2
    assert {row.caller for row in served.rows()} == {OPERATOR}
    happened(f"refused, {status}, and not recorded")
