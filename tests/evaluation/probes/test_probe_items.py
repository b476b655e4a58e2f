"""What the bias and robustness probes ask: swapped rows, unclean requests, and BBQ and CrowS-Pairs as published."""

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.evaluation.probing import row
from tests.models.test_rendering_tools import CALL, HERMES, TURNS
from tests.tiny import write_tokenizer
from tunesmith.candidates.candidate import Candidate
from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Message, ToolCall
from tunesmith.data.dataset import Example
from tunesmith.engines.protocol import Completion
from tunesmith.evaluation.lines import ITEMS, read_items
from tunesmith.evaluation.metrics.declared import make_scoring
from tunesmith.evaluation.probes import drift, memory
from tunesmith.evaluation.probes.bias import PER_TOKEN, bbq_items, crows_pairs_items, swap_items
from tunesmith.evaluation.probes.catalog import suite_of
from tunesmith.evaluation.probes.measuring import Item, encode_items
from tunesmith.evaluation.probes.numbers import general_questions, right_share
from tunesmith.evaluation.probes.suites import ProbeContext, ask, digest_path
from tunesmith.models.rendering import Renderer
from tunesmith.store.records import Record
from tunesmith.store.store import Store
from tunesmith.training.batches.rows import SOURCE, canaries, training_rows
from tunesmith.training.settings import CanarySettings, TrainSettings


def context(
    test: list[Example] | None = None, trained: list[Example] | None = None, rows: int = 100, path: Path | None = None
) -> ProbeContext:
    return ProbeContext(trained or [], (), [], test or [], lambda _row, request: tuple(request), tuple, rows, path)


def called(request: str, answer: str, arguments: str = '{"who":"Anna"}') -> Example:
    """A row whose answer in text follows a call of a function and its result."""
    call = ToolCall(id="c", name="find", arguments=arguments)
    turns = (
        Message(role="user", content=request, tools="[]"),
        Message(role="assistant", content="", tool_calls=(call,)),
        Message(role="tool", content="found", tool_call_id="c"),
        Message(role="assistant", content=answer),
    )
    return row(request, answer).model_copy(update={"messages": turns})


def versions(request: str, answer: str = "ok") -> dict[str, tuple[str, str]]:
    """arm/side -> (request, answer) of one row."""
    found = swap_items(context([row(request, answer)]))
    asked = {f"{item.arm}/{item.id[-1]}": (item.messages[0].content, item.choices[0]) for item in found}
    whole = {name: each for name, each in asked.items() if PER_TOKEN not in name}
    assert {name.replace(PER_TOKEN, ""): each for name, each in asked.items() if name not in whole} == whole
    return whole


def test_genders_are_swapped_in_request_and_answer_alike() -> None:
    found = versions("Anna lost her card and he saw her", '{"who":"Anna"}')
    assert found["gender/a"] == ("William lost his card and he saw him", '{"who":"William"}')
    assert found["gender/b"] == ("Anna lost her card and she saw her", '{"who":"Anna"}')
    assert found["names/a"] == ("Anna lost her card and he saw her", '{"who":"Anna"}')
    assert found["names/b"] == ("Priya lost her card and he saw her", '{"who":"Priya"}')
    for nobody in ("turn on the light", "please mark this with grace"):
        assert versions(nobody) == {}, "also words that are names too"
    titled = versions("MR Smith called")
    assert set(titled) == {"gender/a", "gender/b"}
    assert titled["gender/b"][0] == "MRS Smith called"


def test_changed_requests_keep_their_tools_and_calls() -> None:
    """What is asked is otherwise the row's request: a model without its tools cannot call them."""
    one = called("where is Anna Smith today", "Anna is out")
    asked = context([one])
    for items in (swap_items(asked), drift.robustness_items(asked), memory.extraction_items(asked)):
        assert items
        assert {item.messages[0].tools for item in items} == {"[]"}
    swapped = {item.id[-1]: item for item in swap_items(context([one])) if item.arm == "gender"}
    assert {side: item.choices for side, item in swapped.items()} == {"a": ("William is out",), "b": ("Anna is out",)}
    for side, name in (("a", "William"), ("b", "Anna")):
        assert swapped[side].messages[1].tool_calls[0].arguments == f'{{"who":"{name}"}}'


def test_answers_that_are_calls_are_left_out_and_counted() -> None:
    """Each base writes calls in a form of its own: no text of one is what training writes."""
    whole = called("where is Anna Smith today", "Anna is out")
    call = whole.model_copy(update={"id": "call", "messages": whole.messages[:2]})
    for items in (memory.membership_items, memory.extraction_items):
        found = items(context(trained=[whole, call], test=[call]))
        assert [(item.arm, item.choices or item.expected) for item in found] == [
            ("trained on", ("Anna is out",) if items is memory.membership_items else "Anna is out")
        ]
    assert swap_items(context([call])) == []
    assert {suite_of(name).count_left_out(context([call])) for name in ("membership", "extraction", "swap")} == {1}
    assert suite_of("membership").count_left_out(context(trained=[whole, call])) == 2
    assert suite_of("overfitting").count_left_out(context([call])) is None
    for canary in canaries([whole, call], CanarySettings()):
        request, *between, answer = canary.example.messages
        assert (request.tools, tuple(between)) == ("[]", whole.messages[1:3])
        assert answer.content.startswith("Anna is out ")
    with pytest.raises(UsageError, match="all 2 answers are calls of functions"):
        canaries([call, call], CanarySettings())


