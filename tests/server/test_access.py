"""Every route declares who may call it, and what it declares is enforced; tokens over HTTP."""

import re
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute, iter_route_contexts
from fastapi.staticfiles import StaticFiles
from starlette.routing import BaseRoute, Mount
from typer.main import get_command
from typer.testing import CliRunner

from tests.attack_table import Happened
from tests.commands import call
from tests.console.evidence_rows import put_evaluation
from tests.fabricate import NAME, OPERATOR, OWNER, Scene
from tests.server.conftest import Served, running, running_copy
from tests.server.fake_engine import FakeEngine
from tests.waiting import until
from tunesmith.cli.main import app
from tunesmith.monitoring.recall import Cause, recall
from tunesmith.registry.versions import list_versions
from tunesmith.server.answering.routing import Router
from tunesmith.server.errors import ApiError
from tunesmith.store.people.identities import add_user, deactivate
from tunesmith.store.people.roles import ROLES, TOKEN_SCOPES
from tunesmith.store.people.tokens import issue_token, list_tokens, revoke_token
from tunesmith.store.records import Record

DECISIONS = {"public", "session", "any token", *TOKEN_SCOPES}
OPEN = {"/healthz", "/readyz", "/metrics"}


def decided(dependant: Dependant) -> Iterator[str]:
    """What a route's dependencies, and theirs, decide."""
    if (decision := getattr(dependant.call, "decision", None)) is not None:
        yield decision
    for each in dependant.dependencies:
        yield from decided(each)


def decisions(routes: Iterable[BaseRoute], at: str = "") -> Iterator[tuple[str, str, list[str]]]:
    """(path, methods, decisions) of each route, those of mounted applications included. Static files are public."""
    for found in iter_route_contexts(list(routes)):
        route, path = found.original_route, at + (found.path or "")
        if isinstance(route, Mount) and isinstance(route.app, StaticFiles):
            yield path, "GET", ["public"]
        elif isinstance(route, Mount):
            inner = list(route.routes)
            yield from decisions(inner, path) if inner else [(path, "*", [])]
        elif isinstance(route, APIRoute):
            yield path, " ".join(sorted(found.methods or ())), list(decided(found.dependant))
        else:
            yield path, "*", []


def test_every_route_of_the_application_declares_who_may_call_it(shared: Served) -> None:
    found = list(decisions(shared.app.routes))
    assert len(found) > 25
    for path, _, made in found:
        assert len(set(made)) == 1, path
        assert set(made[0].split(" or ")) <= DECISIONS, path
    assert {path for path, _, made in found if made == ["public"] and "static" not in path} >= OPEN


def by_token(served: Served) -> list[tuple[str, str, set[str]]]:
    """(method, path, scopes that may call it) of each route that takes tokens; no scopes where any token may."""
    found = [
        (method, path, set(made[0].split(" or ")) - {"any token"})
        for path, methods, made in decisions(served.app.routes)
        if not set(made) & {"public", "session"}
        for method in methods.split()
    ]
    assert len(found) > 60
    return found


def address(path: str) -> str:
    """An address of a route: each part is its own name."""
    return path.replace("{model:path}", "m").replace("{", "").replace("}", "")


def token_for(served: Served, name: str, scopes: Iterable[str], **more: Any) -> str:
    """A token of a user who has every role, so that only the scopes decide."""
    return issue_token(served.scene.store, "every", actor=OWNER, name=name, scopes=scopes, **more)


