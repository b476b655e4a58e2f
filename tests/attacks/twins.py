"""Ways to spell a text with other characters so that it looks the same, or nearly so."""

import unicodedata
from collections.abc import Callable

TEXTS = [
    "find the five office files for the final offer",
    "please flag the first flight to florence for me",
    "would you kindly water the ficus on the fifth floor",
    "move my coffee break to half past three on friday",
    "the traffic report says which bridges are shut",
]


def after_each(*hidden: str) -> Callable[[str], str]:
    return lambda text: "".join(one + hidden[place % len(hidden)] for place, one in enumerate(text))


def mapped(letters: str, others: str) -> Callable[[str], str]:
    return lambda text: text.translate(str.maketrans(letters, others))


def ligatures(text: str) -> str:
    for letters, one in (("ffi", "ﬃ"), ("fi", "ﬁ"), ("fl", "ﬂ"), ("ff", "ﬀ"), ("st", "ﬆ")):
        text = text.replace(letters, one)
    return text


MADE: dict[str, Callable[[str], str]] = {
    "zero-width characters": after_each("\u200b", "\u200c", "\u200d", "\u2060", "\ufeff"),
    "soft hyphens": after_each("\u00ad"),
    "tag characters": after_each("\U000e0061", "\U000e007f"),
    "combining accents": lambda text: after_each("\u0301", "", "\u20dd", "\u0489")(text).replace(" \u0301", " "),
    "accented letters": mapped("aeioucnl", "áèîõüçñł"),
    "full-width letters": lambda text: "".join("\u3000" if one == " " else chr(ord(one) + 0xFEE0) for one in text),
    "ligatures": ligatures,
    "Cyrillic letters": mapped("aceopxysijhkmt", "асеорхуѕіјһкмт"),
    "Greek letters": mapped("aoviukt", "αονιυκτ"),
    "mathematical letters": lambda text: "".join(
        chr(0x1D5BA + ord(one) - 97) if "a" <= one <= "z" else one for one in text
    ),
    "letters in circles": lambda text: "".join(
        chr(0x24D0 + ord(one) - 97) if "a" <= one <= "z" else one for one in text
    ),
    "other spaces": mapped(" ", "\u2003"),
    "decomposed text": lambda text: unicodedata.normalize("NFD", mapped("aeo", "äéö")(text)),
}


def twins(texts: list[str]) -> list[str]:
    found = [made(text) for made in MADE.values() for text in texts]
    assert len(set(found)) == len(found) == len(set(found) - set(texts))
    return found
