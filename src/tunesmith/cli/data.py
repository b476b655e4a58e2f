"""`tunesmith data`: make dataset versions, look into them, hold them against their records."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli import data_versions
from tunesmith.cli.terminal import HERE, Directory, Json, Terminal, emit

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tunesmith.store.store import Store

_Digest = Annotated[str | None, typer.Argument(help="A dataset version's digest or its start; the newest without.")]


def register(app: typer.Typer) -> None:
    """Add the `data` verbs."""
    data = typer.Typer(help="Make and inspect dataset versions.", no_args_is_help=True)
    data.command()(build)
    data.command()(show)
    data.command()(verify)
    data.command()(originals)
    data_versions.register(data)
    app.add_typer(data, name="data")


def build(
    engine: Annotated[str, typer.Option(help="Who reads the rows: local or ray; the dataset is the same.")] = "local",
    directory: Directory = HERE,
    as_json: Json = False,
) -> None:
    """Read, check, clean, split and seal the project's sources."""
    from tunesmith.core.errors import UsageError
    from tunesmith.project import open_project
    from tunesmith.services.data import build as build_dataset

    if engine not in ("local", "ray"):
        raise UsageError(f"there is no engine {engine!r}", where="--engine", fix="local or ray")
    shards = None
    if engine == "ray":
        from tunesmith.data.building.ray_runner import RayRunner

        shards = RayRunner()
    project = open_project(directory)
    document = build_dataset(project, progress=Terminal(), shards=shards).document()
    emit(document, as_json, lambda console, _: _show_account(document, console))


def show(
    dataset: _Digest = None,
    split: Annotated[str, typer.Option(help="train, validation, test or removed.")] = "train",
    limit: Annotated[int, typer.Option(min=0, help="Rows to show; 0 shows all.")] = 10,
    directory: Directory = HERE,
    as_json: Json = False,
) -> None:
    """The account of a dataset version and its first rows."""
    from tunesmith.data.building.summary import dataset_summary
    from tunesmith.data.dataset import load_dataset
    from tunesmith.project import open_store

    store = open_store(directory)
    digest = _find(store, dataset)
    loaded = load_dataset(store, digest)
    document = dataset_summary(store, digest).document()
    rows: list[dict[str, Any]]
    if split == "removed":
        rows = [dict(row) for row in loaded.removed()]
    else:
        rows = [example.model_dump(mode="json") for example in loaded.examples(split)]
    shown = rows[:limit] if limit else rows
    document |= {"split": split, "examples": shown}

    def draw(console: Console, _: object) -> None:
        _show_account(document, console)
        _show_rows(split, shown, len(rows), console)

    emit(document, as_json, draw)


def verify(dataset: _Digest = None, directory: Directory = HERE, as_json: Json = False) -> None:
    """Recompute a dataset version's digests, counts and leakage proof; exit 3 where anything differs."""
    from tunesmith.core.digests import short
    from tunesmith.data.building.verify import verify_dataset
    from tunesmith.project import open_store

    store = open_store(directory)
    document = verify_dataset(store, _find(store, dataset))

    def draw(console: Console, _: object) -> None:
        for problem in document["problems"]:
            console.print(f"{problem['path']}: {problem['reason']}", markup=False)
        verdict = "is what its record says" if document["ok"] else f"has {len(document['problems'])} problems"
        console.print(f"{short(document['dataset'])} {verdict} ({document['checked']} things checked)", markup=False)

    emit(document, as_json, draw)
    if not document["ok"]:
        raise typer.Exit(3)


def originals(
    row: Annotated[str | None, typer.Option("--row", metavar="ID", help="One example's alone.")] = None,
    new_key: Annotated[bool, typer.Option("--new-key", help="Print a key for $TUNESMITH_ORIGINALS_KEY.")] = False,
    directory: Directory = HERE,
    as_json: Json = False,
) -> None:
    """What the pseudonyms stand for, where data.privacy.originals keeps it and you have the key."""
    from tunesmith.core.errors import UsageError
    from tunesmith.data.privacy.originals import new_key as make_key
    from tunesmith.data.privacy.originals import read_originals
    from tunesmith.project import open_project

    if new_key:
        emit({"key": (made := make_key())}, as_json, lambda console, _: console.print(made, markup=False))
        return
    project = open_project(directory)
    place = project.settings.data.privacy.originals
    if place is None:
        raise UsageError("this project keeps no originals", where="data.privacy.originals")
    known = read_originals(project.root / place)
    if row is not None and row not in known:
        raise UsageError(f"nothing was replaced in a row {row!r}", fix="tunesmith data show names the rows")
    document = {"originals": known if row is None else {row: known[row]}}

    def draw(console: Console, _: object) -> None:
        for name, pairs in document["originals"].items():
            for pseudonym, original in pairs.items():
                console.print(f"{name}  {pseudonym}  {original}", markup=False)

    emit(document, as_json, draw)


