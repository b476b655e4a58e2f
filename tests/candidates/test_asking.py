"""How sure a base is of an answer that is a label."""

from __future__ import annotations

import math

import pytest

from tunesmith.candidates.asking import _confidence


@pytest.mark.parametrize(
    ("text", "confidence"),
    [("positive", 0.75), ("Positive", 0.75), (" POSITIVE ", 0.75), ("negative", 0.25), ("none of them", 0.0)],
)
def test_a_label_s_confidence_depends_neither_on_case_nor_on_spaces(text: str, confidence: float) -> None:
    """As its score does not: Positive is right where the reference is positive."""
    sums = {"positive": math.log(0.5), "Positive": math.log(0.25), "negative": math.log(0.25)}
    assert _confidence(text, sums) == pytest.approx(confidence, abs=1e-6)
