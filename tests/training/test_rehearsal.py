"""Rehearsal: which rows are added, that they are the base's own answers, and what they leave as it was."""

import shutil
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.commands import call
from tests.tiny import TEMPLATE, write_model
from tests.tiny_project import write_project
from tests.training.test_resume import SETTINGS, StoppedAfter, run
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.progress import Stopped
from tunesmith.engines.protocol import Completion, Generation
from tunesmith.evaluation.probes import drift
from tunesmith.evaluation.probes.numbers import general_questions
from tunesmith.models.rendering import Rendered
from tunesmith.project import Project
from tunesmith.store.store import Store
from tunesmith.training.batches import rehearsal
from tunesmith.training.batches.batch_plan import TrainingPlan
from tunesmith.training.batches.rehearsal import (
    Rehearsed,
    decode_rehearsed,
    encode_rehearsed,
    general_requests,
    rehearse,
    render_rehearsed,
)
from tunesmith.training.settings import TrainSettings


def _answers(asked: Sequence[Generation]) -> list[Completion]:
    """An answer that states its request and draw; every third one has no end."""
    assert {each.temperature for each in asked} == {1.0}, "drawn from the base's own distribution"
    return [
        Completion(f"{each.seed}: {each.messages[-1].content}", "stop" if place % 3 else "length", 1, 1)
        for place, each in enumerate(asked)
    ]


def _rehearsed(rows: int, *, decided: int | None = None, clock: Any = lambda: 0.0, **given: Any) -> list[Rehearsed]:
    return rehearse(TrainSettings.model_validate(given), rows, _answers, clock, decided)


