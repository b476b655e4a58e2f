"""Other readings of a text in which obfuscated values are plain, with offsets into the text.

A view is the text folded (core/text/), decoded (entities, escapes, percent, base64, hex), or with separators that
people spell out. The scan searches views as it searches the text. A finding in one covers the characters of the text
that it was made from. Most texts have no views: each is made only where a fast test says that it can differ.
"""

from __future__ import annotations

import base64
import binascii
import html
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tunesmith.core.text.folding import fold

_LEAST_DECODED = 6  # characters
_LEAST_FOREIGN = 24  # characters, where not all are ASCII
_PRINTABLE = 0.95  # share of the characters of decoded bytes that must be printable


@dataclass(frozen=True, slots=True)
class View:
    """text[i] was made from the characters starts[i] to ends[i] of the original."""

    text: str
    starts: Sequence[int]
    ends: Sequence[int]

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The span of the original from which text[start:end], which is not empty, was made."""
        return self.starts[start], self.ends[end - 1]


def views_of(text: str) -> Iterator[View]:
    """The views that differ from the text. Their number and their total length are bounded by the text's length."""
    view = View(text, range(len(text)), range(1, len(text) + 1))
    if not text.isascii() and (folded := _folded(view)) is not None:
        yield (view := folded)
    for may_be, encoded, decode in _STEPS:
        decoded = _rewritten(view, encoded, decode) if may_be(view.text) else None
        if decoded is not None:
            yield (view := _folded(decoded) or decoded)
    if _may_be_joined(view.text) and (joined := _joined(view)) is not None:
        yield joined


# Folding

_SIGNS = frozenset("@.%&")  # of addresses and of encodings


class _Plain(dict[str, str]):
    """Character -> how it is written plainly, in its case: ASCII for what looks like it, "" for what is not shown.

    Accented Latin letters stay. `alike` also has letters of other scripts that look like Latin ones.
    """

    def __init__(self, *, alike: bool) -> None:
        super().__init__()
        self._alike = alike

    def __missing__(self, letter: str) -> str:
        self[letter] = plain = self._of(letter)
        return plain

    def _of(self, letter: str) -> str:
        if letter.isascii():
            return letter
        if letter.isspace():
            return " "
        folded = "." if letter in "\u3002\uff0e\uff61" else fold(letter)
        accented = unicodedata.normalize("NFKC", letter) == letter and unicodedata.decimal(letter, None) is None
        if (
            accented
            and folded
            and (not self._alike or (unicodedata.name(letter, "").startswith("LATIN") and ord(letter) not in _PHONETIC))
        ):
            return letter
        return folded.upper() if letter.isupper() else folded


_PHONETIC = frozenset((*range(0x250, 0x2B0), *range(0x1D00, 0x1DC0), *range(0xA720, 0xA800)))
_COMPATIBLE, _ALIKE = _Plain(alike=False), _Plain(alike=True)
_TOKEN = re.compile(r"\S+|[^\S \t\r\n]+")
_LATIN = re.compile(r"[A-Za-z0-9@]")
_SECOND_GAP = re.compile(r"\d{1,6}[\W_]{1,3}\d")


def _folded(view: View) -> View | None:
    """The view with plain characters. None where no character that matters changes: quotes and dashes of prose."""
    text = view.text
    if all(_ALIKE[letter] == letter for letter in set(text)):
        return None
    pieces: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    matters, done = False, 0
    for token in _TOKEN.finditer(text):
        if token[0].isascii():
            continue
        # Letters of another script are disguised Latin ones only next to Latin ones.
        table = _ALIKE if _LATIN.search(token[0]) else _COMPATIBLE
        for place in range(*token.span()):
            letter = text[place]
            plain = table[letter]
            if plain == letter:
                continue
            matters = matters or _disguises(text, place, plain)
            pieces += [text[done:place], plain]
            starts += [*view.starts[done:place], *[view.starts[place]] * len(plain)]
            ends += [*view.ends[done:place], *[view.ends[place]] * len(plain)]
            done = place + 1
    if not matters:
        return None
    return View("".join((*pieces, text[done:])), [*starts, *view.starts[done:]], [*ends, *view.ends[done:]])


