"""`rollout start|status|resume|promote|abort|rollback`: move traffic to a version step by step, or back at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.terminal import HERE, As, Directory, Json, emit, say

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.rollout.state import Rollout
    from tunesmith.store.store import Store

Tenant = Annotated[str, typer.Option("--tenant", help="For which tenant; all where left out.")]
Region = Annotated[str, typer.Option("--region", help="For which region; all where left out.")]
Which = Annotated[str, typer.Argument(metavar="ROLLOUT", help="A rollout's number, or a name: its live rollout.")]
Override = Annotated[
    str | None, typer.Option("--override", metavar="REASON", help="Admins: go on without it, and why.")
]
Reason = Annotated[str, typer.Option("--reason", help="Why; the audit log keeps it.")]


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    group = typer.Typer(no_args_is_help=True, help="Move traffic to a version step by step, or back at once.")
    for verb in (start, status, resume, promote, abort, rollback):
        group.command()(verb)
    app.add_typer(group, name="rollout")


def start(
    version: Annotated[str, typer.Argument(help="NAME@v3, or the start of a version's digest.")],
    directory: Directory = HERE,
    as_json: Json = False,
    actor: As = None,
    override: Override = None,
    tenant: Tenant = "",
    region: Region = "",
) -> None:
    """Begin to move traffic to an approved version, by the project's steps. The first version serves at once."""
    from tunesmith.project import open_project
    from tunesmith.registry.versions import resolve
    from tunesmith.rollout import controller

    project = open_project(directory)
    found = resolve(project.store, version, tenant=tenant, region=region)
    rollout = controller.start(
        project.store,
        name=found.name,
        version=found,
        steps=project.settings.rollout.steps,
        actor=project.actor(actor),
        override=override,
        tenant=tenant,
        region=region,
    )
    _show(project.store, [rollout], as_json)
    if rollout.live:
        say("a running `tunesmith serve` moves it on; `tunesmith rollout status` tells how far it is")


def status(
    which: Annotated[
        str | None, typer.Argument(metavar="[ROLLOUT]", help="A number or a name; all if left out.")
    ] = None,
    directory: Directory = HERE,
    as_json: Json = False,
) -> None:
    """Where rollouts stand, and what an analysis under way would say now."""
    from tunesmith.project import open_store
    from tunesmith.rollout.state import get_rollout, list_rollouts

    store = open_store(directory)
    if which is not None and which.isdecimal():
        rollouts = [get_rollout(store, int(which))]
    else:
        rollouts = list_rollouts(store, name=which)
    _show(store, rollouts, as_json, listed=True)


def resume(which: Which, directory: Directory = HERE, as_json: Json = False, actor: As = None) -> None:
    """Leave the pause that a rollout stands at."""
    from tunesmith.rollout import controller

    store, number, who = _found(directory, which, actor)
    _show(store, [controller.resume(store, number, actor=who)], as_json)


def promote(
    which: Which, directory: Directory = HERE, as_json: Json = False, actor: As = None, override: Override = None
) -> None:
    """Give the canary all traffic now, without the remaining steps. An analysis is skipped only with --override."""
    from tunesmith.rollout import controller

    store, number, who = _found(directory, which, actor)
    _show(store, [controller.promote(store, number, actor=who, override=override)], as_json)


def abort(
    which: Which,
    directory: Directory = HERE,
    as_json: Json = False,
    actor: As = None,
    reason: Reason = "aborted by hand",
) -> None:
    """Give all traffic back to the champion and end the rollout."""
    from tunesmith.rollout import controller

    store, number, who = _found(directory, which, actor)
    _show(store, [controller.abort(store, number, actor=who, reason=reason)], as_json)


def rollback(
    name: Annotated[str, typer.Argument(help="The name that versions are called by, as in NAME@champion.")],
    directory: Directory = HERE,
    as_json: Json = False,
    actor: As = None,
    reason: Reason = "rolled back by hand",
    tenant: Tenant = "",
    region: Region = "",
) -> None:
    """Give a name's traffic back to what served before: ends a live rollout, or undoes the newest promotion."""
    from tunesmith.project import open_store
    from tunesmith.rollout import controller
    from tunesmith.store.identities import acting

    store = open_store(directory)
    undone = controller.rollback(
        store, name=name, actor=acting(store, actor), reason=reason, tenant=tenant, region=region
    )
    _show(store, [undone], as_json)


def _found(directory: Any, which: str, actor: str | None) -> tuple[Store, int, str]:
    """(store, the rollout's number, who acts). Raises UsageError where a name has no live rollout, or several."""
    from tunesmith.core.errors import UsageError
    from tunesmith.project import open_store
    from tunesmith.rollout.state import list_rollouts
    from tunesmith.store.identities import acting

    store = open_store(directory)
    who = acting(store, actor)
    if which.isdecimal():
        return store, int(which), who
    live = list_rollouts(store, name=which, live=True)
    if len(live) != 1:
        places = ", ".join(f"{one.id} (tenant {one.tenant!r}, region {one.region!r})" for one in live)
        raise UsageError(
            f"{which[:80]!r} has {len(live)} live rollouts{': ' if places else ''}{places}",
            fix="name one by its number" if live else "tunesmith rollout status lists those that have ended",
        )
    return store, live[0].id, who


def _show(store: Store, rollouts: list[Rollout], as_json: bool, *, listed: bool = False) -> None:
    """The document of one rollout, or, listed, `{"rollouts": [...]}`."""
    from tunesmith.rollout.document import rollout_document

    documents = [rollout_document(store, rollout) for rollout in rollouts]

    def draw(console: Console) -> None:
        if not documents:
            console.print("no rollouts yet; tunesmith rollout start VERSION begins one")
        for document in documents:
            for line in _told(document):
                console.print(line, markup=False)

    emit({"rollouts": documents} if listed else documents[0], as_json, draw)


def _told(document: dict[str, Any]) -> list[str]:
    """A rollout in a few lines: state, steps with a mark at the current one, and why."""
    stable = document["stable"]["version"] if document["stable"] else "nothing"
    place = "".join(f", {key} {document[key]}" for key in ("tenant", "region") if document[key])
    lines = [
        f"rollout {document['rollout']}: {stable} -> {document['canary']['version']}{place}: "
        f"{document['status'].replace('_', ' ')}, canary weight {document['weight']}%"
    ]
    for number, step in enumerate(document["steps"]):
        live = document["status"] in ("running", "paused")
        mark = ">" if live and number == document["step"] else "x" if number < document["step"] else " "
        (kind, value), *_ = step.items()
        lines.append(f"  {mark} {kind} {_settings(value)}".rstrip())
    if document["override"]:
        lines.append(f"  under an override: {document['override']}")
    if document["analysis"]:
        lines.append(f"  {document['analysis']['outcome']}: {document['analysis']['reason']}")
    if document["reason"]:
        lines.append(f"  {document['reason']}")
    return lines


def _settings(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {setting}" for key, setting in value.items())
    return str(value)
