"""Standing that is lost under a running server: each input of the decision in turn, through every way to a version."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.attacks.test_sigterm import serving
from tests.commands import Forked
from tests.fabricate import APPROVER, NAME, OPERATOR, OWNER, STEWARD, Scene, approve, put_chain
from tests.rollout.conftest import Versions, logged, made, scene, versions
from tests.server.conftest import HELLO, Served, StartServer, engine, running, served, start_server
from tests.server.fake_engine import FakeEngine
from tests.server.test_costs import neighbour
from tests.server.test_serve_command import command, folder
from tests.waiting import SECONDS, until
from tunesmith.core.clock import now
from tunesmith.core.text.names import Scope
from tunesmith.monitoring.recall import Cause, recall
from tunesmith.registry.registration import register
from tunesmith.registry.serving import set_alias
from tunesmith.registry.signing import release
from tunesmith.registry.versions import Version, resolve
from tunesmith.rollout.champions import ChampionWatch
from tunesmith.store.people.identities import add_user, deactivate, get_user, set_roles
from tunesmith.store.people.tokens import issue_token
from tunesmith.store.people.user_keys import retire_key, revoke_key
from tunesmith.store.store import Store

__all__ = ["engine", "folder", "made", "scene", "served", "start_server", "versions"]

ADMIN = "ada"


def ways(version: Version) -> list[dict[str, Any]]:
    """Every way to ask for the champion."""
    names = [NAME, f"{NAME}@champion", version.label]
    return [{"model": name} for name in names] + [{"user": "ida"}, {"stream": True}]


def answers(served: Served, version: Version) -> None:
    """Every way leads to an answer."""
    assert {served.post(**way).status_code for way in ways(version)} == {200}
    assert {NAME, f"{NAME}@champion", version.label} <= listed(served)


def refuses(served: Served, version: Version, why: str) -> None:
    """No way leads to an answer, and nothing is computed."""
    calls = served.engine.calls
    for way in ways(version):
        answer = served.post(**way)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (404, "model_not_available"), way
        assert f"{version.label} {why}" in error["message"]
    assert served.engine.calls == calls
    assert not {NAME, f"{NAME}@champion", version.label} & listed(served)


def listed(served: Served) -> set[str]:
    return {model.id for model in served.client().models.list()}


@pytest.mark.attack("standing", "lost under a running server, asked in every way")
def test_a_champion_that_loses_its_standing_stops(served: Served, versions: Versions) -> None:
    # Another store on the same files, as another process has it.
    store, champion = Store(served.scene.store.root), versions[1]
    add_user(store, ADMIN, ["admin"], actor=OWNER)
    add_user(store, "cat", ["approver"], actor=OWNER)
    answers(served, champion)
    changes: tuple[tuple[Callable[[], object], str, Callable[[], object]], ...] = (
        (
            lambda: set_roles(store, OWNER, ["admin"], actor=ADMIN),
            "has no trusted signature.",
            lambda: set_roles(store, OWNER, ["admin", "engineer"], actor=ADMIN),
        ),
        (
            lambda: approve(store, champion, approver="cat", reason="names a customer", decision="refuse"),
            "is not approved.",
            lambda: approve(store, champion, approver=APPROVER),
        ),
        (
            lambda: revoke_key(store, APPROVER, get_user(store, APPROVER).keys[0].label, since=1, actor=ADMIN),
            "is not approved.",
            lambda: approve(store, champion, approver="cat"),
        ),
    )
    for take, why, give_back in changes:
        take()
        refuses(served, champion, why)
        give_back()
        answers(served, champion)
    recalled(store, champion)
    refuses(served, champion, "was recalled: a licence ended.")


def recalled(store: Store, version: Version) -> None:
    recall(store, Cause(kind="version", value=version.digest), reason="a licence ended", actor=STEWARD)


@pytest.mark.attack("standing", "lost under a running server, asked in every way")
def test_a_version_that_expires_while_loaded_stops(
    scene: Scene, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = now() + timedelta(days=1)
    verdict = put_chain(scene.store, seed=9, base=scene.base, dataset=scene.dataset).verdict
    version = register(scene.store, name=NAME, verdict=verdict, actor=OWNER, expires_at=end.isoformat())
    approve(scene.store, version, approver=APPROVER)
    with running(scene, engine) as server:
        server.begin(version)
        answers(server, version)
        monkeypatch.setattr(release, "now", lambda: end)
        refuses(server, version, "expired on")


@pytest.mark.attack("standing", "an override whose user loses the right")
def test_a_withdrawn_override_stops_its_champion(served: Served, versions: Versions) -> None:
    store, champion = Store(served.scene.store.root), versions[4]
    add_user(store, ADMIN, ["admin"], actor=OWNER)
    rollout = served.begin(champion, actor=ADMIN, override="a drill")
    served.until(rollout, lambda now: now.status == "promoted")
    answers(served, champion)
    set_roles(store, ADMIN, ["operator"], actor=OWNER)
    refuses(served, champion, "is not approved")
    set_roles(store, ADMIN, ["admin"], actor=OWNER)
    answers(served, champion)
    set_roles(store, ADMIN, ["operator"], actor=OWNER)
    approve(store, champion, approver=APPROVER)  # an approval needs no override
    assert served.post().status_code == 200


@pytest.mark.attack("standing", "an alias that is moved or removed", "counts from the next request on")
def test_a_moved_alias_counts_from_the_next_request(served: Served, versions: Versions) -> None:
    store = Store(served.scene.store.root)
    for expected, version in ((1, versions[2]), (2, None), (3, versions[1])):
        with store.change(OWNER, "test.point", NAME, {}) as session:
            set_alias(session, name=NAME, version=version, expected=expected, actor=OWNER)
        answer = served.post()
        if version is None:
            assert answer.json()["error"]["code"] == "model_not_found"
            assert NAME not in listed(served)
        else:
            assert answer.headers["x-tunesmith-version"] == version.label


@pytest.mark.attack("standing", "a key that is retired: what it signed goes on", "goes on")
def test_a_retired_key_changes_nothing(served: Served, versions: Versions) -> None:
    store = Store(served.scene.store.root)
    for user in (OWNER, APPROVER):
        retire_key(store, user, get_user(store, user).keys[0].label, actor=OWNER)
        assert {served.post(**way).status_code for way in ways(versions[1])} == {200}


@pytest.mark.attack("standing", "a canary that loses it, for users who had it", "stable answers")
def test_users_of_a_canary_go_back_to_stable(served: Served, versions: Versions) -> None:
    store = Store(served.scene.store.root)
    add_user(store, "cat", ["approver"], actor=OWNER)
    canary = served.scene.version(5, approved=False)
    approve(store, canary, approver="cat")
    rollout = served.paused(canary, 50)
    arms = {f"user-{n}": served.post(user=f"user-{n}").headers["x-tunesmith-arm"] for n in range(20)}
    users = [user for user, arm in arms.items() if arm == "canary"]
    assert users
    deactivate(store, "cat", actor=OWNER)
    for user in users:
        assert served.post(user=user).headers["x-tunesmith-version"] == versions[1].label
    assert served.post(model=canary.label).json()["error"]["code"] == "model_not_available"
    ended = served.until(rollout, lambda now: not now.live)
    assert (ended.status, "cat, who is deactivated" in ended.reason) == ("aborted", True)


def one_waits(server: Served, happens: Callable[[], object]) -> httpx.Response:
    """The answer to a request of another user that waits for one under way, which is answered, while something
    happens."""
    engine = server.engine
    assert server.post().status_code == 200
    with ThreadPoolExecutor(2) as pool:
        engine.gate.clear()
        first = pool.submit(server.post)
        until(lambda: engine.calls == 2)
        second = pool.submit(server.post, neighbour(server))
        until(lambda: server.worker.waiting() == 1)
        happens()
        engine.gate.set()
        assert first.result(SECONDS).status_code == 200
        found = second.result(SECONDS)
        assert engine.calls == 2
    server.stop()
    assert {row.caller for row in server.rows()} == {OPERATOR}, "what was refused is not recorded"
    return found


@pytest.mark.attack("standing", "lost while a request waits, or while it is answered", "the waiting one: 404")
def test_a_waiting_request_is_refused_and_one_under_way_finishes(start_server: StartServer, versions: Versions) -> None:
    server = start_server(together=1)
    answer = one_waits(server, lambda: recalled(server.scene.store, versions[1]))
    assert answer.json()["error"]["code"] == "model_not_available"


@pytest.mark.attack("people", "a user is shut out while their request waits", "refused, 401, and not recorded")
@pytest.mark.parametrize("shut_out", [deactivate, issue_token])  # a new token ends the old one
def test_who_is_shut_out_while_waiting_is_not_answered(start_server: StartServer, shut_out: Any) -> None:
    server = start_server(together=1)
    assert one_waits(server, lambda: shut_out(server.scene.store, "neighbour", actor=OWNER)).status_code == 401


@pytest.mark.attack("standing", "another tenant asks for a champion that lost it")
def test_another_tenant_learns_nothing(served: Served) -> None:
    store = Store(served.scene.store.root)
    theirs = served.scene.version(21, name="theirs", scope=Scope("acme"))
    served.begin(theirs, scope=Scope("acme"))
    tokens = {user: served.person(user, "operator", tenant=of) for user, of in (("al", "acme"), ("bo", "umbra"))}
    deactivate(store, APPROVER, actor=OWNER)
    for model in ("theirs", "theirs@champion", "theirs@v1"):
        said = {user: served.post(token, model=model).json()["error"] for user, token in tokens.items()}
        assert said["al"]["code"] == "model_not_available"
        assert APPROVER not in said["al"]["message"]
        assert said["bo"]["code"] == "model_not_found"


@pytest.mark.attack("standing", "digests and names of candidates as models", "refused, 404")
def test_only_versions_answer(served: Served, versions: Versions) -> None:
    version, scene = versions[1], served.scene
    digests = (version.digest, version.candidate, version.verdict, version.evaluation, scene.base, scene.dataset)
    for model in [digest[start:end] for digest in digests for start, end in ((0, 71), (7, 71), (7, 27))]:
        assert served.post(model=model).json()["error"]["code"] == "model_not_found"
    for model in ("tuned", f"{NAME}:1"):
        assert served.post(model=model).json()["error"]["code"] == "model_not_found"


@pytest.mark.attack("standing", "lost, and the operator is told once", "audit entry, metric and /api/rollouts")
def test_the_operator_is_told_once(served: Served) -> None:
    store = Store(served.scene.store.root)
    deactivate(store, APPROVER, actor=OWNER)
    until(lambda: "tunesmith_champions_refused 1.0" in _metrics(served))
    second = ChampionWatch(store)  # another server's controller
    assert [champion.name for champion in second.refused()] == [NAME]
    (entry,) = logged(served.scene, "champion.refused")
    assert (entry["version"], entry["could_serve"]) == (f"{NAME}@v1", [])
    assert f"{APPROVER}, who is deactivated" in entry["refused"]
    (rollout,) = served.get("/api/rollouts").json()["rollouts"]
    assert rollout["champion"]["refused"] == entry["refused"]
    add_user(store, "cat", ["approver"], actor=OWNER)
    approve(store, resolve(store, f"{NAME}@v1"), approver="cat")
    until(lambda: "tunesmith_champions_refused 0.0" in _metrics(served))
    second.refused()
    assert len(logged(served.scene, "champion.restored")) == 1
    assert NAME not in _metrics(served)


@pytest.mark.attack("standing", "a champion whose files cannot be loaded", "404 and not listed")
def test_a_champion_that_cannot_be_loaded_is_not_listed(served: Served, versions: Versions) -> None:
    served.engine.broken.add(served.scene.store.record(versions[1].candidate).parents["training"])
    assert served.post().json()["error"]["code"] == "model_not_available"
    assert not {NAME, f"{NAME}@champion", f"{NAME}@v1"} & listed(served)
    served.engine.broken.clear()
    assert served.post().status_code == 200
    assert NAME in listed(served)


def _metrics(served: Served) -> str:
    return served.get("/metrics").text


@pytest.mark.slow
@pytest.mark.attack("standing", "lost by a command of another process", "refused, 404; answered")
def test_commands_of_another_process_count_at_the_next_request(folder: Path) -> None:
    with (folder / "tunesmith.yaml").open("a") as file:
        file.write("rollout: {steps: [{setWeight: 100}]}\n")
    with serving(folder, command(folder, "--port", "0")) as (url, headers):
        body = {"model": NAME, "messages": HELLO, "max_tokens": 2}

        def code() -> str:
            document = httpx.post(f"{url}/chat/completions", headers=headers, json=body, timeout=120).json()
            return str(document.get("error", {}).get("code", "answered"))

        def said(*words: str) -> str:
            """What a command in a process of its own says on stderr."""
            process = Forked(folder, *words)
            text = process.communicate(SECONDS)[1]
            assert process.returncode == 0, text
            return text

        assert code() == "answered"
        assert f"nothing serves {NAME}" in said("users", "deactivate", APPROVER, "--as", OWNER)
        assert code() == "model_not_available"
        said("rollout", "start", f"{NAME}@v1", "--override", "drill", "--as", OWNER)
        assert code() == "answered"
        said("recall", "--version", f"{NAME}@v1", "--reason", "wrong", "--as", STEWARD)
        assert code() == "model_not_available"
        assert httpx.get(f"{url}/models", headers=headers).json()["data"] == []
