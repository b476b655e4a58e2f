"""The space of a store: what takes it, what goes; and legal holds, which keep what a version was made from."""

from __future__ import annotations

from tunesmith.core.clock import stamp
from tunesmith.core.errors import NextStep, Refused
from tunesmith.monitoring import pruning
from tunesmith.monitoring.pruning import Pruned
from tunesmith.monitoring.pruning import usage as usage
from tunesmith.registry.holds import HOLD, Held, held_versions
from tunesmith.registry.versions import resolve
from tunesmith.services.actions import Acting, Because, Named, Request, action
from tunesmith.store.people.identities import require
from tunesmith.store.store import PRUNE


class PruneStore(Request):
    """What to prune: what `keep` of the project file leaves. dry_run: delete nothing."""

    dry_run: bool = False


class HoldVersion(Request):
    """A version to hold: NAME@v3 or the start of a digest. end: end its hold. reason: kept in the audit log."""

    version: Named
    reason: Because
    end: bool = False


@action(PRUNE, says="deleted what the store need not keep", permission=PRUNE, whole=True)
def prune(acting: Acting, asked: PruneStore) -> Pruned:
    """Delete trainings and work folders that the project file does not keep, and blobs that nothing names."""
    return pruning.prune(acting.store, acting.project.settings.keep, actor=acting.actor, dry_run=asked.dry_run)


@action(HOLD, says="held a version", permission=HOLD, tokens=("operate",), at="/holds", whole=True)
def hold(acting: Acting, asked: HoldVersion) -> Held:
    """Hold a version: nothing that it was made from is erased until its hold is ended."""
    version = resolve(acting.store, asked.version)
    detail = {"version": version.label, "held": not asked.end, "reason": asked.reason}
    with acting.store.change(acting.actor, HOLD, version.digest, detail) as session:
        require(session, acting.actor, HOLD)
        if asked.end and version.digest not in held_versions(session):
            raise Refused(f"{version.label} is not held", where=version.label, fix=NextStep("see it", "show"))
    return Held.model_validate({**detail, "by": acting.actor, "at": stamp()})
