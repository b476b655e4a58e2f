"""Write the reference pages that follow from the code: settings, command line, HTTP, actions and records.

The pages are written into `docs/reference/generated/` before Sphinx reads its sources. The build fails where a setting,
a command, an option or a route has no description.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

FOLDER = Path(__file__).parents[1] / "reference" / "generated"


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the writer with Sphinx."""
    app.connect("builder-inited", lambda _app: write_all())
    return {"parallel_read_safe": True, "version": "1"}


def write_all() -> None:
    """Write every generated page. A page whose text did not change is left alone, so that Sphinx need not read it."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("settings.md", settings_page()),
        ("command-line.md", command_line_page()),
        ("http.md", http_page()),
        ("actions.md", actions_page()),
        ("records.md", records_page()),
    ):
        path = FOLDER / name
        text = re.sub(r"\((#?)settings-", rf"(\1{path.stem}-", text)  # an object of two pages has an anchor in each
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


# Settings


def settings_page() -> str:
    """Every key of tunesmith.yaml, a table for each group of keys."""
    from tunesmith.project import settings_schema

    schema = settings_schema()
    groups: Mapping[str, Any] = schema["$defs"]
    lines = [
        "# Settings",
        "",
        "Every key of `tunesmith.yaml`. An unknown key is refused, with the nearest known key named.",
        "`tunesmith schema` prints the same as JSON Schema.",
        "",
        "## The project file",
        "",
        *_table(schema, "the project file"),
    ]
    placed = _in_order(schema, groups)
    for name, path in placed.items():
        group = groups[name]
        one_of = f": {_title(name).lower()}" if list(placed.values()).count(path) > 1 else ""
        lines += ["", f"({_anchor(name)})=", f"## `{path}`{one_of}", "", _one_line(group.get("description", "")), ""]
        if "enum" in group:
            lines += ["One of: " + ", ".join(f"`{value}`" for value in group["enum"]) + "."]
        else:
            lines += _table(group, path)
    return "\n".join(lines) + "\n"


def _in_order(schema: Mapping[str, Any], groups: Mapping[str, Any]) -> dict[str, str]:
    """Name -> path of each group of keys, in the order in which a reader of the page meets them."""
    found: dict[str, str] = {}
    queue = list(_placed(schema, ""))
    while queue:
        name, path = queue.pop(0)
        if name not in found:
            found[name] = path
            queue = [*_placed(groups[name], f"{path}."), *queue]
    return found


def _placed(schema: Mapping[str, Any], before: str) -> Iterator[tuple[str, str]]:
    """Name and path of the groups that a group's keys hold."""
    for key, value in schema.get("properties", {}).items():
        mark = ".NAME" if _named(value) is not None else ""
        for name in _references(value):
            yield name, f"{before}{key}{mark}"


def _references(value: Any) -> Iterator[str]:
    """Names of the schemas that a schema refers to."""
    if isinstance(value, Mapping):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"].rsplit("/", 1)[-1]
        for each in value.values():
            yield from _references(each)
    elif isinstance(value, list):
        for each in value:
            yield from _references(each)


def _table(schema: Mapping[str, Any], where: str) -> list[str]:
    required = set(schema.get("required", ()))
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, value in schema.get("properties", {}).items():
        if "description" not in value:
            raise ExtensionError(f"the setting {key!r} of {where} has no description")
        default = "required" if key in required else _default(value)
        lines.append(f"| `{key}` | {_type(value)} | {default} | {_cell(value['description'])} |")
    return lines


def _default(value: Mapping[str, Any]) -> str:
    if "default" not in value or value["default"] is None:
        return ""
    text = json.dumps(value["default"], ensure_ascii=False)
    return f"`{_cell(text)}`" if len(text) <= 60 else ""


