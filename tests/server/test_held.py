"""Answers that wait for a reviewer, over a real server: rules, decisions, deadlines, and who may see what."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.attack_table import Happened
from tests.fabricate import APPROVER, NAME, OPERATOR, OWNER, STEWARD, Scene, approve
from tests.server.conftest import HELLO, SCHEMA, Served, StartServer, starting
from tests.server.fake_engine import FakeEngine
from tests.waiting import until
from tunesmith.core.errors import TunesmithError
from tunesmith.engines.protocol import Completion, TokenScore
from tunesmith.holding.queue import HeldAnswer
from tunesmith.holding.rules import Holder
from tunesmith.holding.settings import HoldSettings
from tunesmith.registry.history import verify_log
from tunesmith.registry.versions import Version, list_versions
from tunesmith.store import database
from tunesmith.store.people.identities import deactivate
from tunesmith.store.people.tokens import issue_token
from tunesmith.store.store import Store
from tunesmith.store.tables import AuditRow, HeldRow

MONEY = '{"intent": "transfer_money"}'
Hold = Callable[..., Served]
RULE: dict[str, Any] = {"field": "intent", "values": ["transfer_money"]}


def holder(*rules: dict[str, Any], **settings: Any) -> Holder:
    given = {"wait": 0, "deadline": 3600, **settings, "rules": list(rules) or [RULE]}
    return Holder(HoldSettings.model_validate(given), {}, SCHEMA)


def held_answer(scene: Scene, number: int, version: Version | None = None) -> HeldAnswer:
    version = version or list_versions(scene.store)[0]
    return HeldAnswer(
        id=f"{number:032x}", name=version.name, version=version.digest, scope=version.scope, caller=OPERATOR,
        reasons=("r",), messages=(), text=MONEY, response={"choices": [{"message": {}}]},
    )  # fmt: skip


@pytest.fixture
def hold(scene: Scene, versions: dict[int, Version], engine: FakeEngine) -> Iterator[Hold]:
    """Starts servers whose champion gives an answer that is held."""
    engine.answer = lambda _request, _adapter: MONEY
    with starting(scene, versions, engine) as start:
        yield lambda *rules, **settings: start(holder=holder(*rules, **settings))


def reviewer(served: Served, name: str = STEWARD) -> httpx.Client:
    return served.http(issue_token(served.scene.store, name, actor=OWNER))


def held(served: Served, **more: Any) -> dict[str, Any]:
    """Where the answer to a request waits."""
    answer = served.post(**more)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "answer_held"), answer.text
    found: dict[str, Any] = answer.json()["error"]["held"]
    assert answer.headers["location"] == found["url"] == f"/api/held/{found['id']}"
    return found


def decide(http: httpx.Client, notice: dict[str, Any], decision: str, **more: Any) -> httpx.Response:
    return http.post(f"{notice['url']}/decide", json={"decision": decision, "reason": "looked at it", **more})


def decided(served: Served, decision: str, more: dict[str, Any], **asked: Any) -> Any:
    """What a request that waits gets, once a reviewer has decided."""
    with ThreadPoolExecutor(1) as threads, reviewer(served) as steward:
        answer = threads.submit(lambda: served.ask(**asked))
        until(lambda: steward.get("/api/held").json()["held"])
        assert not answer.done()  # no token left before the decision
        (one,) = steward.get("/api/held").json()["held"]
        assert decide(steward, {"url": f"/api/held/{one['id']}"}, decision, **more).status_code == 200
        return answer.result(300)


def row_of(served: Served, notice: dict[str, Any]) -> HeldRow | None:
    with database.reading(served.scene.store.engine) as session:
        return session.get(HeldRow, notice["id"])


def audited(served: Served, notice: dict[str, Any]) -> list[AuditRow]:
    with database.reading(served.scene.store.engine) as session:
        return list(session.query(AuditRow).where(AuditRow.subject == notice["id"]))


def test_a_held_answer_leaves_once_a_reviewer_released_it_and_others_at_once(hold: Hold, engine: FakeEngine) -> None:
    served = hold()
    notice = held(served)
    assert served.rows()[0].ok  # the version answered
    with served.http() as caller, reviewer(served) as steward:
        waiting = caller.get(notice["url"]).json()
        assert (waiting["state"], waiting["reasons"]) == ("waiting", ['intent is "transfer_money"'])
        assert not {"completion", "answer", "messages"} & waiting.keys()
        assert not waiting["may_decide"]
        listed = steward.get("/api/held").json()["held"]
        assert [(one["id"], one["may_decide"]) for one in listed] == [(notice["id"], True)]
        seen = steward.get(notice["url"]).json()
        assert (seen["answer"], seen["messages"][-1]["content"]) == (MONEY, HELLO[0]["content"])
        decided = decide(steward, notice, "release")
        done = decided.json()
        assert (decided.status_code, done["state"], done["decided_by"]) == (200, "released", STEWARD)
        assert decide(steward, notice, "release").json() == done  # sent again: the same
        fetched = caller.get(f"/api/held/chatcmpl-{notice['id']}").json()["completion"]
        assert fetched["choices"][0]["message"]["content"] == MONEY
        assert (fetched["id"], fetched["model"]) == (f"chatcmpl-{notice['id']}", f"{NAME}@v1")
        assert steward.get("/api/held").json()["held"] == []
        assert len(caller.get("/api/held", params={"everything": "true"}).json()["held"]) == 1
    (entry,) = audited(served, notice)
    assert (entry.actor, entry.action) == (STEWARD, "answer.release")
    assert (entry.detail["reason"], entry.detail["rules"]) == ("looked at it", waiting["reasons"])
    assert entry.detail["answer"] == entry.detail["given"] == waiting["digest"]
    assert "transfer_money" not in json.dumps({key: entry.detail[key] for key in entry.detail if key != "rules"})
    assert verify_log(served.scene.store) == []
    engine.answer = lambda _request, _adapter: '{"intent": "switch on"}'
    assert served.ask().choices[0].message.content == '{"intent": "switch on"}'
    chunks = list(served.ask(stream=True, logprobs=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == '{"intent": "switch on"}'
    assert sum(len(chunk.choices[0].logprobs.content) for chunk in chunks if chunk.choices[0].logprobs) == 3


CALL = '<call>{"name": "pay", "arguments": {"sum": 5}}</call>'
TOOLS = [{"type": "function", "function": {"name": "pay", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("decision", "given", "said", "called"),
    [
        ("release", MONEY, MONEY, []),
        ("replace", MONEY, '{"intent": "ask"}', []),
        ("release", CALL, "", ["pay"]),
        ("replace", CALL, "ask a person", []),
    ],
)
def test_a_request_that_waits_is_answered_as_decided(
    hold: Hold, engine: FakeEngine, stream: bool, decision: str, given: str, said: str, called: list[str]
) -> None:
    served, asked = hold(wait=120), {"tools": TOOLS} if given == CALL else {"logprobs": True}
    engine.answer = lambda _request, _adapter: given
    more = {"answer": said} if decision == "replace" else {}
    found = decided(served, decision, more, stream=stream, **asked)
    choices = [chunk.choices[0] for chunk in found] if stream else found.choices
    parts = [choice.delta if stream else choice.message for choice in choices]
    assert "".join(part.content or "" for part in parts) == said
    assert [call.function.name for part in parts for call in part.tool_calls or ()] == called
    assert choices[-1].finish_reason == ("tool_calls" if called else "stop")
    assert any(choice.logprobs for choice in choices) == (decision == "release" and given == MONEY)


def test_a_refusal_is_said_and_a_stopping_server_keeps_no_request_open(hold: Hold) -> None:
    served = hold(wait=300)
    with pytest.raises(openai.PermissionDeniedError, match="looked at it") as refused:
        decided(served, "refuse", {}, stream=True)
    assert refused.value.code == "answer_refused"
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(served.post)
        until(lambda: served.serving.awaited._waiting)
        served.stop()
        assert asked.result(300).json()["error"]["code"] == "answer_held"


@pytest.mark.attack("people", "a user is shut out while their answer waits for a reviewer", "refused, 401")
def test_who_is_shut_out_while_an_answer_waits_gets_none(hold: Hold) -> None:
    served = hold(wait=300)
    with ThreadPoolExecutor(1) as threads, reviewer(served) as steward:
        asked = threads.submit(served.post)
        until(lambda: served.serving.awaited._waiting)
        (one,) = steward.get("/api/held").json()["held"]
        deactivate(served.scene.store, OPERATOR, actor=OWNER)
        assert decide(steward, {"url": f"/api/held/{one['id']}"}, "release").status_code == 200
        assert asked.result(300).status_code == 401


@pytest.mark.attack("people", "an edited answer breaks the version's schema")
def test_an_edited_answer_fits_the_schema(hold: Hold, happened: Happened) -> None:
    served = hold()
    notice = held(served)
    with reviewer(served) as steward:
        for edited in ("ask", "{}", '{"intent": 1, "intent": 2}', "", '["intent"]'):
            refused = decide(steward, notice, "replace", answer=edited)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "answer"), edited
            happened("refused")
        for decision, more in (("replace", {}), ("release", {"answer": "{}"}), ("refuse", {"answer": "{}"})):
            assert decide(steward, notice, decision, **more).status_code == 400
        assert decide(steward, notice, "release", reason=" ").status_code == 400
        assert decide(steward, notice, "replace", answer='{"intent": "ask"}').json()["state"] == "replaced"
    choice = served.get(notice["url"]).json()["completion"]["choices"][0]
    assert choice["message"]["content"] == '{"intent": "ask"}'


@pytest.mark.attack("people", "a held answer is read or decided on by somebody else")
def test_only_the_caller_and_reviewers_of_the_tenant_see_it(hold: Hold, engine: FakeEngine, happened: Happened) -> None:
    served = hold()
    store = served.scene.store
    for name, role, tenant in (("amy", "operator", "acme"), ("bea", "operator", "acme"), ("oz", "steward", "other")):
        served.person(name, role, tenant=tenant)
    served.person("sam", "steward", tenant="acme")
    served.person("eu", "steward", tenant="acme", region="eu")
    with reviewer(served, "amy") as amy:
        asked = amy.post("/v1/chat/completions", json={"model": NAME, "messages": HELLO})
        notice = asked.json()["error"]["held"]
        assert amy.get(notice["url"]).status_code == 200
        assert decide(amy, notice, "release").status_code == 403  # no reviewer
        for name in ("bea", "oz", "eu", OPERATOR):  # a colleague, another tenant, another region, of no tenant
            with reviewer(served, name) as other:
                unknown = other.get(f"/api/held/{'0' * 32}").json()["error"]["message"]
                tried, reviews = decide(other, notice, "release"), name in ("oz", "eu")
                assert tried.status_code == (404 if reviews else 403)
                for answer in (other.get(notice["url"]), *([tried] if reviews else [])):
                    assert answer.status_code == 404
                    assert answer.json()["error"]["message"] == unknown.replace("0" * 32, notice["id"])
                assert other.get("/api/held", params={"everything": "true"}).json()["held"] == []
                happened("as if it did not exist")
        for name in ("sam", STEWARD):
            with reviewer(served, name) as review:
                assert review.get(notice["url"]).json()["answer"] == MONEY
        chat_only = issue_token(store, "sam", actor=OWNER, name="chat-only", scopes=["chat"])
        with served.http(chat_only) as chat:
            assert chat.get(notice["url"]).status_code == 404
            assert decide(chat, notice, "release").status_code == 403
        for odd in ("x", "0" * 31, "%00", "..%2f..%2fapi", "Ⅷ" * 32):
            assert amy.get(f"/api/held/{odd}").status_code in (404, 400)


@pytest.mark.attack("people", "a caller decides on the answer to their own request")
def test_nobody_decides_on_their_own_answer(hold: Hold, happened: Happened) -> None:
    served = hold()
    with reviewer(served) as steward, reviewer(served, APPROVER) as approver:
        asked = steward.post("/v1/chat/completions", json={"model": NAME, "messages": HELLO})
        notice = asked.json()["error"]["held"]
        for decision, more in (("release", {}), ("refuse", {}), ("replace", {"answer": '{"intent": "x"}'})):
            refused = decide(steward, notice, decision, **more)
            assert refused.status_code == 403, refused.text
            happened("refused")
        assert not steward.get(notice["url"]).json()["may_decide"]
        assert decide(approver, notice, "release").status_code == 200


def test_at_the_deadline_the_server_releases_what_may_leave(
    hold: Hold, versions: dict[int, Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not an answer of a version that was refused, and none while its version's record cannot be read."""
    served = hold(at_deadline="release")
    other, unread, withdrawn = held(served), held(served, model=f"{NAME}@v2"), held(served, model=f"{NAME}@v3")
    approve(served.scene.store, versions[3], approver=APPROVER, reason="it leaks", decision="refuse")
    whole = Store.record

    def reading(store: Store, digest: str, *kind: Any, **named: Any) -> Any:
        if digest == versions[2].digest:
            raise TunesmithError("the bucket cannot be used")
        return whole(store, digest, *kind, **named)

    with served.http() as caller, reviewer(served) as steward:

        def state(notice: dict[str, Any]) -> Any:
            return caller.get(notice["url"]).json()["state"]

        refused = decide(steward, withdrawn, "release")
        assert (refused.status_code, "it leaks" in refused.json()["error"]["message"]) == (409, True)
        with monkeypatch.context() as patch:
            patch.setattr(Store, "record", reading)
            with database.writing(served.scene.store.engine) as session:
                for notice in (other, unread, withdrawn):
                    session.get_one(HeldRow, notice["id"]).deadline = time.time() - 1
            until(lambda: state(other) != "waiting" != state(withdrawn))
            assert (state(other), state(withdrawn), state(unread)) == ("released", "refused", "waiting")
        until(lambda: state(unread) == "released")
        assert "completion" in caller.get(other["url"]).json()
        assert "completion" not in caller.get(withdrawn["url"]).json()
        late = decide(steward, other, "release")
        assert (late.status_code, late.json()["error"]["code"]) == (409, "already_decided")
    assert [entry.action for entry in audited(served, other)] == ["answer.expire"]


