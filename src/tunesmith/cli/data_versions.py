"""`tunesmith data diff|removed|datasheet|croissant|sign|quality`: what goes with a dataset version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.terminal import HERE, As, Directory, Json, Terminal, emit

if TYPE_CHECKING:
    from rich.console import Console

_Version = Annotated[str, typer.Argument(help="A dataset version's digest or its start.")]
_Output = Annotated[Path | None, typer.Option(help="Write it to this file instead.")]


def register(data: typer.Typer) -> None:
    """Add the verbs to `data`."""
    data.command()(diff)
    data.command()(removed)
    data.command()(datasheet)
    data.command()(croissant)
    data.command()(sign)
    data.command()(quality)


def diff(before: _Version, after: _Version, directory: Directory = HERE, as_json: Json = False) -> None:
    """What became of a dataset version from one to the next: rows, splits, licences, balance."""
    from tunesmith.data.governance.difference import difference
    from tunesmith.project import open_store

    store = open_store(directory)
    document = difference(store, store.find_record(before), store.find_record(after))
    emit(document, as_json, lambda console, _: _show_difference(document, console))


def removed(
    dataset: _Version,
    each: Annotated[int, typer.Option(min=1, help="Rows of each reason.")] = 5,
    directory: Directory = HERE,
    as_json: Json = False,
) -> None:
    """A sample of the rows that were left out, for each reason, read from the sources again."""
    from tunesmith.data.dataset import load_dataset
    from tunesmith.data.governance.difference import removed_sample
    from tunesmith.project import open_store

    store = open_store(directory)
    digest = store.find_record(dataset)
    sample = removed_sample(load_dataset(store, digest), directory, each)

    def draw(console: Console, _: object) -> None:
        for reason, rows in sample.items():
            console.print(f"\n{reason}", style="bold", markup=False)
            for row in rows:
                fields = json.dumps(row.get("fields"), ensure_ascii=False)
                console.print(f"  {row['source']}, row {row['row']}: {fields}", markup=False)

    emit({"dataset": digest, "removed": sample}, as_json, draw)


def datasheet(dataset: _Version, output: _Output = None, directory: Directory = HERE, as_json: Json = False) -> None:
    """A datasheet in Markdown."""
    from tunesmith.data.dataset import load_dataset
    from tunesmith.data.governance.cards import datasheet as written
    from tunesmith.data.governance.signoff import sign_offs
    from tunesmith.project import open_store

    store = open_store(directory)
    digest = store.find_record(dataset)
    text = written(load_dataset(store, digest), directory.absolute().name, sign_offs(store, digest))
    _give(digest, "datasheet", text, output, as_json)


def croissant(dataset: _Version, output: _Output = None, directory: Directory = HERE, as_json: Json = False) -> None:
    """Croissant 1.0 metadata (JSON-LD)."""
    from tunesmith.data.dataset import load_dataset
    from tunesmith.data.governance.cards import croissant as described
    from tunesmith.project import open_store

    store = open_store(directory)
    digest = store.find_record(dataset)
    document = described(load_dataset(store, digest), directory.absolute().name)
    _give(digest, "croissant", json.dumps(document, indent=2, ensure_ascii=False) + "\n", output, as_json)


def sign(
    dataset: _Version,
    reason: Annotated[str, typer.Option(help="What was looked at.")],
    directory: Directory = HERE,
    as_json: Json = False,
    actor: As = None,
) -> None:
    """Stand behind a dataset version as its steward: verified first, entered in the audit log."""
    from tunesmith.core.digests import short
    from tunesmith.data.governance.signoff import sign_off
    from tunesmith.project import open_store
    from tunesmith.store.identities import acting

    store = open_store(directory)
    digest = store.find_record(dataset)
    steward = acting(store, actor)
    document = {
        "dataset": digest,
        "steward": steward,
        "signoff": sign_off(store, digest, steward=steward, reason=reason),
    }
    emit(document, as_json, lambda console, _: console.print(f"{steward} stands behind {short(digest)}", markup=False))


def quality(
    dataset: _Version,
    label_noise: Annotated[bool, typer.Option(help="Look for wrong labels too (extra: quality).")] = False,
    language: Annotated[bool, typer.Option(help="Look for other languages too (extra: quality).")] = False,
    toxicity: Annotated[bool, typer.Option(help="Look for toxic turns too (extra: toxicity).")] = False,
    names: Annotated[bool, typer.Option(help="Count people named, by the scan's model (extra: privacy).")] = False,
    alike: Annotated[bool, typer.Option(help="Look for requests that say the same, by MiniLM (fetched once).")] = False,
    limit: Annotated[int, typer.Option(min=0, help="Flags to show; 0 shows all.")] = 20,
    directory: Directory = HERE,
    as_json: Json = False,
) -> None:
    """Flag rows that a person should look at; drops none. Kept as a record beside the dataset version."""
    from tunesmith.data.dataset import load_dataset
    from tunesmith.data.quality.flags import FLAGS, examine_quality
    from tunesmith.project import open_store

    store = open_store(directory)
    digest = store.find_record(dataset)
    embed = None
    if alike:
        from tunesmith.models.embedding import find_embedder

        embed = find_embedder(Terminal()).embed
    asked = {"label_noise": label_noise, "language": language, "toxic": toxicity, "names": names}
    record = store.record(examine_quality(store, load_dataset(store, digest), embed=embed, **asked))
    flags = [json.loads(line) for line in store.read_blob(record.blobs[FLAGS]).splitlines()]
    shown = flags[:limit] if limit else flags
    document = {"dataset": digest, "quality": record.digest, **record.body, "examples": shown}

    def draw(console: Console, _: object) -> None:
        for what in record.body["looked_for"]:
            flagged = len({flag["id"] for flag in flags if flag["flag"] == what})
            console.print(f"{what}: {flagged} of {record.body['rows']} rows", markup=False)
        if toxicity:
            console.print(f"  {_detector_error(record.body['toxicity'])}", markup=False)
        for what, counts in record.body["balance"].items():
            if set(counts) not in (set(), {""}):
                most = sorted(counts.items(), key=lambda pair: -pair[1])[:8]
                said = ", ".join(f"{value or '(none)'} {number}" for value, number in most)
                console.print(f"balance by {what}: {said}", markup=False)
        _show_names(record.body["names"], record.body["rows"], console)
        for flag in shown:
            console.print(f"  {flag['id']}  {flag['flag']}: {flag['detail']}", markup=False)

    emit(document, as_json, draw)


def _detector_error(found: dict[str, Any]) -> str:
    measured = found["measured"]
    roles = ", ".join(f"{role} {rows}" for role, rows in found["rows"].items()) or "none"
    return (
        f"toxic by role: {roles}. On {measured['sentences']} sentences of which half are toxic and the others look it, "
        f"{found['package']} {found['version']} finds {measured['recall']:.0%} of the toxic ones "
        f"and flags {measured['false_rate']:.0%} of the others (precision {measured['precision'] or 0:.0%})"
    )


def _show_names(names: dict[str, Any], rows: int, console: Console) -> None:
    if found := names.get("found"):
        genders = ", ".join(f"{gender} {number}" for gender, number in found["genders"].items())
        error = found["reference"]["entities"]["PERSON"] if found["reference"] else None
        sure = f"; on annotated text recall {error['recall']}, precision {error['precision']}" if error else ""
        console.print(
            f"people named: in {found['rows']} of {rows} rows, {found['mentions']} mentions of {found['distinct']} "
            f"names, the most frequent {found['most']} times; suggested: {genders} ({found['model']['package']}{sure})",
            markup=False,
        )
    console.print(f"  ({names['caveat']})", markup=False)


def _give(digest: str, what: str, text: str, output: Path | None, as_json: bool) -> None:
    from tunesmith.core.files import write_atomic

    if output is not None:
        write_atomic(output, text.encode())
    document = {"dataset": digest, what: text if output is None else str(output)}
    emit(
        document,
        as_json,
        lambda console, _: console.print(document[what], markup=False, highlight=False, soft_wrap=True),
    )


def _show_difference(document: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    table = Table("", "before", "after", title="From one dataset version to the other", title_justify="left")
    for split, (before, after) in document["splits"].items():
        table.add_row(split, str(before), str(after))
    shown = {name: values for name, values in document["balance"].items() if set(values) != {""}}
    for name, values in {**shown, "removed": document["removed_reasons"]}.items():
        for value, (before, after) in values.items():
            table.add_row(f"{name}: {value or '(none)'}", str(before), str(after))
    console.print(table)
    console.print(", ".join(f"{number} {what}" for what, number in document["rows"].items()), markup=False)