def _disguises(text: str, place: int, plain: str) -> bool:
    """Whether a character that is written plainly may hide a value: inside a word or number, not around words."""
    before, after = text[place - 1 : place], text[place + 1 : place + 2]
    kind = unicodedata.category(text[place])
    if not plain:  # hidden inside a word, but not what selects the form of an emoji
        return before != "" and before.isascii() and after != ""
    if kind[0] in "PZS" and plain != "@":
        if plain in _SIGNS or 0xFF00 < ord(text[place]) < 0xFF5F:  # full width
            return all(one.isascii() and one.isalnum() for one in (before, after))
        return before.isdigit() and _SECOND_GAP.match(text, place + 1) is not None  # not of "1914\N{EN DASH}18"
    return kind != "No" or before.isnumeric() or after.isnumeric()


def _rewritten(view: View, pattern: re.Pattern[str], read: Callable[[re.Match[str]], str | None]) -> View | None:
    """The view with what `read` gives for each match, or the match where it gives None. None: nothing changed."""
    pieces: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    done = 0
    for match in pattern.finditer(view.text):
        value = read(match)
        if value is None:
            continue
        start, end = match.span()
        low, high = view.span(start, end)
        pieces += [view.text[done:start], value]
        starts += [*view.starts[done:start], *[low] * len(value)]
        ends += [*view.ends[done:start], *[high] * len(value)]
        done = end
    if not pieces:
        return None
    return View("".join((*pieces, view.text[done:])), [*starts, *view.starts[done:]], [*ends, *view.ends[done:]])


# Decoding

_ESCAPED = re.compile(
    r"&(?:\#0{0,99}\d{1,8};?|\#[xX]0{0,99}[0-9A-Fa-f]{1,6};?|[A-Za-z][A-Za-z0-9]{1,31};)"  # &#64; &commat;
    # \u0040 %u0040 \u{40}, also with the backslash escaped
    r"|(?:\\{1,8}u[0-9A-Fa-f]{4})+|(?:%u[0-9A-Fa-f]{4})+|\\{1,8}[uU]\{?[0-9A-Fa-f]{1,8}\}?"
    r"|(?:\\{1,8}x[0-9A-Fa-f]{2})+|(?:\\{1,8}[0-3][0-7]{2})+"  # \x40 \100
    r"|(?:%[0-9A-Fa-f]{2})+"
    r"|(?:=[0-9A-F]{2})+|=\r?\n"  # quoted-printable
)
# Runs of pairs of hexadecimal digits; of base64 and base32, also in lines of one length.
_ENCODED = re.compile(
    r"(?<![0-9A-Za-z])(?:0x)?[0-9A-Fa-f]{2}(?:[ :,-]?(?:0x)?[0-9A-Fa-f]{2}){7,}(?![0-9A-Za-z])"
    r"|(?<![A-Za-z0-9+/_-])(?:(?:[A-Za-z0-9+/]{60,76}\r?\n)+[A-Za-z0-9+/]{2,}|[A-Za-z0-9+/_-]{12,})={0,6}"
)
_BACKSLASHES = re.compile(r"\\+")
_PAIRS = re.compile(r"[2-7][0-9A-Fa-f][ :,-](?:0x)?[2-7][0-9A-Fa-f][ :,-]")
_PART = re.compile(r"[A-Za-z0-9]{12,}={0,2}")
_HEX = re.compile(r"(?:0x|[ :,-])?([0-9A-Fa-f]{2})")
_FIGURES = re.compile(r"(?:[2-5]\d)+")
_SHORTEST_RUN = 12
_RUN, _INNER, _DIGIT = re.compile(r"[A-Za-z0-9+/_-]{12,}"), re.compile("(?<=.)[A-Z0-9]"), re.compile(r"\d")


def _may_be_escaped(text: str) -> bool:
    return any(sign in text for sign in "&\\%=")


def _may_be_encoded(text: str) -> bool:
    """A fast test: a long word with a digit or a capital inside, or pairs of hexadecimal digits."""
    words = (word for word in text.split() if len(word) >= _SHORTEST_RUN)
    runs = (run[0] for word in words if not word.islower() or _DIGIT.search(word) for run in _RUN.finditer(word))
    return any(map(_INNER.search, runs)) or _PAIRS.search(text) is not None


