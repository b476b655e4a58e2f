"""The space of a store: what takes it, what goes; and legal holds, which keep what a version was made from."""

from __future__ import annotations

from datetime import timedelta
from functools import partial

from pydantic import Field

from tunesmith.core.clock import stamp
from tunesmith.core.errors import Refused
from tunesmith.monitoring import pruning
from tunesmith.monitoring.pruning import Pruned
from tunesmith.monitoring.pruning import usage as usage
from tunesmith.registry.holds import HOLD, Held, set_hold, state_hold
from tunesmith.registry.signing.attestations import envelope_of
from tunesmith.registry.versions import resolve
from tunesmith.services.actions import Acting, Because, Named, Request, action
from tunesmith.services.versions import Prepared, Signature, sign_here
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


class SignedHold(HoldVersion, Signature):
    """A hold, or its end, that was prepared. at: the time that the statement says. key, signature: as for a decision on
    a version."""

    at: str = Field(pattern=r"^[0-9T:.Z-]{20,30}$")


_holds = partial(action, permission=HOLD, tokens=("operate",), whole=True)


def _stated(acting: Acting, asked: HoldVersion, at: str) -> tuple[tuple[str, str], Held]:
    version = resolve(acting.store, asked.version)
    held = Held(version=version.label, held=not asked.end, at=at, by=acting.actor, reason=asked.reason)
    return (version.label, version.digest), held


@action(HOLD, says="held a version", permission=HOLD, whole=True)
def hold(acting: Acting, asked: HoldVersion) -> Held:
    """Hold a version: nothing that it was made from is erased until its hold is ended."""
    return set_hold(acting.store, *_stated(acting, asked, stamp()), sign_here(acting))


@_holds("hold.prepare", at="/holds/prepare")
def prepare_hold(acting: Acting, asked: HoldVersion) -> Prepared:
    """State what whoever holds a version, or ends its hold, signs. Changes nothing."""
    with acting.store.reading() as session:
        stated = state_hold(acting.store, session, *_stated(acting, asked, stamp()))
    return Prepared.by(acting, stated.statement)


@_holds("hold.submit", says="held a version", at="/holds")
def submit_hold(acting: Acting, asked: SignedHold) -> Held:
    """Hold a version, or end its hold. The caller signed the statement of exactly this, within the last hour."""
    if not stamp(-timedelta(hours=1)) <= asked.at <= stamp():
        raise Refused("what was signed is too old", fix="prepare and sign it again")
    sign = partial(envelope_of, fingerprint=asked.key, signature=asked.signature)
    return set_hold(acting.store, *_stated(acting, asked, asked.at), sign)
