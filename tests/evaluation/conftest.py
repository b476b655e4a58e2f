"""Shared by this folder's tests: a fabricated store and its evaluation, made once and copied for each test."""

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from tests.fabricate import SCHEMA, Fabricated, fabricate
from tunesmith.evaluation.evaluate import evaluate
from tunesmith.evaluation.gates.settings import GATES
from tunesmith.evaluation.gates.verdict import judge, replay
from tunesmith.evaluation.settings import TaskSettings
from tunesmith.evaluation.stats import statistics
from tunesmith.evaluation.summary import verdict_summary
from tunesmith.store.store import Store

TASK = TaskSettings(scorers=("json_valid", "exact_match", "field_f1"))
STANDARD: dict[str, Any] = {
    "lift": {"metric": "exact_match", "over": "best-untuned", "at_least": 0.05, "confidence": 0.95},
    "valid": {"metric": "json_valid", "at_least": 0.9},
    "forgetting": {"suite": "general", "drop_at_most": 0.03},
}


@pytest.fixture(scope="session", autouse=True)
def remembered_draws() -> Iterator[None]:
    """Draw the weights of a resampling once for all intervals over as many groups: half of these tests' time."""
    drawn, draw = statistics.draw_weights, lru_cache(8)(lambda _, *stated, **more: list(drawn(*stated, **more)))

    def weights(*stated: Any, **more: Any) -> Any:
        return draw((statistics.CHUNK, statistics._DRAWS, statistics._TAIL_DRAWS), *stated, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "draw_weights", weights)
        yield


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Fabricated, str]:
    """The store that is copied, with the digest of an evaluation of all four candidates."""
    made = fabricate(tmp_path_factory.mktemp("fabricated") / "store")
    digest = evaluated(made, probes=made.probes)
    made.store.engine.dispose()
    return made, digest


@pytest.fixture
def made(original: tuple[Fabricated, str], tmp_path: Path) -> Fabricated:
    """A fabricated store of the test's own."""
    source, _ = original
    shutil.copytree(source.store.root, tmp_path / "store")
    own = {"candidates": dict(source.candidates), "answers": dict(source.answers), "probes": dict(source.probes)}
    return dataclasses.replace(source, store=Store(tmp_path / "store"), **own)


@pytest.fixture
def evaluation(original: tuple[Fabricated, str]) -> str:
    """The digest of the evaluation that every copy holds."""
    return original[1]


def evaluated(
    made: Fabricated, roles: Mapping[str, str | None] = {}, probes: Mapping[str, str] = {}, **changed: Any
) -> str:
    """The digest of an evaluation of all candidates' answers. roles: further parents; changed: what differs."""
    parents = {"dataset": changed.pop("dataset", made.dataset)}
    parents |= {f"answers:{name}": digest for name, digest in changed.pop("answers", made.answers).items()}
    parents |= {f"probe:{name}": digest for name, digest in probes.items()}
    parents |= {role: digest for role, digest in roles.items() if digest}
    return evaluate(made.store, parents, **{"task": TASK, "answer_schema": SCHEMA, **changed})


def risk_roles(suite: str, after: str | None, before: str | None) -> dict[str, str | None]:
    """The evaluation's parents for answers of the tuned candidate to a risk probe."""
    return {f"risk:{suite}:tuned": after, f"before:{suite}:tuned": before}


def verdict_of(made: Fabricated, evaluation: str, gates: Any = STANDARD, name: str = "tuned") -> str:
    """The digest of the verdict by these gates."""
    return judge(made.store, evaluation=evaluation, candidate=name, gates=GATES.validate_python(gates))


def judged(made: Fabricated, evaluation: str, gates: Any, name: str = "tuned") -> dict[str, Any]:
    """What `gate` prints of the verdict by these gates."""
    return verdict_summary(made.store, verdict_of(made, evaluation, gates, name)).document()


def outcome(made: Fabricated, evaluation: str, name: str = "tuned", **gate: Any) -> dict[str, Any]:
    """The finding of one gate, which alone decides the verdict, and which replays."""
    document = judged(made, evaluation, {"g": gate}, name)
    assert document["verdict"] == document["gates"][0]["outcome"]
    assert replay(made.store, document["digest"])
    return dict(document["gates"][0])
