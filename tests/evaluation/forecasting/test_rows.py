"""Which rows a forecast asks and trains on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.core.errors import Inconclusive
from tunesmith.core.messages import Message, ToolCall
from tunesmith.data.dataset import Example
from tunesmith.evaluation.forecasting.rows import LEAST_HELD, LEAST_TRAINED, MOST_HELD, reserve
from tunesmith.training.estimates.subsets import nested


def _rows(sizes: Sequence[int], name: str) -> list[Example]:
    """Rows in groups of these sizes."""
    found = []
    for group, size in enumerate(sizes):
        for place in range(size):
            turns = (Message(role="user", content=f"{name} {group} {place}"), Message(role="assistant", content="yes"))
            found.append(
                Example(id=f"{name}-{group}-{place}", messages=turns, source="", licence="", group=f"{name} {group}")
            )
    return found


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=40, max_size=50),
    validation=st.lists(st.integers(1, 5), max_size=80),
    seed=st.integers(0, 1000),
)
def test_no_group_is_asked_and_trained_on(sizes: list[int], validation: list[int], seed: int) -> None:
    train, own = _rows(sizes, "train"), _rows(validation, "validation")
    if len(train) < LEAST_TRAINED:
        return
    try:
        found = reserve(train, own, {train[0].wording}, seed=seed, lend=True)
    except Inconclusive:
        return
    assert not {row.group for row in found.held} & {row.group for row in found.pool}
    assert len({row.id for row in found.held}) == len(found.held) <= MOST_HELD
    assert [row in own for row in found.held] == [place < found.validation for place in range(len(found.held))]
    assert len(found.held) - found.validation + len(found.pool) == found.whole == len(train)
    assert 2 * len(found.pool) >= len(train)
    assert train[0].group not in {row.group for row in found.held}, "a prompt shows a row of it"
    assert found == reserve(train, own, {train[0].wording}, seed=seed, lend=True)


def test_few_validation_rows_are_joined_by_training_rows_unless_they_are_newer() -> None:
    train, own = _rows([1] * 400, "train"), _rows([1] * 40, "validation")
    assert len(reserve(train, own, (), seed=0, lend=True).held) == 240
    newer = reserve(train, own, (), seed=0, lend=False)
    assert (len(newer.held), len(newer.pool)) == (40, 400)


def test_groups_by_which_a_prompt_was_searched_for_are_not_asked() -> None:
    train, own = _rows([1] * 400, "train"), _rows([2] * 20, "validation")
    chose = {own[0].group, own[-1].group}
    found = reserve(train, own, (), seed=0, lend=True, chose=chose)
    assert not chose & {row.group for row in found.held}
    assert (found.validation, len(found.held)) == (36, 36 + 200), "training rows take their place"
    with pytest.raises(Inconclusive, match="0 rows") as caught:
        reserve(train, own, (), seed=0, lend=False, chose={row.group for row in own})
    assert "search for prompts by fewer rows" in str(caught.value.fix)


def test_calls_of_functions_are_not_forecast() -> None:
    train, own = _rows([1] * 400, "train"), _rows([1] * 40, "validation")
    call = ToolCall(id="call00000", name="light", arguments="{}")
    answer = Message(role="assistant", content="", tool_calls=(call,))
    own[7] = own[7].model_copy(update={"messages": (*own[7].request, answer)})
    with pytest.raises(Inconclusive, match="calls of functions"):
        reserve(train, own, (), seed=0, lend=True)


@pytest.mark.parametrize(
    ("train", "validation", "what"),
    [
        ([1] * (LEAST_TRAINED - 1), [1] * 100, "training rows are too few"),
        ([1] * 400, [1] * (LEAST_HELD - 1), "can be held out"),
        ([1] * 400, [10] * 19, "19 groups"),
        ([1] * 400, [200, *[1] * 60], "2 groups"),
        ([1] * 400, [11] * 18 + [10] * 1 + [4], "in 19 groups"),
    ],
)
def test_too_few_rows_are_inconclusive(train: list[int], validation: list[int], what: str) -> None:
    with pytest.raises(Inconclusive, match=what):
        reserve(_rows(train, "train"), _rows(validation, "validation"), (), seed=0, lend=False)


def test_subsets_are_nested_and_grow_by_whole_groups() -> None:
    rows = _rows([3, 1, 7, 2, 5] * 8, "train")
    order = nested(rows, 1)
    assert sorted(order, key=lambda row: row.id) == sorted(rows, key=lambda row: row.id)
    seen = [row.group for row in order]
    assert len(set(seen)) == 1 + sum(one != other for one, other in pairwise(seen))
    assert order == nested(rows[::-1], 1), "the order of the rows does not matter"
    assert order != nested(rows, 2)
