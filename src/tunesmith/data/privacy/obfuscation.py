"""Spellings that hide a value from patterns, to measure how many values the scan finds in them."""

from __future__ import annotations

import base64
from collections.abc import Callable
from random import Random

Trick = Callable[[Random, str], str]

_HIDDEN = "\u200b\u200c\u200d\u2060\ufeff\u00ad\u034f\u180e\ufe0f\U000e0020"
_ALIKE = str.maketrans(
    "aceiopxyABCEHKMOPTX",
    "\u0430\u0441\u0435\u0456\u043e\u0440\u0445\u0443\u0410\u0412\u0421\u0415\u041d\u041a\u041c\u041e\u0420\u0422\u0425",
)
_WIDE = str.maketrans({point: point + 0xFEE0 for point in range(33, 127)})
_LEAST = 3  # characters, of which one is hidden or written in another way


def _inside(chance: Random, value: str, hidden: str) -> str:
    place = chance.randint(1, len(value) - 1)
    return value[:place] + hidden + value[place:]


def _hidden(chance: Random, value: str) -> str:
    for _ in range(chance.randint(1, 4)):
        value = _inside(chance, value, chance.choice(_HIDDEN))
    return value


def _digits(first: int) -> Trick:
    table = {48 + digit: first + digit for digit in range(10)}
    return lambda _, value: value.translate(table)


def _mathematical(_: Random, value: str) -> str:
    starts = ((48, 10, 0x1D7CE), (65, 26, 0x1D400), (97, 26, 0x1D41A))
    return value.translate({low + n: start + n for low, count, start in starts for n in range(count)})


def _signs(write: Callable[[str], str]) -> Trick:
    """Some characters that are no letters, and one that is, in another spelling."""

    def trick(chance: Random, value: str) -> str:
        one = chance.randrange(len(value))
        return "".join(
            write(letter) if place == one or not (letter.isalnum() or letter.isspace()) else letter
            for place, letter in enumerate(value)
        )

    return trick


def _base64(chance: Random, value: str) -> str:
    encode = chance.choice((base64.b64encode, base64.urlsafe_b64encode))
    return encode(value.encode()).decode().rstrip(chance.choice(("=", "")) or " ")


def _twice(chance: Random, value: str) -> str:
    return TRICKS["percent-encoding"](chance, _base64(chance, value))


def _with_at(at: str, dot: str) -> Trick:
    def trick(_: Random, value: str) -> str:
        local, domain = value.split("@")
        return f"{local}{at}{domain.replace('.', dot)}"

    return trick


def _between(*gaps: str) -> Trick:
    """Another gap after each four characters."""

    def trick(chance: Random, value: str) -> str:
        plain, gap = "".join(letter for letter in value if letter.isalnum()), chance.choice(gaps)
        return gap.join(plain[at : at + 4] for at in range(0, len(plain), 4))

    return trick


def _broken(chance: Random, value: str) -> str:
    return _inside(chance, value, chance.choice(("\n", "\\\n")))


TRICKS: dict[str, Trick] = {
    "hidden characters": _hidden,
    "full width": lambda _, value: value.translate(_WIDE),
    "look-alike letters": lambda _, value: value.translate(_ALIKE),
    "mathematical": _mathematical,
    "Arabic digits": _digits(0x660),
    "Devanagari digits": _digits(0x966),
    "HTML entities": _signs(lambda letter: f"&#{ord(letter)};"),
    "escapes": _signs(lambda letter: f"\\u{ord(letter):04x}"),
    "percent-encoding": _signs(lambda letter: "".join(f"%{byte:02X}" for byte in letter.encode())),
    "base64": _base64,
    "base64 in percent-encoding": _twice,
    "hexadecimal": lambda _, value: value.encode().hex(),
    "[at]": _with_at("[at]", "[dot]"),
    "(at)": _with_at(" (at) ", "."),
    "at ... dot": _with_at(" at ", " dot "),
    "spaced letters": lambda _, value: " ".join(value),
    "other gaps": _between(".", "\n", " - ", "\u2013", "\u00a0", "/"),
    "small letters": lambda _, value: value.lower(),
    "in two strings": lambda chance, value: _inside(chance, value, '" + "'),
    "broken line": _broken,
}
_ANY = ("hidden characters", "full width", "HTML entities", "escapes", "percent-encoding")
_ENCODED = ("base64", "base64 in percent-encoding", "hexadecimal")
_DIGITS = ("Arabic digits", "Devanagari digits", "mathematical")
# Entity -> the tricks that people use on it. Names and addresses: those that keep the words in view.
FOR: dict[str, tuple[str, ...]] = {
    "EMAIL_ADDRESS": (
        *_ANY,
        *_ENCODED,
        "look-alike letters",
        "mathematical",
        "[at]",
        "(at)",
        "at ... dot",
        "spaced letters",
    ),
    "CREDIT_CARD": (*_ANY, *_ENCODED, *_DIGITS, "other gaps"),
    "IBAN_CODE": (*_ANY, *_ENCODED, *_DIGITS, "other gaps", "small letters", "look-alike letters"),
    "SECRET": (*_ANY, *_ENCODED, "look-alike letters", "mathematical"),
    "PERSON": ("hidden characters", "look-alike letters", "HTML entities"),
    "LOCATION": ("hidden characters", "look-alike letters", "HTML entities"),
    "ORGANIZATION": ("hidden characters", "look-alike letters", "HTML entities"),
    "STREET_ADDRESS": ("hidden characters", "look-alike letters", "HTML entities"),
}
FOR_OTHERS = (*_ANY, "Arabic digits", "mathematical")


def obfuscated(chance: Random, entity: str, value: str) -> str:
    """The value in another spelling, by a trick that is used on this entity."""
    return TRICKS[chance.choice(FOR.get(entity, FOR_OTHERS))](chance, value) if len(value) >= _LEAST else value
