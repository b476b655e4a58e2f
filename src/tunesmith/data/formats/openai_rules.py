"""OpenAI's documented rules for the rows of a chat model's supervised fine-tuning, applied by `format: openai`.

Source: OpenAI's API reference (fine-tuning, the per-line chat input) and its fine-tuning guide. `format: messages`
accepts more than these rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tunesmith.core.errors import UsageError
from tunesmith.core.reading.strict_json import Fields, NotJson, parse_json
from tunesmith.data.formats.tool_calls import given, object_of

LEAST_EXAMPLES: Final = 10
_MOST_FUNCTIONS: Final = 128
# Per role: groups of keys of which one must be present, and further keys that are allowed.
_NEEDED: Final[dict[str, tuple[tuple[str, ...], ...]]] = {
    **dict.fromkeys(("system", "developer", "user"), (("content",),)),
    "assistant": (("content", "tool_calls", "function_call"),),
    "tool": (("content",), ("tool_call_id",)),
    "function": (("content",), ("name",)),
}
_ALSO: Final = {
    "assistant": {"content", "tool_calls", "function_call", "name", "weight", "refusal", "audio"},
    "tool": set[str](),
    "function": set[str](),
}


def require_openai(fields: Fields, where: str) -> None:
    """Raise UsageError, with the place, for the first rule that a row breaks."""
    fields = given(fields)
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UsageError("messages must be a list of at least one message", where=f"{where}, messages")
    for place, message in enumerate(messages):
        at = f"{where}, messages[{place}]"
        _require_message(object_of(message, "message", at), at)
    if messages[-1]["role"] != "assistant":
        raise UsageError(
            f"the last message must be from the assistant, not {messages[-1]['role']}",
            where=f"{where}, messages[{len(messages) - 1}].role",
            fix="end the row with the answer to learn",
        )
    if not isinstance(fields.get("parallel_tool_calls", True), bool):
        raise UsageError("parallel_tool_calls must be true or false", where=f"{where}, parallel_tool_calls")
    for key in ("tools", "functions"):
        listed = fields.get(key, [])
        if not isinstance(listed, list) or len(listed) > _MOST_FUNCTIONS:
            raise UsageError(f"{key} must be a list of at most {_MOST_FUNCTIONS}", where=f"{where}, {key}")
    if "functions" in fields and not fields["functions"]:
        raise UsageError("functions must not be empty", where=f"{where}, functions")


def _require_message(message: Fields, where: str) -> None:
    role = message.get("role")
    if role not in _NEEDED:
        raise UsageError(f"there is no role {role!r}", where=f"{where}.role", fix=f"one of {', '.join(_NEEDED)}")
    for group in _NEEDED[role]:
        if all(message.get(key) is None for key in group):
            raise UsageError(f"a {role} message must have {' or '.join(group)}", where=where)
    if "weight" in message and role != "assistant":
        raise UsageError(f"only an assistant message may have a weight, not a {role} one", where=f"{where}.weight")
    known = {"role", *(key for group in _NEEDED[role] for key in group), *_ALSO.get(role, {"name"})}
    unknown = sorted(message.keys() - known)
    if unknown:
        raise UsageError(f"a {role} message has no key {unknown[0]!r}", where=f"{where}.{unknown[0]}")
    for place, call in enumerate(message.get("tool_calls") or ()):
        at = f"{where}.tool_calls[{place}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or call.get("type") != "function" or not isinstance(call.get("id"), str):
            raise UsageError("a call must have an id, the type function and a function", where=at)
        if not isinstance(function.get("arguments"), str):
            raise UsageError("a call's arguments must be JSON as text", where=f"{at}.function.arguments")


def too_few(rows: int) -> str | None:
    """A warning for a file with fewer rows than OpenAI's service accepts; None for enough."""
    if rows >= LEAST_EXAMPLES:
        return None
    return f"{rows} rows: OpenAI's service accepts files of at least {LEAST_EXAMPLES} examples"


_LONGEST_LINE: Final = 16 << 20
_REPORTED: Final = 1000
_EXPECTED: Final = "Expected file to have JSONL format"


class InvalidExamples(UsageError):
    """A file that OpenAI would refuse too."""

    usual_code = "invalid_file_format"


def check_examples(
    path: Path,
    read: Callable[[Fields, str, Counter[str]], object],
    *,
    training: bool = True,
    on_lines: Callable[[int], object] = lambda _: None,
) -> int:
    """How many examples a file has. read: the format's `read`. training: the file needs at least ten. on_lines:
    called for each 1,000 lines, with their number.

    Raises InvalidExamples for the first line that breaks a rule.
    """
    count = 0
    with path.open("rb") as stream:
        for number, line in enumerate(iter(lambda: stream.readline(_LONGEST_LINE + 1), b""), start=1):
            if number % _REPORTED == 0:  # each report costs time
                on_lines(_REPORTED)
            if len(line) > _LONGEST_LINE:
                raise InvalidExamples(f"Invalid file format. Line {number} is longer than {_LONGEST_LINE >> 20} MB.")
            if line.strip():
                _check_line(line, number, read)
                count += 1
    if training and count < LEAST_EXAMPLES:
        raise InvalidExamples(
            f"Training file has {count} example(s), but must have at least {LEAST_EXAMPLES} examples.",
            code="invalid_n_examples",
        )
    if not count:
        raise InvalidExamples("The file has no examples.", code="invalid_n_examples")
    return count


def _check_line(line: bytes, number: int, read: Callable[[Fields, str, Counter[str]], object]) -> None:
    dictionaries = f"{_EXPECTED}, where every line is a valid JSON dictionary. Line {number}"
    try:
        fields = parse_json(line)
    except NotJson as error:
        raise InvalidExamples(f"{dictionaries}: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidExamples(f"{dictionaries} is not a dictionary.")
    if "messages" not in fields:
        raise InvalidExamples(f"{_EXPECTED} with messages key. Missing 'messages' key on line {number}.")
    try:
        read(fields, f"Line {number}", Counter())
    except UsageError as error:
        raise InvalidExamples(f"Invalid file format. {error.where}: {error.what}.") from error
