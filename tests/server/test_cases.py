"""Feedback that asks to be kept leaves a case; any other leaves no text."""

from __future__ import annotations

from typing import Any

import httpx

from tests.server.conftest import HELLO, Served
from tunesmith.monitoring.cases import list_cases


def _feedback(served: Served, **body: Any) -> httpx.Response:
    with served.http() as http:
        return http.post("/api/feedback", json=body)


def test_a_case_is_kept_where_the_caller_asks(served: Served) -> None:
    answer = served.ask()
    given = _feedback(served, request_id=answer.id, expected='{"intent": "off"}', keep=True)
    assert given.status_code == 200
    assert given.json()["kept"] is True
    (case,) = list_cases(served.scene.store)
    assert case.messages[-1].content == HELLO[0]["content"]
    assert (case.expected, case.answer) == ('{"intent": "off"}', '{"intent": "on"}')
    assert case.scores["exact_match"] == 0.0
    assert case.failed
    (path,) = (served.scene.store.root / "cases").glob("*.json")
    assert path.stat().st_mode & 0o077 == 0


def test_no_text_is_kept_otherwise(served: Served) -> None:
    answer = served.ask()
    assert _feedback(served, request_id=answer.id, expected='{"intent": "off"}').status_code == 200
    assert not (served.scene.store.root / "cases").exists()


def test_a_case_needs_an_answer(served: Served) -> None:
    answer = served.ask()
    assert _feedback(served, request_id=answer.id, score={"mine": 0.0}, keep=True).status_code == 400
    assert _feedback(served, request_id="../../x", expected="{}", keep=True).status_code == 404
    assert not (served.scene.store.root / "cases").exists()
