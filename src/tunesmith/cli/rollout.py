"""`rollout start|status|resume|promote|abort|rollback`: move traffic to a version step by step, or back at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith import services
from tunesmith.cli.terminal import Acting, Drawn, Here, Region, Tenant, add_commands, add_group, say, table

if TYPE_CHECKING:
    from tunesmith.rollout.course import RolloutCourse
    from tunesmith.services.rollouts import RolloutList, RolloutView

Rollout = Annotated[str, typer.Argument(help="A rollout's number, or a name: its live rollout.")]
Override = Annotated[str | None, typer.Option(metavar="REASON", help="Admins: go on without it, and why.")]
Reason = Annotated[str, typer.Option(help="Why; the audit log keeps it.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = add_group(app, "rollout", "Move traffic to a version step by step, or back at once.")
    add_commands(group, start, status, show, resume, promote, abort, rollback)


def start(
    here: Acting, version: str, *, override: Override = None, tenant: Tenant = None, region: Region = None
) -> None:
    """Start to move traffic to an approved version, in the project's steps. The first version serves at once.

    version: NAME@v3, or the start of a version's digest.
    """
    if here.show(services.rollouts.start, _draw).live:
        say("a running `tunesmith serve` moves it on; `tunesmith rollout status` shows the progress")


def status(here: Here, rollout: str | None = None) -> None:
    """Show rollouts, and what a running analysis would decide now.

    rollout: A number or a name; all by default.
    """
    here.emit(services.rollouts.status(here.machine, rollout), _draw_all)


def show(here: Here, number: int) -> None:
    """Show how a rollout goes: what ended its steps, its traffic and evidence over time, and who changed it.

    number ROLLOUT: A rollout's number.
    """
    here.emit(services.rollouts.course(here.machine, number), _draw_course)


def resume(here: Acting, rollout: Rollout, *, reason: Reason = "") -> None:
    """End the pause of a rollout."""
    here.show(services.rollouts.resume, _draw)


def promote(here: Acting, rollout: Rollout, *, override: Override = None, reason: Reason = "") -> None:
    """Give the canary all traffic now, without the remaining steps. Only --override skips an analysis or approval."""
    here.show(services.rollouts.promote, _draw)


def abort(here: Acting, rollout: Rollout, *, reason: Reason = "aborted by hand") -> int:
    """Give all traffic back to the champion and end the rollout. Exit code 3: done, but the champion may not serve."""
    return _ended(here.show(services.rollouts.abort, _draw))


def rollback(
    here: Acting,
    rollout: str,
    *,
    reason: Reason = "rolled back by hand",
    override: Override = None,
    tenant: Tenant = None,
    region: Region = None,
) -> int:
    """Give a name's traffic back to the previous version: end a live rollout, or undo the newest promotion.

    The previous version is the newest one that served before and may serve now. Exit code 3: no such version, or a live
    rollout was ended and the champion may not serve.

    rollout NAME: The name that versions share, as in NAME@champion.
    """
    return _ended(here.show(services.rollouts.rollback, _draw))


def _ended(ended: RolloutView) -> int:
    if ended.champion is None or ended.champion.warning is None:
        return 0
    say(ended.champion.warning)
    return 3


def _draw_all(listed: RolloutList) -> Drawn:
    if not listed.rollouts:
        yield "no rollouts yet; `tunesmith rollout start VERSION` starts one"
    for rollout in listed.rollouts:
        yield from _draw(rollout)
    for warning in dict.fromkeys(one.champion.warning for one in listed.rollouts if one.champion):
        if warning is not None:
            yield warning, "bold red"


def _draw_course(course: RolloutCourse) -> Drawn:
    steps = [(one.number, one.says, one.state, one.ended_at or "", one.ended_by or "") for one in course.steps]
    yield table(steps, "step", "what", "state", "ended", "by")
    spans = [
        (one.at[:16], one.stable.requests, one.stable.failed, one.canary.requests, one.canary.failed)
        for one in course.traffic.spans[-20:]
    ]
    yield table(spans, "from", "stable", "failed", "canary", "failed", title="requests")
    for each in course.evidence:
        points = [(one.requests, f"{one.not_worse:.3g}", f"{one.worse:.3g}") for one in each.points]
        yield table(points, "requests", "not worse", "worse", title=f"step {each.step}: {each.outcome}")
        yield f"{each.needed:g} decides; {each.reason}"
    changes = [(one.at[:19], one.actor, one.action, one.reason) for one in course.changes]
    yield table(changes, "when", "who", "what", "why")


def _draw(rollout: RolloutView) -> Drawn:
    """A rollout in a few lines: its state, its steps with a mark at the current one, and the reason."""
    stable = rollout.stable.version if rollout.stable else "nothing"
    canary = rollout.canary.version if rollout.canary else "nothing"
    state, scope = rollout.status.replace("_", " "), rollout.scope.said
    yield f"rollout {rollout.rollout}: {stable} -> {canary}{scope}: {state}, canary weight {rollout.weight}%"
    for number, step in enumerate(rollout.steps):
        mark = ">" if rollout.live and number == rollout.step else "x" if number < rollout.step else " "
        ((kind, value),) = step.items()
        settings = ", ".join(f"{key} {each}" for key, each in value.items()) if isinstance(value, dict) else value
        yield f"  {mark} {kind} {settings}".rstrip()
    if rollout.live:
        yield f"  evidence: the requests of {', '.join(rollout.main_callers or ()) or 'all callers'}"
    if rollout.override:
        yield f"  under an override: {rollout.override}"
    if rollout.analysis:
        yield f"  {rollout.analysis.outcome}: {rollout.analysis.reason}"
    if rollout.reason:
        yield f"  {rollout.reason}"
