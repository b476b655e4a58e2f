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
import json
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, NamedTuple

from sqlalchemy import Select, Text, case, cast, false, func, or_, select
from sqlalchemy.orm import Session

from tunesmith.core.clock import iso
from tunesmith.core.text.names import Scope
from tunesmith.rollout.analysis import Arm
from tunesmith.store.database import within
from tunesmith.store.store import Store
from tunesmith.store.tables import RequestRow

STEP = "step"  # the key in a request's features that holds the step it was routed under
LEFT = "left"  # true among a request's features: its client left before it saw any text
UNLOADED = "unloaded"  # true among them: stable answered it, since the canary could not be loaded
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
    since = iso(at - timedelta(days=_MAIN_DAYS))
    query = select(day, RequestRow.caller, func.count()).where(RequestRow.name == name, RequestRow.at >= since)
    query = query.where(*within(RequestRow, scope), RequestRow.arm != "pinned")  # pinned: trials of one version
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
    requests = _of_step(rollout, step, metric).subquery()
    columns = [requests.c[name] for name in Counted._fields[:-1]]
    with store.reading() as session:  # the database counts: Python would take seconds for 100,000
        rows = session.execute(select(*columns, func.count()).group_by(*columns)).all()
    counted = [Counted._make(row) for row in rows]
    return arms_of(counted, main_of(counted, main_callers))


class Counted(NamedTuple):
    """Requests that count alike. who: the end user, or the request's id where it names none. score: as JSON, None
    without one. left: its client left before it saw any text. n: how many."""

    arm: str
    caller: str
    who: str
    ok: bool
    cut: bool
    left: bool
    score: str | None
    n: int = 1


def first_of_step(store: Store, rollout: int, step: int, metric: str, most: int) -> list[Counted]:
    """The first requests that were routed during one step of a rollout, oldest first."""
    with store.reading() as session:
        rows = session.execute(_of_step(rollout, step, metric).order_by(RequestRow.at).limit(most)).all()
    return [Counted._make((*row, 1)) for row in rows]


def canary_loads(store: Store, rollout: int) -> bool:
    """Whether the canary could be loaded for the newest request that needed it, on any server. True without one."""
    unloaded = func.coalesce(RequestRow.features[UNLOADED].as_boolean(), false())
    needed = select(RequestRow.arm).where(RequestRow.rollout == rollout, or_(RequestRow.arm == "canary", unloaded))
    with store.reading() as session:
        return session.scalar(needed.order_by(RequestRow.at.desc()).limit(1)) in (None, "canary")


def _of_step(rollout: int, step: int, metric: str) -> Select[Any]:
    """The fields of Counted for each request of a step.

    Each request names its step, so that a clock that is set back does not mix the requests of two steps.
    """
    who = case((RequestRow.end_user == "", RequestRow.id), else_=RequestRow.end_user)
    score = cast(RequestRow.scores.op("->")(metric), Text)  # None, and not "null", where there is none
    left = func.coalesce(RequestRow.features[LEFT].as_boolean(), false()).label("left")
    return select(
        RequestRow.arm, RequestRow.caller, who.label("who"), RequestRow.ok, RequestRow.cut, left, score.label("score")
    ).where(RequestRow.rollout == rollout, RequestRow.features[STEP].as_integer() == step)


def main_of(requests: Sequence[Counted], main_callers: Sequence[str] | None) -> frozenset[str]:
    """Whose requests are evidence, of a step's requests; empty for everybody's. main_callers: the rollout's."""
    callers = {each.caller for each in requests}
    return frozenset(main_callers or (callers if main_callers is None and len(callers) == 1 else ()))


def arms_of(requests: Sequence[Counted], main: frozenset[str]) -> tuple[Arm, Arm]:
    """(canary, stable) of requests. main: as `main_of` gives it."""

    def group(each: Counted) -> str:
        if main:
            return f"end users {_hashed(each.who) % END_USER_GROUPS + 1}/{END_USER_GROUPS}"
        return f"the requests of {each.caller}"

    def arm(name: str) -> Arm:
        here = [each for each in requests if each.arm == name]
        counted = [each for each in here if not main or each.caller in main]
        groups: defaultdict[str, list[Counted]] = defaultdict(list)
        for each in counted:
            groups[group(each)].append(each)
        parts = {key: _arm(members) for key, members in groups.items()}
        uncounted = sum(each.n for each in here) - sum(each.n for each in counted)
        return _arm(counted)._replace(groups=parts, uncounted=uncounted)

    return arm("canary"), arm("stable")


def _arm(requests: Sequence[Counted]) -> Arm:
    scores: list[Any] = []
    for each in requests:
        if each.score is not None and not each.cut:
            scores += [_score(each.score)] * each.n
    return Arm(
        scores=scores,
        requests=sum(each.n for each in requests),
        failed=sum(each.n for each in requests if not each.ok),
        cut=sum(each.n for each in requests if each.cut),
        left=sum(each.n for each in requests if each.left),
    )


@lru_cache(maxsize=4096)
def _score(text: str) -> Any:
    return json.loads(text)


@lru_cache(maxsize=4096)
def _hashed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:8])
