"""The text of a request is kept only where its caller asked for that: scanned, for a limited time, until withdrawn."""

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.attack_table import Happened
from tests.fabricate import OPERATOR, Scene
from tests.server.conftest import Served, StartServer
from tests.waiting import until
from tunesmith.data.settings import Privacy
from tunesmith.monitoring.cases import Case, list_cases
from tunesmith.monitoring.keeping import CaseKeeper
from tunesmith.monitoring.settings import CaseSettings
from tunesmith.store import database
from tunesmith.store.tables import AuditRow

SECRET = "jane.doe@example.com"
ODD = f"zebra lamp of {SECRET}"  # words that nothing else in the store holds
ASK: list[Any] = [{"role": "user", "content": ODD}]
WRONG = '{"intent": "off"}'


@pytest.fixture
def keep(start_server: StartServer, scene: Scene) -> StartServer:
    """Starts servers whose project has `cases:` with settings."""
    return lambda privacy=Privacy(), **settings: start_server(
        keeper=CaseKeeper(scene.store, CaseSettings(**settings), privacy)
    )


@pytest.fixture
def keeping(keep: StartServer) -> Served:
    """A server whose project has `cases: {}`."""
    return keep()


def _ask(served: Served, **more: Any) -> httpx.Response:
    return served.post(messages=ASK, **more)


def _cases(served: Served, count: int = 1) -> list[Case]:
    """The cases, once there are so many: failed requests are kept after their answer."""
    until(lambda: len(list_cases(served.scene.store, everything=True)) >= count)
    found = list_cases(served.scene.store, everything=True)
    assert len(found) == count
    return found


def _holding(root: Path, *words: str) -> list[str]:
    """The files under a folder that hold one of the words, and the database's own files."""
    files = [path for path in root.rglob("*") if path.is_file()]
    return [path.name for path in files if any(word.encode() in path.read_bytes() for word in words)]


def _audited(served: Served, action: str) -> list[AuditRow]:
    with database.reading(served.scene.store.engine) as session:
        return list(session.query(AuditRow).where(AuditRow.action == action))


def _crash(_request: object, _adapter: object) -> str:
    raise RuntimeError("no")


@pytest.mark.attack("privacy", "requests whose callers did not ask to keep them")
@pytest.mark.parametrize("server", ["keeping", "served"])
def test_without_opting_in_no_text_is_on_the_disk(
    request: pytest.FixtureRequest, server: str, happened: Happened
) -> None:
    served: Served = request.getfixturevalue(server)
    if server == "served":  # its project keeps nothing
        answered = _ask(served, store=True)
        assert answered.headers["x-tunesmith-store"] == "no"
        asked = answered.json()["id"]
        refused = served.feedback(asked, expected=WRONG, keep=True)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["param"]) == (400, "storing_not_allowed", "keep")
        assert served.feedback(asked, expected=WRONG).status_code == 200, "no score was added before"
        assert served.engine.calls == 1
    for more in ({}, {"store": False}, {"metadata": {"store": "okapi"}}, {"user": "hippo"}):
        answer = _ask(served, **more)
        assert served.feedback(answer.json()["id"], expected=WRONG).json()["scores"]
    served.engine.answer = lambda _request, _adapter: f"no JSON, zebra {SECRET}"
    assert _ask(served).status_code == 200
    served.engine.answer = _crash
    assert _ask(served).status_code == 500
    assert len(served.rows()) == 6 + (server == "served")
    served.stop()
    assert _holding(served.scene.store.root, "zebra", SECRET, "okapi", "hippo", served.token) == []
    happened("nothing kept", 6)


def test_feedback_that_asks_for_it_leaves_a_case_until_its_caller_withdraws_it(keeping: Served) -> None:
    store, answer = keeping.scene.store, _ask(keeping).json()["id"]
    assert keeping.feedback(answer, expected=WRONG, keep=True).json()["kept"] is True
    (case,) = _cases(keeping)
    assert case.messages[-1].content == "zebra lamp of person1@example.com"
    assert (case.expected, case.answer) == (WRONG, '{"intent": "on"}')
    assert case.scores["exact_match"] == 0.0
    assert case.failed
    (row,) = keeping.rows()
    assert case.at == row.at
    assert datetime.fromisoformat(case.until) - datetime.fromisoformat(row.at) == timedelta(days=30)
    (path,) = (store.root / "cases").glob("*.json")
    assert path.stat().st_mode & 0o077 == 0
    with keeping.http(keeping.person("olaf", "operator")) as http:
        for request in (answer, "chatcmpl-" + "0" * 32, "..x", "x" * 200):
            found = http.delete(f"/api/feedback/{request}")
            assert (found.status_code, found.json()["error"]["code"]) == (404, "request_not_found"), request
    _cases(keeping)
    with keeping.http() as http:
        assert http.delete(f"/api/feedback/{answer}").json()["deleted"] is True
        assert http.delete(f"/api/feedback/{answer}").json()["deleted"] is False
    assert _holding(store.root, "zebra") == []
    again = keeping.feedback(answer, score={"helpful": 0.0}, keep=True).json()
    assert (again["kept"], again["not_kept"]) == (False, "its caller withdrew it")
    assert _holding(store.root, "zebra") == []
    (entry,) = _audited(keeping, "cases.withdraw")
    assert (entry.actor, entry.subject) == (OPERATOR, answer.removeprefix("chatcmpl-"))


