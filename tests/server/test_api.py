"""What the pages show and change, over HTTP: answers as documented, changes that count, and nothing for others."""

import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import openapi_spec_validator
import pytest
from jsonschema import Draft202012Validator

from tests.attack_table import Happened
from tests.console.evidence_rows import SECRET, Evaluated, put_evaluation
from tests.console.test_login import cookie_of, csrf, plain
from tests.data.review.test_review import project_in
from tests.fabricate import NAME, OWNER, STEWARD, Scene
from tests.rollout.conftest import copied
from tests.server.conftest import Served, running
from tests.server.fake_engine import FakeEngine
from tests.server.test_access import OPEN, by_token, decisions
from tests.server.test_held import held_answer, holder
from tunesmith.core.messages import Message
from tunesmith.core.text.names import Scope
from tunesmith.data.review.queue import NewItem, add_items
from tunesmith.holding import queue as holding
from tunesmith.jobs import queue as jobs
from tunesmith.registry.versions import Version
from tunesmith.server.app import openapi_document
from tunesmith.store import audit, database
from tunesmith.store.people.identities import add_user
from tunesmith.store.people.roles import ROLES
from tunesmith.store.people.tokens import issue_token

ACME = "acme-lamps"  # a name of the tenant acme
NOWHERE = "sha256:" + "0" * 64
REVIEWED = "a row that only reviewers of everybody's rows read"


@dataclass
class World:
    """A server whose store has an evaluation, a version of acme with a rollout, and an item to review."""

    served: Served
    evaluated: Evaluated
    version: Version
    rollout: int
    held: str

    @property
    def there(self) -> dict[str, str]:
        """A value for each part of an address, of things that there are."""
        dataset, row = self.served.scene.dataset, self.evaluated.rows[0].id
        numbers = dict.fromkeys(("number", "rollout", "job", "item"), str(self.rollout))
        named = {"digest": self.evaluated.evaluation, "other": dataset, "dataset": dataset, "row": row}
        return {**named, **numbers, "name": ACME, "identifier": self.held, "user": "amy"}

    @property
    def nowhere(self) -> dict[str, str]:
        """The same of things that there are not."""
        numbers = dict.fromkeys(("number", "rollout", "job"), "4096")
        named = {"digest": NOWHERE, "other": NOWHERE, "row": "no-row"}
        return {**named, **numbers, "name": "nobodys", "identifier": "0" * 32, "user": "nobodys"}

    def token(self, user: str) -> str:
        """A token of a user for everything."""
        return issue_token(self.served.scene.store, user, actor=OWNER, name=f"api-{secrets.token_hex(4)}")


