"""`optimise:` with an endpoint and a rewriter, which are a real HTTP server: bounds, failures, resuming."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chat_server import ChatServer, Reply, chat_server, completion
from tests.tiny_project import settings, write_project
from tunesmith.candidates.answering import Answerer
from tunesmith.candidates.candidate import Candidate
from tunesmith.candidates.settings import EndpointSettings
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.pipeline.candidates import untrained_candidate
from tunesmith.pipeline.context import PipelineContext
from tunesmith.project import Project, parse_settings
from tunesmith.records.training import SearchBody
from tunesmith.store.store import Store

ROWS, CALLS, PRICE = 30, 400, 1e-6 * (11 * 2 + 3 * 5)  # of one answer, which takes 11 and 3 tokens
BETTER = "Answer PRECISELY."


def right(body: dict[str, Any]) -> str:
    _, verb, room, thing = body["messages"][-1]["content"].split()
    return json.dumps({"on": verb == "on", "room": room, "thing": thing})


def reply(body: dict[str, Any]) -> Reply:
    """The rewriter answers with a better prompt; with it the candidate is right, and with shots on every other room."""
    if body["model"] == "writer":
        return 200, {}, completion(f"Better:\n```\n{BETTER}\n```")
    knows = BETTER in body["messages"][0]["content"] or (len(body["messages"]) > 2 and "tt" in right(body))
    return 200, {}, completion(right(body) if knows else "no idea")


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server() as running:
        running.reply = reply
        yield running


def project(folder: Path, server: ChatServer, validation: float = 0.3, **optimise: Any) -> Project:
    priced = {"url": server.url, "retries": 0, "parallel": 1, "price": {"prompt": 2, "answer": 5}}
    optimise = {"calls": CALLS, "rows": ROWS, "cost": 1.0, "rewriter": {**priced, "model": "writer"}, **optimise}
    candidates = {
        "rival": {"prompt": "prompt.txt", "endpoint": {**priced, "model": "big"}, "optimise": optimise},
        "tuned": {"prompt_of": "rival", "train": {"epochs": 1}},
    }
    data = {**settings()["data"], "split": {"validation": validation, "test": 0.3, "group_by": "template"}}
    return Project.load(write_project(folder, candidates=candidates, data=data, gates={}))


def found(project: Project, name: str = "rival") -> tuple[Candidate, SearchBody]:
    context = PipelineContext(project)
    made = untrained_candidate(context, name, context.settings_of(name))
    assert made.search is not None
    return made, SearchBody.read(project.store, made.search)


def as_tried(body: SearchBody) -> Any:
    return body.model_dump(exclude={"seconds": True, "tries": {"__all__": {"seconds"}}})


def test_a_search_that_fails_or_is_killed_asks_only_for_the_rest_and_finds_the_same(
    tmp_path: Path, server: ChatServer
) -> None:
    rival, whole = found(project(tmp_path / "whole", server))
    assert (rival.prompt, whole.tries[whole.best].mean) == (BETTER, 1.0)
    assert whole.tries[0].mean == 0.0
    asked = len(server.asked)
    assert asked == whole.budget < CALLS
    assert whole.ended == "rewrites"
    assert whole.cost == pytest.approx(asked * PRICE)
    writer = [body for body in server.asked if body["model"] == "writer"]
    assert "no idea" in writer[0]["messages"][0]["content"]
    test_rows = {
        row.request[-1].content for row in PipelineContext(project(tmp_path / "whole", server)).dataset.examples("test")
    }
    assert not any(text in json.dumps(body) for body in server.asked for text in test_rows)

    server.asked.clear()
    stopped = project(tmp_path / "stopped", server)
    fails: list[str] = ["big", "writer"]

    def broken(body: dict[str, Any]) -> Reply:
        if fails and body["model"] == fails[0] and len(server.asked) > 40:
            return 503, {}, {"error": "busy"}
        return reply(body)

    server.reply = broken
    while fails:
        with pytest.raises(TunesmithError, match="status 503"):
            found(stopped)
        fails.pop(0)
    _, again = found(stopped)
    assert as_tried(again) == as_tried(whole)
    assert len(server.asked) <= asked + 2 * 16, "at most one batch is asked again after each failure"
    found(stopped)
    assert len(server.asked) <= asked + 2 * 16, "a finished search is looked up"
    tuned, _ = found(stopped, "tuned")
    assert (tuned.prompt, tuned.shots) == (BETTER, ())


def test_the_stated_cost_ends_a_search_with_the_best_so_far(tmp_path: Path, server: ChatServer) -> None:
    rival, body = found(project(tmp_path / "p", server, cost=100 * PRICE))
    assert body.ended == "cost"
    assert len(server.asked) == body.budget
    assert body.cost <= 100 * PRICE
    assert body.tries[body.best].mean == max(one.mean for one in body.tries if one.rows == ROWS)
    assert rival.prompt == "Answer with JSON."
    other = EndpointSettings(url=server.url, model="x")
    with pytest.raises(UsageError, match="rival is big at"):  # what another model says is not recorded as its answers
        _ = Answerer(Store(tmp_path / "p" / ".tunesmith"), None, rival, other).responder
    rival, body = found(project(tmp_path / "less", server, cost=PRICE))
    assert (body.best, body.tries[0].rows, body.ended) == (0, 16, "cost")
    assert rival.shots == ()


@pytest.mark.parametrize("said", ["", "``````", "\x00<|im_end|>" * 400])
def test_nonsense_scores_low_and_breaks_nothing(tmp_path: Path, server: ChatServer, said: str) -> None:
    def answers(body: dict[str, Any]) -> Reply:
        if body["model"] == "writer":
            return 200, {}, completion(said)
        return (400, {}, {"error": "too long"}) if len(body["messages"]) > 30 else reply(body)

    server.reply = answers
    rival, body = found(project(tmp_path / "p", server))
    assert rival.prompt == "Answer with JSON."
    assert 0 < body.tries[body.best].mean < 1
    assert {one.why is not None for one in body.tries if len(one.shots) == 16} == {True}


def test_too_few_validation_rows_are_refused_with_their_number(tmp_path: Path, server: ChatServer) -> None:
    with pytest.raises(UsageError, match="takes 30 validation rows, and the dataset has 1"):
        found(project(tmp_path / "p", server, validation=0.1))
    assert server.asked == []
    text = (tmp_path / "p" / "tunesmith.yaml").read_text().replace("prompt_of: rival", "prompt_of: tuned")
    with pytest.raises(UsageError, match="prompt_of: 'tuned' has no optimise"):
        parse_settings(text, "x")
    for wrong in ({"rows": 29}, {"seed": 2**31}):
        with pytest.raises(UsageError, match=r"should be (greater|less) than"):
            project(tmp_path / "wrong", server, **wrong)
