"""The list of actions: commands, routes and forms offer the same, by the same names."""

import ast
import itertools
from collections.abc import Iterator
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
# A key in the browser is proposed there; a command enrols a key in a file. Decisions are sent to a server. Commands
# verify files, too, where nobody can be looked up.
NO_COMMANDS = {
    "audit.verify",
    "erasure.prepare",
    "erasure.submit",
    "storage.prepare_hold",
    "storage.submit_hold",
    "users.propose_key",
} | {
    "versions.submit_decision",
    "versions.verify",
}


MODULES = [ast.parse(file.read_text()).body for file in Path(tunesmith.cli.__path__[0]).glob("*.py")]
FUNCTIONS = [[each for each in body if isinstance(each, ast.FunctionDef)] for body in MODULES]


def options(function: ast.FunctionDef) -> set[str]:
    return {each.arg for each in function.args.args + function.args.kwonlyargs} - {"here"}


def calls() -> Iterator[tuple[str, set[str], list[ast.FunctionDef]]]:
    """For each `here.do(services.NOUN.ACTION, field=...)` or `show`: the action, these fields, and the functions that
    come to it, whose options are fields, too."""
    for functions in FUNCTIONS:
        texts = [(each, ast.unparse(each)) for each in functions]
        for function in functions:
            around = [each for each, text in texts if f" {function.name}(here" in text]
            for node in ast.walk(function):
                match node:
                    case ast.Call(ast.Attribute(ast.Name("here" | "acting"), "do" | "show" | "request"), [action, *_]):
                        name = ast.unparse(action).removeprefix("services.")
                        yield name, {str(each.arg) for each in node.keywords}, around


def place(action: Action[Any, Any]) -> str:
    """Where commands find an action: module.function."""
    return f"{action.does.__module__.rpartition('.')[2]}.{action.does.__name__}"


def test_commands_give_every_field_of_the_actions_that_they_do() -> None:
    given: dict[str, set[str]] = {}
    actions = {place(each): each.asked.model_fields.keys() - OF_PAGES for each in all_actions()}
    for action, fields, around in calls():
        assert fields <= actions[action], action
        given.setdefault(action, set()).update(fields, *(options(each) & actions[action] for each in around))
    assert given == {name: fields for name, fields in actions.items() if name not in NO_COMMANDS}


def test_every_option_of_a_command_is_read() -> None:
    """By its name, as a field of a request, or with all that are given."""
    actions, done = {place(each): each.asked.model_fields.keys() for each in all_actions()}, list(calls())
    for function in itertools.chain(*FUNCTIONS):
        fields = set().union(*(actions[action] for action, _, around in done if function in around))
        text, read = ast.unparse(function), {each.id for each in ast.walk(function) if isinstance(each, ast.Name)}
        read |= {"tenant", "region"} if "here.scope" in text else set()
        if "here.given" not in text:
            assert options(function) <= read | fields, function.name


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
