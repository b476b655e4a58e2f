"""Traffic divided between two versions through the official client, judged, promoted and rolled back while it flows."""

from pathlib import Path
from typing import Any

import pytest

from tests.acting import do
from tests.attack_table import Happened
from tests.fabricate import NAME, OPERATOR, OWNER
from tests.server.conftest import Served, StartServer
from tests.server.fake_engine import VALID
from tests.tiny_project import settings, write_project
from tests.waiting import until
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.evaluation.settings import TaskSettings
from tunesmith.project import Project
from tunesmith.registry.versions import Version, get_alias
from tunesmith.rollout.commands import abort, resume
from tunesmith.rollout.controller import advance
from tunesmith.rollout.state import Rollout, get_rollout
from tunesmith.server import app as server_app
from tunesmith.server.answering import routing
from tunesmith.services import rollouts
from tunesmith.store.store import Store

Versions = dict[int, Version]
ANALYSIS: dict[str, Any] = {"analysis": {"metric": "json_valid"}}


def rounds(served: Served, number: int) -> None:
    """Wait until the server's controller has begun and ended so many rounds."""
    ends = set[float]()

    def enough() -> bool:
        ends.add(served.serving.checked_at)
        return len(ends) > number + 1  # one ended before, and one may have begun before

    until(enough)


def test_traffic_follows_weights_and_users_keep_their_arm(served: Served, versions: Versions) -> None:
    served.post(user="ada@example.org")
    rollout = served.paused(versions[2], 50)
    assert rollout.main_callers == (OPERATOR,)  # it made all requests so far
    arms = [served.post().headers["x-tunesmith-arm"] for _ in range(60)]
    assert 12 < arms.count("canary") < 48
    for user in ("ada@example.org", "bea", "cleo", "dora"):
        assert len({served.post(user=user).headers["x-tunesmith-version"] for _ in range(4)}) == 1
    before, *rows = served.rows()
    assert {row.caller for row in (before, *rows)} == {OPERATOR}
    assert {(row.rollout, row.features["step"]) for row in rows} == {(rollout.id, 1)}
    assert {row.version for row in rows if row.arm == "canary"} == {versions[2].digest}
    assert {row.version for row in rows if row.arm == "stable"} == {versions[1].digest}
    assert {row.end_user for row in (before, *rows[:60])} == {""}
    hashes = [{row.end_user for row in rows[at : at + 4]} for at in range(60, 76, 4)]
    assert [len(each) for each in hashes] == [1] * 4
    assert [len(each) for each in set[str]().union(*hashes)] == [16] * 4
    canary = next(user for user in map(str, range(99)) if served.post(user=user).headers["x-tunesmith-arm"] == "canary")
    abort(served.scene.store, rollout.id, actor=OPERATOR, reason="complaints")
    assert served.post(user=canary).headers["x-tunesmith-version"] == f"{NAME}@v1", "from the next request on"


def test_analysis_rolls_back_a_bad_overridden_canary(served: Served, versions: Versions) -> None:
    store, good = served.scene.store, served.scene.store.record(versions[1].candidate).parents["training"]
    served.engine.answer = lambda _request, adapter: VALID if adapter == good else "not json"
    plan = ({"setWeight": 30}, ANALYSIS, {"setWeight": 100})
    rollout = served.begin(versions[4], *plan, actor=OWNER, override="a drill")
    served.until(rollout, lambda now: now.step == 1)
    sent = 0
    while get_rollout(store, rollout.id).live:
        assert served.post().status_code == 200
        sent += 1
        assert sent < 200
    ended = get_rollout(store, rollout.id)
    assert (ended.status, ended.override) == ("aborted", "a drill")
    assert ended.reason.startswith("worse; json_valid: canary 0.000")
    assert sum(row.arm == "canary" for row in served.rows()) <= 40
    assert served.post().headers["x-tunesmith-version"] == f"{NAME}@v1"


