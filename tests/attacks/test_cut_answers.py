"""A caller makes answers bad by its own parameters: they count for no arm of a rollout."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from tests.fabricate import Scene
from tests.server.conftest import Served, engine, made, running, scene, served, versions
from tests.server.fake_engine import VALID
from tests.server.tiny_engine import TinyEngine
from tunesmith.registry.versions import Version
from tunesmith.rollout.traffic import arms

__all__ = ["engine", "made", "scene", "served", "versions"]

# Parameters that cut VALID, whose fake tokens are its two words.
CUTS: list[dict[str, Any]] = [
    {"max_tokens": 1},
    {"max_completion_tokens": 1},
    {"max_tokens": 1, "stream": True},
    {"stop": ["{"]},
    {"stop": "}"},
    {"stop": ["never", " "], "max_tokens": 2},
]
WHOLE: list[dict[str, Any]] = [{}, {"max_tokens": 1000}, {"max_tokens": 2}, {"stop": ["never"]}, {"temperature": 2.0}]


@pytest.mark.attack("rollout", "max_tokens and stop texts that make answers invalid", "recorded, not scored")
def test_answers_that_the_request_cut_are_not_scored(served: Served) -> None:
    for parameters in CUTS:
        answer = served.ask(**parameters)
        assert (list(answer)[-1] if parameters.get("stream") else answer).choices[0].finish_reason
    for parameters in WHOLE:
        assert served.ask(**parameters).choices[0].message.content == VALID
    rows = served.rows()
    assert [(row.ok, row.cut, row.scores) for row in rows[: len(CUTS)]] == [(True, True, {})] * len(CUTS)
    assert [(row.cut, row.scores) for row in rows[len(CUTS) :]] == [(False, {"json_valid": 1.0})] * len(WHOLE)
    with served.http() as http:
        assert f'outcome="cut"}} {len(CUTS)}.0' in http.get("/metrics").text
        for row in rows[: len(CUTS)]:
            found = http.post("/api/feedback", json={"request_id": row.id, "expected": VALID}).json()
            assert found["scores"] == {}
            assert set(found["not_scored"]) == {"json_valid", "exact_match"}
            assert "max_tokens, stop text" in found["not_scored"]["exact_match"]


@pytest.mark.attack("rollout", "max_tokens and stop texts that make answers invalid", "counted as cut")
def test_scores_given_for_cut_answers_count_for_no_arm(served: Served, versions: dict[int, Version]) -> None:
    rollout = served.begin(versions[2], {"setWeight": 50}, {"pause": {}}, {"setWeight": 100})
    for number in range(10):
        answer = served.ask(max_tokens=1, user=f"user {number}")
        with served.http() as http:
            given = {"request_id": answer.id, "score": {"exact_match": 0.0}}
            assert http.post("/api/feedback", json=given).status_code == 200
    steps = {row.features["step"] for row in served.rows() if row.rollout == rollout.id}
    found = [arm for step in steps for arm in arms(served.scene.store, rollout.id, step, "exact_match", None)]
    assert [list(arm.scores) for arm in found] == [[]] * len(found)
    assert sum(arm.cut for arm in found) == sum(arm.requests for arm in found) == 10


@pytest.mark.attack("rollout", "max_tokens and stop texts, native engine", "recorded, not scored")
def test_the_native_engine_says_what_ended_an_answer(
    scene: Scene, versions: dict[int, Version], tmp_path: Path
) -> None:
    tiny: Any = TinyEngine(scene.base, tmp_path / "tiny")
    tiny.gate = threading.Event()
    with running(scene, tiny) as served:
        served.begin(versions[1])
        text = served.ask(temperature=1.0, seed=3).choices[0].message.content
        served.ask(temperature=1.0, seed=3, max_tokens=2)
        served.ask(temperature=1.0, seed=3, stop=[text[1]])
        served.ask(temperature=1.0, seed=3, max_tokens=100_000)
        assert [row.cut for row in served.rows()] == [False, True, True, False]
