"""Pseudonyms: one per value and conversation, for every spelling of it, in the value's own format.

Ranges that are reserved for examples are used where they exist (RFC 2606, RFC 5737, RFC 7042, 555-01xx telephone
numbers). Other numbers keep their layout with other digits, so that texts stay plausible and answers valid.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from tunesmith.core.text.folding import plain

_GIVEN = (  # noqa: SIM905  shorter than a name a line
    "Alex|Robin|Sam|Jordan|Casey|Morgan|Taylor|Jamie|Riley|Avery|Quinn|Rowan|Skyler|Emery|Finley|Harper|"
    "Kendall|Logan|Marlow|Noel|Oakley|Parker|Reese|Sage|Tatum|Arden|Blake|Corey|Devon|Ellis"
).split("|")
_FAMILY = (  # noqa: SIM905  shorter than a name a line
    "Ashdown|Birchall|Calloway|Denholm|Eastwick|Fenwright|Garrowby|Hollins|Inglesby|Jessop|Kestrel|Larkham|"
    "Millbrook|Northcott|Oakhurst|Pemberly|Quennell|Rosedale|Silverton|Thornbury|Underhay|Varley|Westerby|"
    "Yarrow|Zellner"
).split("|")
_PLACES = (  # noqa: SIM905  shorter than a name a line
    "Arborvale|Brindleton|Cloverfield|Dunmere|Elmswick|Foxhollow|Greyport|Hazelmoor|Ivybridge|Juniper|"
    "Kingsmere|Lindale|Maplewick|Norwell|Oldhaven|Pinecrest|Quarryton|Rivermead|Stonebeck|Tarnfield"
).split("|")
_TELEPHONE = "12025550100"

_MADE: dict[str, Callable[[int], str]] = {
    "EMAIL_ADDRESS": lambda n: f"person{n}@example.com",
    "IP_ADDRESS": lambda n: f"192.0.2.{n % 256}",
    "MAC_ADDRESS": lambda n: f"00:00:5e:00:53:{n % 256:02x}",
    "URL": lambda n: f"https://example.com/{n}",
    "LOCATION": lambda n: _nth(_PLACES, n),
    "ORGANIZATION": lambda n: f"Example Company {n}",
    "STREET_ADDRESS": lambda n: f"{n} Example Street",
}
# Numbers whose layout is kept.
_LAID_OUT = frozenset(
    ("CREDIT_CARD", "PHONE_NUMBER", "US_SSN", "US_ITIN", "UK_NHS", "PL_PESEL", "US_PASSPORT", "IBAN_CODE", "UK_NINO",
     "ES_NIF", "US_DRIVER_LICENSE", "MEDICAL_LICENSE", "ZIP_CODE", "AGE", "IT_FISCAL_CODE")
)  # fmt: skip
_NAMED = frozenset(("LOCATION", "ORGANIZATION", "STREET_ADDRESS"))  # written in the case of the value
_SPELT_EXACTLY = ("SECRET", "CRYPTO")
_CASELESS = ("EMAIL_ADDRESS", "URL", "MAC_ADDRESS")


# Pseudonyms that can be told from real values. Numbers in the layout of the value cannot.
_RECOGNISED = re.compile(
    r"person\d+@example\.com|\b192\.0\.2\.\d{1,3}\b|\b00:00:5e:00:53:[0-9a-f]{2}\b|https://example\.com/\d+"
    r"|\bExample Company \d+|\b\d+ Example Street\b|\b(?:secret|crypto|[a-z]+(?:_[a-z]+)+)_\d+\b"
    rf"|\b(?:{'|'.join(_GIVEN)}) (?:{'|'.join(_FAMILY)})\b|\b(?:{'|'.join(_PLACES)})(?: \d+)?\b",
    re.IGNORECASE,
)


def recognised(text: str) -> list[tuple[int, int]]:
    """Where a text holds pseudonyms that can be told from real values: start and end of each."""
    return [match.span() for match in _RECOGNISED.finditer(text)]


class Pseudonyms:
    """The pseudonyms of one conversation. own: the project's own entities, whose numbers keep their layout."""

    def __init__(self, own: Iterable[str] = ()) -> None:
        self._own = frozenset(own)
        self._numbers: dict[tuple[str, str], int] = {}
        self._counts: dict[str, int] = {}
        self._people: list[tuple[str, ...]] = []

    def add(self, entity: str, value: str) -> bool:
        """Add a value in any spelling; returns whether it is new. Add the longest names of people first."""
        value = plain(value)
        if entity == "PERSON":
            if self._person(value) is not None:
                return False
            self._people.append(_parts(value))
            return True
        key = (entity, same_value(entity, value))
        if key in self._numbers:
            return False
        self._counts[entity] = self._numbers[key] = self._counts.get(entity, 0) + 1
        return True

    def of(self, entity: str, value: str) -> str:
        """The pseudonym of an added value, in the value's case and layout."""
        value = plain(value)
        if entity == "PERSON":
            number = self._person(value)
            parts = _parts(value)
            whole = self._people[number or 0]
            given, family = _person(number or 0)
            name = f"{given} {family}" if len(parts) > 1 else given if parts[:1] == whole[:1] else family
            return _cased(name, value)
        n = self._numbers[(entity, same_value(entity, value))]
        if entity in _LAID_OUT or entity in self._own:
            return laid_out(entity, value, n, keep_prefix=entity == "IBAN_CODE" or entity in self._own)
        made = _MADE.get(entity)
        if made is None:
            return f"{entity.lower()}_{n}"
        return _cased(made(n), value) if entity in _NAMED else made(n)

    def _person(self, value: str) -> int | None:
        """The number of the person with this name, or with a name that contains it."""
        parts = _parts(value)
        for number, whole in enumerate(self._people):
            if set(parts) <= set(whole):
                return number
        return None


