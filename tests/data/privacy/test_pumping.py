"""The time of a privacy scan grows linearly with the text, whatever the text repeats."""

import itertools
import random
import re
import re._parser as sre  # type: ignore[import-not-found]  # how Python reads a pattern; `re` has no other way
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import regex

from tests.attack_table import Happened
from tunesmith.core.text import folding
from tunesmith.data.privacy import addresses, check_digits, credentials, entities, names, scan
from tunesmith.data.privacy.entities import Finder
from tunesmith.data.settings import ENTITIES, Privacy

LETTERS = "a1 \n./@-:"
# Beginnings after which many places look alike: of addresses, names, telephone numbers, web addresses, tokens.
UNITS = ("a 1", "Aa 1 ", "1 Aa ", "12 Aa Rd, ", "12345 ", "12/", "www1.a.", "a.a@", "eyJ", "eyJa-", "sk-A", "0x41 ",
         "&#64;", "%41", "[at]", "a dot ", "+1 (", "aaaa\n", "password is ", "aws a", "1.1.1.1 ",
         "a.com ", "4 ")  # fmt: skip
_KINDS = {"CATEGORY_DIGIT": "1", "CATEGORY_SPACE": " ", "CATEGORY_NOT_WORD": "-"}


def pumped(unit: str, size: int) -> str:
    """The unit, repeated up to a size."""
    return (unit * (size // len(unit) + 1))[:size]


def own_texts(pattern: str, size: int, samples: int) -> Iterator[str]:
    """Texts of the pattern's own beginnings: one repeated, and one followed by many equal letters."""
    draw = random.Random(pattern)
    tree = sre.parse(re.sub(r"^\(\?[a-z]+\)", "", pattern))
    found = {_matching(tree, draw)[:120] for _ in range(samples)} - {""}
    for text in sorted(found):
        for end in {len(text), *draw.sample(range(1, len(text) + 1), min(3, len(text)))}:
            begun = text[:end]
            yield pumped(begun, size)
            for letter in {begun[-1], *" \n1"}:
                yield begun + letter * size


def _matching(tree: Any, draw: random.Random) -> str:
    """A text that the pattern matches, but for its lookarounds."""
    text = ""
    for code, value in tree:
        kind = str(code)
        if kind == "IN":
            code, value = draw.choice(value)
            kind = str(code)
        if kind in ("LITERAL", "RANGE"):
            text += chr(value if kind == "LITERAL" else value[0])
        elif kind in ("ANY", "NOT_LITERAL", "CATEGORY", "NEGATE"):
            text += _KINDS.get(str(value), "a")
        elif kind == "BRANCH":
            text += _matching(draw.choice(value[1]), draw)
        elif kind in ("SUBPATTERN", "ATOMIC_GROUP"):
            text += _matching(value[3] if kind == "SUBPATTERN" else value, draw)
        elif kind in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            least, most, inner = value
            text += "".join(_matching(inner, draw) for _ in range(draw.randint(least, min(int(most), least + 2))))
    return text


SIZE, FINDERS_SIZE = 30_000, 10_000
SECONDS = 1.0  # of computing: linear patterns take milliseconds, quadratic ones more than this


def all_patterns() -> dict[str, Any]:
    """Every pattern that the scan runs over texts, by a name: the project's and presidio's."""
    found: dict[str, Any] = {}
    for module in (addresses, check_digits, credentials, entities, folding, names, scan):
        for name, value in vars(module).items():
            if isinstance(value, re.Pattern) and value is not names._FIELD:  # matched with one line of a name
                found[f"{module.__name__.rpartition('.')[2]}.{name}"] = value
    found |= {f"secret {number}": pattern for number, pattern in enumerate(credentials._patterns())}
    found |= {f"address {number}": pattern for number, (_, pattern) in enumerate(addresses._patterns())}
    found |= {name: regex.compile(own.regex) for name, own in entities._OWN.items()}
    flags = regex.DOTALL | regex.MULTILINE | regex.IGNORECASE
    for name, recogniser in entities._presidio(tuple(entities.RECOGNISERS)):
        patterns = getattr(recogniser, "patterns", None) or ()
        found |= {f"{name} {one.name}": regex.compile(one.regex, flags) for one in patterns}
    return found


PATTERNS = all_patterns()


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


@pytest.mark.attack("privacy", "patterns pumped with their own beginnings")
@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_takes_linear_time_over_its_own_beginnings(name: str, happened: Happened) -> None:
    pattern, tried = PATTERNS[name], 0
    more = {"timeout": SECONDS} if isinstance(pattern, regex.Pattern) else {}
    for text in own_texts(pattern.pattern, SIZE, 1):
        with within(SECONDS, f"{pattern.pattern[:80]!r} over {text[:60]!r}..."):
            for _ in pattern.finditer(text, **more):
                pass
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
    units = [*LETTERS, *map("".join, itertools.permutations(LETTERS, 2)), *UNITS]
    FINDERS[name]("1 a@b.org \N{FULLWIDTH DIGIT ONE}")
    for unit in units:
        with within(SECONDS, f"{name} over {unit!r} repeated"):
            FINDERS[name](pumped(unit, FINDERS_SIZE))
    happened("linear time", len(units))


@pytest.mark.slow
@pytest.mark.attack("privacy", "80,000 characters of repeated strings, whole scan", "linear time")
@pytest.mark.parametrize("unit", ["/", "1.", "key  ", "a@a.com "])
def test_a_long_text_is_scanned_in_seconds(unit: str) -> None:
    finder = Finder(Privacy(entities=(*ENTITIES, "URL")))
    finder.find(["1 a@b.org"])
    with within(60, unit):  # telephone numbers take the most: about 3 s over digits
        finder.find([pumped(unit, 80_000)])
