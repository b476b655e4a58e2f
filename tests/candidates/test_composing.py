"""What a training row teaches: its own answers, and none of the examples that are shown before it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.fabricate import example, put_base, put_dataset
from tests.tiny import write_model
from tunesmith.candidates.candidate import Candidate, Retrieve
from tunesmith.candidates.composing import Composer, compose
from tunesmith.core.access import ANYONE
from tunesmith.core.messages import Message
from tunesmith.data.dataset import Example
from tunesmith.models.rendering import Renderer
from tunesmith.store.store import Store

SHOT = (Message(role="user", content="turn on the fan"), Message(role="assistant", content='{"shot":1}'))
OTHERS = [example(f"turn on the {thing} light", {"retrieved": thing}, thing) for thing in ("hall", "kitchen")]


def _own(weights: Sequence[int]) -> Example:
    """A row with one answer for each weight."""
    turns: list[Message] = []
    for place, weight in enumerate(weights):
        turns.append(Message(role="user", content=f"turn on the kitchen light {place}"))
        turns.append(Message.model_validate({"role": "assistant", "content": f'{{"own":{place}}}', "weight": weight}))
    return Example(id="own", messages=tuple(turns), source="rows.jsonl", licence="CC0-1.0", group="own")


def test_only_a_rows_own_answers_are_labels(tmp_path: Path) -> None:
    renderer, store, row = Renderer(write_model(tmp_path / "model")), Store(tmp_path / "store"), _own([1, 0, 1])
    candidate = Candidate(
        name="shown",
        base=put_base(store),
        max_tokens=8,
        prompt="Answer.",
        shots=(SHOT,),
        dataset=put_dataset(store, [*OTHERS, row]),
        retrieve=Retrieve(k=2),
    )
    composer = Composer(store, candidate)
    composed = composer.training_conversation(row)
    assert [turn.content for turn in composed if turn.role == "assistant"] == [
        '{"shot":1}', '{"retrieved": "hall"}', '{"retrieved": "kitchen"}', '{"own":0}', '{"own":1}', '{"own":2}'
    ]  # fmt: skip
    rendered = renderer.conversation(composed)
    learned = [token for token, label in zip(rendered.ids, rendered.trained, strict=True) if label]
    assert renderer.text(learned) == '{"own":0}{"own":2}'
    # The model sees the same tokens as where the row is a request, and requests are composed as before.
    plain = compose(candidate, row.messages, composer.retrieved_without_group(row, ANYONE))
    assert rendered.ids == renderer.conversation(plain).ids
    assert renderer.prompt(composed[:-1]) == renderer.prompt(plain[:-1])
    assert {turn.weight for turn in plain[:-6]} == {1}
