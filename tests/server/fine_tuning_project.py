"""A project on a tiny random base that takes fine-tuning jobs, and its server."""

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path

from tests.commands import Forked, first_line
from tests.tiny_project import rows, settings, write_project
from tunesmith.core.text.names import Scope
from tunesmith.project import Project
from tunesmith.store.people.identities import add_user, ensure_owner
from tunesmith.store.people.tokens import issue_token

MODEL = "gpt-4o-mini-2024-07-18"
OWNER = "olive"


def fine_tuning_settings(**changes: object) -> dict[str, object]:
    """The project file as data."""
    return {
        **settings(),
        "task": {"scorers": ["exact_match"]},
        "gates": {"right": {"metric": "exact_match", "at_least": 0.0}},
        "candidates": {
            "plain": {"max_tokens": 8},
            "tuned": {"train": {"rank": 2, "batch": 8, "checkpoint_seconds": 0.1}, "max_tokens": 8},
        },
        "fine_tuning": {"models": {MODEL: None}, "licence": "CC0-1.0", "split": {"validation": 0.1, "test": 0.4}},
        **changes,
    }


def write_fine_tuning_project(folder: Path, **changes: object) -> Path:
    """A project whose fine-tuning jobs take seconds."""
    return write_project(folder, **fine_tuning_settings(**changes))


def examples() -> bytes:
    """A file as OpenAI's clients upload it. No two requests have the same wording, so that each is a group."""
    found = []
    for request, answer in (row["messages"] for row in rows()):
        short = {"role": "assistant", "content": json.dumps({"on": json.loads(answer["content"])["on"]})}
        found.append(json.dumps({"messages": [request, short]}).encode() + b"\n")
    return b"".join(found)


def token_of_engineer(folder: Path, scope: Scope = Scope()) -> str:
    """A token of amy, an engineer; ada is an approver."""
    store = Project.load(folder).store
    ensure_owner(store)
    add_user(store, "amy", ["engineer"], actor=OWNER, scope=scope)
    add_user(store, "ada", ["approver"], actor=OWNER)
    token = issue_token(store, "amy", actor=OWNER)
    store.engine.dispose()
    return token


@contextlib.contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[str, Forked]]:
    """A running `tunesmith serve`: its URL and its process."""
    process = Forked(folder, "serve", "--json", "--port", "0", "--grace", "5", *options)
    try:
        yield first_line(process)["url"], process
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
