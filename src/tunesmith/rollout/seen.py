"""What a person saw of a rollout before they changed it, so that a page that is out of date changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.orm import Session

from tunesmith.core.digests import short
from tunesmith.core.errors import Refused
from tunesmith.registry.aliases import get_alias
from tunesmith.rollout.state import Rollout

_FIX = "load the page again, and decide by what it shows now"


@dataclass(frozen=True, slots=True)
class Seen:
    """What a person looked at; None for what they did not say.

    rollout: its number. step: the index of its step. champion: the digest of what served its name, "" for nothing.
    """

    rollout: int | None = None
    step: int | None = None
    champion: str | None = None

    def check(self, session: Session, current: Rollout) -> None:
        """Raise Refused unless the rollout that would change now is as it was seen."""
        where = f"rollout {current.id} of {current.name}"
        if self.rollout not in (None, current.id):
            raise Refused(f"this would change rollout {current.id}, not {self.rollout}", where=where, fix=_FIX)
        if self.step not in (None, current.step):
            state = current.status.replace("_", " ")
            at = f" at step {current.step + 1} of {len(current.steps)}" if current.live else ""
            raise Refused(f"rollout {current.id} went on meanwhile: it is {state}{at}", where=where, fix=_FIX)
        champion = get_alias(session, current.name, "champion", current.scope)
        digest = champion.version if champion else ""
        if self.champion not in (None, digest):
            serves = f"{short(digest)} serves" if digest else "nothing serves"
            raise Refused(f"the champion changed meanwhile: {serves} {current.name} now", where=where, fix=_FIX)


NOT_SAID = Seen()
