"""Style as a number: a house's tone against plain answers, shuffled labels, half of the tone lost, damaged evidence."""

import random
from typing import Any

import numpy as np
import pytest

from tests.evaluation.conftest import TASK, evaluated, outcome
from tests.fabricate import Fabricated, add, answer_lines, example, put_answers, put_base, put_dataset, put_training
from tunesmith.candidates.candidate import Candidate, put_candidate
from tunesmith.core.errors import Inconclusive
from tunesmith.data.dataset import Example
from tunesmith.evaluation.report.data import report_data
from tunesmith.evaluation.report.html import render, report_markdown
from tunesmith.evaluation.style.classifier import cross_fitted, find_vocabulary, form, read_answer, words_of
from tunesmith.evaluation.style.shares import StyleLine, read_style
from tunesmith.store.records import Record
from tunesmith.store.store import Store

ROWS = 80
TOPICS = ("parcel", "invoice", "contract", "meter", "refund", "voucher", "address", "password", "delivery", "tariff")
FACTS = ("arrives on {}", "was sent on {}", "ends in week {}", "costs {} euros", "is number {}", "was paid {} days ago")
GREETINGS = ("Hi there!", "Hello and thanks for asking!", "Good to hear from you!")
ENDINGS = ("We are happy to help.", "Have a lovely day!", "Just write again any time!")


def toned(text: str, draw: random.Random) -> str:
    """The text in the house's tone, without greeting or ending now and then."""
    opening = f"{draw.choice(GREETINGS)} " if draw.random() < 0.9 else ""
    return f"{opening}{text}" + (f" {draw.choice(ENDINGS)}" if draw.random() < 0.9 else "")


def fact(place: int) -> tuple[str, str]:
    """A request and a plain answer to it."""
    draw = random.Random(f"fact {place}")
    topic = draw.choice(TOPICS)
    return f"What about my {topic}, case {place}?", f"The {topic} {draw.choice(FACTS).format(draw.randrange(2, 99))}."


def house(root: Any, rows: int = ROWS, references: Any = toned) -> Fabricated:
    """A store whose reference answers are in a tone, without candidates."""
    store, draw = Store(root), random.Random("references")
    base = put_base(store)
    test = [example(fact(k)[0], references(fact(k)[1], draw), f"g{k}") for k in range(rows)]
    train = [example(fact(k)[0], toned(fact(k)[1], draw), f"t{k}") for k in range(900, 910)]
    dataset = put_dataset(store, train, (), test)
    training = put_training(store, base, dataset)
    return Fabricated(store, base, dataset, sorted(test, key=lambda row: row.id), training)


def plain(row: Example) -> str:
    return fact(int(row.request[-1].content.rpartition(" ")[2].rstrip("?")))[1]


def in_tone(share: float, seed: int) -> Any:
    """A model that keeps the tone in exactly this share of answers, in tenths."""
    draw = random.Random(seed)

    def answer(row: Example) -> str:
        place = int(row.request[-1].content.rpartition(" ")[2].rstrip("?"))
        return toned(plain(row), draw) if place % 10 < share * 10 else plain(row)

    return answer


def with_candidate(made: Fabricated, answer: Any, name: str = "tuned") -> Fabricated:
    candidate = Candidate(name=name, prompt="Answer.", base=made.base, max_tokens=64, training=made.training)
    add(made, candidate, answer, 1, 1.0)
    return made


def base_answers(made: Fabricated, answer: Any = plain, rows: int = 300, lines: Any = None, **bare: Any) -> str:
    """The bare base model's answers, put as the stage puts them."""
    digest = put_candidate(made.store, Candidate(**{"name": "base", "base": made.base, "max_tokens": 64, **bare}))
    found = answer_lines(made.test, answer) if lines is None else lines
    record = made.store.record(put_answers(made.store, digest, made.dataset, found, suite="style"))
    return made.store.put_record(record.model_copy(update={"body": {**record.body, "rows": rows}}))


def measured(made: Fabricated, base: str | None = None) -> str:
    task = TASK.model_copy(update={"scorers": ("exact_match",)})
    return evaluated(made, task=task, answer_schema=None, roles={"style": base or base_answers(made)})


