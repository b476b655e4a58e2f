"""The features of a request that drift monitoring compares, alike for served requests and for the test split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from tunesmith.candidates.candidate import load_candidate
from tunesmith.candidates.retrieval import example_index
from tunesmith.core.messages import Message
from tunesmith.data.dataset import Example, load_dataset
from tunesmith.monitoring.drift import Baseline, Report, watch
from tunesmith.monitoring.settings import MonitoringSettings
from tunesmith.records.evaluation import EvaluationBody
from tunesmith.registry.versions import Version
from tunesmith.store.store import Store

Nearest = Callable[[Sequence[Message]], float]


def request_features(messages: Sequence[Message], nearest: Nearest | None) -> dict[str, float]:
    """characters: length of the user's turns. nearest: similarity (0 to 1) to the closest training row, if known."""
    features = {"characters": float(sum(len(message.content) for message in messages if message.role == "user"))}
    if nearest is not None:
        features["nearest"] = nearest(messages)
    return features


def measured_features(examples: Sequence[Example], nearest: Nearest | None) -> dict[str, list[float]]:
    """Feature name -> its values, one for each example, in the order of examples."""
    rows = [request_features(example.request, nearest) for example in examples]
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}


def measured_baseline(store: Store, version: Version) -> Baseline:
    """The features of the test rows that a version was evaluated on, and its share of valid JSON on them."""
    candidate = load_candidate(store, version.candidate)
    evaluation = store.record(version.evaluation, kind="evaluation")
    nearest: Nearest | None = None
    if candidate.dataset is not None:
        index = example_index(load_dataset(store, candidate.dataset).examples("train"))
        nearest = lambda messages: index.similarity(last_request(messages))  # noqa: E731
    rows = load_dataset(store, evaluation.parents["dataset"]).examples("test")
    measured = [one for one in EvaluationBody.of(evaluation).candidates.values() if one.candidate == version.candidate]
    valid = measured[0].metrics.get("json_valid") if measured else None
    return Baseline(
        features=measured_features(rows, nearest),
        json_valid=None if valid is None else (valid.mean, valid.low, valid.high),
    )


def drift_report(store: Store, settings: MonitoringSettings, version: Version, tenant: str | None = None) -> Report:
    """The drift report on what a version served. tenant: consider only its requests."""
    baseline = partial(measured_baseline, store, version)
    return watch(store, settings, name=version.name, version=version.digest, measure=baseline, tenant=tenant)


def last_request(messages: Sequence[Message]) -> str:
    """The text of the last user turn, "" if there is none."""
    return next((message.content for message in reversed(messages) if message.role == "user"), "")