@pytest.mark.attack("privacy", "the texts of held answers after their time", "nothing left, nothing logged")
def test_texts_are_deleted_and_never_logged(hold: Hold, caplog: pytest.LogCaptureFixture) -> None:
    served = hold()
    notice = held(served, messages=[{"role": "user", "content": "quagga zebra"}])
    with reviewer(served) as steward:
        assert decide(steward, notice, "refuse").status_code == 200
    store = served.scene.store
    with database.writing(store.engine) as session:
        row = session.get_one(HeldRow, notice["id"])
        assert "quagga" in json.dumps(row.texts)
        assert row.until == row.deadline + 3600
        row.until = time.time() - 1
    until(lambda: row_of(served, notice) is None)
    assert served.get(notice["url"]).status_code == 404
    assert [entry.action for entry in audited(served, notice)] == ["answer.refuse"]
    served.stop()
    store.engine.dispose()
    left = [path for path in store.root.rglob("*") if path.is_file() and b"quagga" in path.read_bytes()]
    assert left == []
    assert "quagga" not in caplog.text
    assert "transfer_money" not in caplog.text


def test_openai_clients_do_not_send_a_held_request_again_until_the_queue_is_full(
    hold: Hold, engine: FakeEngine
) -> None:
    served, notices = hold(at_most=2), []
    for stream in (False, True):
        before = engine.calls
        with pytest.raises(openai.PermissionDeniedError) as error:
            served.client(retries=3).chat.completions.create(model=NAME, messages=HELLO, stream=stream)
        assert (error.value.code, engine.calls) == ("answer_held", before + 1)
        assert isinstance(error.value.body, dict)
        notices.append(error.value.body["held"])
    full = served.post()
    assert (full.status_code, full.json()["error"]["code"]) == (503, "held_queue_full")
    until(lambda: "tunesmith_held_waiting 2.0" in served.get("/metrics").text)
    assert 'tunesmith_held_answers_total{outcome="held"} 2.0' in served.get("/metrics").text
    with reviewer(served) as steward:
        decide(steward, notices[0], "refuse")
    held(served)


