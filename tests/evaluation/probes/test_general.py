"""The packaged suite, and a question's score."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from tunesmith.core.errors import Inconclusive
from tunesmith.evaluation.probes.general import general_questions, right_share

QUESTIONS = general_questions()


def test_the_suite_is_sound() -> None:
    assert Counter(question.area for question in QUESTIONS) == dict.fromkeys(
        ("facts", "arithmetic", "language", "common-sense", "instructions"), 90
    )
    assert len({question.id for question in QUESTIONS}) == len(QUESTIONS)
    assert len({question.messages[0].content for question in QUESTIONS}) == len(QUESTIONS)
    for question in QUESTIONS:
        assert question.id.startswith(question.area + "-")
        assert len(set(question.choices)) == 4
        assert 0 <= question.right < 4
        assert all(choice == choice.strip() and choice for choice in question.choices)
        assert len(question.messages[0].content) < 90, "short, so that the suite takes seconds"
    places = Counter(question.right for question in QUESTIONS)
    assert min(places.values()) > 80, "the right choice has no usual place"


def test_the_share_is_the_softmax() -> None:
    question = QUESTIONS[0].model_copy(update={"right": 1})
    logs = [math.log(share) for share in (0.1, 0.2, 0.05, 0.05)]
    assert right_share(logs, question) == pytest.approx(0.5)
    every = [right_share(logs, QUESTIONS[0].model_copy(update={"right": place})) for place in range(4)]
    assert every == pytest.approx([0.25, 0.5, 0.125, 0.125])
    assert right_share([-5000.0, -5001.0, -5002.0, -5003.0], question) == pytest.approx(0.2369, abs=1e-4)


@pytest.mark.parametrize(
    "logs", [[], [-1.0] * 3, [-1.0, -1.0, -1.0, math.nan], [-1.0, -1.0, -1.0, -math.inf], [1.0] * 4]
)
def test_numbers_that_are_no_log_probabilities(logs: list[float]) -> None:
    with pytest.raises(Inconclusive) as caught:
        right_share(logs, QUESTIONS[0])
    assert caught.value.where == QUESTIONS[0].id