def _characters(match: re.Match[str]) -> str | None:
    """The characters that escapes stand for; None for what is none."""
    run = _BACKSLASHES.sub(r"\\", match[0])
    plain: str | None
    if run[0] == "&":
        plain = html.unescape(run)
    elif run[:2] in ("\\u", "%u", "\\U"):
        plain = _code_points(run)
    elif run[:2] == "\\x":
        plain = _text(bytes.fromhex(run.replace("\\x", "")))
    elif run[0] == "\\":
        plain = _text(bytes(int(run[at + 1 : at + 4], 8) for at in range(0, len(run), 4)))
    elif run[0] == "%":
        plain = _text(bytes.fromhex(run.replace("%", "")))
    elif run[-1] == "\n":
        plain = ""
    else:  # quoted-printable encodes signs; what follows an equals sign elsewhere is a value
        plain = bytes.fromhex(run.replace("=", "")).decode("latin-1")
        plain = None if not plain.isascii() or any(letter.isalnum() for letter in plain) else plain
    return None if plain == run else plain


def _code_points(run: str) -> str | None:
    units = re.findall(r"[\\%]u([0-9A-Fa-f]{4})", run)
    if 6 * len(units) == len(run):  # pairs of surrogates are one character
        raw = b"".join(int(unit, 16).to_bytes(2, "big") for unit in units)
        return raw.decode("utf-16-be", "replace")
    number = int(run[2:].strip("{}"), 16)
    return chr(number) if number < 0x110000 and not 0xD800 <= number < 0xE000 else None