@pytest.mark.attack("serving", "one caller fills the queue of held answers", "429, and others go on")
def test_one_caller_does_not_fill_the_queue(start_server: StartServer, engine: FakeEngine) -> None:
    engine.answer = lambda _request, _adapter: MONEY
    served = start_server(holder=holder(), per_user=2)
    held(served), held(served)
    full = served.post()
    assert (full.status_code, full.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    other = issue_token(served.scene.store, APPROVER, actor=OWNER)
    assert served.post(other).json()["error"]["code"] == "answer_held"


@pytest.mark.parametrize(
    ("rule", "answer", "reason"),
    [
        ({"confidence_below": 0.7}, "sure", "its least likely token has probability 0.607, below 0.7"),
        ({"confidence_below": 0.6}, "sure", None),
        ({"values": ["refund"]}, "ＲＥＦＵＮＤ ", 'the answer is "refund"'),
        ({"values": ["refund"]}, '"refund"', 'the answer is "refund"'),
        ({"values": ["refund"]}, "no refund", None),
        (RULE, "transfer_money", "the answer is not a JSON object"),
        (RULE, '{"intent": ["x", "Transfer_Money"]}', 'intent is "transfer_money"'),
        (RULE, '{"intent": "other"}', None),
        (RULE, '{"Intent": "transfer_money"}', "the answer does not fit the task's schema"),
        (RULE, '{"intent": {"x": "transfer_money"}}', "intent is an object or a nested list"),
        (RULE, '{"intent": [["transfer_money"]]}', "intent is an object or a nested list"),
        ({"field": "urgent", "values": [True]}, '{"intent": "x"}', "the answer has no urgent"),
        ({"field": "amount", "values": [1000]}, '{"amount": 1e3}', "amount is 1000"),
        ({"field": "urgent", "values": [True]}, '{"urgent": true}', "urgent is true"),
        ({"field": "urgent", "values": [True]}, '{"intent": "x", "urgent": 1}', None),
    ],
)
def test_which_answers_wait(rule: dict[str, Any], answer: str, reason: str | None) -> None:
    scores = (TokenScore(answer, answer.encode(), -0.5, ()),)
    found = holder(rule).reasons(Completion(answer, "stop", 1, 1, scores=scores))
    assert found == (() if reason is None else (reason,))


def test_a_rule_on_confidence_has_tokens_scored_and_shows_no_scores(hold: Hold, engine: FakeEngine) -> None:
    assert hold({"confidence_below": 0.6}).ask().choices[0].logprobs is None
    assert engine.seen[-1].top_logprobs == 0
    held(hold({"confidence_below": 0.7}))
