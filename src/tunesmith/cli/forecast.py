"""`forecast`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.terminal import Acting, Terminal, add_commands, draw_table

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.services.runs.forecast import Forecast

EXITS = {"train": 0, "don't": 3, "undecided": 4, None: 4}
_DAYS = 30.0
_COLOURS = {"train": "green", "don't": "red", "undecided": "yellow", None: "yellow"}


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_commands(app, forecast)


def forecast(
    here: Acting,
    candidate: Annotated[str | None, typer.Argument(help="Its name; by default the only one that is trained.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="How long it may take, as 90s or 5m; by default a tenth of the training's budget, or 2m.",
        ),
    ] = None,
    goal: Annotated[
        float | None,
        typer.Option(min=-1.0, max=1.0, help="The lift from which tuning pays; by default the lift gate's bound."),
    ] = None,
    days: Annotated[
        float, typer.Option(min=1.0, max=3650.0, help="Days in which lower running costs have to repay the training.")
    ] = _DAYS,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Also write it as an HTML page with the plot.")
    ] = None,
    queue: Annotated[
        bool, typer.Option("--queue", help="Leave it to `tunesmith worker`, with the defaults, and return at once.")
    ] = False,
) -> None:
    """Forecast before a training whether it will pay. Exits with 0 for train, 3 for don't, 4 for undecided."""
    from tunesmith.core.errors import UsageError

    if queue:
        from tunesmith.cli.jobs import draw_job
        from tunesmith.services.runs import jobs

        if (budget, goal, days, output) != (None, None, _DAYS, None):
            raise UsageError("a queued forecast takes the defaults", where="--queue", fix="leave the other options out")
        here.emit(jobs.queue_forecast(here.project, candidate, actor=here.actor), draw_job)
        return
    from tunesmith.core.settings import duration_of
    from tunesmith.services.runs import forecast as services

    if output is not None and output.is_dir():  # said before minutes of work, not after
        raise UsageError(f"{output} is a folder", where="--output", fix="name a file in it")
    seconds = None if budget is None else duration_of(budget, "--budget")
    found = services.forecast(
        here.project, candidate, budget=seconds, goal=goal, days=days, progress=Terminal(), actor=here.actor
    )
    if output is not None:
        services.forecast_page(found, output)
    here.emit(found, _draw)
    raise typer.Exit(EXITS[found.decision])


def _draw(console: Console, found: Forecast) -> None:
    from rich.text import Text

    from tunesmith.evaluation.report.wording import percent

    rows = [(f"trained on {each.rows:,} rows", percent(each.mean), "") for each in found.subsets]
    rows += [(name, percent(mean), "") for name, mean in sorted(found.rivals.items(), key=lambda one: one[1])]
    interval = f"{percent(found.score.low)} to {percent(found.score.high)}"
    rows.append((f"forecast for all {found.rows:,} rows", percent(found.score.median), interval))
    most = "up to " if len(found.rivals) > 1 else ""  # one that can hardly be the best is asked fewer
    title = f"{most}{sum(found.held.values())} held-out rows"
    draw_table(console, rows, "", found.metric, f"{found.confidence:.0%} interval", title=title)
    console.print(Text(found.headline, f"bold {_COLOURS[found.decision]}"))
    for sentence in found.reasons:
        console.print(f"- {sentence}")
