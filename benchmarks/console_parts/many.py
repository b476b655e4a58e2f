"""A store with many versions, recorded requests and an evaluation of many rows, fabricated in seconds."""

from __future__ import annotations

import json
import random
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import insert
from tests.fabricate import (
    OPERATOR,
    OWNER,
    SCHEMA,
    Scene,
    adapter_files,
    answer_lines,
    build_scene,
    commands,
    flawed,
    put_answers,
    put_dataset,
    put_training,
)

from service_parts.large_registry import fabricate_versions
from tunesmith.candidates.candidate import Candidate, put_candidate
from tunesmith.core.clock import now
from tunesmith.evaluation.evaluate import evaluate
from tunesmith.evaluation.settings import TaskSettings
from tunesmith.jobs import queue
from tunesmith.registry.versions import Version
from tunesmith.rollout.commands import start
from tunesmith.rollout.controller import advance
from tunesmith.rollout.settings import RolloutSettings
from tunesmith.rollout.state import Rollout, get_rollout
from tunesmith.rollout.traffic import STEP
from tunesmith.store import database
from tunesmith.store.store import Store
from tunesmith.store.tables import RequestRow

_HOURS = 0.9  # in which all requests came, so that Home counts every one
_PEOPLE = 500  # end users of the application that makes the requests
_JOBS = 200
_AT_ONCE = 5_000  # rows that are inserted at once


@dataclass(frozen=True)
class Size:
    """How much of each kind there is. rows: of the evaluation that the matrix shows."""

    versions: int = 1_000
    requests: int = 100_000
    rows: int = 10_000


@dataclass(frozen=True)
class Made:
    """Where the store is, and what its pages are about. rollout: live, at an analysis with all requests."""

    root: str
    url: str
    base: str
    version: str
    dataset: str
    evaluation: str
    rollout: int
    job: int

    def told(self, **more: Any) -> str:
        """As JSON, for a process."""
        return json.dumps({**asdict(self), **more})


def make(folder: Path, size: Size) -> Made:
    """The store, in a folder that is empty. The environment's user must be OWNER."""
    began = time.perf_counter()
    scene = build_scene(folder / "store")
    stable = scene.version(1)
    fabricate_versions(scene, size.versions)
    canary = scene.version(2)
    evaluation, dataset = _put_evaluation(scene, size.rows)
    rollout = _begin(scene.store, stable, canary)
    put_requests(scene.store, rollout, size.requests)
    jobs = [queue.add(scene.store, "run", {}, project="p", actor=OWNER).id for _ in range(min(_JOBS, size.versions))]
    scene.store.engine.dispose()
    print(f"  the store was made in {time.perf_counter() - began:.0f} s", flush=True)
    return Made(
        root=str(scene.store.root),
        url=f"sqlite:///{scene.store.root / 'tunesmith.db'}",
        base=scene.base,
        version=f"{canary.name}/{canary.number}",
        dataset=dataset[7:],
        evaluation=evaluation[7:],
        rollout=rollout.id,
        job=jobs[-1],
    )


def put_requests(store: Store, rollout: Rollout, count: int, draw: random.Random | None = None) -> None:
    """Record requests of a rollout's present step, evenly over the last hour; the newest came just now."""
    draw = draw or random.Random(5)
    newest, step = now(), timedelta(hours=_HOURS) / max(1, count)

    def row(place: int) -> dict[str, Any]:
        canary = draw.random() * 100 < rollout.weight
        right = draw.random() < (0.93 if canary else 0.92)
        return {
            "id": f"req-{newest.timestamp():.6f}-{place}",
            "at": (newest - step * (count - 1 - place)).isoformat(timespec="microseconds"),
            "name": rollout.name,
            "tenant": "",
            "region": "",
            "caller": OPERATOR,
            "end_user": f"{draw.randrange(_PEOPLE):016x}",
            "version": rollout.canary if canary else rollout.stable,
            "rollout": rollout.id,
            "arm": "canary" if canary else "stable",
            "ok": draw.random() < 0.995,
            "cut": False,
            "seconds": 0.1,
            "prompt_tokens": 60,
            "completion_tokens": 20,
            "scores": {"json_valid": float(right), "exact_match": float(draw.random() < 0.8)},
            "features": {STEP: rollout.step, "nearest": round(draw.random(), 3), "characters": 40},
        }

    with database.writing(store.engine) as session:
        for first in range(0, count, _AT_ONCE):
            session.execute(insert(RequestRow), [row(place) for place in range(first, min(count, first + _AT_ONCE))])


def _begin(store: Store, stable: Version, canary: Version) -> Rollout:
    """A rollout at an analysis that goes on for long."""
    analysis = {"metric": "json_valid", "worse_by_at_most": 0.001, "min_requests": 10**7}
    steps = RolloutSettings.model_validate({"steps": [{"setWeight": 100}]}).steps
    advance(store, start(store, name=stable.name, version=stable, steps=steps, actor=OPERATOR).id)
    plan = [{"setWeight": 20}, {"analysis": analysis}, {"setWeight": 100}]
    steps = RolloutSettings.model_validate({"steps": plan}).steps
    begun = start(store, name=canary.name, version=canary, steps=steps, actor=OPERATOR, main_callers=[OPERATOR])
    advance(store, begun.id)
    return get_rollout(store, begun.id)


def _put_evaluation(scene: Scene, count: int) -> tuple[str, str]:
    """(evaluation, dataset): five candidates' answers to so many held-out rows, scored in the ordinary way."""
    store = scene.store
    test = sorted(commands(count, 3, 2000, 4), key=lambda row: row.id)
    dataset = put_dataset(store, commands(20, 1, 0), commands(5, 2, 1000), test)
    base: dict[str, Any] = {"base": scene.base, "max_tokens": 24}
    training = put_training(store, scene.base, dataset, adapter_files(scene.base, 77))
    candidates = {
        Candidate(name="tuned", prompt="Answer in JSON.", training=training, dataset=dataset, **base): (0.93, 1.0),
        Candidate(name="prompt", prompt="Answer in JSON.", **base): (0.2, 0.5),
        Candidate(name="long-prompt", prompt="Answer in JSON, with intent and slots.", **base): (0.4, 0.8),
        Candidate(name="bare", **base): (0.05, 0.3),
        Candidate(name="nearest", method="nearest", dataset=dataset, **base): (0.5, 1.0),
    }
    answers = {
        f"answers:{one.name}": put_answers(
            store, put_candidate(store, one), dataset, answer_lines(test, flawed(*right, seed=len(one.name)))
        )
        for one, right in candidates.items()
    }
    task = TaskSettings.model_validate({"scorers": ["exact_match", "json_valid"]})
    return evaluate(store, {"dataset": dataset, **answers}, task=task, answer_schema=SCHEMA), dataset