def test_unloadable_canary_ends_its_rollout(served: Served, versions: Versions) -> None:
    served.engine.broken.add(served.scene.store.record(versions[2].candidate).parents["training"])
    rollout = served.paused(versions[2], 100)
    answer = served.post()
    assert (answer.status_code, answer.headers["x-tunesmith-version"]) == (200, f"{NAME}@v1")
    assert answer.headers["x-tunesmith-arm"] == "stable"
    ended = get_rollout(served.scene.store, rollout.id)
    assert (ended.status, ended.reason) == (
        "aborted", "the canary could not be loaded: the adapter does not fit this base",
    )  # fmt: skip


def test_a_canary_that_another_server_can_load_keeps_its_rollout(served: Served) -> None:
    """As one that needs grammars, where the engine follows none."""
    canary = served.scene.version(9, answer_grammar='start: "a"\n')
    rollout = served.paused(canary, 100)
    served.engine.follows_grammars = False
    answer = served.post()
    assert (answer.status_code, answer.headers["x-tunesmith-version"]) == (200, f"{NAME}@v1")
    assert get_rollout(served.scene.store, rollout.id).status == "paused"
    answer = served.post(model=canary.label)
    assert answer.status_code == 404
    assert "a grammar, which this server's engine cannot follow" in answer.json()["error"]["message"]
    served.engine.follows_grammars = True
    assert served.post(model=canary.label).status_code == 200