@pytest.fixture(scope="module")
def world(made: Scene, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("api")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_USER", OWNER)
        copy = copied(made, root / "store")
        evaluated = put_evaluation(copy)
        version = copy.version(9, name=ACME, scope=Scope("acme"))
        (root / "rows.jsonl").write_text("")
        project = project_in(root)
        project.store = copy.store
        for name, scope in (("every", Scope()), ("amy", Scope("acme")), ("eve", Scope("other"))):
            add_user(copy.store, name, ROLES, actor=OWNER, scope=scope)
        turns = (Message(role="user", content=REVIEWED), Message(role="assistant", content="yes"))
        items = [NewItem("row", f"row-{n}", {"flagged": "yes"}, copy.dataset, "train", turns) for n in range(2)]
        add_items(copy.store, items, wanted=1, actor=OWNER)
        with running(copy, FakeEngine(copy.base), project=project) as served:
            served.begin(served.scene.version(8), {"setWeight": 100})
            rollout = served.begin(version, scope=Scope("acme")).id
            for _ in range(rollout):  # a job of acme with the rollout's number, too
                jobs.add(copy.store, "run", {"cause": ACME}, project="p", actor="amy", scope=Scope("acme"))
            answer = held_answer(copy, 7, version)
            holding.put(copy.store, answer, holder().settings, 100)
            yield World(served, evaluated, version, rollout, answer.id)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return openapi_document()


def test_the_document_is_valid_and_describes_every_route(document: dict[str, Any], world: World) -> None:
    openapi_spec_validator.validate(document)
    stated = {(path, method.upper()) for path, operations in document["paths"].items() for method in operations}
    taken = {(path.replace(":path", ""), method) for method, path, _ in by_token(world.served)}
    assert stated == taken | {(path, "GET") for path in OPEN}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert ("security" in operation) == (path not in OPEN), f"{method} {path}"


def check(document: Mapping[str, Any], path: str, method: str, answer: httpx.Response) -> None:
    """An answer is one that the OpenAPI document describes."""
    stated = document["paths"][path][method]["responses"][str(answer.status_code)]["content"]
    if "application/json" in answer.headers["content-type"]:
        schema = {**stated["application/json"]["schema"], "components": document["components"]}
        Draft202012Validator(schema).validate(answer.json())
    else:
        assert answer.headers["content-type"].partition(";")[0] in stated


def test_what_pages_show_is_answered_as_documented(world: World, document: dict[str, Any]) -> None:
    evaluation, dataset = world.evaluated.evaluation, world.served.scene.dataset
    version = f"/api/versions/{ACME}/1"
    asked = {
        "/api/evaluations": "/api/evaluations?page=1",
        "/api/evaluations/{digest}": f"/api/evaluations/{evaluation}?verdict={world.evaluated.verdict}",
        "/api/evaluations/{digest}/findings": f"/api/evaluations/{evaluation}/findings",
        "/api/evaluations/{digest}/requests": f"/api/evaluations/{evaluation}/requests?show=flips&most=3",
        "/api/evaluations/{digest}/requests/{row}": f"/api/evaluations/{evaluation}/requests/{world.there['row']}",
        "/api/versions": "/api/versions?search=acme&state=serving",
        "/api/versions/{name}/{number}": version,
        "/api/versions/{name}/{number}/lineage": f"{version}/lineage",
        "/api/versions/{name}/{number}/records/{digest}": f"{version}/records/{world.version.candidate}",
        "/api/versions/{name}/{number}/records/{digest}/rows": f"{version}/records/{dataset}/rows?split=test",
        "/api/versions/{name}/{number}/documents/{document}": f"{version}/documents/datasheet.md",
        "/api/rollouts": "/api/rollouts",
        "/api/rollouts/{number}": f"/api/rollouts/{world.rollout}",
        "/api/rollouts/{number}/course": f"/api/rollouts/{world.rollout}/course",
        "/api/datasets": "/api/datasets",
        "/api/datasets/{digest}/sign-offs": f"/api/datasets/{dataset}/sign-offs",
        "/api/datasets/{digest}/rows": f"/api/datasets/{dataset}/rows?split=test&search=lamp",
        "/api/review": "/api/review?state=all",
        "/api/review/next": "/api/review/next?after=1",
        "/api/review/{number}": "/api/review/1",
        "/api/recalls": "/api/recalls",
        "/api/recalls/pending": "/api/recalls/pending",
        "/api/impact": "/api/impact?base=tiny",
        "/api/drift": "/api/drift",
        "/api/webhooks": "/api/webhooks",
        "/api/status": "/api/status",
        "/api/audit": "/api/audit?search=version&most=5",
        "/api/users": "/api/users",
        "/api/keys": "/api/keys",
    }
    with world.served.http(world.token("every")) as http:
        for path, url in asked.items():
            answer = http.get(url)
            assert answer.status_code == 200, (url, answer.text)
            assert answer.headers["cache-control"] == "no-store"
            check(document, path, "get", answer)
        assert http.get("/api/review/1").json()["messages"][0]["content"] == REVIEWED
        assert len(http.get("/api/audit?most=5").json()["entries"]) == 5
        for path in (f"{version}/verification", "/api/audit/verification"):
            answer = http.post(path)
            assert (answer.status_code, answer.json()["ok"], answer.json()["problems"]) == (200, True, [])
        for wrong in (
            "/api/evaluations/zzz",
            f"/api/evaluations/{evaluation}/requests?metric=none",
            "/api/versions?state=none",
            "/api/recalls/status?kind=none&value=x",
            "/api/recalls/status?kind=row&value=never-recalled",
            "/api/audit?before=-1",
            "/api/retraining",  # the project does not say when
        ):
            answer = http.get(wrong)
            assert answer.status_code == 400, (wrong, answer.text)


def test_papers_are_written_and_read(world: World, document: dict[str, Any]) -> None:
    with world.served.http(world.token("amy")) as http:
        at = f"/api/versions/{ACME}/1"
        assert http.get(f"{at}/documents/card.md").status_code == 409, "nobody wrote it yet"
        written = http.post("/api/papers", json={"version": f"{ACME}@v1", "papers": ["card", "bom"]})
        assert written.status_code == 200, written.text
        check(document, "/api/papers", "post", written)
        for file in ("card.md", "bom.json"):
            answer = http.get(f"{at}/documents/{file}")
            check(document, "/api/versions/{name}/{number}/documents/{document}", "get", answer)
        shown = http.get(at).json()["papers"]
        assert [each["by"] for each in shown] == ["amy", "amy", "", ""]
    with plain(world.served, cookie_of(world.served, "amy")) as http:
        form = {"csrf": csrf(http.get("/").text), "version": f"{ACME}@v1", "next": f"/console/versions/{ACME}/1"}
        done = http.post("/console/do/papers", data=form)
        assert (done.status_code, done.headers.get("location")) == (303, form["next"]), done.text
        page = http.get(form["next"]).text
        assert f'href="/console/versions/{ACME}/1/ai-act.md"' in page
        assert "a person must fill in" in page


def test_changes_count(world: World) -> None:
    with world.served.http(world.token(STEWARD)) as http:
        done = http.post("/api/review/2/decide", json={"decision": "reject", "reason": "no", "revision": 0})
        assert (done.status_code, done.json()["state"]) == (200, "reject")
        again = http.post("/api/review/2/decide", json={"decision": "accept", "revision": 0})
        assert (again.status_code, again.json()["error"]["code"]) == (409, "refused")
        cause = {"kind": "version", "value": f"{NAME}@v2", "reason": "withdrawn"}
        reach = http.post("/api/recalls", json={**cause, "dry_run": True})
        assert (reach.status_code, reach.json()["done"]) == (200, False), reach.text
        assert http.get("/api/recalls").json() == {"recalls": []}
        gone = http.post("/api/recalls", json=cause)
        assert (gone.status_code, gone.json()["done"]) == (200, True), gone.text
        assert http.get("/api/recalls").json()["recalls"][0]["reason"] == "withdrawn"
        assert http.get(f"/api/recalls/status?kind=version&value={NAME}@v2").status_code == 200
    with world.served.http(world.token("every")) as http:
        new = http.post("/api/users", json={"name": "nina", "roles": ["steward"], "tenant": "acme"})
        assert (new.status_code, new.json()["tenant"]) == (200, "acme")
        assert http.post("/api/users/nina/roles", json={"roles": ["operator"]}).json()["roles"] == ["operator"]
        assert http.post("/api/users/nina/deactivate").json()["active"] is False
        ended = http.post(f"/api/rollouts/{world.rollout}/abort", json={"reason": "why"})
        assert ended.status_code == 409, "it has ended"


BODIES: dict[str, dict[str, Any]] = {
    "/api/rollouts": {"version": f"{ACME}@v1"},
    "/api/rollouts/{rollout}/abort": {"reason": "why"},
    "/api/rollouts/{rollout}/rollback": {"reason": "why"},
    "/api/datasets/{dataset}/sign-offs": {"reason": "why"},
    "/api/review/{item}/decide": {"decision": "accept", "revision": 0},
    "/api/recalls": {"kind": "version", "value": f"{ACME}@v1", "reason": "why"},
    "/api/users": {"name": "mallory", "roles": ["admin"]},
    "/api/users/{user}/roles": {"roles": ["admin"]},
    "/api/users/{user}/deactivate": {},
    "/api/tokens/{user}/{name}": {},
    "/api/keys/{user}/confirm": {"fingerprint": "0" * 64},
    "/api/keys/{user}/reject": {"fingerprint": "0" * 64},
    "/api/held/{identifier}/decide": {"decision": "refuse", "reason": "why"},
    "/api/papers": {"version": f"{ACME}@v1"},
    "/api/decisions/prepare": {"version": f"{ACME}@v1", "decision": "refuse", "reason": "why"},
    "/console/evidence/{digest}/playground": {"question": "x", "candidate": "a"},
}


def same_as_nothing(world: World, http: httpx.Client, method: str, path: str, form: Mapping[str, str]) -> None:
    """A person of another tenant gets the same answer for what there is as for what there is not."""
    answers = []
    for values in (world.there, world.nowhere):
        ids = {key: values.get(key, "x") for key in re.findall(r"\{(\w+)", path)}
        if "versions" in path:
            ids["number"] = "1"
        if "{document}" in path:
            ids["document"] = "report.md"
        if "/datasets/" in path or "/rows/" in path:
            ids["digest"] = values["other"]
        if path.startswith("/console") and "digest" in ids and "records" not in path:
            ids["digest"] = ids["digest"].removeprefix("sha256:")
        if path.startswith("/console/rows"):
            ids["dataset"] = values["other"].removeprefix("sha256:")
        url = re.sub(r"\{(\w+)(:path)?\}", lambda found: ids[found[1]], path)  # noqa: B023
        query = {"base": "tiny", "kind": "row", "value": "x", "cause": "row x"}
        body = BODIES.get(path.replace("/console/do/", "/api/"), {})
        sent: dict[str, Any] = {"data": form} if form else {"json": body}
        answer = http.request(method, url, params=query, **({} if method == "GET" else sent))
        said = answer.text
        for text in (ACME, SECRET, REVIEWED):
            assert text not in said.replace(url, "") or text in str(body), (method, url, said)
        for known in ids.values():
            said = re.sub(rf"(?<!\w){re.escape(known)}(?!\w)", "ID", said)
        answers.append((answer.status_code, said))
    assert answers[0] == answers[1], f"{method} {path}: other answers for what there is"
    assert answers[0][0] < 500, (method, path, answers)


def same_for_stated(tenant: str, send: Callable[[dict[str, str]], httpx.Response]) -> None:
    """A request that states a tenant which is not the caller's tells nothing of a version."""
    answers = [send({"version": f"{ACME}@v{number}", "tenant": tenant}) for number in (1, 99)]
    assert [answer.status_code for answer in answers] == [403, 403]
    assert answers[0].text == answers[1].text


def done_by_eve(world: World) -> list[str]:
    """What eve, of another tenant, has changed, oldest first."""
    with database.reading(world.served.scene.store.engine) as session:
        return [entry.action for entry in audit.entries(session) if entry.actor == "eve"]


@pytest.mark.attack("people", "another tenant's token on every route, with ids of things that there are")
def test_another_tenant_learns_and_changes_nothing(world: World, happened: Happened) -> None:
    with world.served.http(world.token("eve")) as http:
        before = done_by_eve(world)
        for method, path, _ in by_token(world.served):
            same_as_nothing(world, http, method, path, {})
            happened("the same as for nothing")
        for path in ("/api/rollouts", "/api/decisions/prepare"):
            for tenant in ("acme", ""):
                same_for_stated(tenant, lambda body, at=path: http.post(at, json={**BODIES[at], **body}))  # type: ignore[misc]
    assert set(done_by_eve(world)[len(before) :]) <= {"user.token"}
    with world.served.http(world.token("amy")) as http:
        listed = [one["name"] for one in http.get("/api/versions").json()["versions"]]
        assert ACME in listed
        assert http.get(f"/api/versions/{ACME}/1").status_code == 200
        assert http.get("/api/datasets").status_code == 403


@pytest.mark.attack("console", "another tenant's session on every page and form, with ids of things that there are")
def test_another_tenants_pages_tell_and_change_nothing(world: World, happened: Happened) -> None:
    pages = [(method, path) for path, method, made in decisions(world.served.app.routes) if made == ["session"]]
    with plain(world.served, cookie_of(world.served, "eve")) as http:
        mark, before = csrf(http.get("/console/keys").text), done_by_eve(world)
        for method, path in pages:
            if path not in ("/console/changes", "/console/logout"):
                action = BODIES.get(path.replace("/console/do/", "/api/"), {})
                same_as_nothing(world, http, method, path, {**action, "csrf": mark})
                happened("the same as for nothing")
        same_for_stated("acme", lambda body: http.post("/console/do/rollouts", data={"csrf": mark, **body}))
    assert len(pages) > 50
    assert done_by_eve(world) == before
    with plain(world.served, cookie_of(world.served, "amy")) as http:
        for path in (
            f"/console/versions/{ACME}/1",
            f"/console/jobs/{world.rollout}",
            f"/console/rollouts/{world.rollout}",
        ):
            assert ACME in http.get(path).text, path


@pytest.mark.attack("people", "a browser's cookie in place of a token, and forms without the mark of their session")
def test_cookies_open_no_route_and_forms_need_their_mark(world: World, happened: Happened) -> None:
    cookie = cookie_of(world.served, "every")
    with plain(world.served, cookie) as http:
        for method, path, _ in by_token(world.served):
            url = re.sub(r"\{(\w+)(:path)?\}", "1", path)
            answer = http.request(method, url, json={})
            assert answer.status_code == 401, (method, path)
            happened("refused, 401")
        forms = [path for path, *taken in decisions(world.served.app.routes) if taken == ["POST", ["session"]]]
        assert len(forms) > 20
        mark = csrf(http.get("/console/keys").text)
        for path in forms:
            url = re.sub(r"\{(\w+)(:path)?\}", "1", path)
            for fields, headers in (
                ({}, {}),
                ({"csrf": "0" * 64}, {}),
                ({"csrf": mark}, {"Sec-Fetch-Site": "cross-site"}),
                ({"csrf": mark}, {"Sec-Fetch-Site": "same-site"}),
                ({"csrf": mark}, {"Origin": "https://elsewhere.example"}),
            ):
                answer = http.post(url, data=fields, headers=headers)
                assert answer.status_code == 403, (path, headers, answer.status_code)
                happened("refused, 403")
