"""The status of a recall: what still uses the recalled records, and which versions replaced the recalled ones."""

from __future__ import annotations

from collections.abc import Mapping

from tunesmith.core.errors import NextStep, UsageError
from tunesmith.core.values import View
from tunesmith.data.governance.withdrawn import ROW_CAUSES, load_withdrawn, recalled_values, same_name
from tunesmith.monitoring.pending_retrains import newest_left
from tunesmith.monitoring.recall import Cause, find_reached
from tunesmith.records.version import VersionBody
from tunesmith.store.store import Store


class RecallStatus(View):
    """Whether nothing uses what was recalled any more. left: what still has to be done, one line each.

    retrain: names of recalled versions without a replacement. replaced: name -> the newest version made without it.
    other_licences, near: see Recall; they do not count as what is left.
    """

    cause: str
    gone: bool
    left: tuple[str, ...]
    retrain: tuple[str, ...]
    replaced: Mapping[str, str]
    other_licences: tuple[str, ...] = ()
    near: tuple[str, ...] = ()


def recall_status(store: Store, cause: Cause) -> RecallStatus:
    """The status of a recall, from the graph of records as it is now.

    Gone: every record made from the cause is marked as recalled, no alias points at one, no live rollout has one as an
    arm, the review queue does not hold its rows, and the next build leaves them out. Raises UsageError if the cause was
    never recalled.
    """
    with store.reading() as session:
        marked = recalled_values(session, cause.kind).get(same_name(cause.kind, cause.value))
        if not marked:
            raise UsageError(
                f"{cause.label} was never recalled in this store",
                fix=NextStep("recall it", "recall", reason=..., **{cause.kind: cause.value}),
            )
        recall, items = find_reached(store, session, cause, reason="", done=False)
        since = [one for one in recall.reached if one.digest not in marked]
        left = [f"{one.kind} {one.label} was made from it since: recall it again" for one in since]
        left += [f"{one.name}@{one.alias}{one.scope.said} still points at it" for one in recall.aliases]
        left += [f"rollout {number} still has an arm of it" for number in recall.rollouts]
        if items:
            left.append(f"the review queue holds its text (items: {len(items)}): recall it again")
        names = {VersionBody.read(store, one.digest).name for one in recall.reached if one.kind == "version"}
        left_over = {name: newest_left(store, session, name) for name in sorted(names)}
    newest = {name: version.label for name, version in left_over.items() if version is not None}
    if cause.kind in ROW_CAUSES:
        withdrawn = load_withdrawn(store)
        if not withdrawn.names(cause.kind, cause.value):
            left.append("the next build would include its rows again")
    return RecallStatus.of(
        recall,
        gone=not left,
        left=tuple(left),
        retrain=tuple(sorted(names - newest.keys())),
        replaced=newest,
    )
