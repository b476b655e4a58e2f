"""Finds street addresses by patterns: a number and a street name, a unit, a post box, and the lines that follow.

A pattern may match by chance ("Line 12"), so each has a score, as presidio's have. Patterns with a word for a street or
a unit are sure; a name with a number counts only after words that announce an address.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

SURE, LIKELY, GUESS = 0.85, 0.6, 0.3
_NEAR = 60  # characters before a match that may announce an address
_BOOST = 0.35

# Words that end a street's name, in any case; those of the second list only where they are capitalised.
_STREET = (
    "street|st|avenue|ave|road|rd|lane|drive|dr|boulevard|blvd|parkway|pkwy|highway|hwy|crescent|terrace|turnpike"
    "|expressway|freeway|str"
)
_STREET_NAMES = (
    "Ln|Court|Ct|Way|Close|Place|Pl|Square|Sq|Circle|Alley|Loop|Trail|Mews|Grove|Gardens?|Row|Quay|Isle|Pass|Plaza|Walk"
    "|Rise|Path|Ridge|Points?|Crossing|Branch|Estates?|Extensions?|Junctions?|Landing|Manors?|Meadows?|Mission"
    "|Mountains?|Orchard|Oval|Overpass|Parks?|Passage|Pike|Pines?|Plains?|Ports?|Prairie|Ramp|Ranch|Rapids?|Rest|Roads"
    "|Route|Run|Shoals?|Shores?|Skyway|Springs?|Spurs?|Station|Stream|Streets|Summit|Throughway|Trace|Tracks?|Tunnel"
    "|Underpass|Unions?|Valleys?|Via|Viaduct|Views?|Villages?|Ville|Vista|Wall|Wells|Knolls?|Keys?|Inlet|Islands?"
    "|Hollow|Hills?|Heights|Harbors?|Greens?|Glens?|Gateway|Forks?|Forges?|Fords?|Forest|Flats?|Ferry|Falls|Fields?"
    "|Dam|Dale|Curve|Creek|Coves?|Courts|Corners?|Common|Cliffs?|Clubs?|Centers?|Causeway|Canyon|Camp|Bypass|Burgs?"
    "|Brooks?|Bridge|Bluffs?|Bend|Beach|Bayou|Avenues"
)
# Words that begin a street's name: French, Italian, Spanish, Portuguese, Polish, Norwegian.
_FIRST = (
    "rue|avenue|boulevard|allée|impasse|chemin|quai|viale|piazza|corso|calle|avenida|avda|paseo|rua|travessa|carrer"
    "|ul|ulica|aleja|strada|trg|c/"
)
# Endings of a street's name: German, Dutch, Danish, Swedish, Norwegian, Finnish, Estonian.
_ENDS = (
    "straße|strasse|gasse|weg|platz|allee|damm|ufer|straat|laan|plein|kade|gracht|dijk|singel|vej|gade|stræde|gata"
    "|gatan|vägen|väg|gränd|stigen|veien|vegen|gaten|katu|tie|polku|kuja|tänav"
)
_AFTER = "utca|út|útja|tér|u|náměstí|sokak|caddesi|tänav"  # words after the name: Hungarian, Czech, Turkish, Estonian
_NOT_NAMES = (
    "a|an|and|are|as|at|but|by|can|do|for|from|get|go|got|have|i|if|in|into|is|it|me|my|no|not|of|off|on|one|only|or"
    "|out|people|per|percent|plus|minus|times|pm|am|points?|stars?|so|some|than|that|the|then|they|this|to|until|was"
    "|we|with|you|your|minutes?|hours?|seconds?|days?|weeks?|months?|years?|january|february|march|april|may|june"
    "|july|august|september|october|november|december|dec|nov|oct|sept|aug|jan|feb"
)
_WORD = rf"(?!(?i:{_NOT_NAMES})\b)[^\W\d_][\w'’.\-]{{0,30}}"
_NAME = rf"(?!(?i:{_NOT_NAMES})\b)[^\W\d_a-zß-öø-ÿ][\w'’.\-]{{0,30}}"
_NUMBER = r"\d{1,5}(?i:[a-z])?(?:[-/]\d{1,4}(?i:[a-z])?)?\b"
_UNIT = r"(?i:apt|apartment|suite|ste|unit|flat|room)\b\.? ?#?\d{1,5}(?i:[a-z])?\b"
_BOX = r"(?i:p\.? ?o\.? ?box|postbox) \d{1,6}\b"
_MILITARY = r"(?i:(?:unit|psc) \d{3,5},? box \d{3,5}\s{0,8}[,\n]\s{0,8}(?:apo|fpo|dpo) (?:aa|ae|ap) \d{5})\b"

# What may follow: units, then lines or parts with a place, a postal code or both.
_CODE = r"(?:(?:[A-Z]{1,2}-)?\d{3,5}(?:[- ]\d{2,4}| ?[A-Z]{2})?|[A-Z]{1,2}\d[A-Z\d]? ?\d[A-Z]{2}|\d{2})\b"
_STATE = r"[A-Z]{2,3}\b"
_PLACE = (
    rf"{_NAME}(?:[ -](?:{_NAME}|of|de|del|la|le|les|sur|en|an|am|der|di|da|do|and|the|\([^\W\d]{{2,20}}\)"
    rf"|\({_NAME}\))){{0,5}}"
)
_PART = rf"(?:{_PLACE},? (?:{_STATE} )?{_CODE}|{_STATE} {_CODE}|{_CODE} {_PLACE}|{_CODE}|{_PLACE}|{_STATE})"
_CUT = r"\s{0,8}[,\n]\s{0,8}"
_TAIL = (
    rf"(?:(?:{_CUT}|\.? ){_UNIT}|(?:{_CUT}| ){_BOX}){{0,4}}"
    rf"(?:\s{{0,8}}[,\n][,\s]{{0,8}}{_PART}(?=\s{{0,8}}(?:[,\n.?!]|$| [a-z]))){{0,4}}"
)
# A place in lower case counts only before a postal code, after a comma or on its own line.
_SMALL_TAIL = rf"(?:{_CUT}[^\W\d_]{{2,20}}(?: [^\W\d_]{{2,20}})?,? (?:[a-z]{{2,3}} )?\d{{5}}\b)?"
_LINE = rf"(?:\s{{1,8}}{_PLACE})?"  # a place may follow a unit without a comma


@functools.cache
def _patterns() -> tuple[tuple[float, re.Pattern[str]], ...]:
    street = rf"(?:(?i:{_STREET})|{_STREET_NAMES})\b\.?"
    forms = (
        (SURE, _MILITARY),
        # 615 Benedum Drive; 1987 74 Diakou Street
        (SURE, rf"\b{_NUMBER},? (?:{_NUMBER} )?(?:{_WORD} ){{1,4}}(?i:{_STREET})\b\.?(?: (?:NE|NW|SE|SW|[NSEW])\b)?"),
        (SURE, rf"\b{_NUMBER},? (?:{_NUMBER} )?(?:{_NAME} ){{1,4}}(?:{_STREET_NAMES})\b"),
        # 56 rue La Boétie; Avenida Otoniel Dutra 1277
        (SURE, rf"\b{_NUMBER},? (?i:{_FIRST})\b\.? {_WORD}(?: {_WORD}){{0,3}}(?: {_NUMBER})?"),
        (SURE, rf"(?<!\w)(?i:{_FIRST})\b\.? ?(?:{_WORD} ){{1,4}}{_NUMBER}"),
        # Ziegelgasse 19; 6108 Friedhofstrasse 33; 98 Hegyalja út 4
        (SURE, rf"\b(?:{_NUMBER} )?[^\W\d_](?i:[^\W\d_]{{2,30}}(?:{_ENDS})) {_NUMBER}"),
        (SURE, rf"\b(?:{_NUMBER} )?(?:{_WORD} ){{1,3}}(?i:{_AFTER})\b\.? {_NUMBER}\.?"),
        # 1317 Kimberly Way Laidlaw Green, Apt. 962; 0605 Πεντέλης 210 apt. 999
        (SURE, rf"\b{_NUMBER} (?:{_WORD} ){{1,5}}(?:{_NUMBER} )?(?:{_UNIT}|{_BOX}){_LINE}"),
        (SURE, rf"\b(?:{_NUMBER} )?{_BOX}"),
        (LIKELY, rf"\b{_UNIT}(?=\s{{0,8}}[,\n])"),
        # 2407 Tawastintie 6, Sé, Portugal: a number before and after
        (LIKELY, rf"\b\d{{2,5}} (?:{_NAME} ){{1,4}}{_NUMBER}"),
        (GUESS, rf"\b\d{{2,5}} (?:{_WORD} ){{1,3}}{_NUMBER}"),
        # Edeby 55; Benedum Drive
        (GUESS, rf"(?<!\w)(?:{_NAME} ){{1,3}}{_NUMBER}(?! ?(?:%|[ap]\.?m\b))"),
        (GUESS, rf"(?<!\w)(?:{_NAME} ){{1,3}}{street}"),
        (
            GUESS,
            rf"(?i:the corner of) {_WORD}(?: {_WORD}){{0,3}}(?: {_NUMBER})? and (?:{_WORD} ?){{1,4}}(?:{_NUMBER})?",
        ),
        (GUESS, rf"\b{_UNIT}"),
        (GUESS, rf"\b\d{{1,5}} (?:{_NAME} ){{0,2}}{_NAME}"),
    )
    return tuple((score, re.compile(form + _SMALL_TAIL + _TAIL)) for score, form in forms)


# Words that announce an address.
_SPEAKS = (
    r"\b(?:address(?:es)?:?|lives? (?:at|on)|living (?:at|on)|located (?:at|on)|meet(?:ing)? (?:me |you )?(?:at|on)"
    r"|taxi to|return(?:ed)? to|sen[dt] (?:it |one |this |a new one )?to|sent to|ship(?:ped)? (?:it )?to"
    r"|deliver(?:ed)? (?:it )?to|moved to|(?:office|restaurant|house|shop|store) is (?:at|on)|drive to|navigate to"
    r"|directions to|corner of|side of)"
)
_CONTEXT_WORDS = re.compile(_SPEAKS, re.IGNORECASE)
_CONTEXT = re.compile(_SPEAKS + r"\W*(?:\w+\W+){0,3}$", re.IGNORECASE)
_DIGIT = re.compile(r"\d")


def find_addresses(text: str) -> Iterator[tuple[int, int, float]]:
    """(start, end, score) of matches that look like addresses. Spans may overlap."""
    if not _DIGIT.search(text) and not _CONTEXT_WORDS.search(text):
        return  # without a digit, only announced addresses are found
    for score, pattern in _patterns():
        for match in pattern.finditer(text):
            near = text[max(0, match.start() - _NEAR) : match.start()]
            yield match.start(), match.end(), min(1.0, score + (_BOOST if _CONTEXT.search(near) else 0.0))
