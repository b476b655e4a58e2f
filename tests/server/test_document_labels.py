"""A caller's prompt, answer and headers, and the server's log and database, hold only passages that they may see.

Each document holds a word of its own. The engine repeats its whole prompt as the answer, so that a word that reached
the prompt is seen everywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.attack_table import Happened
from tests.fabricate import APPROVER, OWNER, Scene, approve, put_chain
from tests.server.conftest import Served, running
from tests.server.fake_engine import FakeEngine
from tunesmith.candidates.candidate import Retrieve
from tunesmith.core.scope import Scope
from tunesmith.data.documents import DocumentSettings, build_documents
from tunesmith.data.settings import Privacy
from tunesmith.engines.protocol import Generation
from tunesmith.registry.registration import register
from tunesmith.store import database
from tunesmith.store.people.identities import add_user, set_groups
from tunesmith.store.people.tokens import issue_token
from tunesmith.store.tables import Table

# Document -> its labels. The server is in the region eu.
DOCUMENTS: dict[str, dict[str, Any]] = {
    "public": {},
    "acme": {"tenant": "acme"},
    "globex": {"tenant": "globex"},
    "eu": {"region": "eu"},
    "us": {"region": "us"},
    "hr": {"groups": ["hr", "board"]},
    "ops": {"groups": ["ops"]},
    "acme-hr": {"tenant": "acme", "groups": ["hr"]},
    "acme-us": {"tenant": "acme", "region": "us"},
}
# Caller -> (tenant, groups, the documents that they see).
CALLERS: dict[str, tuple[str, list[str], set[str]]] = {
    "nobody": ("", [], {"public", "eu"}),
    "acme-app": ("acme", [], {"public", "eu", "acme"}),
    "globex-app": ("globex", ["ops"], {"public", "eu", "globex", "ops"}),
    "board": ("", ["board"], {"public", "eu", "hr"}),
    "acme-hr-app": ("acme", ["hr"], {"public", "eu", "acme", "hr", "acme-hr"}),
}
NAME = "manual"
ASK: list[Any] = [{"role": "user", "content": "how is the lamp switched on"}]


def canary(name: str) -> str:
    """The word that only this document holds."""
    return f"canary{name.replace('-', '')}word"


@dataclass
class Labelled:
    """A server over documents with labels. tokens: of each caller."""

    served: Served
    tokens: dict[str, str]

    def ask(self, caller: str, **more: Any) -> Any:
        """The answer to one request, as a response of httpx."""
        with self.served.http(self.tokens[caller]) as http:
            return http.post("/v1/chat/completions", json={"model": f"{NAME}@v1", "messages": ASK, **more})


@pytest.fixture
def labelled(scene: Scene, tmp_path: Path) -> Iterator[Labelled]:
    paths: list[Any] = []
    (tmp_path / "docs").mkdir()
    for name, labels in DOCUMENTS.items():
        (tmp_path / "docs" / f"{name}.md").write_text(f"The lamp is switched on at the wall. {canary(name)}\n")
        path = f"docs/{name}.md"
        paths.append({"path": path, **labels} if labels else path)
    settings = DocumentSettings.model_validate({"paths": paths, "asked_as": {}})
    documents = build_documents(scene.store, settings, tmp_path, Privacy(action="report"))
    chain = put_chain(
        scene.store,
        tuned=False,
        base=scene.base,
        dataset=scene.dataset,
        prompt="Answer from the manual.",
        retrieve=Retrieve.model_validate({"from": "documents", "k": 9}),
        documents=documents,
        max_tokens=200,
    )
    version = register(scene.store, name=NAME, verdict=chain.verdict, actor=OWNER)
    approve(scene.store, version, approver=APPROVER, reason="right")
    tokens = {}
    for caller, (tenant, groups, _) in CALLERS.items():
        add_user(scene.store, caller, ["operator"], actor=OWNER, scope=Scope(tenant), groups=groups)
        tokens[caller] = issue_token(scene.store, caller, actor=OWNER)
    engine = FakeEngine(scene.base)
    engine.context_length = 400
    engine.answer = lambda request, _adapter: _prompt(request).replace("\n", " ")
    with running(scene, engine, region="eu") as served:
        yield Labelled(served, tokens)


def _prompt(request: Generation) -> str:
    return "\n".join(message.content for message in request.messages)


def _named(anything: str) -> set[str]:
    """The documents whose word a text holds."""
    return {name for name in DOCUMENTS if canary(name) in anything}


@pytest.mark.attack("people", "passages of another tenant, region or group")
def test_only_what_the_caller_may_see_leaves_the_store(
    labelled: Labelled, caplog: pytest.LogCaptureFixture, happened: Happened
) -> None:
    caplog.set_level(logging.DEBUG)
    tokens_of: dict[str, int] = {}
    for caller, (_, _, visible) in [*CALLERS.items(), *CALLERS.items()]:  # twice: what one left behind is not reused
        caplog.clear()
        answer = labelled.ask(caller)
        assert answer.status_code == 200
        prompt = labelled.served.engine.seen[-1]
        assert _named(_prompt(prompt)) == visible
        assert _named(answer.text) == visible, "the engine repeats its prompt"
        assert _named(str(answer.headers)) == set()
        sources = {f"docs/{name}.md" for name in visible}
        assert set(answer.headers["x-tunesmith-sources"].split(", ")) == sources
        # The counts are of this prompt, and equal requests of one caller get equal ones.
        usage = answer.json()["usage"]
        assert usage["prompt_tokens"] == labelled.served.engine.count_prompt(prompt.messages)
        assert tokens_of.setdefault(caller, usage["prompt_tokens"]) == usage["prompt_tokens"]
        streamed = labelled.ask(caller, stream=True, stream_options={"include_usage": True})
        assert _named(streamed.text) == visible
        assert _named(caplog.text) == set()
    with labelled.served.http() as http:
        assert _named(http.get("/metrics").text) == set()
    set_groups(labelled.served.scene.store, "board", ["ops"], actor=OWNER)  # which counts from the next request on
    assert _named(labelled.ask("board").text) == {"public", "eu", "ops"}
    assert _named(_database(labelled)) == set()
    happened("nothing else", len(CALLERS))


def test_errors_name_no_passage(labelled: Labelled, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    engine = labelled.served.engine
    engine.context_length = 60  # the passages of acme-hr-app leave no room, those of nobody do
    too_long = labelled.ask("acme-hr-app")
    assert too_long.json()["error"]["code"] == "context_length_exceeded"
    assert _named(too_long.text + str(too_long.headers)) == set()
    assert labelled.ask("nobody").status_code == 200
    engine.context_length = 400

    def fails(request: Generation, _adapter: str | None) -> str:
        raise ValueError(f"cannot decode {_prompt(request)}")

    engine.answer = fails
    failed = labelled.ask("acme-app")
    assert failed.status_code == 500
    assert _named(failed.text + str(failed.headers)) == set()
    assert _named(caplog.text) <= CALLERS["acme-app"][2], "the operator's log has the engine's own words at most"
    assert _named(_database(labelled)) == set()


def _database(labelled: Labelled) -> str:
    """Every row of every table."""
    with database.reading(labelled.served.scene.store.engine) as session:
        return str([session.execute(table.select()).all() for table in Table.metadata.sorted_tables])
