"""A caller's prompt, answer and headers, and the server's log and database, hold only passages that they may see.

Each document holds a word of its own. The engine repeats its whole prompt as the answer, so that a word that reached
the prompt is seen everywhere.
"""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.attack_table import Happened
from tests.fabricate import APPROVER, OWNER, Scene, approve, put_chain
from tests.server.conftest import Served, running
from tests.server.fake_engine import FakeEngine
from tunesmith.data.documents import DocumentSettings, build_documents
from tunesmith.data.settings import Privacy
from tunesmith.engines.protocol import Generation
from tunesmith.records.candidate import Retrieve
from tunesmith.registry.registration import register
from tunesmith.store import database
from tunesmith.store.people.identities import set_groups
from tunesmith.store.tables import Table

# Document -> its labels. The server is in the region eu.
DOCUMENTS: dict[str, dict[str, Any]] = {
    "public": {},
    "acme": {"tenant": "acme"},
    "eu": {"region": "eu"},
    "us": {"region": "us"},
    "hr": {"groups": ["hr", "board"]},
    "ops": {"groups": ["ops"]},
    "acme-hr": {"tenant": "acme", "groups": ["hr"]},
}
# Caller -> (tenant, groups, the documents that they see).
CALLERS: dict[str, tuple[str, list[str], set[str]]] = {
    "globex-app": ("globex", ["ops"], {"public", "eu", "ops"}),
    "board": ("", ["board"], {"public", "eu", "hr"}),
    "acme-hr-app": ("acme", ["hr"], {"public", "eu", "acme", "hr", "acme-hr"}),
}
NAME = "manual"
ASK: list[Any] = [{"role": "user", "content": "how is the lamp switched on"}]


def canary(name: str) -> str:
    """The word that only this document holds."""
    return f"canary{name.replace('-', '')}word"


Ask = Callable[..., httpx.Response]


@pytest.fixture
def labelled(scene: Scene, tmp_path: Path) -> Iterator[tuple[Served, Ask]]:
    """A server over documents with labels, and a function that sends one request of a caller."""
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
    engine = FakeEngine(scene.base)
    engine.context_length = 400
    engine.answer = lambda request, _adapter: _prompt(request).replace("\n", " ")
    with running(scene, engine, region="eu") as served:
        callers = {
            name: served.person(name, "operator", tenant=tenant, groups=groups)
            for name, (tenant, groups, _) in CALLERS.items()
        }

        def ask(caller: str, **more: Any) -> httpx.Response:
            return served.post(callers[caller], model=f"{NAME}@v1", messages=ASK, **more)

        yield served, ask


def _prompt(request: Generation) -> str:
    return "\n".join(message.content for message in request.messages)


def _named(anything: str) -> set[str]:
    """The documents whose word a text holds."""
    return {name for name in DOCUMENTS if canary(name) in anything}


def _database(served: Served) -> str:
    """Every row of every table."""
    with database.reading(served.scene.store.engine) as session:
        return str([session.execute(table.select()).all() for table in Table.metadata.sorted_tables])


@pytest.mark.attack("people", "passages of another tenant, region or group")
def test_only_what_the_caller_may_see_leaves_the_store(
    labelled: tuple[Served, Ask], caplog: pytest.LogCaptureFixture, happened: Happened
) -> None:
    caplog.set_level(logging.DEBUG)
    (served, ask), tokens_of = labelled, dict[str, int]()
    engine = served.engine
    for caller, (_, _, visible) in [*CALLERS.items(), *CALLERS.items()]:  # twice: what one left behind is not reused
        answer = ask(caller)
        assert answer.status_code == 200
        assert _named(_prompt(engine.seen[-1])) == visible
        assert _named(answer.text) == visible, "the engine repeats its prompt"
        assert _named(str(answer.headers)) == set()
        sources = {f"docs/{name}.md" for name in visible}
        assert set(answer.headers["x-tunesmith-sources"].split(", ")) == sources
        # The counts are of this prompt, and equal requests of one caller get equal ones.
        tokens = answer.json()["usage"]["prompt_tokens"]
        assert tokens == engine.count_prompt(engine.seen[-1].messages) == tokens_of.setdefault(caller, tokens)
        assert _named(ask(caller, stream=True, stream_options={"include_usage": True}).text) == visible
    assert _named(served.get("/metrics").text) == set()
    set_groups(served.scene.store, "board", ["ops"], actor=OWNER)  # which counts from the next request on
    assert _named(ask("board").text) == {"public", "eu", "ops"}
    happened("nothing else", len(CALLERS))

    # Errors name no passage.
    engine.context_length = 50  # the passages of acme-hr-app leave no room, those of globex-app do
    too_long = ask("acme-hr-app")
    assert too_long.json()["error"]["code"] == "context_length_exceeded"
    assert _named(too_long.text + str(too_long.headers)) == set()
    assert ask("globex-app").status_code == 200
    assert _named(caplog.text) == set()

    def fails(request: Generation, _adapter: str | None) -> str:
        raise ValueError(f"cannot decode {_prompt(request)}")

    engine.answer = fails
    failed = ask("globex-app")
    assert failed.status_code == 500
    assert _named(failed.text + str(failed.headers)) == set()
    assert _named(caplog.text) <= CALLERS["globex-app"][2], "the operator's log has the engine's own words at most"
    assert _named(_database(served)) == set()