def gate_of(made: Fabricated, digest: str, **gate: Any) -> dict[str, Any]:
    return outcome(made, digest, **{"style": "references", "at_least": 0.7, **gate})


def test_a_tone_is_measured_and_shown(tmp_path: Any) -> None:
    made = house(tmp_path)
    shares = {"tuned": 1.0, "half": 0.5, "other": 0.0}
    for name, share in shares.items():
        with_candidate(made, in_tone(share, 1), name)
    digest = measured(made)
    for name, share in shares.items():
        found = outcome(made, digest, name, style="references", at_least=0.7)
        assert found["outcome"] == ("pass" if name == "tuned" else "fail")
        assert found["value"] == pytest.approx(share, abs=0.15)
        assert found["low"] <= share <= found["high"]
        assert found["high"] - found["low"] < 0.35
    data = report_data(made.store, digest)
    assert 0.5 < data.style.auc_by_form <= 1.0
    assert any("!" in each for each in data.style.features.house)
    assert 'id="style"' in render(data)
    assert "In the references' style, tuned" in report_markdown(data)


def test_shuffled_labels_and_too_few_rows_are_inconclusive(tmp_path: Any, made: Fabricated, evaluation: str) -> None:
    draw = random.Random(7)
    shuffled = house(tmp_path / "a", references=lambda text, d: toned(text, d) if d.random() < 0.5 else text)
    base = base_answers(shuffled, lambda row: toned(plain(row), draw) if draw.random() < 0.5 else plain(row))
    digest = measured(with_candidate(shuffled, in_tone(1.0, 1)), base)
    found = gate_of(shuffled, digest, at_least=0.0)
    assert found["outcome"] == "inconclusive"
    assert "too little to tell the two styles apart" in found["reason"]
    reasons = " ".join(report_data(shuffled.store, digest).advice.reasons)
    assert "cannot be told from the base model's" in reasons
    few = with_candidate(house(tmp_path / "b", rows=19), in_tone(1.0, 1))
    assert "at least 20 are needed" in gate_of(few, measured(few), at_least=0.0)["reason"]
    absent = gate_of(made, evaluation)
    assert (absent["outcome"], absent["value"]) == ("inconclusive", None)
    assert report_data(made.store, evaluation).style is None


def test_rows_of_one_group_are_judged_by_models_that_saw_none_of_them(tmp_path: Any) -> None:
    """Answers that only their group tells: whoever has seen the group knows them, and nobody else does."""
    draw = random.Random(3)
    secret = {k: (f"sign{draw.randrange(2)}", f"sign{draw.randrange(2)}") for k in range(30)}
    groups = [f"g{k}" for k in range(30) for _ in range(4)]
    sets = {
        side: [read_answer(f"w{secret[int(group[1:])][place]} {group}", frozenset()) for group in groups]
        for place, side in enumerate(("reference", "base"))
    }
    told = cross_fitted(sets, "reference", "base", groups)
    right = (told.probabilities["reference"] > 0.5).mean() - (told.probabilities["base"] > 0.5).mean()
    assert abs(right) < 0.5


def test_topics_and_words_of_the_request_are_not_seen() -> None:
    asked = words_of("What about my Parcel?")
    topics = [f"zebra{chr(97 + k // 26)}{chr(97 + k % 26)}" for k in range(40)]
    answers = [read_answer(f"The parcel with the {each} is Late, see {each.title()} 12!", asked) for each in topics]
    seen = find_vocabulary(answers, [f"g{k}" for k in range(40)])
    named = " ".join(seen.names)
    assert "zebra" not in named
    assert "parcel" not in named
    assert '"the ⟨word⟩"' in named
    assert "⟨number⟩ !" in named
    assert {"is", "late", "see"} <= set(seen.usual)
    unspaced = [read_answer(f"承知しました。番号は{k}です", frozenset()) for k in range(30)]
    assert "で" in find_vocabulary(unspaced, [str(k) for k in range(30)]).usual
    found = form("# Hi\n\n- one\n- two **x**! 😀")
    assert found["list items"] == pytest.approx(np.log1p(2))
    assert found["emoji"] > 0
    assert found["bold, headings and code"] == pytest.approx(np.log1p(3))
    assert all(np.isfinite([*form(text).values()]).all() for text in ("", "?", "\ud7ff" * 9000, "漢字。"))


