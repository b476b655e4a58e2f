"""Evidence in a real browser: the list, one evaluation, the matrix, one request, and the playground."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import expect
from typer.testing import CliRunner

from tests.console.conftest import Login, check_page, follow
from tests.console.evidence_rows import HOSTILE, SECRET, Evaluated, put_evaluation
from tests.console.test_login import cookie_of, csrf, plain
from tests.data.review.test_review import project_in
from tests.fabricate import APPROVER, NAME, OPERATOR, OWNER, Scene, put_recall
from tests.rollout.conftest import copied
from tests.server.conftest import Served
from tests.waiting import until
from tunesmith.cli.main import app
from tunesmith.core.errors import Refused
from tunesmith.core.text.names import Scope
from tunesmith.engines.protocol import Completion
from tunesmith.evaluation.gates.settings import GATES
from tunesmith.evaluation.gates.verdict import judge
from tunesmith.registry.registration import register
from tunesmith.registry.versions import list_versions
from tunesmith.store.people.identities import add_user
from tunesmith.store.people.tokens import issue_token


@pytest.fixture(scope="session")
def measured(made: Scene, tmp_path_factory: pytest.TempPathFactory) -> tuple[Scene, Evaluated]:
    """The scene with an evaluation, never changed."""
    copy = copied(made, tmp_path_factory.mktemp("measured") / "store")
    found = put_evaluation(copy)
    copy.store.engine.dispose()
    return copy, found


@pytest.fixture
def scene(measured: tuple[Scene, Evaluated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setenv("TUNESMITH_USER", OWNER)
    copy = copied(measured[0], tmp_path / "store")
    yield copy
    copy.store.engine.dispose()


@pytest.fixture
def evaluated(measured: tuple[Scene, Evaluated]) -> Evaluated:
    return measured[1]


def test_an_approver_reads_an_evaluation_down_to_one_answer(served: Served, evaluated: Evaluated, login: Login) -> None:
    page = login(APPROVER, "/console/evidence")
    follow(page.get_by_role("link", name="Evidence").first)
    follow(page.locator("tbody th a").first)
    expect(page.get_by_role("heading", level=1)).to_contain_text("pass")
    expect(page.get_by_role("heading", name="Risks of tuning")).to_be_visible()

    follow(page.get_by_role("link", name="Requests by candidates"))
    expect(page.locator(".matrix tbody tr a").first).to_be_visible()
    assert page.locator("td.change").first.inner_text() == "loss", "what got worse comes first"
    page.get_by_label("Show").select_option("losses")
    expect(page.locator("#results td.change.win")).to_have_count(0)
    page.wait_for_url("**show=losses**")
    page.get_by_label("Show").select_option("all")
    page.get_by_label("Search").fill("7 * 7")
    expect(page.locator(".matrix tbody tr")).to_have_count(1)
    expect(page.get_by_role("status")).to_contain_text("1 of 60 requests")
    page.locator(".matrix tbody a").press("Enter")

    expect(page.get_by_role("heading", name="Reference answer")).to_be_visible()
    expect(page.locator("pre").nth(1)).to_have_text("{{ 7 * 7 }} [click](javascript:alert(1))")
    assert page.locator(".answers ins").count() > 0
    assert page.locator("a[href^=javascript], main script, main img").count() == 0

    page.goto(f"{served.url}{evaluated.path}/requests?page=2")
    expect(page.get_by_text("Page 2 of 2, 60 requests")).to_be_visible()
    expect(page.locator(".matrix tbody tr")).to_have_count(10)
    follow(page.locator(".matrix tbody tr").last.get_by_role("link"))
    expect(page.get_by_text("60 of 60")).to_be_visible()
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_text("59 of 60")).to_be_visible()

    store = served.scene.store
    record = store.record(evaluated.evaluation)
    old = store.put_record(record.model_copy(update={"body": {k: v for k, v in record.body.items() if k != "seed"}}))
    page.goto(f"{served.url}/console/evidence/{old[7:]}")
    expect(page.get_by_role("heading", level=1)).to_contain_text("seed: Field required")


@pytest.mark.attack("people", "an answer that repeats a document which the reader may not see")
def test_what_a_reader_may_not_see_is_withheld(served: Served, evaluated: Evaluated) -> None:
    store = served.scene.store
    register(store, name="acme", verdict=evaluated.verdict, actor=OWNER, scope=Scope("acme"))
    add_user(store, "kim", ["engineer"], actor=OWNER, scope=Scope("acme"), groups=["support"])
    add_user(store, "leo", ["engineer"], actor=OWNER, scope=Scope("acme"))
    add_user(store, "mia", ["engineer"], actor=OWNER, scope=Scope("umbrella"))
    told = [row.id for number, row in enumerate(evaluated.rows) if number % 2]
    seen = {}
    for name in ("kim", "leo"):
        with plain(served, cookie_of(served, name)) as http:
            page = http.get(f"{evaluated.path}/requests/{told[0]}")
            found = http.get(f"{evaluated.path}/matrix", params={"search": SECRET}).text
            number = re.search(r"<strong>(\d+)</strong> of 60 requests", found)
            assert number is not None
            seen[name] = (SECRET in page.text, "docs/safe.md" in page.text, int(number[1]))
            assert ("withheld" in page.text) is (name == "leo")
    assert seen["kim"] == (True, True, 60)
    assert seen["leo"] == (False, False, 60 - len(told)), "neither shown nor found by a search"
    with plain(served, cookie_of(served, "mia")) as http:
        assert http.get("/console/evidence").text.count("<tr") == 0
        assert http.get(evaluated.path).status_code == 404
        # A version of her tenant shows her the evaluation, but not acme's rows.
        register(store, name="both", verdict=evaluated.verdict, actor=OWNER, scope=Scope("umbrella"))
        text = http.get(f"{evaluated.path}/matrix").text
        assert ("of 55 requests" in text, "of acme" in text) == (True, False)
        row = next(row for row in evaluated.rows if row.tenant == "acme")
        assert http.get(f"{evaluated.path}/requests/{row.id}").status_code == 404
        assert "acme</a>" not in http.get(f"{evaluated.path}/findings").text


def test_bad_addresses_are_answered_and_texts_take_the_permission(served: Served, evaluated: Evaluated) -> None:
    with plain(served, cookie_of(served, OWNER)) as http:

        def status(path: str) -> int:
            return http.get(evaluated.path + path).status_code

        assert http.get("/console/evidence?page=0").status_code == 400
        assert "Table of evaluations" in http.get("/console/evidence?page=9").text  # the last page
        assert http.get("/console/evidence/nothing").status_code == 404
        assert status("?verdict=nothing") == 404
        assert status("/requests/nothing") == 404
        assert status("/matrix?page=0") == 400
        assert '<tr><th scope="row">' not in http.get(evaluated.path + "/matrix?page=9").text
        for query in ("focus=nobody", "rival=nobody", "metric=none", "show=everything"):
            assert status(f"/matrix?{query}") == 409, query
        assert status(f"/requests/{evaluated.rows[0].id}?compared=nobody") == 409
    with plain(served, cookie_of(served, OPERATOR)) as http:
        assert "engineers, stewards and approvers" in http.get(evaluated.path).text
        for path in ("/requests", "/matrix", f"/requests/{evaluated.rows[0].id}", "/playground"):
            answer = http.get(evaluated.path + path)
            assert answer.status_code in (403, 409), path
            assert evaluated.rows[0].answer not in answer.text
    put_recall(served.scene.store, evaluated.evaluation)
    with plain(served, cookie_of(served, APPROVER)) as http:
        assert "recalled" in http.get("/console/evidence").text
        assert "consent withdrawn" in http.get(evaluated.path).text
        for path in ("/matrix", f"/requests/{evaluated.rows[0].id}"):
            answer = http.get(evaluated.path + path)
            assert (answer.status_code, evaluated.rows[0].answer in answer.text) == (409, False), path


def test_the_playground_asks_side_by_side_and_keeps_nothing(served: Served, evaluated: Evaluated, login: Login) -> None:
    served.engine.answer = lambda request, adapter: HOSTILE[0] if adapter else f"asked {request.messages[-1].content}"
    page = login(OWNER, evaluated.path + "/playground")
    expect(page.get_by_text("This is no evidence.")).to_be_visible()
    for why in ("not registered as a version", "only evaluations ask", "another base model"):
        expect(page.get_by_text(why)).to_be_visible()
    version = register(served.scene.store, name=NAME, verdict=evaluated.verdict, actor=OWNER)
    page.reload()
    expect(page.get_by_text(f"as {version.label}")).to_be_visible()
    page.get_by_label("Question").fill("turn on <b>everything</b>")
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_text("asked turn on <b>everything</b>").first).to_be_visible()
    expect(page.locator("#answers pre", has_text="document.title")).to_have_text(HOSTILE[0])
    expect(page.locator("#answers section")).to_have_count(4)
    check_page(page)
    assert served.rows() == []


def test_a_judged_candidate_is_registered_on_its_page_and_over_http(
    served: Served, evaluated: Evaluated, login: Login, tmp_path: Path
) -> None:
    store = served.scene.store
    with_project(served, tmp_path)
    add_user(store, "amy", ["engineer"], actor=OWNER)
    page = login("amy", evaluated.path)
    page.on("dialog", lambda dialog: dialog.accept())
    gates = GATES.validate_python({"valid": {"metric": "json_valid", "at_least": 0.5}})
    endpoint = judge(store, evaluation=evaluated.evaluation, candidate="remote", gates=gates)
    page.goto(f"{served.url}{evaluated.path}?verdict={endpoint[7:]}")
    expect(page.get_by_text("remote is an endpoint: it can be compared with, but not registered.")).to_be_visible()
    expect(page.get_by_role("button", name="Register remote as a version")).to_have_count(0)
    page.goto(f"{served.url}{evaluated.path}")
    assert "tuned: pass" in page.locator("h1").inner_text(), "not the newest verdict, but that on the best candidate"
    page.get_by_role("button", name="Register tuned as a version").click()
    page.wait_for_url("**/console/versions/desk/1")
    expect(page.get_by_text("by amy, who signed it")).to_be_visible()
    follow(page.get_by_role("link", name="The evaluation", exact=True))
    expect(page.get_by_role("link", name="desk@v1")).to_be_visible()
    expect(page.get_by_role("button", name="Register tuned as a version")).to_have_count(0)
    sent = {"verdict": evaluated.verdict}
    with served.http(issue_token(store, "amy", actor="amy")) as http:
        found = http.post("/api/versions", json=sent).json()
        (registered,) = list_versions(store, "desk")
        assert (found["version"], found["digest"]) == ("desk@v1", registered.digest)
        assert http.post("/api/versions", json={"verdict": evaluated.evaluation}).status_code == 404


def with_project(served: Served, folder: Path, at_least: float = 0.5) -> None:
    """Give the server a project, in a folder that commands take too. at_least: of its gate; 0.5 is the verdict's."""
    project = project_in(folder, metric="json_valid", at_least=at_least)
    project.store, served.serving.project = served.scene.store, project