def _text(data: bytes) -> str | None:
    """Bytes as UTF-8, else as Latin-1."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _encoded_text(match: re.Match[str]) -> str | None:
    """The text that a run of base64, base32 or hexadecimal digits holds; None where it holds no printable text."""
    run = match[0]
    digits = "".join(_HEX.findall(run))
    # A long number is none: only figures, which are 30 to 39, are written without a letter.
    if _HEX.sub("", run) == "" and (not digits.isdigit() or _FIGURES.fullmatch(digits)):
        return _printable(bytes.fromhex(digits)) or _base64(run)
    return _base64(run)


def _base64(run: str) -> str | None:
    if run.isdigit():
        return None
    joined = "".join(run.split()).rstrip("=").translate(_URL_SAFE)
    if (plain := _printable(_bytes(base64.b64decode, joined, 4))) is not None:
        return plain
    if run.isupper() and (plain := _printable(_bytes(base64.b32decode, joined, 8))) is not None:
        return plain
    # A part of a path or of a hyphenated name.
    parts = [(part, _printable(_bytes(base64.b64decode, part[0].rstrip("="), 4))) for part in _PART.finditer(run)]
    if len(joined) == len(run.rstrip("=")) and any(plain is not None for _, plain in parts):
        pieces, done = [], 0
        for part, plain in parts:
            pieces += [run[done : part.start()], part[0] if plain is None else plain]
            done = part.end()
        return "".join((*pieces, run[done:]))
    return None


_URL_SAFE = str.maketrans("-_", "+/")


def _bytes(decode: Callable[[str], bytes], digits: str, unit: int) -> bytes:
    """Decoded digits of a base whose padding is missing; without the last digit where it is left over."""
    if unit == 4 and len(digits) % 4 == 1:
        digits = digits[:-1]
    try:
        return decode(digits + "=" * (-len(digits) % unit))
    except (binascii.Error, ValueError):
        return b""


def _printable(data: bytes) -> str | None:
    if len(data) >= 2 * _LEAST_DECODED and len(data) % 2 == 0 and not any(data[1::2]):
        data = data[::2]  # UTF-16 of ASCII characters
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None
    if len(text) < _LEAST_DECODED:
        return None
    if not text.isascii() and len(text) < _LEAST_FOREIGN:
        return None  # chance
    printable = sum(letter.isprintable() or letter in "\t\r\n" for letter in text)
    return text if printable >= _PRINTABLE * len(text) else None


# Escapes within escapes, in a run or around it.
_ESCAPES = (_may_be_escaped, _ESCAPED, _characters)
_RUNS = (_may_be_encoded, _ENCODED, _encoded_text)
_STEPS = (_ESCAPES, _ESCAPES, _RUNS, _ESCAPES, _RUNS, _ESCAPES)


# Separators that are spelled out, letters that are spaced, lines that are broken

_AT, _DOT = r"(?:at|arroba|@)", r"(?:dot|punkt|punto|\.)"
_OPEN, _CLOSE = r"[\[({<]", r"[\])}>]"
# jane at acme dot org: a domain whose dots are words, so that "look at acme.org" is none.
_SPOKEN = (
    r"(?<![\w@.])(?P<local>[a-z0-9][\w+-]{0,40}?(?:(?:\.|[ _-]dot[ _-])[a-z0-9+-]{1,40}){0,4})[ _-]{1,3}(?:at|arroba)"
    r"[ _-]{1,3}(?P<domain>[a-z0-9-]{1,40}?(?:[ _-]{1,3}(?:dot|punkt|punto)[ _-]{1,3}[a-z0-9-]{1,40}?){1,5})"
    r"(?![a-z0-9])"
)
# Words before "at amazon dot com" that are no name of a mailbox.
_NO_LOCAL_PART = frozenset(
    (  # noqa: SIM905  shorter than a word a line
        "am are ask available be book bought buy check click find found get go going help here i in is it later look "
        "looked looking me meet meeting more not now off on online only open or order ordered page pay price see sell "
        "shop shopping site sold start stay store that them there this today up us visit was watch we website were "
        "work works working you"
    ).split()
)
# Marks of Markdown and HTML around a sign.
_BEGIN, _END = r"(?:[*`]{1,3}|_{1,2}|<[a-z]{1,10}>)", r"(?:[*`]{1,3}|_{1,2}|</[a-z]{1,10}>)"
_JOINS = re.compile(
    rf"(?P<at>(?:(?<=\w)\s{{1,3}})?{_OPEN}\s?{_AT}\s?{_CLOSE}\s{{0,3}}"
    rf"|(?<=\w)(?:\(a\)|(?P<mark>[*'\"])at(?P=mark)|{_BEGIN}@{_END})(?=\w))"
    r"|(?P<spaced>(?<=\w)\s{1,3}@\s{0,3}(?=\w)|(?<=\w)@\s{1,3}(?=\w))"
    rf"|(?P<dot>(?:(?<=\w)\s{{1,3}})?{_OPEN}\s?{_DOT}\s?{_CLOSE}\s{{0,3}}|(?<=\w)(?P<quote>[*'\"])dot(?P=quote)(?=\w))"
    rf"|{_SPOKEN}"
    # A token or an address that goes on in the next line, or in the next string.
    r"|(?P<broken>(?<=[\w/+=.-]{16})\\?\r?\n[ \t>|#*]{0,8}(?=[\w/+=.-]{0,200}\d)(?=[\w/+=.-]{4})"
    r"|(?<=[\w/+=.-]{4})\\?\r?\n[ \t]{0,8}(?=[\w/+=.-]{16})(?=[\w/+=.-]{0,200}\d)|(?<=\w)\n\s{0,3}(?=@\w)"
    r"""|["']\s{0,3}[+.]?\s{0,3}\\?\n?\s{0,3}["'](?=\w))""",
    re.IGNORECASE,
)
# Endings of domains that are words of a sentence, as in "lunch @ cafe . it was good" and "a table at main dot to".
_ENDINGS_THAT_ARE_WORDS = frozenset(
    (  # noqa: SIM905  shorter than a word a line
        "able ad ai all am app are art as at bar be best bet bid bike bingo boats boo book box build buy by cab "
        "cafe call cam camp car care cars case cash cat chat cheap city click cloud coach codes cool dad dance "
        "data date day deal deals diet dish do docs dog dot drive earth eat fail faith fan fans farm fast film "
        "fire fish fit fly food forum free fun fund gal game games gap gay gift gifts gives glass go gold golf "
        "got green group guide guru hair help here homes horse host hot house how id if in ink is it jobs jot joy "
        "kids kim kiwi la land law lease legal life like link live loan loans lol love ma man map me media meet "
        "men menu mint mom money moto mov movie mr ms my name navy new news next ninja no now of off on one ong "
        "onion online open or pa page paris party pay pet phone photo pics pin pink pizza place play plus pm "
        "poker porn post press promo pub quest radio read red rent rest rich rip rocks room run safe sale salon "
        "save sc school seat see seek seven sex sh shoes shop show silk site skin sky smart smile so song spa "
        "space sport spot store study style sucks surf talk tax taxi team tech tennis tips tires to today tools "
        "top tours town toys trade trust tube tv us vet video vote voyage watch wed win wine work works world wow "
        "you zero zip zone"
    ).split()
)
_LOCAL = re.compile(r"[\w.+-]{1,64}\Z")
_DOMAIN = re.compile(rf"[\w-]{{1,63}}(?:(?:\s{{1,3}}{_DOT}\s{{1,3}}|\.)[\w-]{{1,63}}){{0,5}}", re.IGNORECASE)
_DOT_OF_DOMAIN = re.compile(rf"\s{{1,3}}{_DOT}\s{{1,3}}|[ _-]{{1,3}}(?:dot|punkt|punto)[ _-]{{1,3}}|\.", re.IGNORECASE)
_DOTS_OF_DOMAIN = re.compile(rf"(?<=@)[\w-]+(?:\.[\w-]+)*(?:\s{{1,3}}{_DOT}\s{{1,3}}[\w-]+)+", re.IGNORECASE)
_SPACED_DOT = re.compile(rf"\s{{1,3}}{_DOT}\s{{1,3}}", re.IGNORECASE)
_WORDS = ("dot", "punkt", "punto", "arroba", " @", "@ ", " . ", "\n")
_MARKED = ("(a)", *(f"{mark}{word}{mark}" for mark in "*'\"" for word in ("at", "dot")), "*@", "`@", "_@", ">@")
_BRACKETED = ("at]", "at)", "at}", "at>", "@]", "@)", "@}", "@>", ".]", ".)", ".}", " ]", " )", " }")
_STRINGS = ('" +', "' +", '"+', "'+", '" "', '""', "' '")
_MAY_BE_SPACED = re.compile(r" \S \S \S \S \S")
_SPACED, _SPACE = re.compile(r"(?<!\S)\S(?:[ \t]\S){7,}(?!\S)"), re.compile(r"[ \t]")


