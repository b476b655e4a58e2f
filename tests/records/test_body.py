"""Bodies of records: read by their kind's model, and written as they were read."""

from typing import Any

import pytest

from tunesmith.core.errors import Refused
from tunesmith.records.body import bodies
from tunesmith.records.training import SearchBody
from tunesmith.store.records import KINDS, Record

_TRY = {"prompt": "p", "shots": [], "how": "none", "mean": 1, "prompt_tokens": 2, "completion_tokens": 1, "seconds": 1}
_RAN: dict[str, Any] = {"settings": {"tries": 2}, "split": "validation", "rows": 1, "budget": 1, "seconds": 0.5}
_BODY = {**_RAN, "tries": [_TRY], "best": 0}


def test_every_kind_of_record_has_a_model() -> None:
    assert bodies().keys() == KINDS.keys()


def test_a_body_is_written_as_it_was_read_with_keys_that_no_version_knows() -> None:
    record = Record(kind="search", body={**_BODY, "tries": [{**_TRY, "later": None}], "more": {"a": 1}})
    body = SearchBody.of(record)
    assert body.tries[0].mean == 1.0
    assert body.record({}).digest == record.digest


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (Record(kind="search", body={**_BODY, "best": "0"}), "best: Input should be a valid integer"),
        (Record(kind="search", body={**_BODY, "tries": [{**_TRY, "mean": None}]}), "tries.0.mean: "),
        (Record(kind="search", body={}), "settings: Field required"),
        (Record(kind="forecast", body=_BODY), "it is a record of the kind forecast"),
    ],
)
def test_a_body_that_is_not_of_the_kind_is_refused(record: Record, said: str) -> None:
    with pytest.raises(Refused, match=said) as refused:
        SearchBody.of(record)
    assert refused.value.where == f"record {record.digest}"
