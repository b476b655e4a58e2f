"""The list of actions: commands, routes and forms offer the same, by the same names."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

import tunesmith.cli
from tunesmith.core.errors import UsageError
from tunesmith.server.console.routes import fields_of
from tunesmith.services import jobs, rollouts
from tunesmith.services.actions import Action, all_actions
from tunesmith.store.people.roles import ACTIONS

# What a page has shown before a change, which commands do not say.
OF_PAGES = {"step", "champion"}
# A key in the browser is proposed there; a command enrols a key in a file. The other commands ask a server, or verify
# files where nobody can be looked up.
NO_COMMANDS = {"audit.verify", "decisions.prepare", "decisions.submit", "keys.propose", "versions.verify"}


def calls() -> dict[str, list[set[str]]]:
    """For each `here.do(NOUN.ACTION, field=...)` of the commands, the fields that it gives, by NOUN.ACTION."""
    found: dict[str, list[set[str]]] = {}
    for file in Path(tunesmith.cli.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "do":
                fields = {str(each.arg) for each in node.keywords}
                found.setdefault(ast.unparse(node.args[0]), []).append(fields)
    return found


def place(action: Action[Any, Any]) -> str:
    """Where commands find an action: module.function."""
    return f"{action.does.__module__.rpartition('.')[2]}.{action.does.__name__}"


def test_commands_give_every_field_of_the_actions_that_they_do() -> None:
    given, actions = calls(), {place(each): each for each in all_actions() if place(each) not in NO_COMMANDS}
    assert given.keys() == actions.keys()
    for name, action in actions.items():
        assert set().union(*given[name]) == action.asked.model_fields.keys() - OF_PAGES, name


def test_every_action_is_documented_and_its_permission_is_known() -> None:
    for action in all_actions():
        assert action.does.__doc__, action.name
        assert action.permission is None or action.permission in ACTIONS, action.name
        assert action.at or not action.form, action.name


def test_the_fields_of_a_form_are_those_of_the_request() -> None:
    read = fields_of(jobs.add.asked, {"changes.my.lora.rank": ["8"], "csrf": ["x"], "candidate": [""]})
    assert read == {"changes": {"my.lora": {"rank": "8"}}}
    read = fields_of(rollouts.promote.asked, {"step": ["3"], "reason": ["3"]})
    assert read == {"step": 3, "reason": "3"}
    assert fields_of(rollouts.promote.asked, {"step": ["\u0663"]}) == {"step": "\u0663"}
    with pytest.raises(UsageError, match="cannot be read"):
        fields_of(jobs.add.asked, {"changes": ["1"], "changes.my.lora.rank": ["8"]})


def test_a_request_that_is_not_valid_names_the_field() -> None:
    with pytest.raises(UsageError, match="leave them out"):
        rollouts.rollback.request({"rollout": "7", "reason": "why", "tenant": "acme"})
    with pytest.raises(UsageError, match=r"invalid 'version': .* at most 200") as caught:
        rollouts.start.request({"version": "x" * 201})
    assert caught.value.where == "version"
