"""Which requests go to the canary, and what each arm's requests showed."""

from __future__ import annotations

import hashlib

from sqlalchemy import select

from tunesmith.rollout.analysis import Arm
from tunesmith.store import database
from tunesmith.store.store import Store
from tunesmith.store.tables import RequestRow

STEP = "step"  # the key in a request's features that holds the step it was routed under


def goes_to_canary(rollout: int, weight: int, key: str) -> bool:
    """Whether a request goes to the canary: the same answer for the same key, and never taken back as weight grows.

    weight: percent. key: the request's id, or its user's name so that they keep their arm.
    """
    hashed = hashlib.sha256(f"{rollout}:{key}".encode(errors="replace")).digest()
    return int.from_bytes(hashed[:8]) * 100 < weight << 64


def arms(store: Store, rollout: int, step: int, metric: str) -> tuple[Arm, Arm]:
    """(canary, stable): what the requests routed under a step of a rollout showed, with the metric's scores.

    Requests are told apart by the step they were routed under and not by time, so that a clock set back mixes nothing.
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
