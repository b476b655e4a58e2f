"""The baseline of drift monitoring: what a version's evaluation saw before the release."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.candidates.candidate import load_candidate
from tunesmith.candidates.retrieval import example_index
from tunesmith.core.messages import Message
from tunesmith.data.dataset import load_dataset
from tunesmith.monitoring.drift import Baseline
from tunesmith.monitoring.features import Nearest, last_request, measured_features
from tunesmith.registry.versions import Version
from tunesmith.store.store import Store


def measured_baseline(store: Store, version: Version) -> Baseline:
    """The features of the test rows that a version was evaluated on, and its share of valid JSON on them."""
    candidate = load_candidate(store, version.candidate)
    evaluation = store.record(version.evaluation, kind="evaluation")
    nearest: Nearest | None = None
    if candidate.dataset is not None:
        index = example_index(load_dataset(store, candidate.dataset).examples("train"))

        def similarity(messages: Sequence[Message]) -> float:
            return index.similarity(last_request(messages))

        nearest = similarity
    rows = load_dataset(store, evaluation.parents["dataset"]).examples("test")
    measured = [one for one in evaluation.body["candidates"].values() if one["candidate"] == version.candidate]
    valid = measured[0]["metrics"].get("json_valid") if measured else None
    return Baseline(
        features=measured_features(rows, nearest),
        json_valid=None if valid is None else (valid["mean"], valid["low"], valid["high"]),
    )
