"""The time of a privacy scan grows linearly with the text, whatever the text repeats."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import regex

from tests.attack_table import Happened
from tests.data.privacy.pumping import own_texts, pumped, short_units
from tunesmith.core.text import folding
from tunesmith.data.privacy import addresses, check_digits, credentials, entities, names, scan
from tunesmith.data.privacy.entities import Finder
from tunesmith.data.settings import Privacy

SIZE, FINDERS_SIZE = 30_000, 10_000
SECONDS = 1.0  # of computing: linear patterns take milliseconds, quadratic ones more than this


def own_patterns() -> dict[str, Any]:
    """Every pattern that the scan runs over texts, by a name."""
    found: dict[str, Any] = {}
    for module in (addresses, check_digits, credentials, entities, folding, names, scan):
        for name, value in vars(module).items():
            if isinstance(value, re.Pattern) and value is not names._FIELD:  # matched with one line of a name
                found[f"{module.__name__.rpartition('.')[2]}.{name}"] = value
    for number, pattern in enumerate(credentials._patterns()):
        found[f"secret {number}"] = pattern
    for number, (_, pattern) in enumerate(addresses._patterns()):
        found[f"address {number}"] = pattern
    for name, own in entities._OWN.items():
        found[name] = regex.compile(own.regex)
    return found


def presidio_patterns() -> dict[str, Any]:
    flags = regex.DOTALL | regex.MULTILINE | regex.IGNORECASE
    return {
        f"{name} {one.name}": regex.compile(one.regex, flags)
        for name, recogniser in entities._presidio(tuple(entities.RECOGNISERS))
        for one in getattr(recogniser, "patterns", None) or ()
    }


PATTERNS = own_patterns()
PRESIDIO = presidio_patterns()


@contextmanager
def within(seconds: float, what: str) -> Iterator[None]:
    """Raise AssertionError once the process has computed for so long: a pattern is interrupted in the middle."""
    assert threading.current_thread() is threading.main_thread()

    def over(*_: Any) -> None:
        raise AssertionError(f"more than {seconds} s: {what}")

    before = signal.signal(signal.SIGVTALRM, over)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def search_all(pattern: Any, text: str) -> None:
    more = {"timeout": SECONDS} if isinstance(pattern, regex.Pattern) else {}
    for _ in pattern.finditer(text, **more):
        pass


@pytest.mark.attack("privacy", "patterns pumped with their own beginnings")
@pytest.mark.parametrize("name", PATTERNS | PRESIDIO)
def test_a_pattern_takes_linear_time_over_its_own_beginnings(name: str, happened: Happened) -> None:
    pattern = (PATTERNS | PRESIDIO)[name]
    tried = 0
    for text in own_texts(pattern.pattern, SIZE, 1):
        with within(SECONDS, f"{pattern.pattern[:80]!r} over {text[:60]!r}..."):
            search_all(pattern, text)
        tried += 1
    happened("linear time", tried)


FINDERS: dict[str, Callable[[str], Any]] = {
    "secrets": lambda text: list(credentials.find_secrets(text)),
    "addresses": lambda text: list(addresses.find_addresses(text)),
    "cards": lambda text: list(check_digits.find_cards(text)),
    "IBANs": lambda text: list(check_digits.find_ibans(text)),
    "plain spelling": lambda text: folding.plain_with_offsets(f"\N{FULLWIDTH DIGIT ONE}{text}"),
}


@pytest.mark.attack("privacy", "strings of one or two characters, repeated")
@pytest.mark.parametrize("name", FINDERS)
def test_a_finder_takes_linear_time_over_repeated_strings(name: str, happened: Happened) -> None:
    units = short_units()
    FINDERS[name]("1 a@b.org \N{FULLWIDTH DIGIT ONE}")
    for unit in units:
        with within(SECONDS, f"{name} over {unit!r} repeated"):
            FINDERS[name](pumped(unit, FINDERS_SIZE))
    happened("linear time", len(units))


@pytest.mark.slow
@pytest.mark.attack("privacy", "80,000 characters of repeated strings, whole scan")
@pytest.mark.parametrize("unit", ["/", "1.", "key  ", "a@a.com "])
def test_a_long_text_is_scanned_in_seconds(unit: str, happened: Happened) -> None:
    finder = Finder(Privacy())
    finder.find(["1 a@b.org"])
    with within(60, unit):  # telephone numbers take the most: about 3 s over digits
        finder.find([pumped(unit, 80_000)])
    happened("linear time")