@pytest.mark.attack("privacy", "a user asks to keep the request of another user")
def test_only_who_made_a_request_may_let_it_be_kept(keeping: Served) -> None:
    asked, opted_in = _ask(keeping).json()["id"], _ask(keeping, store=True).json()["id"]
    olaf = keeping.person("olaf", "operator")
    refused = keeping.feedback(asked, olaf, expected=WRONG, keep=True)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "permission_denied")
    assert _holding(keeping.scene.store.root, "zebra") == []
    # Feedback of anybody of the tenant counts for a request whose caller lets it be kept.
    assert keeping.feedback(opted_in, olaf, expected=WRONG).json()["kept"] is True
    (case,) = _cases(keeping)
    assert (case.by, case.request) == ("olaf", opted_in.removeprefix("chatcmpl-"))


def test_a_request_with_store_is_kept_where_it_went_wrong(keeping: Served) -> None:
    right = keeping.ask(messages=ASK, store=True).id  # the official client
    assert "kept" not in keeping.feedback(right, expected='{"intent": "on"}').json()
    wrong = _ask(keeping, store=True).json()["id"]
    assert keeping.feedback(wrong, score={"helpful": 0.0}).json()["kept"] is True
    keeping.engine.answer = lambda _request, _adapter: "no JSON"
    invalid = _ask(keeping, store=True, stream=True)
    keeping.engine.answer = _crash
    crashed = _ask(keeping, store=True)
    assert (invalid.status_code, crashed.status_code) == (200, 500)
    cases = _cases(keeping, 3)
    assert [case.answer for case in cases] == ['{"intent": "on"}', "no JSON", None]
    assert all(case.failed and case.expected is None for case in cases)
    # What somebody says later about the answer is added to the case.
    late = keeping.feedback(cases[1].request, expected=WRONG)
    assert late.json()["kept"] is True
    assert _cases(keeping, 3)[1].expected == WRONG
    keeping.feedback(cases[1].request, score={"helpful": 0.2})
    assert _cases(keeping, 3)[1].expected == WRONG, "kept, although this call says none"
    assert _holding(keeping.scene.store.root, SECRET) == []


@pytest.mark.attack("privacy", "secrets and addresses in requests that callers ask to keep")
@pytest.mark.parametrize("settings", [{"action": "report"}, {"action": "pseudonymise", "entities": ["IBAN_CODE"]}])
def test_what_is_kept_is_scanned(keep: StartServer, settings: dict[str, Any], happened: Happened) -> None:
    served = keep(Privacy.model_validate(settings))
    token = served.token
    served.engine.answer = lambda _request, _adapter: f'{{"intent": "mail {SECRET}"}}'
    asked = [{"role": "system", "content": f"You are {SECRET}"}, {"role": "user", "content": f"zebra {token}"}]
    answer = served.post(messages=asked, store=True)
    expected = f'{{"intent": "write to {SECRET} {token}"}}'
    assert served.feedback(answer.json()["id"], expected=expected).json()["kept"] is True
    (case,) = _cases(served)
    assert "zebra" in case.messages[-1].content
    assert "person1@example.com" in case.messages[0].content
    assert case.expected is not None
    assert "person1@example.com" in case.expected
    assert _holding(served.scene.store.root, SECRET, token) == []
    happened("replaced", 4)


LONG = [{"role": "user", "content": "z" * 70_000}]  # one token of this engine
NO_DATA = "it holds EMAIL_ADDRESS, and this project keeps no such text"


@pytest.mark.parametrize(
    ("at_most", "action", "messages", "reason"),
    [
        (9, "refuse", ASK, NO_DATA),
        (9, "report", LONG, "it is longer than 65,536 characters"),
        (1, "report", ASK, "1 requests wait for a review"),
    ],
)
def test_what_is_not_kept_says_why(keep: StartServer, at_most: int, action: Any, messages: Any, reason: str) -> None:
    served = keep(Privacy(action=action), at_most=at_most)
    asked = [ASK, messages] if at_most == 1 else [messages]
    answers = [served.post(messages=each).json()["id"] for each in asked]
    given = [served.feedback(each, expected=WRONG, keep=True).json() for each in answers]
    assert [each["kept"] for each in given] == [True, False][-len(asked) :]
    assert (reason in given[-1]["not_kept"], given[-1]["scores"]["exact_match"]) == (True, 0.0)
    _cases(served, len(asked) - 1)
    assert action == "report" or _holding(served.scene.store.root, "zebra") == []


@pytest.mark.attack("privacy", "a request is kept for longer than was promised", "deleted")
def test_what_has_expired_is_gone(keep: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.server.app._CLEAN_SECONDS", 0.1)
    seconds = 3.0
    served = keep(days=seconds / 86_400)
    root = served.scene.store.root
    answer = _ask(served).json()["id"]
    assert served.feedback(answer, expected=WRONG, keep=True).json()["kept"] is True
    until(lambda: not list((root / "cases").glob("*.json")))
    (row,) = served.rows()
    until_when = CaseKeeper(served.scene.store, CaseSettings(days=seconds / 86_400), Privacy()).until(row.at)
    promised = datetime.fromisoformat(row.at) + timedelta(seconds=seconds)
    assert promised == datetime.fromisoformat(until_when) <= datetime.now().astimezone()
    until(lambda: bool(_audited(served, "cases.expire")))
    assert _holding(root, "zebra") == []
    (entry,) = _audited(served, "cases.expire")
    assert entry.detail == {"requests": [row.id]}