@pytest.mark.parametrize("error", [TunesmithError("the disk is full"), OSError(24, "Too many open files")])
def test_a_canary_that_cannot_be_loaded_now_keeps_its_step(
    served: Served,
    versions: Versions,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    monkeypatch.setattr(routing, "_REST", 600.0)
    monkeypatch.setattr(server_app, "_REST", 0.0)
    rollout = served.paused(versions[2], 100)
    whole, canary = served.engine.load_adapter, served.scene.store.record(versions[2].candidate).parents["training"]
    tried: list[str] = []

    def load(name: str, folder: Path) -> None:
        tried.append(name)
        if name == canary:
            raise error
        whole(name, folder)

    with monkeypatch.context() as patch:
        patch.setattr(served.engine, "load_adapter", load)
        for _ in range(3):
            answer = served.post()
            assert (answer.status_code, answer.headers["x-tunesmith-arm"]) == (200, "stable")
        assert served.post(model=f"{NAME}@v2").json()["error"]["code"] == "unavailable"
        assert get_rollout(served.scene.store, rollout.id).status == "paused"
        resume(served.scene.store, rollout.id, actor=OPERATOR)
        rounds(served, 3)
        kept = get_rollout(served.scene.store, rollout.id)
        assert (kept.status, kept.step) == ("running", 2), "stable answered for it, which is no reason to promote it"
        moved = advance(served.scene.store, rollout.id)  # as another server, which never tried to load it
        assert (moved.status, moved.step) == ("running", 2)
    assert tried.count(canary) == 1, "the others did not wait for it"
    assert sum("could not be loaded" in record.getMessage() for record in caplog.records) == 1
    served.serving.versions._retries._until.clear()
    assert served.post().headers["x-tunesmith-arm"] == "canary"
    served.until(rollout, lambda now: now.status == "promoted")


def test_a_rollout_that_cannot_be_checked_keeps_nothing_else_waiting(
    served: Served, versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, failed = server_app.advance, list[int]()

    def advancing(store: Store, rollout: int, **more: Any) -> Rollout:
        if get_rollout(store, rollout).name == "theirs":
            failed.append(rollout)
            raise TunesmithError("the disk is full")
        return whole(store, rollout, **more)

    def away(_store: Store) -> Any:
        raise TunesmithError("the bucket cannot be used")

    rollout = served.paused(versions[2], 50)
    served.begin(served.scene.version(31, name="theirs"))
    monkeypatch.setattr(server_app, "_FAILED_REST", 3600.0)
    monkeypatch.setattr(server_app, "advance", advancing)
    monkeypatch.setattr(server_app, "tidy", away)
    # The newest is checked first.
    served.begin(served.scene.version(32, name="theirs"), {"setWeight": 50}, {"pause": {}}, {"setWeight": 100})
    until(lambda: failed)
    resume(served.scene.store, rollout.id, actor=OPERATOR)
    served.until(rollout, lambda now: now.status == "promoted")
    rounds(served, 2)
    assert len(failed) == 1, "its weights are not copied again each second"


# Feedback


def give(served: Served, request: str, token: str | None = None, **given: Any) -> tuple[int, Any]:
    response = served.feedback(request, token, **given)
    return response.status_code, response.json()


def test_feedback_scores_the_kept_answer_once_and_only_for_its_tenant(served: Served) -> None:
    right, wrong = served.ask(), served.ask()
    eve = served.person("eve", "operator", tenant="acme")
    said = [
        give(served, right.id, eve, expected="x"),
        give(served, right.id, eve, score={"thumbs": 0.0}),
        give(served, "chatcmpl-nothing", expected="x"),
        give(served, "nothing", score={"thumbs": 0.0}),
    ]
    assert {(status, document["error"]["code"]) for status, document in said} == {(404, "request_not_found")}
    assert give(served, right.id, expected='{ "intent":"on" }') == (
        200, {"request_id": right.id.removeprefix("chatcmpl-"), "scores": {"exact_match": 1.0}},
    )  # fmt: skip
    assert give(served, wrong._request_id, expected='{"intent": "off"}')[1]["scores"] == {"exact_match": 0.0}
    assert give(served, right.id, score={"thumbs": 1.0})[0] == 200
    for again in ({"score": {"thumbs": 0.0}}, {"score": {"json_valid": 0.0}}, {"score": {"new": 1.0, "thumbs": 0.0}}):
        status, document = give(served, right.id, **again)
        assert (status, document["error"]["code"]) == (409, "already_scored")
    assert [row.scores for row in served.rows()] == [
        {"json_valid": 1.0, "exact_match": 1.0, "thumbs": 1.0}, {"json_valid": 1.0, "exact_match": 0.0},
    ]  # fmt: skip
    assert {row.features["feedback_by"] for row in served.rows()} == {OPERATOR}


def test_a_forgotten_answer_is_scored_by_number(start_server: StartServer) -> None:
    served = start_server(kept_answers=1)
    old, new = served.ask(), served.ask()
    status, document = give(served, old.id, expected=VALID)
    assert (status, document["error"]["code"]) == (409, "answer_gone")
    assert give(served, old.id, score={"exact_match": 1.0})[0] == 200
    assert give(served, new.id, expected=VALID)[0] == 200


def test_feedback_that_is_not_well_formed_is_400(shared: Served) -> None:
    for given in (
        {},
        {"expected": "a", "score": {"b": 1.0}},
        {"score": {}},
        {"score": {"Upper": 1.0}},
        {"score": {"a": 1.1}},
        {"score": {"a": True}},
        {"expected": "a", "more": 1},
    ):
        assert give(shared, "x", **given)[0] == 400, given


JUDGE = {"url": "http://127.0.0.1:9/v1", "model": "m"}


def test_declared_scorers_score_served_answers(start_server: StartServer, tmp_path: Path) -> None:
    (tmp_path / "polite.py").write_text(
        "def score(answer, reference, request):\n    return 0.5 if 'lamp' in request else 0\n"
    )
    declared = [
        "exact_match",
        "groundedness",
        {"name": "says_on", "pattern": "on"},
        {"name": "intent", "label": "intent"},
        {"name": "polite", "function": "polite.py:score"},
        {"name": "better", "judge": JUDGE},
    ]
    scorers = TaskSettings.model_validate({"scorers": declared}).scorers
    served = start_server(scorers=scorers, root=tmp_path)
    answer = served.ask()
    assert served.rows()[0].scores == {"says_on": 1.0}
    found = served.feedback(answer.id, expected='{"intent": "on", "room": "hall"}').json()
    bad = served.feedback(served.ask().id, expected="no JSON")
    assert found["scores"] == {"exact_match": 0.0, "intent": 1.0, "polite": 0.5}
    assert "asks a judge" in found["not_scored"]["better"]
    assert "retrieved texts" in found["not_scored"]["groundedness"]
    assert bad.status_code == 400
    assert "has no 'intent'" in bad.json()["error"]["message"]


def test_rollout_refuses_a_metric_that_service_does_not_measure(tmp_path: Path) -> None:
    """The second analysis needs retrieved texts, or json_valid, as by default. What only feedback gives is measured."""
    analyses = [{"analysis": {"metric": metric}} for metric in ("helpful", "groundedness")]
    steps = [{"setWeight": 10}, *analyses, {"setWeight": 100}]
    task: Any = {**settings()["task"], "scorers": ["exact_match", "groundedness"]}
    project = Project.load(write_project(tmp_path / "a", task=task, gates={}, rollout={"steps": steps}))
    with pytest.raises(UsageError, match="step 3 analyses groundedness, which service does not measure"):
        do(project, rollouts.start, version="tiny@v1")
    project = Project.load(write_project(tmp_path / "b", task={**task, "scorers": ["exact_match"]}, gates={}))
    with pytest.raises(UsageError, match=r"step 2 analyses json_valid.*task\.scorers does not list it") as caught:
        do(project, rollouts.start, version="tiny@v1")
    assert "rollout.steps" in str(caught.value.where)
    assert "success_rate" in str(caught.value.fix)


# Control


PAUSES = ({"setWeight": 10}, {"pause": {}}, {"setWeight": 20}, {"pause": {}}, {"setWeight": 100})


@pytest.mark.attack("rollout", "a change over HTTP by somebody who saw an older step or champion")
def test_what_the_caller_did_not_see_is_not_changed(served: Served, versions: Versions, happened: Happened) -> None:
    store = served.scene.store
    rollout = served.begin(versions[2], *PAUSES)
    served.until(rollout, lambda now: (now.step, now.status) == (1, "paused"))

    def sent(action: str, **body: Any) -> tuple[int, str]:
        answer = served.send(f"/api/rollouts/{rollout.id}/{action}", body)
        return answer.status_code, answer.json().get("error", {}).get("message", "")

    before, seen = get_rollout(store, rollout.id), {"step": 1, "champion": versions[1].digest}
    stale = ({"step": 0}, "went on meanwhile"), ({"champion": versions[2].digest}, "champion changed")
    for action in ("resume", "promote", "abort", "rollback"):
        for changed, says in stale:
            status, message = sent(action, **{**seen, "reason": "stale", **changed})
            assert (status, says in message) == (409, True), (action, message)
            happened("refused, 409")
        assert sent(action, step="1")[0] == sent(action, step=True)[0] == 400
    assert get_rollout(store, rollout.id) == before
    assert sent("abort", **seen)[0] == sent("rollback", reason="")[0] == sent("promote", override=" ")[0] == 400
    assert sent("resume", **seen)[0] == 200
    served.until(rollout, lambda now: (now.step, now.status) == (3, "paused"))
    assert sent("promote", **{**seen, "step": 3})[0] == 200
    other = served.begin(versions[3], *PAUSES)
    status, message = sent("rollback", reason="not this one")
    assert (status, f"rollout {other.id}, not {rollout.id}" in message) == (409, True)
    abort(store, other.id, actor=OPERATOR, reason="enough")
    assert sent("rollback", reason="it errs", champion=versions[2].digest)[0] == 200
    champion = get_alias(store, NAME)
    assert champion is not None
    assert champion.version == versions[1].digest


def test_metrics_name_nobody_and_features_are_recorded(served: Served) -> None:
    served.ask()
    served.ask(messages=[{"role": "user", "content": "zzz qqq"}])
    text = served.get("/metrics").text
    assert not [name for name in (NAME, OPERATOR) if name in text]
    assert 'tunesmith_requests_total{arm="stable",outcome="answered"} 2.0' in text
    assert 'tunesmith_tokens_total{arm="stable",kind="completion"} 4.0' in text
    assert "tunesmith_waiting_requests 0.0" in text
    near, far = (row.features for row in served.rows())
    assert (near["characters"], far["characters"]) == (18.0, 7.0)
    assert near["nearest"] > 0.3
    assert far["nearest"] == 0.0
