"""`webhooks list|retry|test`: whether other systems heard what happened."""

from __future__ import annotations

import typer

from tunesmith import services
from tunesmith.cli.terminal import Acting, Drawn, Here, add_commands, add_group, table


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = add_group(app, "webhooks", "Show, repeat and test what is sent to other systems.")
    add_commands(group, retry, test, list=list_webhooks)


def list_webhooks(here: Here) -> int:
    """List the webhooks, and the events that did not arrive. Exit code 1: some failed too often and are given up."""
    listed = services.monitoring.list_webhooks(here.project)
    here.emit(listed, _draw_list)
    return 1 if any(webhook.given_up for webhook in listed.webhooks) else 0


def retry(here: Acting, webhook: str) -> None:
    """Let a worker try again at once what did not arrive, given up or not.

    webhook: Its name in tunesmith.yaml.
    """
    retried = here.do(services.monitoring.retry_webhook)
    here.emit(retried, f"{retried.events} events are tried again")


def test(here: Acting, webhook: str) -> int:
    """Send an event of the type webhook.test now. Exit code 1: it did not arrive.

    webhook: Its name in tunesmith.yaml.
    """
    tested = here.do(services.monitoring.test_webhook)
    here.emit(tested, f"{tested.event}: {tested.problem or 'arrived'}")
    return 1 if tested.problem else 0


def _draw_list(listed: services.monitoring.WebhookList) -> Drawn:
    if not listed.webhooks:
        yield "no webhooks; `webhooks:` in tunesmith.yaml adds some"
        return
    rows = [(each.name, each.host, each.waiting, each.given_up) for each in listed.webhooks]
    yield table(rows, "webhook", "host", "waiting", "given up")
    failed = [
        (each.webhook, each.type, each.event, f"{each.attempts}{', given up' if each.given_up else ''}", each.error)
        for each in listed.failed
    ]
    if failed:
        yield table(failed, "webhook", "type", "event", "attempts", "error")