@pytest.fixture(scope="module")
def every(made: Scene, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of these tests' own, which add users and tokens."""
    with running_copy(made, tmp_path_factory.mktemp("access")) as server:
        add_user(server.scene.store, "every", ROLES, actor=OWNER)
        yield server


@pytest.mark.attack("people", "a route without a token, or with one that does not hold")
def test_no_route_answers_without_a_token_that_holds(every: Served, happened: Happened) -> None:
    store = every.scene.store
    add_user(store, "gone", ROLES, actor=OWNER)
    tokens = {
        "expired": token_for(every, "expired", ["all"], now=1e9, expires=1e9 + 1),
        "revoked": token_for(every, "revoked", ["all"]),
        "deactivated": issue_token(store, "gone", actor=OWNER),
        "unknown": "tsk_" + "A" * 43,
    }
    revoke_token(store, "every", "revoked", actor=OWNER)
    deactivate(store, "gone", actor=OWNER)
    says = {"expired": "expired on 2001-09-09", "revoked": "was revoked on"}
    with every.http("x") as http:
        del http.headers["authorization"]
        for method, path, _ in by_token(every):
            assert http.request(method, address(path)).status_code == 401, f"{method} {path} without a token"
    clients = {why: every.http(token) for why, token in tokens.items()}
    for method, path, _ in by_token(every):
        for why, http in clients.items():
            answer = http.request(method, address(path))
            assert answer.status_code == 401, f"{method} {path}, {why}"
            assert says.get(why, "No valid token") in answer.json()["error"]["message"]
            assert answer.json()["error"]["code"] == "invalid_api_key"
            happened("refused, 401")


@pytest.mark.attack("people", "a route with a token of another scope")
def test_each_route_takes_its_scopes_and_no_other(every: Served, happened: Happened) -> None:
    narrow = {scope: every.http(token_for(every, scope, [scope])) for scope in TOKEN_SCOPES}
    for method, path, scopes in by_token(every):
        for scope, http in narrow.items():
            answer = http.request(method, address(path))
            allowed = not scopes or scope in scopes | {"all"}
            found = answer.json()["error"]["code"] if answer.status_code >= 400 else ""
            if path == "/api/tokens/{user}/{name}":
                allowed = scope in ("tokens", "all")
            assert (found == "insufficient_scope") != allowed, f"{method} {path} with {scope}: {found}"
            assert answer.status_code != 401
            if not allowed:
                assert answer.status_code == 403
                lacks = f"has no scope {min(scopes, default='tokens')}, only {scope}"
                assert lacks in answer.json()["error"]["message"] or len(scopes) > 1
                happened("refused, 403")


@pytest.mark.attack("people", "a token with scopes that its user's roles do not permit")
def test_a_scope_permits_nothing_that_the_roles_do_not(every: Served, happened: Happened) -> None:
    store = every.scene.store
    add_user(store, "reader", ["operator"], actor=OWNER)
    token = issue_token(store, "reader", actor=OWNER)
    dataset, post = every.scene.dataset, "POST"
    asked = [
        (post, "/api/versions", {}),
        (post, "/api/decisions", {}),
        (post, "/api/decisions/prepare", {}),
        (post, "/api/jobs", {}),
        (post, "/api/review/1/decide", {"decision": "accept", "revision": 0}),
        (post, f"/api/datasets/{dataset}/sign-offs", {"reason": "read it"}),
        (post, "/api/recalls", {"kind": "row", "value": "x", "reason": "why"}),
        (post, "/api/users", {"name": "mallory", "roles": ["admin"]}),
        (post, "/api/users/reader/roles", {"roles": ["admin"]}),
        (post, "/api/tokens", {"user": "every", "name": "mine"}),
        ("DELETE", "/api/tokens/every/expired", {}),
        ("GET", "/v1/files", {}),
        (post, "/v1/files", {}),
        ("DELETE", "/v1/files/file-x", {}),
        (post, "/v1/fine_tuning/jobs", {}),
    ]
    with every.http(token) as http:
        for method, path, body in asked:
            answer = http.request(method, path, json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "permission_denied"), path
            happened("refused, 403")


# What the console shows, the command line and HTTP can show too: the table in the reference is complete and true


TABLE = Path(__file__).parents[2] / "docs" / "reference" / "pages.md"
# Forms of actions, which have a list of their own; logging in and out, files that ship with the pages, and the stream
# that tells open pages to look again.
NO_PAGE = re.compile(r".* /console(/(do/|login|logout|oidc|static|changes).*|/\{rest:path\})?")
SESSION = "only in a session"


def pages() -> list[tuple[str, list[str], list[str], list[str], str]]:
    """(what, routes of the console, commands, routes over HTTP, scopes or why there are none) of each line."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [
        (what, *(re.findall("`([^`]+)`", cell) for cell in (page, command, http)), scope or http)
        for what, page, command, http, scope in cells
    ]


def commands() -> set[str]:
    """Every command of the command line."""

    def under(command: object, path: tuple[str, ...]) -> set[str]:
        inner = getattr(command, "commands", None)
        if inner is None:
            return {" ".join(path)}
        return set().union(*(under(each, (*path, name)) for name, each in inner.items()))

    return under(get_command(app), ())


def test_every_page_of_the_console_is_in_the_table_and_has_a_command_and_a_route(shared: Served) -> None:
    routes = {
        f"{method} {path}": set(made[0].split(" or "))
        for path, methods, made in decisions(shared.app.routes)
        for method in methods.split()
    }
    shown_by = [route for route in routes if re.match(r"\w+ /(console.*)?$", route) and not NO_PAGE.fullmatch(route)]
    assert len(shown_by) > 30
    assert sorted(route for _, shown, _, _, _ in pages() for route in shown) == sorted(shown_by)
    known = commands()
    for what, _, named, over_http, scopes in pages():
        assert named, what
        assert set(named) <= known, f"{what}: {set(named) - known}"
        assert over_http or scopes == SESSION, what
        for route in over_http:
            assert routes[route] & {"any token", *re.findall("[a-z]+", scopes)}, (what, route, routes[route])


def test_the_commands_that_list(scene: Scene) -> None:
    def run(*words: str) -> Any:
        """A command's JSON. It is drawn as well."""
        drawn = CliRunner().invoke(app, [*words, "-C", str(scene.store.root)], catch_exceptions=False)
        assert drawn.exit_code == 0, drawn.output
        assert drawn.stdout
        return call(scene.store.root, *words)

    measured = put_evaluation(scene, n=20).evaluation
    found = run("evaluations")
    assert (found["total"], found["evaluations"][0]["evaluation"]) == (5, measured)
    assert run("evaluations", measured[7:19])["summary"]["evaluation"] == measured
    unmeasured = {**scene.store.record(measured).body, "candidates": {}}
    of_a_later_version = scene.store.put_record(Record(kind="evaluation", body=unmeasured))
    (first, second, *_), lines = run("evaluations")["evaluations"], len(found["evaluations"])
    assert (first["evaluation"], second["evaluation"], lines) == (of_a_later_version, measured, 5)
    assert first["unreadable"].startswith(f"record {of_a_later_version[7:19]} does not state what")
    unread = scene.store.put_record(Record(kind="dataset", body={}))
    listed = {one["dataset"]: one.get("unreadable", "") for one in run("data", "list")["datasets"]}
    assert (listed[scene.dataset], f"record {unread[7:19]} does not state what" in listed[unread]) == ("", True)
    assert run("recalls") == {"recalls": []}
    withdrawn = list_versions(scene.store)[0]
    recall(scene.store, Cause(kind="version", value=withdrawn.digest), reason="why", actor=OWNER)
    assert [one["reason"] for one in run("recalls")["recalls"]] == ["why"]
    assert "licence" in run("notice", f"{NAME}@v1")["notice"]


# /api/tokens: those of whoever calls are the limit


DAY = 86_400


def made(served: Served, token: str | None = None, **body: Any) -> httpx.Response:
    return served.send("/api/tokens", body, token)


def listed(served: Served, token: str | None = None, **query: str) -> list[tuple[str, str, str]]:
    """(user, name, status) of the tokens that a token may see. The server's own one is called `own`."""
    found = served.get("/api/tokens", token, **query).json()["tokens"]
    return [(each["user"], re.sub("^tests-.*", "own", each["name"]), each["status"]) for each in found]


def test_users_make_list_and_revoke_their_own_tokens_and_admins_everybodys(served: Served) -> None:
    answer = made(served, name="ci", scopes=["chat", "feedback"], expires="30d")
    assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
    issued = answer.json()
    assert (issued["user"], issued["name"], issued["scopes"]) == (OPERATOR, "ci", ["chat", "feedback"])
    left = datetime.fromisoformat(issued["expires"]).timestamp() - time.time()
    assert 29.9 * DAY < left <= 30 * DAY
    assert listed(served) == [(OPERATOR, "own", "active"), (OPERATOR, "ci", "active")]
    with served.http(issued["token"]) as leaked:
        refused = leaked.delete(f"/api/tokens/{OPERATOR}/own")
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")
        ended = leaked.delete(f"/api/tokens/{OPERATOR}/ci")  # a leaked token ends itself whatever its scopes are
        assert (ended.status_code, ended.json()["status"]) == (200, "revoked")
        assert leaked.get("/v1/models").status_code == 401
    admin = issue_token(served.scene.store, OWNER, actor=OWNER)
    assert {user for user, _, _ in listed(served, admin)} == {OWNER, OPERATOR}
    assert {user for user, _, _ in listed(served, admin, user=OPERATOR)} == {OPERATOR}
    assert served.get("/api/tokens", user=OWNER).status_code == 403
    given = made(served, admin, user=OPERATOR, name="given", scopes=["read"]).json()
    assert (given["user"], given["scopes"]) == (OPERATOR, ["read"])
    with served.http(admin) as http:
        assert http.delete(f"/api/tokens/{OPERATOR}/given").status_code == 200
        assert http.delete(f"/api/tokens/{OPERATOR}/none").json()["error"]["code"] == "token_not_found"
        assert http.get("/api/drift").json()["error"]["code"] == "no_project"


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
    assert [name for _, name, _ in listed(served)] == ["own", "short", "same", "shorter"]
    assert [one.expires for one in list_tokens(store, OPERATOR) if one.name == "same"] == [end]


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
            token = issue_token(scene.store, OPERATOR, actor=OPERATOR, name=name)
            assert served.get("/v1/models", token).status_code == 200
        issue_token(scene.store, OPERATOR, actor=OPERATOR, name="idle")
        if at_once:
            until(lambda: len(used()) == 2)
    assert used().keys() == {"one", "two"}
    assert all(before <= moment <= time.time() for moment in used().values())
    assert served.serving.used == {}