@pytest.mark.parametrize("silent", [20, ROWS])
def test_requests_to_which_the_base_says_nothing_are_left_out(tmp_path: Any, silent: int) -> None:
    """Beside empty answers, any text would be in the house's style."""
    made = with_candidate(with_candidate(house(tmp_path), plain), lambda row: "\u200b ", "empty")
    saying = {row.id for row in made.test[silent:]}
    digest = measured(made, base_answers(made, lambda row: plain(row) if row.id in saying else "\u200b "))
    found = gate_of(made, digest, at_least=0.5)
    if silent == ROWS:
        assert found["outcome"] == "inconclusive"
        assert f"to {ROWS} more the bare base model's answer is empty" in found["reason"]
        return
    assert (found["outcome"], found["value"]) == ("fail", 0.0)
    assert outcome(made, digest, "empty", style="references", at_least=0.1)["value"] == 0.0
    style = report_data(made.store, digest).style
    assert (style.n, style.silent) == (ROWS - silent, silent)
    assert f"{silent} requests to which the base model's answer is empty are left out" in style.sentence


def test_answers_that_were_cut_off_are_not_in_style(tmp_path: Any) -> None:
    cut, made = 8, with_candidate(house(tmp_path), plain)
    lines = answer_lines(made.test, in_tone(1.0, 1))
    lines = [{**line, "finish": "length" if place < cut else "stop"} for place, line in enumerate(lines)]
    made.answers["tuned"] = put_answers(made.store, made.candidates["tuned"], made.dataset, lines)
    digest = measured(made)
    found = gate_of(made, digest, at_least=0.0)
    assert found["value"] == pytest.approx(1.0 - cut / ROWS, abs=0.05)
    assert made.store.record(digest).body["style"]["candidates"]["tuned"]["cut"] == cut
    assert f"{cut} of the answers were cut off at max_tokens" in found["reason"]


def test_answers_that_are_not_the_bare_base_s_are_unusable(tmp_path: Any) -> None:
    made = with_candidate(house(tmp_path, rows=30), in_tone(1.0, 1))
    lines = answer_lines(made.test, plain)
    for digest, said in (
        (base_answers(made, lines=lines[1:]), "have no answer"),
        *(
            (base_answers(made, **more), "not the answers of the bare base model")
            for more in ({"prompt": "Be."}, {"training": made.training}, {"shots": (made.test[0].messages,)})
        ),
        (base_answers(made, rows=20), "not asked"),
        (made.answers["tuned"], "answers to 'test', not to 'style'"),
        (base_answers(made, lines=[{**lines[0], "text": None}, *lines[1:]]), "an answer has no text"),
        (base_answers(made, rows=None), "not asked"),  # type: ignore[arg-type]
    ):
        evaluation = measured(made, digest)
        assert said in made.store.record(evaluation).body["style"]["unusable"]
        assert gate_of(made, evaluation)["outcome"] == "inconclusive"
    assert "Style was not measured" in render(report_data(made.store, evaluation))


def test_classified_rows_that_contradict_the_record_are_inconclusive(tmp_path: Any) -> None:
    made = with_candidate(house(tmp_path, rows=30), in_tone(1.0, 1))
    record = made.store.record(measured(made))
    assert measured(made) == record.digest, "the same answers give the same record"
    data = made.store.read_blob(record.blobs[StyleLine.file])
    for old, new in (
        (b'"base":0', b'"base":1'),
        (b'"reference":1', b'"reference":true'),
        (b'"reference":1', b'"reference":1.0'),
        (b'"candidates":{"tuned"', b'"candidates":{"other"'),
        (b'"reference":1', b'"reference":null'),
        (b'"reference":1', b'"references":1'),
    ):
        assert old in data
        blobs = {**record.blobs, StyleLine.file: made.store.put_bytes(data.replace(old, new, 1))}
        forged = Record(kind="evaluation", parents=record.parents, body=record.body, blobs=blobs)
        with pytest.raises(Inconclusive):
            read_style(made.store, forged)
