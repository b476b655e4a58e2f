"""Which requests go to the canary, and the scores of each arm's requests."""

from __future__ import annotations

import hashlib

from sqlalchemy import select

from tunesmith.rollout.analysis import Arm
from tunesmith.store import database
from tunesmith.store.store import Store
from tunesmith.store.tables import RequestRow

STEP = "step"  # the key in a request's features that holds the step it was routed under


def goes_to_canary(rollout: int, weight: int, key: str) -> bool:
    """Whether a request goes to the canary. The same key gets the same answer, and keeps the canary as weight grows.

    weight: percentage. key: the request's id, or its user's name, so that a user keeps one arm.
    """
    hashed = hashlib.sha256(f"{rollout}:{key}".encode(errors="replace")).digest()
    return int.from_bytes(hashed[:8]) * 100 < weight << 64


def arms(store: Store, rollout: int, step: int, metric: str) -> tuple[Arm, Arm]:
    """(canary, stable): the requests that were routed during one step of a rollout, with their scores of a metric.

    Each request names its step, so that a clock that is set back does not mix the requests of two steps.
    """
    under_step = RequestRow.features[STEP].as_integer() == step
    query = select(RequestRow.arm, RequestRow.ok, RequestRow.scores).where(RequestRow.rollout == rollout, under_step)
    with database.reading(store.engine) as session:
        rows = session.execute(query).all()
    return _arm([row for row in rows if row.arm == "canary"], metric), _arm(
        [row for row in rows if row.arm == "stable"], metric
    )


def _arm(rows: list, metric: str) -> Arm:
    return Arm(
        scores=[row.scores[metric] for row in rows if metric in row.scores],
        requests=len(rows),
        failed=sum(not row.ok for row in rows),
    )