def _type(value: Mapping[str, Any]) -> str:
    """A field's type in a few words, with a link where it is a group of keys."""
    if "$ref" in value:
        name = value["$ref"].rsplit("/", 1)[-1]
        return f"[{_title(name)}](#{_anchor(name)})"
    for key in ("anyOf", "oneOf", "allOf"):
        if key in value:
            kinds = [_type(each) for each in value[key] if each.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds))
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{each}`" for each in value["enum"])
    kind = value.get("type", "any")
    if kind == "array":
        parts = value.get("prefixItems")
        inside = ", ".join(map(_type, parts)) if parts else _type(value.get("items", {}))
        return f"list of {inside}{_bounds(value)}"
    if kind == "object":
        inside = _named(value)
        return ("map" if inside is None else f"map of names to {_type(inside)}") + _bounds(value)
    return {"string": "text", "integer": "whole number", "boolean": "true or false"}.get(kind, str(kind)) + _bounds(
        value
    )


def _named(value: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the names of a map lead to, whether any name may stand there or names of a form."""
    inside = [value.get("additionalProperties"), *value.get("patternProperties", {}).values()]
    return next((each for each in inside if isinstance(each, Mapping)), None)


def _bounds(value: Mapping[str, Any]) -> str:
    words = {"minimum": "at least", "maximum": "at most", "exclusiveMinimum": "above", "exclusiveMaximum": "below"}
    found = [f"{said} {value[key]}" for key, said in words.items() if key in value]
    counted = {"maxLength": "characters", "maxItems": "items", "maxProperties": "keys"}
    found += [f"at most {value[key]:,} {what}" for key, what in counted.items() if key in value]
    return f" ({', '.join(found)})" if found else ""


# Command line


def command_line_page() -> str:
    """Every command with its arguments and options."""
    from typer.main import get_command

    from tunesmith.cli.main import app

    top = get_command(app)
    lines = [
        "# Command line",
        "",
        "Every command takes `-h`. `-C DIR` may come before the command too. With `--json`, standard output is one",
        "JSON document. Messages go to standard error.",
        "",
        "| exit code | meaning |",
        "|---|---|",
        "| 0 | done |",
        "| 1 | failed |",
        "| 2 | wrong usage: the command, the settings or the rows |",
        "| 3 | refused: a gate failed, a verification failed, a policy said no, traffic drifted |",
        "| 4 | inconclusive: the evidence does not decide |",
        "| 130 | stopped by ctrl-C; the same command continues |",
    ]
    for name, command in top.commands.items():  # type: ignore[attr-defined]
        lines += _command(f"tunesmith {name}", command, "##")
    return "\n".join(lines) + "\n"


def _command(path: str, command: Any, level: str) -> list[str]:
    if not command.help:
        raise ExtensionError(f"the command `{path}` has no help text")
    lines = ["", f"{level} `{path}`", "", _prose(command.help)]
    if commands := getattr(command, "commands", None):
        for name, each in commands.items():
            lines += _command(f"{path} {name}", each, level + "#")
        return lines
    rows = []
    for parameter in command.params:
        if parameter.name == "help":
            continue
        if not getattr(parameter, "help", None):
            raise ExtensionError(f"`{path}`: {parameter.name} has no help text")
        option = any(name.startswith("-") for name in parameter.opts)
        names = [*parameter.opts, *parameter.secondary_opts] if option else [parameter.name.upper()]
        needed = "required" if parameter.required else _option_default(parameter)
        rows.append(f"| {', '.join(f'`{name}`' for name in names)} | {_cell(parameter.help)} | {needed} |")
    return [*lines, "", "| argument or option | meaning | default |", "|---|---|---|", *rows] if rows else lines


def _option_default(parameter: Any) -> str:
    """The default of an option; nothing for a flag that is off, an empty text, the current folder and None."""
    default = parameter.default
    if default in (None, False, "", (), []) or callable(default) or str(default) == ".":
        return ""
    return f"`{_cell(str(getattr(default, 'value', default)))}`"


# HTTP


def http_page() -> str:
    """Every route, with its request and its answer, from the OpenAPI document of the server."""
    from tunesmith.server.app import openapi_document

    document = openapi_document()
    schemas: Mapping[str, Any] = document.get("components", {}).get("schemas", {})
    lines = [
        "# HTTP",
        "",
        "Routes under `/v1` are OpenAI's; routes under `/api` are Tunesmith's own. Callers send",
        "`Authorization: Bearer TOKEN`. Errors have OpenAI's form:",
        '`{"error": {"message", "type", "param", "code"}}`.',
        "[For the application developer](../../how-to/application-developer.md) explains the headers of an answer.",
    ]
    used: list[str] = []
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            summary = route.get("description") or route.get("summary")
            if not route.get("description"):
                raise ExtensionError(f"the route {method.upper()} {path} has no docstring")
            lines += ["", f"## {method.upper()} `{path}`", "", _prose(summary)]
            for parameter in route.get("parameters", ()):
                said = _one_line(parameter.get("description", ""))
                lines += ["", f"- `{parameter['name']}` ({parameter['in']})" + (f": {said}" if said else "")]
            answers = list(_contents(route))
            for title, content in answers:
                used += _references(content)
                if not title.startswith("Answer") or title < "Answer 4":
                    lines += ["", f"{title}: {_type(content)}"]
            if errors := [(title[7:], content) for title, content in answers if title >= "Answer 4" and title < "B"]:
                lines += ["", f"Errors: {', '.join(status for status, _ in errors)}, each {_type(errors[0][1])}"]
    return "\n".join([*lines, *_objects(used, schemas)]) + "\n"


def _contents(route: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    body = route.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    if body:
        yield "Request", body
    for status, answer in route.get("responses", {}).items():
        content = answer.get("content", {}).get("application/json", {}).get("schema")
        if content and status != "422":
            yield f"Answer {status}", content


def _objects(used: list[str], schemas: Mapping[str, Any]) -> list[str]:
    """A table for each object that is used, and for those that it uses."""
    lines = ["", "## Objects"] if used else []
    seen: list[str] = []
    while used:
        name = used.pop(0)
        if name in seen or name not in schemas:
            continue
        seen.append(name)
        used += _references(schemas[name])
        lines += ["", f"({_anchor(name)})=", f"### {_title(name)}", ""]
        if text := schemas[name].get("description"):
            lines += [_one_line(text), ""]
        lines += _fields(schemas[name])
    return lines


def _fields(schema: Mapping[str, Any]) -> list[str]:
    required = set(schema.get("required", ()))
    lines = ["| field | type | | meaning |", "|---|---|---|---|"]
    for key, value in schema.get("properties", {}).items():
        needed = "required" if key in required else ""
        lines.append(f"| `{key}` | {_type(value)} | {needed} | {_cell(value.get('description', ''))} |")
    return lines


# Actions


def actions_page() -> str:
    """Every action of people, with who may do it and where."""
    from tunesmith.services.actions import all_actions

    lines = [
        "# Actions",
        "",
        "What people do is a list of functions. Commands, routes under `/api` and the console's forms call them.",
        "A token needs one of the scopes, and permits no more than the roles of its user.",
        "",
        "| action, also of its audit entry | does | over HTTP | scope | permission | in the console |",
        "|---|---|---|---|---|---|",
    ]
    for one in sorted(all_actions(), key=lambda each: each.name):
        route = f"`{one.method} /api{one.at}`" if one.at and one.api else "only in a session" if one.at else ""
        said = _cell((one.does.__doc__ or "").partition("\n")[0])
        needed = " and ".join([*([f"`{one.permission}`"] if one.permission else []), *(["all tenants"] * one.whole)])
        form = f"`POST /console/do{one.at}`" if one.form else ""
        lines.append(f"| `{one.name}` | {said} | {route} | {', '.join(one.tokens)} | {needed} | {form} |")
    return "\n".join(lines) + "\n"


# Records


def records_page() -> str:
    """Every kind of record, with what its body states."""
    from pydantic.json_schema import models_json_schema

    from tunesmith.records.body import bodies
    from tunesmith.store.records import KINDS

    lines = [
        "# Records",
        "",
        "A record is what one stage states: canonical JSON (RFC 8785) with `kind`, `parents` (role to digest), `blobs`",
        "(file name to digest) and `body`. Its SHA-256 is its name. A record never changes.",
        "",
        "| kind | made by | parents | blobs |",
        "|---|---|---|---|",
    ]
    for name, kind in KINDS.items():
        parents, blobs = (", ".join(f"`{each}`" for each in names) for names in (kind.parents, kind.blobs))
        made_by = f"`{kind.made_by}`" if kind.made_by else "earlier versions"
        lines.append(f"| `{name}` | {made_by} | {parents} | {blobs} |")
    by_model, document = models_json_schema([(body, "validation") for body in bodies().values()])
    schemas: Mapping[str, Any] = document["$defs"]
    used: list[str] = []
    for kind_name, body in bodies().items():
        schema = schemas[by_model[body, "validation"]["$ref"].rsplit("/", 1)[-1]]
        used += _references(schema)
        lines += ["", f"## `{kind_name}`", "", _one_line(schema["description"]), "", *_fields(schema)]
    return "\n".join([*lines, *_objects(used, schemas)]) + "\n"


# Text


def _anchor(name: str) -> str:
    return "settings-" + name.lower().replace("_", "-").replace("[", "-").replace("]", "")


def _title(name: str) -> str:
    """A class's name as words: `SplitSettings` is "Split"."""
    bare = name.removesuffix("Settings") or name
    spaced = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in bare).strip()
    return spaced[:1].upper() + spaced[1:]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _prose(text: str) -> str:
    """A docstring as paragraphs, its indentation removed."""
    import inspect

    return inspect.cleandoc(text.replace("\f", ""))


def _cell(text: str) -> str:
    return _one_line(text).replace("|", "\\|")
