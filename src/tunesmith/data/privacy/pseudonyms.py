"""What stands for a value: the same for every spelling of it in a conversation, and of the form it had.

Where a range is reserved for examples it is used (RFC 2606, RFC 5737, RFC 7042, the 555-01xx telephone numbers); other
numbers keep their layout with made-up digits, so that texts stay plausible and answers valid under a schema.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

_GIVEN_WORDS = (
    "Alex|Robin|Sam|Jordan|Casey|Morgan|Taylor|Jamie|Riley|Avery|Quinn|Rowan|Skyler|Emery|Finley|Harper|"
    "Kendall|Logan|Marlow|Noel|Oakley|Parker|Reese|Sage|Tatum|Arden|Blake|Corey|Devon|Ellis"
)
_GIVEN = tuple(_GIVEN_WORDS.split("|"))
_FAMILY_WORDS = (
    "Ashdown|Birchall|Calloway|Denholm|Eastwick|Fenwright|Garrowby|Hollins|Inglesby|Jessop|Kestrel|Larkham|"
    "Millbrook|Northcott|Oakhurst|Pemberly|Quennell|Rosedale|Silverton|Thornbury|Underhay|Varley|Westerby|"
    "Yarrow|Zellner"
)
_FAMILY = tuple(_FAMILY_WORDS.split("|"))
_PLACES_WORDS = (
    "Arborvale|Brindleton|Cloverfield|Dunmere|Elmswick|Foxhollow|Greyport|Hazelmoor|Ivybridge|Juniper|"
    "Kingsmere|Lindale|Maplewick|Norwell|Oldhaven|Pinecrest|Quarryton|Rivermead|Stonebeck|Tarnfield"
)
_PLACES = tuple(_PLACES_WORDS.split("|"))
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
# Written with digits in a layout that is kept; letters before the first digit are kept where they say the kind alone.
_LAID_OUT = frozenset(
    ("CREDIT_CARD", "PHONE_NUMBER", "US_SSN", "US_ITIN", "UK_NHS", "PL_PESEL", "US_PASSPORT", "IBAN_CODE", "UK_NINO",
     "ES_NIF", "US_DRIVER_LICENSE", "MEDICAL_LICENSE", "ZIP_CODE", "AGE", "IT_FISCAL_CODE")
)  # fmt: skip
_NAMED = frozenset(("LOCATION", "ORGANIZATION", "STREET_ADDRESS"))  # written in the case of what they stand for
_SPELT_EXACTLY = ("SECRET", "CRYPTO")
_CASELESS = ("EMAIL_ADDRESS", "URL", "MAC_ADDRESS")


class Pseudonyms:
    """Of one conversation. own: the project's own entities, whose numbers keep their layout too."""

    def __init__(self, own: Iterable[str] = ()) -> None:
        self._own = frozenset(own)
        self._numbers: dict[tuple[str, str], int] = {}
        self._counts: dict[str, int] = {}
        self._people: list[tuple[str, ...]] = []

    def add(self, entity: str, value: str) -> bool:
        """Whether the value is one that was not met yet. People: give the longest names first."""
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
        """What stands for a value that was added, spelt as it is."""
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
        """The number of the person whose name this is, or a part of."""
        parts = _parts(value)
        for number, whole in enumerate(self._people):
            if set(parts) <= set(whole):
                return number
        return None


def same_value(entity: str, value: str) -> str:
    """What two spellings of one value share: numbers their digits and letters, addresses all but their case."""
    if entity in _SPELT_EXACTLY:
        return value
    if entity in _CASELESS:
        return value.casefold()
    return re.sub(r"[\W_]", "", value).casefold()


def laid_out(entity: str, value: str, n: int, *, keep_prefix: bool) -> str:
    """The value with other digits, the last of which say n, and X for its letters; a name where it has too few."""
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
    # Two lists of lengths without a common factor: 750 names before one comes again.
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
