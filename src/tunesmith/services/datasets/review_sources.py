"""What comes into the review queue: rows that were flagged or chosen, and requests that failed in service."""

from __future__ import annotations

from collections import defaultdict

from tunesmith.core.reading.strict_json import parse_json
from tunesmith.data.dataset import SPLITS, Dataset, Example, load_dataset
from tunesmith.data.governance.withdrawn import load_withdrawn
from tunesmith.data.privacy.pseudonyms import recognised
from tunesmith.data.quality.flags import FLAGS
from tunesmith.data.review.queue import NewItem
from tunesmith.monitoring import cases
from tunesmith.store.store import Store

CONFLICT = "equal request with another answer"
NEAR = "similar request with another answer"
PSEUDONYM = "holds a pseudonym"
CHOSEN = "chosen by its text"
FAILED = "failed in service"
MOST_FOUND = 100  # rows that one search adds


def rows_to_review(
    store: Store, digest: str | None, *, pseudonyms: bool = False, search: str = "", by: str = ""
) -> list[NewItem]:
    """Rows of a dataset version that were flagged, and those that somebody chose; none without a version.

    pseudonyms: also rows that hold one. search: also training and validation rows with this text. Test rows are not
    chosen so: who corrects them where a candidate lost makes that candidate look better. Recalled rows are not added.
    """
    if digest is None:
        return []
    loaded = load_dataset(store, digest)
    why: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for _, kind, child in store.children(digest):
        if kind == "quality":
            for line in store.read_blob(store.record(child).blobs[FLAGS]).splitlines():
                flag = parse_json(line)
                why[flag["id"]][flag["flag"]] = flag["detail"]
    body = loaded.record.body
    for clusters, reason in ((body["conflicts"]["examples"], CONFLICT), (body["near_clusters"]["examples"], NEAR)):
        for ids in clusters:
            for name in ids:
                why[name][reason] = f"{len(ids)} rows: {', '.join(ids)}"
    for name in _with_text(loaded, search):
        why[name][CHOSEN] = f"{by}: {search[:80]}"
    withdrawn = load_withdrawn(store)
    return [
        NewItem("row", example.id, found, digest, split, example.messages)
        for split, example in _examples(loaded)
        if not withdrawn.holds(example)
        and (found := why.get(example.id, {}) | (_pseudonyms(example) if pseudonyms else {}))
    ]


def cases_to_review(store: Store) -> list[NewItem]:
    """Kept requests that failed."""
    cases.delete_expired(store)
    return [
        NewItem("case", case.request, {FAILED: ", ".join(f"{name} {value:.2f}" for name, value in case.scores.items())})
        for case in cases.list_cases(store)
    ]


def _examples(dataset: Dataset) -> list[tuple[str, Example]]:
    return [(split, example) for split in SPLITS for example in dataset.examples(split)]


def _with_text(dataset: Dataset, search: str) -> list[str]:
    """Ids of rows that are no test rows and hold a text, in upper or lower case."""
    if not search:
        return []
    wanted = search.casefold()
    found = [
        example.id
        for split, example in _examples(dataset)
        if split != "test" and any(wanted in turn.text.casefold() for turn in example.messages)
    ]
    return found[:MOST_FOUND]


def _pseudonyms(example: Example) -> dict[str, str]:
    texts = [turn.text for turn in example.messages]
    found = [text[start:end] for text in texts for start, end in recognised(text)]
    return {PSEUDONYM: ", ".join(dict.fromkeys(found))} if found else {}
