"""`webhooks list|retry|test`: whether other systems heard what happened."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.terminal import Acting, Here, add_commands, draw_table, printed

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.services.webhooks import WebhookList

Name = Annotated[str, typer.Argument(metavar="WEBHOOK", help="Its name in tunesmith.yaml.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(no_args_is_help=True, help="Show, repeat and test what is sent to other systems.")
    add_commands(group, retry, test, list=list_webhooks)
    app.add_typer(group, name="webhooks")


def list_webhooks(here: Here) -> None:
    """List the webhooks, and the events that did not arrive. Exit code 1: some failed too often and are given up."""
    from tunesmith.services import webhooks

    found = webhooks.list_webhooks(here.project)
    here.emit(found, _draw_list)
    raise typer.Exit(1 if any(webhook.given_up for webhook in found.webhooks) else 0)


def retry(here: Acting, webhook: Name) -> None:
    """Let a worker try again at once what did not arrive, given up or not."""
    from tunesmith.services import webhooks

    found = here.do(webhooks.retry, webhook=webhook)
    here.emit(found, printed(f"{found.events} events are tried again"))


def test(here: Acting, webhook: Name) -> None:
    """Send an event of the type webhook.test now. Exit code 1: it did not arrive."""
    from tunesmith.services import webhooks

    found = here.do(webhooks.test, webhook=webhook)
    here.emit(found, printed(f"{found.event}: {found.problem or 'arrived'}"))
    raise typer.Exit(1 if found.problem else 0)


def _draw_list(console: Console, found: WebhookList) -> None:
    if not found.webhooks:
        console.print("no webhooks; `webhooks:` in tunesmith.yaml adds some")
        return
    rows = [(each.name, each.host, each.waiting, each.given_up) for each in found.webhooks]
    draw_table(console, rows, "webhook", "host", "waiting", "given up")
    failed = [
        (each.webhook, each.type, each.event, f"{each.attempts}{', given up' if each.given_up else ''}", each.error)
        for each in found.failed
    ]
    if failed:
        draw_table(console, failed, "webhook", "type", "event", "attempts", "error")
