"""Dataset cards: a datasheet for people and Croissant metadata for machines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files

from tunesmith.core.digests import short
from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.data.dataset import SPLITS, Dataset
from tunesmith.records.dataset import SignOffBody

_FIELDS = {
    "id": "The row's id: the digest of its content and source.",
    "messages": "The texts of the conversation's turns; the last one is the answer to learn.",
    "licence": "The SPDX expression of the row's licence.",
    "source": "The file that the row was read from.",
    "group": "The group of related rows; all rows of a group are in one split.",
}


def croissant(dataset: Dataset, name: str) -> JsonObject:
    """The Croissant 1.0 description (JSON-LD): the splits' files with their SHA-256, and the fields of a row."""
    body = dataset.body
    splits = [split for split in SPLITS if dataset.splits[split]]
    context = files("tunesmith.data.governance") / "croissant_context.json"  # as Croissant 1.0 prescribes it
    return {
        "@context": json.loads(context.read_text(encoding="utf-8")),
        "@type": "sc:Dataset",
        "name": name,
        "description": f"Dataset version {dataset.digest}: {body.rows.kept} conversations.",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "license": sorted(body.licences),
        "url": f"urn:tunesmith:dataset:{dataset.digest}",
        "version": f"1.0.0+{short(dataset.digest)}",
        "distribution": [_file(dataset, split) for split in splits],
        "recordSet": [_rows(split) for split in splits],
    }


def _file(dataset: Dataset, split: str) -> JsonObject:
    return {
        "@type": "cr:FileObject",
        "@id": f"{split}.jsonl",
        "name": f"{split}.jsonl",
        "contentUrl": f"{split}.jsonl",
        "encodingFormat": "application/jsonlines",
        "sha256": dataset.record.blobs[f"{split}.jsonl"].removeprefix("sha256:"),
    }


def _rows(split: str) -> JsonObject:
    # Of messages, a list of turns, the text of each turn is taken.
    taken = {"messages": {"transform": {"jsonPath": "$.content"}}}
    return {
        "@type": "cr:RecordSet",
        "@id": split,
        "name": split,
        "key": {"@id": f"{split}/id"},
        "field": [
            {
                "@type": "cr:Field",
                "@id": f"{split}/{field}",
                "name": field,
                "description": said,
                "dataType": "sc:Text",
                **({"repeated": True} if field == "messages" else {}),
                "source": {
                    "fileObject": {"@id": f"{split}.jsonl"},
                    "extract": {"column": field},
                    **taken.get(field, {}),
                },
            }
            for field, said in _FIELDS.items()
        ],
    }


def datasheet(dataset: Dataset, name: str, sign_offs: Sequence[SignOffBody]) -> str:
    """A datasheet in Markdown, after Gebru et al., "Datasheets for Datasets" (CACM 64(12), 2021).

    It answers what the record can answer; only the owner can say why the data was collected.
    """
    body = dataset.body
    rows, leakage, conflicts = body.rows, body.leakage, body.conflicts
    parts = {
        "Motivation": ["To be completed by the owner of the data: why these rows were collected, and by whom."],
        "Composition": [
            f"{rows.kept} conversations of {rows.read} rows read.",
            _table("split", "rows", dataset.splits),
            _table("licence", "rows", body.licences),
            f"{conflicts.requests} requests have more than one answer ({conflicts.rows} rows).",
        ],
        "Collection": [_table("source", "rows", {one.path: one.rows for one in body.sources})],
        "Cleaning": [
            f"{rows.changed} rows were changed.",
            _table("left out because", "rows", rows.removed),
            _table("found by the privacy scan", "values", body.privacy),
        ],
        "Uses": [
            f"Held out: whole groups. Groups in two splits: {leakage.shared_groups}; near pairs across splits: "
            f"{leakage.near_pairs} at a similarity of {leakage.threshold:g} ({leakage.method}).",
            *(f"Compared with {one.path}, {one.rows} rows." for one in body.decontaminated),
        ],
        "Maintenance": [f"Signed off by {one.steward}, {one.at}: {one.reason}" for one in sign_offs]
        or ["No steward has signed off this version."],
    }
    text = "\n\n".join(f"## {title}\n\n" + "\n\n".join(filter(None, said)) for title, said in parts.items())
    return f"# Datasheet of {_plain(name)}, version {short(dataset.digest)}\n\n`{dataset.digest}`\n\n{text}\n"


def _table(what: str, number: str, counts: Mapping[str, int]) -> str:
    if not counts:
        return f"{what}: none."
    lines = [f"| {_plain(key)} | {count} |" for key, count in counts.items()]
    return "\n".join([f"| {what} | {number} |", "|---|---|", *lines])


def _plain(text: str) -> str:
    """The text without characters that would end a table cell or a line."""
    return " ".join(text.replace("|", "\\|").split())
