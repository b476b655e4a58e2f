"""The duties that the licences of the rows put on a version, and the notice about them in the version's folder.

A dataset's record states the duties of its rows. A version that was trained on the dataset, or answers with its rows,
states the same duties and signs them. Verification recomputes them from the version's lineage.
"""

from __future__ import annotations

from collections.abc import Mapping

from tunesmith.records.dataset import DatasetBody, Duties
from tunesmith.store.records import Record, ancestors

NOTICE = "NOTICE.md"


def carried(records: Mapping[str, Record], candidate: str) -> Duties | None:
    """The duties of all datasets that a candidate was trained on or answers with; None if there is no dataset.

    records: the candidate and every record that it was made from.
    """
    behind = ancestors(records.__getitem__, [candidate]).values()
    stated = [DatasetBody.of(record).duties for record in behind if record.kind == "dataset"]
    if not stated:
        return None
    named = {(one.source, one.licence): one for duties in stated for one in duties.attribution}
    return Duties(
        use="commercial" if all(duties.use == "commercial" for duties in stated) else "non-commercial",
        attribution=tuple(named[key] for key in sorted(named)),
        share_alike=tuple(sorted({name for duties in stated for name in duties.share_alike})),
        unknown=tuple(sorted({name for duties in stated for name in duties.unknown})),
    )


def notice(name: str, duties: Duties) -> bytes:
    """NOTICE.md of a version's folder. The same duties give the same bytes."""
    lines = [f"# Notice for {name}", "", "What the licences of this version's training examples ask of you.", ""]
    if duties.use == "commercial":
        lines += ["**Use.** All of them allow commercial use."]
    else:
        lines += ["**Use.** Some of them do not allow commercial use. Do not use this version commercially."]
    if duties.share_alike:
        newest = duties.share_alike[-1]
        lines += ["", f"**Share alike.** If you pass this version on, do so under {newest}."]
    if duties.unknown:
        read = ", ".join(duties.unknown)
        lines += ["", f"**To be read.** Tunesmith does not know these licences; read them: {read}."]
    if duties.attribution:
        lines += ["", "**Attribution.** If you pass this version on, name these sources and their licences:", ""]
        lines += [f"- {one.credit or one.source} ({one.licence})".replace("\n", " ") for one in duties.attribution]
    return ("\n".join(lines) + "\n").encode()
