"""How rows are laid end to end: what is read stays as it is, what is computed has few shapes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tunesmith.engines.batch import computed_tokens, label_count, lay_out
from tunesmith.models.rendering import Rendered
from tunesmith.training.batches.batch_plan import plan


@st.composite
def _batches(draw: st.DrawFn) -> list[Rendered]:
    shared = draw(st.lists(st.integers(1, 9), max_size=40))
    rows = []
    for _ in range(draw(st.integers(1, 12))):
        asked = draw(st.lists(st.integers(1, 9), min_size=1, max_size=60))
        told = draw(st.lists(st.integers(1, 9), min_size=1, max_size=60))
        rows.append(Rendered((*shared, *asked, *told), (False,) * len([*shared, *asked]) + (True,) * len(told)))
    return rows


@given(_batches())
def test_every_label_is_predicted_from_its_row(rows: list[Rendered]) -> None:
    batch = lay_out(rows)
    assert batch.tokens == computed_tokens(rows) == batch.prefix + sum(batch.lengths)
    start, seen = batch.prefix, 0
    for row, length in zip(rows, batch.lengths, strict=True):
        whole = [*batch.ids[: batch.prefix].tolist(), *batch.ids[start : start + length].tolist()]
        places = [*range(batch.prefix), *range(batch.prefix, batch.prefix + length)]
        assert batch.positions[start : start + length].tolist() == places[batch.prefix :]
        for label in range(label_count(row)):
            at = int(batch.predicts[seen + label]) - start + batch.prefix
            assert tuple(whole[: at + 1]) == row.ids[: at + 1]
            assert int(batch.labels[seen + label]) == row.ids[at + 1]
        start, seen = start + length, seen + label_count(row)
    assert seen == batch.labels.numel()


def test_plan_is_a_function_of_seed_and_epoch() -> None:
    many = [_row(length) for length in range(20, 50)]
    first = plan(many, 4, seed=1, epoch=0)
    assert first == plan(many, 4, seed=1, epoch=0)
    assert first != plan(many, 4, seed=1, epoch=1)
    assert first != plan(many, 4, seed=2, epoch=0)
    assert sorted(place for batch in first for place in batch) == list(range(30))


def test_many_lengths_give_few_shapes() -> None:
    made = [_row(length) for length in range(20, 200)]
    batches = [lay_out(made[start : start + 16]) for start in range(len(made) - 16)]
    assert len({max(batch.lengths) for batch in batches}) <= 24
    assert len({batch.tokens for batch in batches}) <= 26
    bare = [sum(len(row.ids) - 1 for row in made[start : start + 16]) for start in range(len(made) - 16)]
    assert sum(batch.tokens for batch in batches) < 1.06 * sum(bare)


def _row(length: int) -> Rendered:
    ids = tuple((length * 7 + place * 3) % 50 + 1 for place in range(length))
    return Rendered(ids, (False,) * (length // 2) + (True,) * (length - length // 2))
