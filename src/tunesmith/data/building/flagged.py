"""Rows that people should look at: what `data quality` flagged, contradictions, pseudonyms, and rows with a text."""

from __future__ import annotations

from collections import defaultdict

from tunesmith.data.dataset import SPLITS, load_dataset
from tunesmith.data.governance.withdrawn import load_withdrawn
from tunesmith.data.privacy.pseudonyms import recognised
from tunesmith.data.quality.flags import read_flags
from tunesmith.data.review.queue import NewItem
from tunesmith.store.store import Store

CONFLICT = "equal request with another answer"
NEAR = "similar request with another answer"
PSEUDONYM = "holds a pseudonym"
CHOSEN = "chosen by its text"
MOST_FOUND = 100  # rows that one search adds


def rows_to_review(store: Store, digest: str, *, pseudonyms: bool, search: str, by: str) -> list[NewItem]:
    """Rows of a dataset version that were flagged, and those that somebody chose.

    pseudonyms: also rows that hold one. search: also training and validation rows with this text. Test rows are not
    chosen so: who corrects them where a candidate lost makes that candidate look better. Recalled rows are not added.
    """
    loaded, chosen = load_dataset(store, digest), 0
    why: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for _, kind, child in store.children(digest):
        if kind == "quality":
            for flag in read_flags(store, store.record(child)):
                why[flag.id][flag.flag] = flag.detail
    body = loaded.body
    for clusters, reason in ((body.conflicts.examples, CONFLICT), (body.near_clusters.examples, NEAR)):
        for ids in clusters:
            for name in ids:
                why[name][reason] = f"{len(ids)} rows: {', '.join(ids)}"
    withdrawn, wanted, items = load_withdrawn(store), search.casefold(), []
    for split in SPLITS:
        for example in loaded.examples(split):
            texts = [turn.text for turn in example.messages]
            reasons = why[example.id]
            if wanted and split != "test" and chosen < MOST_FOUND and any(wanted in text.casefold() for text in texts):
                chosen += 1
                reasons[CHOSEN] = f"{by}: {search[:80]}"
            if pseudonyms and (those := [text[start:end] for text in texts for start, end in recognised(text)]):
                reasons[PSEUDONYM] = ", ".join(dict.fromkeys(those))
            if reasons and not withdrawn.holds(example):
                items.append(NewItem("row", example.id, reasons, digest, split, example.messages))
    return items
