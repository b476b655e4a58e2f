"""`forecast`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.terminal import Acting, Terminal, add_commands, draw_table

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.services.forecast import ForecastView

EXITS = {"train": 0, "don't": 3, "undecided": 4, None: 4}
_COLOURS = {"train": "green", "don't": "red", "undecided": "yellow", None: "yellow"}


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_commands(app, forecast)


def forecast(
    here: Acting,
    candidate: Annotated[str | None, typer.Argument(help="Its name; by default the only one that is trained.")] = None,
    rows: Annotated[
        int | None,
        typer.Option(min=1, help="Rows of the largest subset; by default a sixteenth of all, and 100 at least."),
    ] = None,
    goal: Annotated[
        float | None,
        typer.Option(min=-1.0, max=1.0, help="The lift from which tuning pays; by default the lift gate's bound."),
    ] = None,
    queue: Annotated[
        bool, typer.Option("--queue", help="Leave it to `tunesmith worker`, with the defaults, and return at once.")
    ] = False,
) -> None:
    """Forecast from trainings on subsets whether a training will pay. Exits with 0 for train, 3 for don't, 4 for
    undecided."""
    from tunesmith.core.errors import UsageError

    if queue:
        from tunesmith.cli.jobs import draw_job
        from tunesmith.services import jobs

        if (rows, goal) != (None, None):
            raise UsageError("a queued forecast takes the defaults", where="--queue", fix="leave the other options out")
        here.emit(here.do(jobs.add, kind="forecast", candidate=candidate), draw_job)
        return
    from tunesmith.services import forecast

    found = forecast.forecast(here.project, candidate, rows=rows, goal=goal, progress=Terminal(), actor=here.actor)
    here.emit(found, _draw)
    raise typer.Exit(EXITS[found.decision])


def _draw(console: Console, found: ForecastView) -> None:
    from rich.text import Text

    from tunesmith.core.text.wording import percent

    rows = [(f"trained on {each.rows:,} rows", percent(each.mean), "") for each in found.subsets]
    rows += [(name, percent(mean), "") for name, mean in sorted(found.rivals.items(), key=lambda one: one[1])]
    rows += [
        (f"expected of {each.rows:,} rows", percent(each.median), f"{percent(each.low)} to {percent(each.high)}")
        for each in found.curve
        if each.rows >= found.rows
    ]
    title = f"{sum(found.held.values())} validation rows"
    draw_table(console, rows, "", found.metric, f"{found.confidence:.0%} interval", title=title)
    console.print(Text(found.headline, f"bold {_COLOURS[found.decision]}"))
    for sentence in found.reasons:
        console.print(f"- {sentence}")