def same_value(entity: str, value: str) -> str:
    """A key that all spellings of a value share: only letters and digits count, or only case is ignored."""
    if entity in _SPELT_EXACTLY:
        return value
    if entity in _CASELESS:
        return value.casefold()
    return re.sub(r"[\W_]", "", value).casefold()


def laid_out(entity: str, value: str, n: int, *, keep_prefix: bool) -> str:
    """The value with its digits replaced by n (zero-padded) and its letters by X; `entity_n` where n does not fit."""
    places = sum(letter.isdecimal() for letter in value)
    number = f"{int(_TELEPHONE) + n}" if entity == "PHONE_NUMBER" else str(n)
    if places < len(str(n)) or places == 0:
        return f"{entity.lower()}_{n}"
    digits = iter(number[-places:].rjust(places, "0"))
    first = next((place for place, letter in enumerate(value) if letter.isdecimal()), 0)
    prefix = value[: min(first, 4)] if keep_prefix else ""
    rest = value[len(prefix) :]
    return prefix + "".join(next(digits) if letter.isdecimal() else _other(letter, entity) for letter in rest)


def _other(letter: str, entity: str) -> str:
    if not letter.isalpha() or entity == "PHONE_NUMBER":  # the x of an extension
        return letter
    return "X" if letter.isupper() else "x"


def _person(number: int) -> tuple[str, str]:
    # 150 different names before one repeats.
    return _GIVEN[number % len(_GIVEN)], _FAMILY[(number * 7) % len(_FAMILY)]


def _nth(names: Sequence[str], n: int) -> str:
    round_, place = divmod(n - 1, len(names))
    return names[place] if round_ == 0 else f"{names[place]} {round_ + 1}"


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part.casefold() for part in re.findall(r"[^\W_]+(?:['’\-][^\W_]+)*", name))


def _cased(name: str, value: str) -> str:
    letters = "".join(letter for letter in value if letter.isalpha())
    if len(letters) > 1 and letters.isupper():
        return name.upper()
    return name.lower() if letters.islower() and letters else name
