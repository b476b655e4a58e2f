"""Versions side by side: ranked among those that were measured on the same held-out rows, and among no others."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from tunesmith.candidates.candidate import load_candidate
from tunesmith.core.digests import short
from tunesmith.core.errors import TunesmithError
from tunesmith.evaluation.compare import comparison_document, side_of_digest
from tunesmith.evaluation.report.approach_ladder import approach_of
from tunesmith.registry.aliases import list_aliases
from tunesmith.registry.versions import Version, list_versions
from tunesmith.store import database
from tunesmith.store.recalls import recalled
from tunesmith.store.store import Store


def leaderboard(store: Store, name: str | None = None) -> dict[str, Any]:
    """{"boards": [{"name", "dataset", "metric", "n", "versions": [...]}]}, the newest rows first.

    One board for each name, dataset version and leading metric: figures of other rows do not compare. Within a board
    the best mean comes first; each later one has its paired difference from the first, with an interval.
    """
    boards: defaultdict[tuple[str, str, str], list[tuple[Version, dict[str, Any]]]] = defaultdict(list)
    serving = {alias.version: alias.alias for alias in list_aliases(store)}
    for version in list_versions(store, name):
        record = store.record(version.evaluation, kind="evaluation")
        metric = record.body["primary"]
        row = _row(store, version, metric, serving.get(version.digest))
        boards[version.name, record.parents["dataset"], metric].append((version, row))
    found = []
    for (owner, dataset, metric), entries in boards.items():
        entries.sort(key=lambda entry: (-entry[1]["mean"], entry[0].number))
        for version, row in entries[1:]:
            row["behind"] = _behind(store, version, entries[0][0], metric)
        found.append(
            {
                "name": owner,
                "dataset": dataset,
                "metric": metric,
                "n": store.record(entries[0][0].evaluation).body["n"],
                "versions": [row for _, row in entries],
            }
        )
    newest = {id(board): max(row["created_at"] for row in board["versions"]) for board in found}
    return {"boards": sorted(found, key=lambda board: newest[id(board)], reverse=True)}


def _row(store: Store, version: Version, metric: str, alias: str | None) -> dict[str, Any]:
    body = store.record(version.evaluation, kind="evaluation").body
    verdict = store.record(version.verdict, kind="verdict").body
    stated = next(one for one in body["candidates"].values() if one["candidate"] == version.candidate)
    with database.reading(store.engine) as session:
        withdrawn = recalled(session, version.digest)
    return {
        "version": version.label,
        "digest": version.digest,
        "created_at": version.created_at,
        "alias": alias,
        "candidate": verdict["name"],
        "approach": approach_of(store, load_candidate(store, version.candidate)),
        "verdict": verdict["verdict"],
        "recalled": withdrawn,
        **stated["metrics"][metric],
        "price": dict(stated["price"]),
        "behind": None,
    }


def _behind(store: Store, version: Version, best: Version, metric: str) -> dict[str, float] | None:
    """version minus best on the same rows; None where their scores cannot be paired."""
    sides = [side_of_digest(store, one.evaluation, one.candidate, one.label) for one in (best, version)]
    try:
        gap = comparison_document(store, *sides)["metrics"][metric]["difference"]
    except (TunesmithError, KeyError):
        return None
    return {key: float(gap[key]) for key in ("mean", "low", "high")}


def board_title(board: dict[str, Any]) -> str:
    """One line for people."""
    return f"{board['name']}: {board['metric']} on {board['n']} held-out requests of dataset {short(board['dataset'])}"