def test_canaries_are_rows_like_the_others_and_always_the_same() -> None:
    rows = [row(f"turn on lamp {n}", '{"thing":"lamp"}') for n in range(30)]
    settings = CanarySettings(each=5, repeats=(1, 4), controls=100)
    made = canaries(rows, settings)
    assert made == canaries(list(reversed(rows)), settings)
    assert [sum(each.repeats == times for each in made) for times in (0, 1, 4)] == [100, 5, 5]
    assert len({each.example.answer for each in made}) == 110
    assert made[0].example.answer.startswith('{"thing":"'), "the form of the user's own answers"
    planted = training_rows(rows, TrainSettings(canaries=settings))
    assert planted[:30] == training_rows(rows, TrainSettings()) == rows
    assert len({each.id for each in planted}) == len(planted) == 30 + 5 + 20
    assert {each.source for each in planted[30:]} == {SOURCE}
    asked = memory.canary_items(context()._replace(canaries=made))
    assert Counter(item.arm for item in asked) == {"control": 100, "1": 5, "4": 5}


def test_expected_calls_are_scored_as_calls(tmp_path: Path) -> None:
    """Robustness of a base that writes calls between tags: answers that are right in every arm count as right."""
    write_tokenizer(tmp_path, HERMES)
    call = row("x", "y").model_copy(update={"messages": TURNS[:2]})
    items = drift.robustness_items(context([call]))
    store = Store(tmp_path / "store")
    kept = Record(kind="answers", blobs={ITEMS: store.put_bytes(encode_items(items))})
    assert read_items(store, kept, Item) == items
    candidate, renderer = Candidate(name="tuned", base="sha256:0", max_tokens=64), Renderer(tmp_path)
    engine: Any = SimpleNamespace(
        generate=lambda asked, adapter, _: [Completion(CALL if adapter == "a" else "", "stop", 1, 1)] * len(asked),
        choose=lambda asked, adapter, _: [[-3.0 if adapter == "a" else -9.0]] * len(asked),
    )
    suite = suite_of("robustness")
    likely = memory.membership_items(context(test=[row("where is it", "here")]))
    first, *lines = ask(engine, engine, renderer, "a", [*likely, *items], candidate)
    assert first == {"id": likely[0].id, "scores": [-3.0], "tokens": 5}
    scoring = make_scoring("exact_match", None, tmp_path)
    assert {suite.value(item, line, scoring) for item, line in zip(items, lines, strict=True)} == {1.0}


def test_every_learned_answer_of_a_conversation_is_asked_for() -> None:
    said = ("one", "ann@firm.org", "two", "shown", "three", "bob@firm.org")
    messages = tuple(
        Message(role="assistant" if place % 2 else "user", content=text, weight=0 if text == "shown" else 1)
        for place, text in enumerate(said)
    )
    talk = row("x", "y", "g").model_copy(update={"id": "talk", "messages": messages})
    asked = context(trained=[talk], test=[row("please go", "gone")])
    found = [(item.id, item.choices, len(item.messages), item.group) for item in memory.membership_items(asked)[:2]]
    assert found == [("trained on:talk", ("bob@firm.org",), 5, "g"), ("trained on:talk/1", ("ann@firm.org",), 1, "g")]
    assert {item.expected for item in memory.extraction_items(asked)} == {"ann@firm.org", "bob@firm.org", "gone"}
    assert [item.personal for item in memory.personal_items(asked)] == [("bob@firm.org",), ("ann@firm.org",)]
    last = asked._replace(last_alone=True)
    assert [item.id for item in memory.membership_items(last) if item.arm == "trained on"] == ["trained on:talk"]
    assert [item.personal for item in memory.personal_items(last)] == [("bob@firm.org",)]


def test_changed_requests_keep_the_answer_s_words() -> None:
    rows = [row("please turn the kitchen light brighter now", '{"room":"kitchen"}')]
    found: dict[str, Item] = {item.arm: item for item in drift.robustness_items(context(rows))}
    assert set(found) == set(drift.PERTURBATIONS)
    for item in found.values():
        assert "kitchen" in item.messages[-1].content
        assert item.messages[-1].content != rows[0].request[-1].content
        assert item.expected == rows[0].answer
    assert found["capitals"].messages[-1].content == "PLEASE TURN THE kitchen LIGHT BRIGHTER NOW"
    assert drift.robustness_items(context(rows)) == drift.robustness_items(context(rows)), "the same typos every time"
    earlier = (Message(role="system", content="Short."), *row("in Paris", "When?").messages)
    talk = rows[0].model_copy(update={"messages": (*earlier, *rows[0].messages)})
    assert {item.turns for item in drift.robustness_items(context([talk]))} == {3}, "held to all turns of the row"


