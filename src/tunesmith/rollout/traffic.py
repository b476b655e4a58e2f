"""Which requests go to the canary, whose requests are evidence, and the scores of each arm's requests.

A caller is a user of Tunesmith with a token. An application usually serves many people under one token, and names them
in the request's `user`. Anybody with a token can write any `user`, so it counts only where its token's owner is one of
the rollout's main callers: those that make nearly all the traffic anyway, or that the project file names.

- With main callers, only their requests are evidence. Their end users are divided into `END_USER_GROUPS` groups.
- Otherwise all requests are, and each caller is a group.

A verdict must hold without any one group (`analysis.judge`).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import Row, func, select
from sqlalchemy.orm import Session

from tunesmith.core.scope import Scope
from tunesmith.rollout.analysis import Arm
from tunesmith.store import database
from tunesmith.store.store import Store
from tunesmith.store.tables import RequestRow

STEP = "step"  # the key in a request's features that holds the step it was routed under
END_USER_GROUPS = 20
# A caller that makes this share of a name's traffic, day by day, is its main caller.
_MAIN_SHARE, _MAIN_DAYS = 0.8, 7


def goes_to_canary(rollout: int, weight: int, key: str) -> bool:
    """Whether a request goes to the canary. The same key gets the same answer, and keeps the canary as weight grows.

    weight: percentage. key: the request's id, or its user's name, so that a user keeps one arm.
    """
    return _hashed(f"{rollout}:{key}") * 100 < weight << 64


def end_user(rollout: int, caller: str, user: str) -> str:
    """The name under which a request's `user` is recorded: a hash, so that rollouts cannot be joined by it."""
    return f"{_hashed(f'{rollout}:{caller}:{user}'):016x}"


def usual_callers(session: Session, name: str, scope: Scope, at: datetime) -> tuple[str, ...] | None:
    """The main caller of a name in the last seven days, as a tuple of one; () if there are several callers.

    None if nobody called it. A caller's share is its mean share of the days with traffic, so that a flood on one day
    counts as one day.
    """
    day = func.substr(RequestRow.at, 1, 10)
    since = (at - timedelta(days=_MAIN_DAYS)).isoformat(timespec="microseconds")
    query = select(day, RequestRow.caller, func.count()).where(RequestRow.name == name, RequestRow.at >= since)
    query = query.where(RequestRow.arm != "pinned")  # trials of one version, by its number
    for column, value in ((RequestRow.tenant, scope.tenant), (RequestRow.region, scope.region)):
        query = query.where(column == value) if value else query
    days: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for date, caller, count in session.execute(query.group_by(day, RequestRow.caller)):
        days[date][caller] = count
    shares: defaultdict[str, float] = defaultdict(float)
    for counts in days.values():
        for caller, count in counts.items():
            shares[caller] += count / sum(counts.values()) / len(days)
    return tuple(caller for caller, share in shares.items() if share >= _MAIN_SHARE) if days else None


def arms(store: Store, rollout: int, step: int, metric: str, main_callers: Sequence[str] | None) -> tuple[Arm, Arm]:
    """(canary, stable): the requests that were routed during one step of a rollout, with their scores of a metric.

    main_callers: whose requests are evidence; () for everybody's; None if nobody called before the rollout: then a
    caller that is alone is the main one.
    """
    rows = requests_of_step(store, rollout, step)
    return arms_of(rows, metric, main_of(rows, main_callers))


def requests_of_step(store: Store, rollout: int, step: int, most: int | None = None) -> Sequence[Row]:
    """The requests that were routed during one step of a rollout, oldest first. most: only the first so many.

    Each request names its step, so that a clock that is set back does not mix the requests of two steps.
    """
    under_step = RequestRow.features[STEP].as_integer() == step
    query = select(
        RequestRow.id,
        RequestRow.arm,
        RequestRow.ok,
        RequestRow.cut,
        RequestRow.scores,
        RequestRow.caller,
        RequestRow.end_user,
    ).where(RequestRow.rollout == rollout, under_step)
    with database.reading(store.engine) as session:
        return session.execute(query.order_by(RequestRow.at).limit(most)).all()


def main_of(rows: Sequence[Row], main_callers: Sequence[str] | None) -> frozenset[str]:
    """Whose requests are evidence, of a step's requests; empty for everybody's. main_callers: the rollout's."""
    callers = {row.caller for row in rows}
    return frozenset(main_callers or (callers if main_callers is None and len(callers) == 1 else ()))


def arms_of(rows: Sequence[Row], metric: str, main: frozenset[str]) -> tuple[Arm, Arm]:
    """(canary, stable) of requests, with their scores of a metric. main: as `main_of` gives it."""

    def group(row: Row) -> str:
        if main:
            number = _hashed(row.end_user or row.id) % END_USER_GROUPS
            return f"end users {number + 1}/{END_USER_GROUPS}"
        return f"the requests of {row.caller}"

    def arm(name: str) -> Arm:
        here = [row for row in rows if row.arm == name]
        counted = [row for row in here if not main or row.caller in main]
        groups: defaultdict[str, list[Row]] = defaultdict(list)
        for row in counted:
            groups[group(row)].append(row)
        parts = {key: Arm(**_counts(members, metric)) for key, members in groups.items()}
        return Arm(**_counts(counted, metric), groups=parts, uncounted=len(here) - len(counted))

    return arm("canary"), arm("stable")


def _counts(rows: Sequence[Row], metric: str) -> dict:
    return {
        "scores": [row.scores[metric] for row in rows if metric in row.scores and not row.cut],
        "requests": len(rows),
        "failed": sum(not row.ok for row in rows),
        "cut": sum(row.cut for row in rows),
    }


def _hashed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:8])
