"""The graph, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.fabricate import Chain, approve
from tunesmith.core.errors import Refused
from tunesmith.registry.lineage import ancestors, tree
from tunesmith.registry.versions import Version
from tunesmith.store.store import Store


def kinds(nodes: list[dict[str, Any]], key: str) -> set[str]:
    return {node["kind"] for node in nodes} | {kind for node in nodes for kind in kinds(node[key], key)}


def test_everything_a_version_came_of_is_found_from_files(store: Store, version: Version, chain: Chain) -> None:
    found = ancestors(store, [version.digest])
    assert {record.kind for record in found.values()} == {
        "version", "candidate", "evaluation", "verdict", "training", "dataset", "base", "answers",
    }  # fmt: skip
    Path(store.record_where(chain.dataset)).unlink()
    with pytest.raises(Refused, match="is not in the store"):
        ancestors(store, [version.digest])


def test_a_tree_shows_each_record_in_full_once(store: Store, version: Version, chain: Chain) -> None:
    approve(store, version, approver="ann")
    node = tree(store, chain.training or "").document()
    assert kinds(node["parents"], "parents") == {"base", "dataset"}
    assert kinds(node["children"], "children") == {
        "candidate",
        "answers",
        "evaluation",
        "verdict",
        "version",
        "approval",
    }
    assert node["says"] == "262 steps, loss 0.069068"

    def spelled_out(nodes: list[dict[str, Any]], key: str) -> list[str]:
        whole = [inner["digest"] for inner in nodes if not inner["seen"]]
        return whole + [digest for inner in nodes for digest in spelled_out(inner[key], key)]

    for way in ("parents", "children"):
        found = spelled_out(tree(store, version.digest if way == "parents" else chain.base).document()[way], way)
        assert len(found) == len(set(found))
