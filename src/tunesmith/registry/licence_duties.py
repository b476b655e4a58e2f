"""What the licences of the rows ask of a version, and the notice that says so beside its weights.

A duty goes the way the rows went: from a row to its dataset's record, from there to whatever was trained on it or
answers from it, and so into the version, which signs it. It can be followed back: the version's statement must ask for
exactly what its lineage asks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.store.records import Record

NOTICE = "NOTICE.md"


def carried(records: Mapping[str, Record], candidate: str) -> dict[str, Any] | None:
    """The duties of every dataset that a candidate was trained on or answers from; None where there is none.

    records: the candidate and all that it came of. Datasets sealed before duties were recorded state none.
    """
    waiting, seen = [candidate], set()
    stated: list[Mapping[str, Any]] = []
    while waiting:
        digest = waiting.pop()
        if digest in seen:
            continue
        seen.add(digest)
        record = records[digest]
        waiting += record.parents.values()
        if record.kind == "dataset" and record.body.get("duties"):
            stated.append(record.body["duties"])
    if not stated:
        return None
    named = {(one["source"], one["licence"]): dict(one) for duties in stated for one in duties["attribution"]}
    return {
        "use": "commercial" if all(duties["use"] == "commercial" for duties in stated) else "non-commercial",
        "attribution": [named[key] for key in sorted(named)],
        "share_alike": sorted({name for duties in stated for name in duties["share_alike"]}),
        "unknown": sorted({name for duties in stated for name in duties["unknown"]}),
    }


def notice(name: str, duties: Mapping[str, Any]) -> bytes:
    """NOTICE.md of a version's folder. The same duties give the same bytes."""
    lines = [f"# Notice to {name}", "", "What the licences of the examples behind this version ask of you.", ""]
    if duties["use"] == "commercial":
        lines += ["**Use.** Commercial use is allowed by all of them."]
    else:
        lines += ["**Use.** Some of them allow no commercial use. Do not use this version commercially."]
    if duties["share_alike"]:
        newest = duties["share_alike"][-1]
        lines += ["", f"**Share alike.** Whoever passes this version on does so under {newest}."]
    if duties["unknown"]:
        read = ", ".join(duties["unknown"])
        lines += ["", f"**To be read.** What these ask is not known to Tunesmith: {read}."]
    if duties["attribution"]:
        lines += ["", "**Attribution.** Name these sources and their licences wherever this version is passed on:", ""]
        lines += [
            f"- {one['credit'] or one['source']} ({one['licence']})".replace("\n", " ") for one in duties["attribution"]
        ]
    return ("\n".join(lines) + "\n").encode()
