"""`rollout start|status|resume|promote|abort|rollback`: move traffic to a version step by step, or back at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.terminal import Acting, Here, Region, Tenant, add_commands, draw_table, say

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from tunesmith.services.rollout_course import RolloutCourse
    from tunesmith.services.rollouts import RolloutList, RolloutView

Which = Annotated[str, typer.Argument(metavar="ROLLOUT", help="A rollout's number, or a name: its live rollout.")]
Override = Annotated[
    str | None, typer.Option("--override", metavar="REASON", help="Admins: go on without it, and why.")
]
Reason = Annotated[str, typer.Option("--reason", help="Why; the audit log keeps it.")]
Number = Annotated[int, typer.Argument(metavar="ROLLOUT", help="A rollout's number.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(no_args_is_help=True, help="Move traffic to a version step by step, or back at once.")
    add_commands(group, start, status, show, resume, promote, abort, rollback)
    app.add_typer(group, name="rollout")


def start(
    here: Acting,
    version: Annotated[str, typer.Argument(help="NAME@v3, or the start of a version's digest.")],
    override: Override = None,
    tenant: Tenant = None,
    region: Region = None,
) -> None:
    """Start to move traffic to an approved version, in the project's steps. The first version serves at once."""
    from tunesmith.services import rollouts

    started = here.do(rollouts.start, version=version, override=override, tenant=tenant, region=region)
    here.emit(started, _draw)
    if started.live:
        say("a running `tunesmith serve` moves it on; `tunesmith rollout status` shows the progress")


def status(
    here: Here,
    which: Annotated[
        str | None, typer.Argument(metavar="[ROLLOUT]", help="A number or a name; all by default.")
    ] = None,
) -> None:
    """Show rollouts, and what a running analysis would decide now."""
    from tunesmith.services import rollouts

    here.emit(rollouts.status(here.store, which), _draw_all)


def show(here: Here, number: Number) -> None:
    """Show how a rollout goes: what ended its steps, its traffic and evidence over time, and who changed it."""
    from tunesmith.services import rollout_course

    here.emit(rollout_course.course(here.store, number), _draw_course)


def resume(here: Acting, which: Which, reason: Reason = "") -> None:
    """End the pause of a rollout."""
    from tunesmith.services import rollouts

    here.emit(here.do(rollouts.resume, rollout=which, reason=reason), _draw)


def promote(here: Acting, which: Which, override: Override = None, reason: Reason = "") -> None:
    """Give the canary all traffic now, without the remaining steps. Only --override skips an analysis or approval."""
    from tunesmith.services import rollouts

    here.emit(here.do(rollouts.promote, rollout=which, override=override, reason=reason), _draw)


def abort(here: Acting, which: Which, reason: Reason = "aborted by hand") -> None:
    """Give all traffic back to the champion and end the rollout. Exit code 3: done, but the champion may not serve."""
    from tunesmith.services import rollouts

    _emit_ended(here, here.do(rollouts.abort, rollout=which, reason=reason))


def rollback(
    here: Acting,
    name: Annotated[str, typer.Argument(help="The name that versions share, as in NAME@champion.")],
    reason: Reason = "rolled back by hand",
    override: Override = None,
    tenant: Tenant = None,
    region: Region = None,
) -> None:
    """Give a name's traffic back to the previous version: end a live rollout, or undo the newest promotion.

    The previous version is the newest one that served before and may serve now. Exit code 3: no such version, or a live
    rollout was ended and the champion may not serve.
    """
    from tunesmith.services import rollouts

    done = here.do(rollouts.rollback, rollout=name, reason=reason, override=override, tenant=tenant, region=region)
    _emit_ended(here, done)


def _emit_ended(here: Acting, ended: RolloutView) -> None:
    here.emit(ended, _draw)
    if ended.champion is not None and ended.champion.warning is not None:
        say(ended.champion.warning)
        raise typer.Exit(3)


def _draw_all(console: Console, found: RolloutList) -> None:
    if not found.rollouts:
        console.print("no rollouts yet; `tunesmith rollout start VERSION` starts one")
    for rollout in found.rollouts:
        _draw(console, rollout)
    for warning in dict.fromkeys(one.champion.warning for one in found.rollouts if one.champion):
        if warning is not None:
            console.print(warning, style="bold red")


def _draw_course(console: Console, found: RolloutCourse) -> None:
    steps = [(one.number, one.says, one.state, one.ended_at or "", one.ended_by or "") for one in found.steps]
    draw_table(console, steps, "step", "what", "state", "ended", "by")
    spans = [
        (one.at[:16], one.stable.requests, one.stable.failed, one.canary.requests, one.canary.failed)
        for one in found.traffic.spans
    ]
    draw_table(console, spans[-20:], "from", "stable", "failed", "canary", "failed", title="requests")
    for each in found.evidence:
        points = [(one.requests, f"{one.not_worse:.3g}", f"{one.worse:.3g}") for one in each.points]
        draw_table(console, points, "requests", "not worse", "worse", title=f"step {each.step}: {each.outcome}")
        console.print(f"{each.needed:g} decides; {each.reason}", soft_wrap=True, highlight=False)
    changes = [(one.at[:19], one.actor, one.action, one.reason) for one in found.changes]
    draw_table(console, changes, "when", "who", "what", "why")


def _draw(console: Console, rollout: RolloutView) -> None:
    for line in _lines(rollout):
        console.print(line)


def _lines(rollout: RolloutView) -> Iterator[str]:
    """A rollout in a few lines: its state, its steps with a mark at the current one, and the reason."""
    stable = rollout.stable.version if rollout.stable else "nothing"
    canary = rollout.canary.version if rollout.canary else "nothing"
    scope = "".join(
        f", {key} {value}" for key, value in (("tenant", rollout.tenant), ("region", rollout.region)) if value
    )
    state = rollout.status.replace("_", " ")
    yield f"rollout {rollout.rollout}: {stable} -> {canary}{scope}: {state}, canary weight {rollout.weight}%"
    for number, step in enumerate(rollout.steps):
        mark = ">" if rollout.live and number == rollout.step else "x" if number < rollout.step else " "
        (kind, value), *_ = step.items()
        yield f"  {mark} {kind} {_settings(value)}".rstrip()
    if rollout.live:
        callers = ", ".join(rollout.main_callers or ()) or "all callers"
        yield f"  evidence: the requests of {callers}"
    if rollout.override:
        yield f"  under an override: {rollout.override}"
    if rollout.analysis:
        yield f"  {rollout.analysis.outcome}: {rollout.analysis.reason}"
    if rollout.reason:
        yield f"  {rollout.reason}"


def _settings(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {setting}" for key, setting in value.items())
    return str(value)
