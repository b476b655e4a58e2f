"""Text of strangers on terminals, in logs and in JSON."""

import json
import logging

import pytest

from tests.attack_table import Happened
from tunesmith.core.errors import TunesmithError
from tunesmith.core.text.display import LogFormatter, NoRepeats, json_text, printable, printable_line

# Sequences that a terminal obeys, marks that reorder, and characters that nobody sees.
HOSTILE = [
    "\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\r", "\x08", "\x00", "\x7f", "\x85", "\u202e", "\u2066", "\u2069",
    "\u200f", "\u061c", "\u200b", "\u2060", "\ufeff", "\u00ad", "\u034f", "\u180e", "\u3164", "\u115f", "\ufe0f",
    "\U000e0041", "\U000e0100", "\u2028", "\u2029", "\ud800", "\ue000", "\u2800",
]  # fmt: skip
SEEN = ["naïve café", "日本語", "ไทย", "हिन्दी", "שלום", "مرحبا", "👍", "⚠️", "a\tb\nc", "[red]x[/]", ":smile:"]


@pytest.mark.attack("terminal", "escape sequences, overrides and hidden characters")
@pytest.mark.parametrize("hostile", HOSTILE)
def test_hidden_characters_are_shown_as_code_points(hostile: str, happened: Happened) -> None:
    shown = printable(f"a{hostile}b")
    assert all(letter not in shown for letter in hostile if not letter.isprintable())
    assert f"⟨U+{ord(hostile[0]):04X}⟩" in shown
    written = json_text({"text": hostile})
    assert json.loads(written) == {"text": hostile}
    assert written.isprintable()
    assert written.isascii()
    happened("shown as code points", 2)


@pytest.mark.attack("terminal", "line feeds that imitate a line")
def test_a_name_with_line_feeds_stays_one_entry(happened: Happened) -> None:
    assert printable_line("\nreason: x\nhome@v1 verifies\n") == "\nreason: x\n    home@v1 verifies\n"
    assert printable_line("\n\n") == "\n\n"
    record = logging.LogRecord("tunesmith", logging.INFO, "", 0, "no model %s", ("x\r\n2026 INFO promoted",), None)
    assert LogFormatter("%(levelname)s %(message)s").format(record) == "INFO no model x⟨U+000D⟩\n    2026 INFO promoted"
    happened("indented", 2)
    for text in SEEN:  # what people write stays as it is
        assert printable(text) == text
        assert json.loads(json_text(text)) == text


def test_an_error_that_says_what_to_do_is_logged_shortly_and_once_a_minute() -> None:
    repeats, form = NoRepeats(), LogFormatter()

    def logged(error: Exception) -> str | None:
        try:
            raise error
        except type(error) as raised:
            caught = (type(raised), raised, raised.__traceback__)
        record = logging.LogRecord("tunesmith", logging.ERROR, "", 0, "%d lost", (1,), caught)
        return form.format(record) if repeats.filter(record) else None

    full = TunesmithError("the disk is full: 0 MB are free", fix="free space")
    found = [logged(full) for _ in range(3)]
    assert found == ["1 lost\n    the disk is full: 0 MB are free\n      fix: free space", None, None]
    assert logged(TunesmithError("another")) == "1 lost\n    another"
    assert "Traceback" in str(logged(ZeroDivisionError()))
    repeats.seconds = 0.0
    assert "1 lost (and 2 times more since 0 s ago)" in str(logged(full))