def test_as_many_as_all_epochs_take_up_to_a_limit() -> None:
    assert len(_rehearsed(300, rehearse=0.02, epochs=3)) == 18
    assert len(_rehearsed(10, rehearse=0.02, epochs=3)) == 3, "one an epoch at least"
    many = _rehearsed(8000, rehearse=0.02, epochs=3)
    assert len(many) == 256
    assert len({each.answer for each in many}) == 256, "a request that comes again is answered anew"
    assert all(each.answer.endswith(each.request) for each in many)
    first, again, other = (_rehearsed(20, rehearse=1.0, epochs=1, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert {each.request for each in first} != {each.request for each in other}


def test_drawing_ends_with_its_share_of_the_budget_and_can_be_repeated() -> None:
    ticks = count(step=2.0)  # a look at the clock takes two seconds, and a twentieth of the budget is three
    drawn = _rehearsed(8000, rehearse=0.02, budget=60, clock=lambda: next(ticks))
    assert len(drawn) == 64, "32 at a time"
    assert _rehearsed(8000, rehearse=0.02, budget=60, decided=64, clock=None) == drawn
    endless = count(step=1000.0)
    assert len(_rehearsed(8000, rehearse=0.02, budget=60, clock=lambda: next(endless))) == 32, "some in any case"


def test_what_is_kept_is_read_again() -> None:
    drawn = [*_rehearsed(20, rehearse=1.0, epochs=1), Rehearsed("naïve\u2028?", '"\n', ended=True)]
    assert decode_rehearsed(encode_rehearsed(drawn)) == drawn
    for damaged in (encode_rehearsed(drawn)[:-9], b"[1]\n", b'{"request": "?"}\n', b"\xff\n"):
        with pytest.raises(ValueError):
            decode_rehearsed(damaged)


def test_a_cut_answer_is_learned_without_its_end() -> None:
    def conversation(turns: Sequence[Any], loss_on: str) -> Rendered:
        if not turns[1].content:
            raise Refused("no token of this conversation would be trained on")
        words = len(turns[1].content.split())
        return Rendered((*range(3 + words), 98, 99), (False,) * 3 + (True,) * words + (True, False))

    renderer: Any = SimpleNamespace(conversation=conversation)
    ended, cut, empty = (Rehearsed("?", text, ended=end) for text, end in (("a b", True), ("a b", False), ("", True)))
    assert render_rehearsed(renderer, [ended, cut, empty], 99) == [
        Rendered((0, 1, 2, 3, 4, 98, 99), (False, False, False, True, True, True, False)),
        Rendered((0, 1, 2, 3, 4), (False, False, False, True, True)),
    ]
    assert [len(row.ids) for row in render_rehearsed(renderer, [ended, cut], 5)] == [5], "a long one is left out"


def test_what_is_left_out_is_said_and_nothing_left_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "model")
    drawn = [Rehearsed("?", "yes", ended=True), Rehearsed("?", "<|im_end|>", ended=True)]
    monkeypatch.setattr(rehearsal, "rehearse", lambda *_: drawn)
    chosen = SETTINGS.model_copy(update={"rehearse": 0.02, "epochs": 2})
    run(tmp_path, chosen)
    store = Store(tmp_path / "store")
    (body,) = (store.record(digest).body for digest in store.records_of("training"))
    assert body["rehearsed"] == 2
    assert any(each.startswith("1 of 2 answers of the base are not rehearsed") for each in body["notices"])
    monkeypatch.setattr(rehearsal, "rehearse", lambda *_: drawn[1:])
    shutil.rmtree(tmp_path / "work")
    with pytest.raises(Refused, match="none of 1 answers of the base can be rehearsed") as refused:
        run(tmp_path, chosen)
    assert refused.value.where == "train.rehearse"


def test_a_base_that_cannot_answer_general_requests_is_refused(tmp_path: Path) -> None:
    asks = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system turn comes first') }}{% endif %}"
    write_model(tmp_path / "model", template=asks + TEMPLATE)
    with pytest.raises(Refused, match=r"cannot answer general requests: .* a system turn comes first") as refused:
        run(tmp_path, SETTINGS.model_copy(update={"rehearse": 0.1}))
    assert refused.value.where == "train.rehearse"


def test_each_epoch_rehearses_the_next_ones() -> None:
    def row(first: int) -> Rendered:
        return Rendered((first, 1, 2), (False, True, True))

    plan = TrainingPlan(
        [row(place) for place in range(10)],
        TrainSettings(epochs=4, batch=4, rehearse=0.2),
        rehearsal=[row(place) for place in range(100, 105)],
        share=False,
    )
    firsts = [
        sorted(int(batch.ids[start]) for step in plan.epoch(epoch) for batch in step for start in _starts(batch))
        for epoch in range(4)
    ]
    assert [each[:10] for each in firsts] == [list(range(10))] * 4
    assert [each[10:] for each in firsts] == [[100, 101], [102, 103], [100, 104], [101, 102]]
    assert plan.epoch_steps == 3


def _starts(batch: Any) -> list[int]:
    """Where the rows of a batch begin: at position 0."""
    return [place for place, position in enumerate(batch.positions.tolist()) if position == 0]


def test_no_probe_asks_what_is_rehearsed() -> None:
    probed = {each.messages[-1].content for each in general_questions()}
    packaged = [drift._packaged(kind) for kind in ("fact", "unsafe", "harmless", "polite")]
    assert all(packaged)
    probed |= {each["request"] for listed in packaged for each in listed}
    requests = [each.lower() for each in general_requests()]
    assert len(requests) == len(set(requests))
    assert all(requests)
    assert not set(requests) & {each.lower() for each in probed}


def test_stopped_it_goes_on_with_the_same_answers_and_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = SETTINGS.model_copy(update={"rehearse": 0.1, "epochs": 1})
    write_model(tmp_path / "whole" / "model")
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    whole = run(tmp_path / "whole", chosen)
    with pytest.raises(Stopped):
        run(tmp_path / "stopped", chosen, progress=StoppedAfter(9))
    kept = {name: tmp_path / name / "work" / "rehearsal.jsonl" for name in ("changed", "cut", "emptied")}
    for name in kept:
        shutil.copytree(tmp_path / "stopped", tmp_path / name)
    kept["cut"].write_bytes(b"".join(kept["cut"].read_bytes().splitlines(keepends=True)[1:]))
    kept["emptied"].write_bytes(b"")
    for name in ("cut", "emptied"):
        assert run(tmp_path / name, chosen) == whole, "they are drawn again"

    def again(*_: Any) -> Any:
        raise AssertionError("the base was asked again")

    monkeypatch.setattr(rehearsal, "rehearse", again)
    assert run(tmp_path / "stopped", chosen) == whole
    kept["changed"].write_bytes(kept["changed"].read_bytes().replace(b'"answer": "', b'"answer": "x', 1))
    with pytest.raises(Refused, match="other rehearsed answers"):
        run(tmp_path / "changed", chosen)


def test_a_training_that_rehearsed_within_a_budget_is_repeated(tmp_path: Path) -> None:
    train = {"rank": 2, "batch": 12, "rows": 24, "validate_by": "loss", "rehearse": 0.1, "budget": 8}
    plain = {"prompt": "prompt.txt", "max_tokens": 8}
    candidates = {"within": {**plain, "train": train}, "shared": {**plain, "weights": "within"}}
    folder = write_project(tmp_path / "p", candidates=candidates)
    store = Project.load(folder).store
    for name, why in (("within", "there is none to repeat"), ("shared", "candidate 'shared' has no training")):
        with pytest.raises(UsageError, match=why):
            call(folder, "train", name, "--repeat")
    assert store.records_of("training") == [], "nothing was trained"
    done = call(folder, "train", "within")
    body = store.record(done["training"]).body
    assert (done["rows"], body["settings"]["rehearse"]) == (24, 0.1)
    assert body["rehearsed"] == body["decisions"]["rehearsed"] > 0
    call(folder, "train", "within", "--repeat")  # raises where the weights differ
