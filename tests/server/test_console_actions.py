"""What the console does, the command line and HTTP can do too: the table in the reference is complete and true."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from tests.commands import call
from tests.console.evidence_rows import put_evaluation
from tests.fabricate import NAME, OWNER, Scene
from tests.server.conftest import Served
from tests.server.test_access import decisions
from tunesmith.cli.main import app
from tunesmith.monitoring.recall import Cause, recall
from tunesmith.registry.versions import list_versions

TABLE = Path(__file__).parents[2] / "docs" / "reference" / "console-actions.md"
# Logging in and out, files that ship with the pages, and the stream that tells open pages to look again.
NO_ACTION = re.compile(r".* /console(/(login|logout|oidc|static|changes).*|/\{rest:path\})?")
SESSION = "only in a session"


def rows() -> list[tuple[str, list[str], list[str], list[str], str]]:
    """(what, routes of the console, commands, routes over HTTP, scopes or why there are none) of each line."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [
        (what, *(re.findall("`([^`]+)`", cell) for cell in (page, command, http)), scope or http)
        for what, page, command, http, scope in cells
    ]


def commands() -> set[str]:
    """Every command of the command line."""

    def under(command: object, path: tuple[str, ...]) -> set[str]:
        inner = getattr(command, "commands", None)
        if inner is None:
            return {" ".join(path)}
        return set().union(*(under(each, (*path, name)) for name, each in inner.items()))

    return under(get_command(app), ())


@pytest.fixture
def served_routes(shared: Served) -> dict[str, set[str]]:
    """Method and path of every route -> the scopes that may call it."""
    return {
        f"{method} {path}": set(made[0].split(" or "))
        for path, methods, made in decisions(shared.app.routes)
        for method in methods.split()
    }


def test_every_action_of_the_console_is_in_the_table(served_routes: dict[str, set[str]]) -> None:
    console = {route for route in served_routes if re.match(r"\w+ /(console.*)?$", route)}
    actions = {route for route in console if not NO_ACTION.fullmatch(route)}
    assert len(actions) > 50
    listed = [route for _, pages, _, _, _ in rows() for route in pages]
    assert sorted(listed) == sorted(actions)


def test_each_action_has_a_command_and_a_route(served_routes: dict[str, set[str]]) -> None:
    known = commands()
    for what, _, named, routes, scopes in rows():
        assert named, what
        assert set(named) <= known, f"{what}: {set(named) - known}"
        assert routes or scopes == SESSION, what
        for route in routes:
            assert route in served_routes, f"{what}: {route}"
            assert served_routes[route] & {"any token", *re.findall("[a-z]+", scopes)}, (
                f"{what}: {route} takes {served_routes[route]}"
            )


def test_the_commands_that_list(scene: Scene) -> None:
    def run(*words: str) -> Any:
        """A command's JSON. It is drawn as well."""
        drawn = CliRunner().invoke(app, [*words, "-C", str(scene.store.root)], catch_exceptions=False)
        assert drawn.exit_code == 0, drawn.output
        assert drawn.stdout
        return call(scene.store.root, *words)

    measured = put_evaluation(scene, n=20).evaluation
    found = run("evaluations")
    assert (found["total"], found["evaluations"][0]["evaluation"]) == (5, measured)
    assert run("evaluations", measured[7:19])["summary"]["evaluation"] == measured
    assert scene.dataset in [one["dataset"] for one in run("data", "list")["datasets"]]
    assert run("recalls") == {"recalls": []}
    withdrawn = list_versions(scene.store)[0]
    recall(scene.store, Cause(kind="version", value=withdrawn.digest), reason="why", actor=OWNER)
    assert [one["reason"] for one in run("recalls")["recalls"]] == ["why"]
    assert "licence" in run("notice", f"{NAME}@v1")["notice"]
