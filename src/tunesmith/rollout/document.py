"""A rollout as `rollout status --json` and the API tell it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from tunesmith.rollout.controller import look
from tunesmith.rollout.state import Rollout
from tunesmith.store import database
from tunesmith.store.store import Store
from tunesmith.store.tables import VersionRow


def rollout_document(store: Store, rollout: Rollout) -> dict[str, Any]:
    """Its state, its steps and, where it stands at an analysis, what that would say now. JSON throughout."""
    judgement = look(store, rollout)
    return {
        "rollout": rollout.id,
        "name": rollout.name,
        "tenant": rollout.tenant,
        "region": rollout.region,
        "status": rollout.status,
        "weight": rollout.weight,
        "step": rollout.step,
        "steps": [step.model_dump(mode="json", exclude_none=True) for step in rollout.steps],
        "stable": _arm(store, rollout.stable),
        "canary": _arm(store, rollout.canary),
        "started_by": rollout.started_by,
        "started_at": rollout.started_at,
        "step_began_at": rollout.began_at,
        "override": rollout.override,
        "reason": rollout.reason,
        "analysis": None if judgement is None else judgement.as_json(),
        "history": list(rollout.history),
    }


def _arm(store: Store, digest: str) -> dict[str, str] | None:
    """Digest and label; the label is empty where the version is gone, the arm None where nothing served before."""
    if not digest:
        return None
    with database.reading(store.engine) as session:
        row = session.scalars(select(VersionRow).where(VersionRow.digest == digest)).first()
        return {"version": f"{row.name}@v{row.number}" if row else "", "digest": digest}