def _find(store: Store, prefix: str | None) -> str:
    """A dataset record's digest: the one that starts so, or the newest."""
    from tunesmith.core.errors import UsageError

    if prefix is not None:
        return store.find_record(prefix)
    known = store.records_of("dataset")
    if not known:
        raise UsageError("there is no dataset version yet", where=str(store.root), fix="`tunesmith data build`")
    return known[-1]


def _show_account(document: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    from tunesmith.core.digests import short

    rows, leakage = document["rows"], document["leakage"]
    table = Table(title=f"Dataset version {short(document['dataset'])}", show_header=False, title_justify="left")
    for source in document["sources"]:
        how = "told" if source["format_told"] else "detected"  # --json states by what
        held = ", held out" if source.get("split") == "test" else ""
        table.add_row(f"source {source['path']}", f"{source['rows']} rows, format {source['format']} ({how}){held}")
    for warning in document["warnings"]:
        table.add_row("warning", warning)
    table.add_row("read", str(rows["read"]))
    table.add_row("kept", f"{rows['kept']} ({rows['changed']} changed)")
    for reason, number in rows["removed"].items():
        table.add_row(f"removed: {reason}", str(number))
    for name, number in document["splits"].items():
        table.add_row(name, f"{number} rows in {document['groups'][name]} groups")
    table.add_row(
        "leakage",
        f"{leakage['shared_groups']} shared groups, {leakage['near_pairs']} near pairs at {leakage['threshold']}",
    )
    for name, number in leakage.get("shared", {}).items():
        table.add_row(f"leakage by {name}", f"{number} stand in two splits")
    _show_division(document, table)
    for outside in document.get("decontaminated", ()):
        table.add_row("held against", f"{outside['path']}, {outside['rows']} rows")
    near = document.get("near_clusters", {"clusters": 0})
    if near["clusters"]:
        table.add_row(
            "near, answers differ", f"{near['clusters']} clusters, {near['rows']} rows, the largest {near['largest']}"
        )
    for licence, number in document["licences"].items():
        table.add_row(f"licence {licence}", str(number))
    for entity, number in document["privacy"].items():
        table.add_row(f"found: {entity}", str(number))
    _show_scan(document.get("privacy_scan"), table)
    for key, number in document["ignored_keys"].items():
        table.add_row(f"key not read: {key}", f"in {number} rows")
    if document["conflicts"]["requests"]:
        conflicts = document["conflicts"]
        table.add_row("conflicts", f"{conflicts['requests']} requests with different answers, {conflicts['rows']} rows")
    console.print(table)


def _show_division(document: dict[str, Any], table: Table) -> None:
    for name, (first, last) in document.get("time", {"spans": {}})["spans"].items():
        table.add_row(f"time of {name}", f"{first[:19]} to {last[:19]} by {document['time']['key']}")
    strata = document.get("strata", {"rows": {}})
    bare = [kind for kind, rows in strata["rows"].items() if not rows["test"]]
    if strata["rows"]:
        without = f", {len(bare)} of them not in the test: {', '.join(bare[:5])}" if bare else ", all in the test"
        table.add_row(f"kinds by {strata['key']}", f"{len(strata['rows'])}{without}")


def _show_scan(scan: dict[str, Any] | None, table: Table) -> None:
    if scan is None:  # a record of an older version
        return
    for role, found in scan["fields"].items():
        table.add_row(f"found in: {role}", ", ".join(f"{entity} {number}" for entity, number in found.items()))
    missed = {entity: one for entity, one in scan["planted"].items() if one["found"] < one["planted"]}
    for entity, one in sorted(missed.items(), key=lambda pair: float(pair[1]["recall"]))[:3]:
        table.add_row(
            f"scan for {entity}",
            f"finds {one['found']} of {one['planted']} planted here (at least {one['recall_at_least']:.0%})",
        )
    if whole := [one for entity, one in scan["planted"].items() if entity not in missed]:
        least = min(float(one["recall_at_least"]) for one in whole)
        table.add_row(f"scan for {len(whole)} kinds", f"finds all that was planted here (at least {least:.0%} of each)")
    left = scan["left"]["at_most"]
    if scan["planted"]:
        table.add_row("probably left", "no bound" if left is None else f"at most {left:g} values (95%)")


def _show_rows(split: str, rows: list[dict[str, Any]], total: int, console: Console) -> None:
    console.print(f"\n{split}: {len(rows)} of {total} rows", markup=False)
    for row in rows:
        if "messages" not in row:
            console.print(json.dumps(row, ensure_ascii=False), markup=False)
            continue
        console.print(f"\n{row['id']}  {row['group']}  {row['licence']}", style="dim", markup=False)
        for turn in row["messages"]:
            console.print(f"  {turn['role']}: {turn['content']}", markup=False)
            for call in turn.get("tool_calls", ()):
                console.print(f"    calls {call['name']} {call['arguments']}", markup=False)