def test_what_may_not_be_registered_is_refused_by_command_over_http_and_on_the_page(
    served: Served, evaluated: Evaluated, tmp_path: Path
) -> None:
    store, sent = served.scene.store, {"verdict": evaluated.verdict}
    add_user(store, "mia", ["engineer"], actor=OWNER, scope=Scope("umbrella"))
    (tmp_path / ".tunesmith").symlink_to(store.root)
    owners = issue_token(store, OWNER, actor=OWNER)
    with served.http(owners) as http, plain(served, cookie_of(served, OWNER)) as page:
        form = {"csrf": csrf(page.get("/console/keys").text), **sent}

        def refused(why: str) -> None:
            command = CliRunner().invoke(app, ["register", evaluated.verdict, "-C", str(tmp_path)])
            assert (type(command.exception), why in str(command.exception)) == (Refused, True), command.output
            for answer in (http.post("/api/versions", json=sent), page.post("/console/do/versions", data=form)):
                assert (answer.status_code, why in answer.text) == (409, True), answer.text

        with_project(served, tmp_path, at_least=0.6)
        refused("changed since this verdict: gate valid")
        with_project(served, tmp_path)
        put_recall(served.scene.store, store.record(evaluated.evaluation).parents["dataset"])
        refused("recalled: consent withdrawn")
    with served.http(issue_token(store, "mia", actor="mia")) as other:
        told = [other.post("/api/versions", json={"verdict": one}) for one in (evaluated.verdict, f"sha256:{'0' * 64}")]
        assert [answer.status_code for answer in told] == [404, 404]
        assert told[0].text == told[1].text