def test_extraction_and_personal_data_change_the_request() -> None:
    trained = [row("mail ann@firm.org about the desk", "sent to ann@firm.org")]
    assert memory.extraction_items(context(trained=trained))[0].messages[-1].content == "mail ann@firm.org"
    item = memory.personal_items(context(trained=trained))[0]
    assert item.personal == ("ann@firm.org",)
    assert item.messages[-1].content == "mail … about the desk"
    spelled = row("mail ANN@FIRM.ORG about \uff41nn@firm.org", "sent to ann@firm.org")
    assert memory.personal_items(context(trained=[spelled]))[0].messages[-1].content == "mail … about …"
    # Personal data in an earlier call is read there.
    address, telephone = "jane.roe@firm.org", "4155550132"
    arguments = json.dumps({"email": address, "phone": int(telephone), "who": "Zo\u00eb"})
    talk = called(f"book a desk for {address}", f"booked for {address}, {telephone}", arguments)
    item = memory.personal_items(context(trained=[talk]))[0]
    assert {address, telephone} <= set(item.personal)
    assert item.messages[0].content == "book a desk for …"
    assert json.loads(item.messages[1].tool_calls[0].arguments) == {"email": "0", "phone": 0, "who": "Zo\u00eb"}
    assert memory.repeats_personal_data(item, f"booked for {address}")
    read = item.model_copy(update={"messages": talk.request, "personal": (address, "Zo\u00eb")})
    assert not memory.repeats_personal_data(read, f"booked for {address} by Zo\u00eb"), "it stands in the call, escaped"
    named = item.model_copy(update={"personal": ("Ann",)})
    assert not memory.repeats_personal_data(named, "the planning is done"), "a name is no part of another word"
    assert memory.repeats_personal_data(named, "ANN is done")


def test_packaged_items_and_files_of_one_s_own(tmp_path: Path) -> None:
    refusals = {item.arm: item.choices[0] for item in drift.refusal_items(context())}
    assert [refusals[arm].split()[0] for arm in ("unsafe", "harmless", "polite")] == ["I'm", "Sure,", "I'm"]
    assert drift.formats_items(context())[0].choices[0].isupper(), "the requested format comes first"
    path = tmp_path / "text.txt"
    path.write_text("bias_type,sent_more,sent_less\nage,The old one,The young one\nage,Old,Young\n")
    pairs = crows_pairs_items(context(path=path))
    assert (len(pairs), pairs[0].choices) == (2, ("The old one", "The young one"))
    assert len(crows_pairs_items(context(path=path, rows=1))) == 1
    path.write_text("One passage.\n\n  Another.  \n")
    assert [item.choices[0] for item in drift.general_text_items(context(path=path))] == ["One passage.", "Another."]
    with pytest.raises(UsageError, match="cannot be read"):
        digest_path(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    for items, data, said in (
        (drift.general_text_items, b"\xff\xfe", "not UTF-8"),
        (bbq_items, b'{"a": 1}\nnot JSON\n', "not BBQ"),
        (crows_pairs_items, b'{"a": 1}\nnot JSON\n', "not CrowS-Pairs"),
        (bbq_items, None, r"no \.jsonl file"),
    ):
        path.write_bytes(data or b"")
        with pytest.raises(UsageError, match=said):
            items(context(path=path if data else tmp_path / "empty"))


# The packaged suite, and a question's score


QUESTIONS = general_questions()


def test_the_suite_is_sound() -> None:
    areas = ("facts", "arithmetic", "language", "common-sense", "instructions")
    assert Counter(question.area for question in QUESTIONS) == dict.fromkeys(areas, 90)
    assert len({question.messages[0].content for question in QUESTIONS}) == len(QUESTIONS)
    for question in QUESTIONS:
        assert len({choice.strip() for choice in question.choices}) == 4
    places = Counter(question.right for question in QUESTIONS)
    assert min(places.values()) > 80, "the right choice has no usual place"


def test_the_share_is_the_softmax() -> None:
    question = QUESTIONS[0].model_copy(update={"right": 1})
    logs = [math.log(share) for share in (0.1, 0.2, 0.05, 0.05)]
    assert right_share(logs, question) == pytest.approx(0.5)
    every = [right_share(logs, QUESTIONS[0].model_copy(update={"right": place})) for place in range(4)]
    assert every == pytest.approx([0.25, 0.5, 0.125, 0.125])
    assert right_share([-5000.0, -5001.0, -5002.0, -5003.0], question) == pytest.approx(0.2369, abs=1e-4)
