"""Reads a Modelfile, and renders its template, as Ollama does: the part of Go's text/template that exports write."""

import re
from collections.abc import Sequence
from itertools import groupby

from jinja2 import Environment, StrictUndefined

from tunesmith.core.messages import Message

_ACTION = re.compile(r'\{\{ ("(?:\\.|[^"])*"|[^"]*?|[^"]*?"[^"]*") \}\}')
_IN_JINJA = {
    ".System": "{{ system }}", ".Content": "{{ said[1] }}", "if .System": "{% if system %}", "else": "{% else %}",
    "range .Messages": "{% for said in messages %}", "end": "",
}  # fmt: skip


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """(instruction or parameter, its text). A quote ends at a line's end, and what is not printable is dropped."""
    found, lines = [], iter(text.split("\n"))
    for line in filter(None, lines):
        name, said = line.removeprefix("PARAMETER ").split(" ", 1)
        while said.startswith('"""') and not (len(said.strip()) >= 6 and said.strip().endswith('"""')):
            said += "\n" + next(lines)
        said = "".join(letter for letter in said.strip() if letter.isprintable() or letter in "\n\t\r")
        quotes = next((mark for mark in ('"""', '"') if said.startswith(mark)), "")
        found.append((name, said[len(quotes) : len(said) - len(quotes)]))
    return found


def render(template: str, messages: Sequence[Message]) -> str:
    """The prompt of a conversation. Raises TypeError where Go's `index` fails, KeyError for what is not known here."""
    made, ends = [], []
    for place, part in enumerate(_ACTION.split(template)):
        if place % 2 == 0:
            assert "{{" not in part, part
            made.append("{{ " + repr(part) + " }}")
        elif part.startswith('"'):
            made.append("{{ " + part + " }}")
        elif part.startswith("index"):
            made.append("{{ messages['no number'].nothing }}")
        elif asks := re.fullmatch(r'(else )?if (eq|ne) \.Role (".*")', part):
            made.append(f"{{% {'elif' if asks[1] else 'if'} said[0] {'==' if asks[2] == 'eq' else '!='} {asks[3]} %}}")
        else:
            made.append(_IN_JINJA[part])
        if place % 2 and part.startswith(("if", "range")):
            ends.append("{% endif %}" if part.startswith("if") else "{% endfor %}")
        made += [ends.pop()] if place % 2 and part == "end" else []
    system = "\n\n".join(turn.content for turn in messages if turn.role == "system")
    turns = groupby(messages, key=lambda turn: turn.role)  # turns of one role that follow each other are one
    joined = [(role, "\n\n".join(turn.content for turn in several)) for role, several in turns]
    by_jinja = Environment(undefined=StrictUndefined, keep_trailing_newline=True)  # noqa: S701  nothing is HTML
    return by_jinja.from_string("".join(made)).render(system=system, messages=joined)