@pytest.mark.attack("people", "questions of the playground beyond its bounds, without the form's mark, and at once")
def test_the_playground_is_bounded(served: Served, evaluated: Evaluated, login: Login) -> None:
    page = login(OWNER, evaluated.path + "/playground")
    mark = page.locator("input[name=csrf]").last.get_attribute("value") or ""
    (cookie,) = page.context.cookies()
    with plain(served, cookie["value"]) as http:

        def ask(question: str, *names: str, csrf: str = mark) -> httpx.Response:
            body = {"csrf": csrf, "question": question, "candidate": list(names)}
            return http.post(evaluated.path + "/playground", data=body)

        assert ask("hello", "prompt", csrf="").status_code == 403
        assert ask(" ", "prompt").status_code == 400
        assert ask("x" * 4001, "prompt").status_code == 400
        assert ask("hello").status_code == 400
        assert ask("hello", "tuned", "remote").status_code == 400
        served.engine.answer = lambda *_: "word " * 1000
        assert "cut off" in ask("hello", "prompt").text
        served.engine.gate.clear()
        page.get_by_label("Question").fill("wait")
        page.get_by_role("button", name="Ask").click()
        expect(page.get_by_text("Asking…")).to_be_visible()
        # The page says so when it sends; the next question must come after the server has this one.
        until(lambda: served.serving.trying._turns.held_by(OWNER) == 1)
        assert ask("hello", "prompt").status_code == 429
        served.engine.gate.set()
        expect(page.locator("#answers section").first).to_be_visible()


