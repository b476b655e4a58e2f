"""Performing an action for a caller of /api and for a form of the console alike."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from tunesmith.server.serving import Serving
from tunesmith.services.actions import Acting, Action
from tunesmith.services.held import HeldAnswerView
from tunesmith.store.people.identities import User
from tunesmith.store.people.tokens import Token

# A field of a request in an action's path.
FIELD = re.compile(r"\{(\w+)\}")


def tell_of_decision(serving: Serving, decided: HeldAnswerView) -> None:
    """Answer the request that waits for a held answer, and count the decision."""
    serving.metrics.held.labels(decided.state).inc()
    serving.awaited.tell(decided.id)


# What the server itself does once an action is done, by the action's name.
AFTER: Mapping[str, Callable[[Serving, Any], None]] = {"answer.decide": tell_of_decision}


async def perform(
    serving: Serving, user: User, action: Action[Any, Any], asked: Any, *, session: str = "", token: Token | None = None
) -> Any:
    """What an action returns, on the threads that users share. session: of the console; token: of a caller of /api."""
    acting = Acting(serving.store, user, serving.own_project, session, token)
    threads = serving.files if action.reads_files else serving.noting
    result = await threads.run(user.name, lambda: action(acting, asked))
    if (after := AFTER.get(action.name)) is not None:
        after(serving, result)
    return result
