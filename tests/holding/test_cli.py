"""`tunesmith held`: list, show, release and refuse."""

from typing import Any

import pytest

from tests.commands import call, printed
from tests.fabricate import APPROVER, NAME, OPERATOR, OWNER, STEWARD, Scene
from tests.rollout.conftest import begin, made, scene, versions
from tunesmith.candidates.grammars.copying import CopyGrammars
from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Message
from tunesmith.core.text.names import Scope
from tunesmith.holding import queue
from tunesmith.holding.settings import HoldSettings
from tunesmith.registry.versions import Version

__all__ = ["made", "scene", "versions"]

SETTINGS = HoldSettings.model_validate({"rules": [{"values": ["pay"]}]})
SCHEMA = '{"type": "object", "required": ["intent"]}'
COPIED = '{"type": "object", "properties": {"who": {"type": "string"}, "n": {"type": "integer"}}, "required": ["who"]}'


@pytest.fixture
def waiting(scene: Scene, versions: dict[int, Version], monkeypatch: pytest.MonkeyPatch) -> Scene:
    """A scene with two answers that wait."""
    monkeypatch.setenv("COLUMNS", "250")
    begin(scene, versions[1])
    for identifier in ("a" * 32, "b" * 32):
        answer = queue.HeldAnswer(
            id=identifier, name=NAME, version=versions[1].digest, scope=versions[1].scope, caller=OPERATOR,
            reasons=('intent is "pay"',), messages=(Message(role="user", content="\x1b[2Jpay [bold]eve[/]"),),
            text='{"intent": "pay"}', response={"choices": [{"message": {"content": '{"intent": "pay"}'}}]},
            schemas=(SCHEMA,),
        )  # fmt: skip
        queue.put(scene.store, answer, SETTINGS, 10)
    return scene


def run(scene: Scene, *words: str) -> str:
    return printed(scene.store.root, "held", *words)


def document(scene: Scene, *words: str) -> Any:
    return call(scene.store.root, "held", *words)


def test_a_reviewer_lists_shows_and_decides(waiting: Scene) -> None:
    assert "no answer waits" in run(waiting, "list", "--as", OWNER)  # an admin reviews nothing
    assert [one["id"][0] for one in document(waiting, "list", "--as", STEWARD)["held"]] == ["a", "b"]
    shown = run(waiting, "show", "a" * 32, "--as", STEWARD)
    assert 'held because: intent is "pay"' in shown
    assert "[bold]eve[/]" in shown  # a stranger's text: shown, not obeyed
    assert "\x1b" not in shown
    assert 'answer: {"intent": "pay"}' in shown
    assert "answer:" not in run(waiting, "show", "a" * 32, "--as", OPERATOR)
    with pytest.raises(UsageError, match="at least 1 character"):
        run(waiting, "release", "a" * 32, "--as", STEWARD)
    with pytest.raises(UsageError, match="does not fit the schema"):
        run(waiting, "release", "a" * 32, "--answer", "{}", "--reason", "x", "--as", STEWARD)
    edited = ("release", "a" * 32, "--answer", '{"intent": "ask"}', "--reason", "too much", "--as", STEWARD)
    assert document(waiting, *edited)["state"] == "replaced"
    assert document(waiting, *edited)["decided_by"] == STEWARD  # again: nothing new
    with pytest.raises(queue.AlreadyDecided, match=f"{STEWARD} decided already: replaced"):
        run(waiting, "refuse", "a" * 32, "--reason", "no", "--as", APPROVER)
    assert f"is refused by {APPROVER}" in run(waiting, "refuse", "b" * 32, "--reason", "no", "--as", APPROVER)
    assert document(waiting, "list", "--as", STEWARD)["held"] == []
    assert len(document(waiting, "list", "--all", "--as", STEWARD)["held"]) == 2
    asked = document(waiting, "show", "a" * 32, "--as", OPERATOR)["completion"]["choices"][0]
    assert (asked["message"]["content"], asked["finish_reason"]) == ('{"intent": "ask"}', "stop")


def test_an_edited_answer_may_be_spelled_in_any_way(waiting: Scene) -> None:
    """Of copied fields there is a grammar, which holds the spelling of what is decoded."""
    with waiting.store.reading() as session:
        before = queue.get(session, "a" * 32)
    held = queue.HeldAnswer(
        id="c" * 32, name=NAME, version=before.version, scope=Scope(before.tenant, before.region), caller=OPERATOR,
        reasons=(), messages=(Message(role="user", content="call Ren\u00e9e"),), text='{"who": "Ren\u00e9e"}',
        response={"choices": [{"message": {"content": '{"who": "Ren\u00e9e"}'}}]},
        schemas=(COPIED,), grammar=CopyGrammars(COPIED, ("who",)).grammar(["call Ren\u00e9e"]),
    )  # fmt: skip
    queue.put(waiting.store, held, SETTINGS, 10)
    how, spelled = {"actor": STEWARD, "reason": "looked at it"}, '{\n  "who" : "Ren\\u00e9e",\n  "n": 2\n}'
    with pytest.raises(UsageError, match="does not fit the grammar"):
        queue.decide(waiting.store, held.id, "replace", answer='{"who": "Mario"}', **how)
    queue.decide(waiting.store, held.id, "replace", answer=spelled, **how)
    with waiting.store.reading() as session:
        assert queue.get(session, held.id).texts["edited"] == spelled