@pytest.mark.attack("serving", "candidates that hang in the playground")
def test_a_hanging_candidate_is_stopped_and_blocks_nobody(served: Served, evaluated: Evaluated, login: Login) -> None:
    served.change(answer_seconds=2)
    served.engine.answer = lambda *_: "word " * 1000
    served.engine.gate.clear()
    page = login(OWNER, evaluated.path + "/playground")
    page.get_by_label("Question").fill("wait")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#answers .notice.bad").first).to_contain_text("no answer within 2 s")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served.engine, "stream", lambda *_: iter([Completion("well", "stop", 1, 1)]))
        other = login(APPROVER, evaluated.path + "/playground")
        other.get_by_label("Question").fill("and now?")
        other.get_by_role("button", name="Ask").click()
        expect(other.locator("#answers pre", has_text="well").first).to_be_visible()
    assert served.engine.pieces == 0
    served.engine.gate.set()
    until(lambda: served.serving.trying._turns.held_by(OWNER) == 0)
    assert served.engine.pieces < 10, "the engine went on with a question that was stopped"


def test_the_command_line_prints_the_same(scene: Scene, evaluated: Evaluated) -> None:
    def printed(*words: str) -> str:
        words = (*words, "--as", APPROVER, "-C", str(scene.store.root))
        done = CliRunner().invoke(app, words, env={"COLUMNS": "200"}, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    found = json.loads(printed("requests", "--show", "losses", "--json"))
    assert found["evaluation"] == evaluated.evaluation
    assert len(found["rows"]) == found["changes"]["loss"] > 0
    assert {row["change"] for row in found["rows"]} == {"loss"}
    gates = GATES.validate_python({"lift": {"metric": "exact_match", "over": "prompt", "at_least": 0.0}})
    judge(scene.store, evaluation=evaluated.evaluation, candidate="tuned", gates=gates)
    compared = [
        json.loads(printed("requests", "--json", *words))["filter"]["rival"] for words in ((), ("--focus", "rag"))
    ]
    assert compared == ["prompt", "remote"], (
        "the gate's rival, as in the report; without one the best untuned candidate"
    )
    row = evaluated.rows[1]
    assert row.id in printed("requests", "--search", row.messages[-2].content[:20])
    # No tenant sees a document of acme's support.
    assert re.search(r"\(\d+%\): withheld", printed("request", row.id, "--evaluation", evaluated.evaluation[7:20]))
    answers = json.loads(printed("request", row.id, "--compared", "tuned", "--json"))["answers"]
    opened = {one["candidate"]: one for one in answers}
    for name in ("prompt", "nearest"):
        changes = opened[name]["changes"]
        assert "".join(text for kind, text in changes if kind != "removed") == opened[name]["text"]
        assert "".join(text for kind, text in changes if kind != "added") == opened["tuned"]["text"]
