"""Checks a file of examples as OpenAI's fine-tuning does before it trains, and refuses it in its words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from tunesmith.core.errors import UsageError
from tunesmith.core.reading.strict_json import NotJson, parse_json
from tunesmith.data.formats.openai_rules import LEAST_EXAMPLES, require_openai

_LONGEST_LINE: Final = 16 << 20
_EXPECTED: Final = "Expected file to have JSONL format"


class InvalidExamples(UsageError):
    """A file that OpenAI would refuse too. code: for programs to read."""

    def __init__(self, what: str, code: str = "invalid_file_format") -> None:
        super().__init__(what)
        self.code = code


def check_examples(path: Path, *, training: bool = True, on_line: Callable[[], object] = lambda: None) -> int:
    """How many examples a file has. training: it needs at least ten. on_line: called for each line.

    Raises InvalidExamples for the first line that breaks a rule.
    """
    found, number = 0, 0
    with path.open("rb") as stream:
        while line := stream.readline(_LONGEST_LINE + 1):
            number += 1
            on_line()
            if len(line) > _LONGEST_LINE:
                raise InvalidExamples(f"Invalid file format. Line {number} is longer than {_LONGEST_LINE >> 20} MB.")
            if line.strip():
                _check_line(line, number)
                found += 1
    if training and found < LEAST_EXAMPLES:
        raise InvalidExamples(
            f"Training file has {found} example(s), but must have at least {LEAST_EXAMPLES} examples.",
            "invalid_n_examples",
        )
    if not found:
        raise InvalidExamples("The file has no examples.", "invalid_n_examples")
    return found


def _check_line(line: bytes, number: int) -> None:
    try:
        fields = parse_json(line)
    except NotJson as error:
        raise InvalidExamples(
            f"{_EXPECTED}, where every line is a valid JSON dictionary. Line {number}: {error}"
        ) from error
    if not isinstance(fields, dict):
        raise InvalidExamples(
            f"{_EXPECTED}, where every line is a valid JSON dictionary. Line {number} is not a dictionary."
        )
    if "messages" not in fields:
        raise InvalidExamples(f"{_EXPECTED} with messages key. Missing 'messages' key on line {number}.")
    try:
        require_openai(fields, f"Line {number}")
    except UsageError as error:
        raise InvalidExamples(f"Invalid file format. {error.where}: {error.what}.") from error