def _may_be_joined(text: str) -> bool:
    small = text.lower()
    if any(word in small for word in (*_WORDS, *_MARKED)) or _MAY_BE_SPACED.search(text) is not None:
        return True
    if any(bracket in small for bracket in "[({<") and any(sign in small for sign in _BRACKETED):
        return True
    return ('"' in small or "'" in small) and any(sign in small for sign in _STRINGS)


def _joined(view: View) -> View | None:
    gaps = {place for run in _SPACED.finditer(view.text) for place in range(run.start() + 1, run.end(), 2)}
    joined = _rewritten(view, _SPACE, lambda match: "" if match.start() in gaps else None) if gaps else None
    joined = _rewritten(joined or view, _JOINS, _join) or joined or view
    joined = _rewritten(joined, _DOTS_OF_DOMAIN, _dots_joined) or joined
    return None if joined is view else joined


def _join(match: re.Match[str]) -> str | None:
    if match["at"]:
        return "@"
    if match["spaced"]:
        text, (start, end) = match.string, match.span()
        local, domain = _LOCAL.search(text, max(0, start - 64), start), _DOMAIN.match(text, end)
        return None if local and domain and _may_be_a_sentence(local[0], domain[0]) else "@"
    if match["dot"]:
        return "."
    if match["local"]:
        if match["local"].lower() in _NO_LOCAL_PART:
            return None
        if " " in match[0] and _may_be_a_sentence(match["local"], match["domain"]):
            return None
        plain = re.compile(r"[ _-]+(?:dot|punkt|punto)[ _-]+", re.IGNORECASE)
        return f"{plain.sub('.', match['local'])}@{plain.sub('.', match['domain'])}"
    return ""


def _dots_joined(match: re.Match[str]) -> str | None:
    """A domain after @ with its dots; None where "jane@acme . it" may be the end of a sentence and the next one."""
    local = _LOCAL.search(match.string, max(0, match.start() - 65), match.start() - 1)
    if " . " in match[0] and local and _may_be_a_sentence(local[0], match[0]):
        return None
    return _SPACED_DOT.sub(".", match[0])


def _may_be_a_sentence(local: str, domain: str) -> bool:
    """Whether a spaced address may be prose: letters only before the @, and a common word after each dot."""
    endings = _DOT_OF_DOMAIN.split(domain)[1:]
    return local.isalpha() and bool(endings) and all(one.lower() in _ENDINGS_THAT_ARE_WORDS for one in endings)
