"""Finds secrets in prose: tokens of known formats, and values that follow a word such as "password".

The token patterns are those of detect-secrets, plus missing ones from the issuers' documentation. detect-secrets'
entropy and keyword detectors are made for source code and flag half of ordinary prose. Here a keyword counts only
before a value that does not look like a word.
"""

from __future__ import annotations

import base64
import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tunesmith.store.people.tokens import TOKEN_FORM

# Regex detectors of detect-secrets that are not used: addresses are no secrets, and _FORMS has the whole private key.
# The others take quadratic or cubic time over texts such as many slashes or spaces; _FORMS has what they find.
_UNUSED = (
    "IPPublicDetector",
    "PrivateKeyDetector",
    *("CloudantDetector", "IbmCloudIamDetector", "IbmCosHmacDetector", "SoftlayerDetector"),
    *("JwtTokenDetector", "NpmDetector", "OpenAIDetector"),
)
# Every repetition is bounded, or begins only where no other can have begun, so that time is linear in the text.
_JOIN = r"""["']?\]?(?: {0,8}(?:=>|:=|::|[:=]) {0,8}| {1,8})["']?"""
_FORMS = (
    TOKEN_FORM,  # of our own HTTP interface
    # The whole key, not only its first line.
    r"(?s)-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY[A-Z ]{0,20}-----.*?(?:-----END [A-Z0-9 ]{0,60}-----|\Z)",
    r"github_pat_[A-Za-z0-9_]{36,255}",
    r"gl(?:pat|dt|ptt|rt|ft|cbt|oas|soat)-[A-Za-z0-9_\-.]{20,255}",
    r"xox[abeoprs]-[A-Za-z0-9-]{10,255}",
    r"xapp-\d-[A-Za-z0-9-]{20,255}",
    r"(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{10,255}",
    r"whsec_[A-Za-z0-9+/]{24,255}",
    r"\bsk-(?:proj-|svcacct-|admin-|ant-[a-z0-9]+-|or-v1-)?[A-Za-z0-9_-]{20,255}",
    r"\bAIza[A-Za-z0-9_-]{35}",
    r"\bya29\.[A-Za-z0-9_-]{20,255}",
    r"\bGOCSPX-[A-Za-z0-9_-]{28}",
    r"\bhf_[A-Za-z0-9]{30,40}\b",
    r"\b(?:npm|pul|dp\.pt|shpat|shpss|glsa|dckr_pat|nvapi|r8|gsk|tvly|lin_api|sntrys|PMAK|dop_v1|doo_v1)[_-][A-Za-z0-9_\-]{20,255}",
    r"\bSG\.[A-Za-z0-9_-]{16,32}\.[A-Za-z0-9_-]{16,64}",
    r"\b\d{8,10}:AA[A-Za-z0-9_-]{33}",
    r"\b(?:A3T[A-Z0-9]|AKIA|ASIA|ABIA|ACCA|AGPA|AIDA|AROA|ANPA|ANVA)[A-Z0-9]{16}\b",
    r"\bAccountKey=[A-Za-z0-9+/]{86}==",
    r"\bAGE-SECRET-KEY-1[A-Z0-9]{58}",
    r"\beyJ[A-Za-z0-9_-]{8,4096}\.eyJ[A-Za-z0-9_-]{8,8192}\.[A-Za-z0-9_-]{8,4096}",
    # A token of two or more parts of which only the first is JSON, as encrypted ones are.
    r"(?<![A-Za-z0-9_=-])(?=[A-Za-z0-9_=-]++\.[A-Za-z0-9_=-])[A-Za-z0-9_=-]*?(eyJ[A-Za-z0-9_=-]+\.[A-Za-z0-9_=-]+)",
    r"sk-[A-Za-z0-9_-]{20,200}?T3BlbkFJ[A-Za-z0-9]{20}",
    r"/:_authToken=\s{0,8}(npm_\S{1,255}|[A-Fa-f0-9-]{36})",
    rf"(?i)(?<!\w)(?:cloudant|clou|cl)[_-]?(?:api)?(?:key|pwd|pw|password|pass|token){_JOIN}([0-9a-f]{{64}}|[a-z]{{24}})",
    rf"(?i)(?<!\w)(?:softlayer|sl)[_-]?(?:api)?[_-]?(?:key|pwd|password|pass|token){_JOIN}([a-z0-9]{{64}})",
    r"://:([^\s:/?#@\[\]!$&'()*+,;=<>{}]{6,512})@",  # redis://:password@host
    r"sig=([A-Za-z0-9%+/_-]{40,200}={0,2})",  # of a shared access signature of Azure
    r"https?://api\.softlayer\.com/soap/v3(?:\.1)?/([a-z0-9]{64})",
    rf"(?i)(?<!\w)(?:ibm[_-]?)?(?:cloud[_-]?)?(?:iam[_-]?)?(?:api[_-]?)?(?:key|pwd|password|pass|token){_JOIN}"
    r"([\w-]{44})(?![\w-])",
    rf"(?i)(?<!\w)(?:(?:ibm)?[_-]?cos[_-]?(?:hmac)?)?[_-]?secret[_-]?(?:access)?[_-]?key{_JOIN}([a-f0-9]{{48}})(?![a-f0-9])",
    r"https://hooks\.slack\.com/(?:services|workflows)/[A-Za-z0-9/]{30,100}",
    r"https://discord(?:app)?\.com/api/webhooks/\d{15,22}/[A-Za-z0-9_-]{40,100}",
)
# A word for a secret, what joins it to its value, and the value.
_NAMED = re.compile(
    r"(?:pass(?:word|phrase|wd|code)?|pwd|secret|token|credentials?|(?:api|access|secret|private|auth|account|encryption"
    r"|signing|storage|client)[ _-]?(?:access[ _-]?)?(?:key|secret|token)|bearer|pin code|recovery code)s?"
    r"(?:[\"'`]?\s{0,8}(?::=|=>|[:=>])\s{0,8}"
    r"|\s{1,8}(?:(?:(?:is|was|has been) )?(?:changed|set|reset) to|is|was|are|to|as|be|of|it's|now|for \w{1,40} is)"
    r"\s{0,8}:?\s{1,8}|\s{1,8})"
    # Only looked at: a value that is none may be the word before one, as in "secret password: ...".
    r"(?P<open>[\"'`]?)(?=(?P<value>[^\s\"'`,;<>{}()\[\]]{6,512}))",
    re.IGNORECASE,
)
_AWS_SECRET = re.compile(r"(?i:aws|secret|access)[^\n]{0,40}?(?<![A-Za-z0-9+/])([A-Za-z0-9+/]{40})(?![A-Za-z0-9+/=])")
# The user and password of HTTP's basic authentication, as base64.
_BASIC = re.compile(r"[Bb]asic {1,8}([A-Za-z0-9+/]{8,1024}={0,2})(?![A-Za-z0-9+/=])")
# The password of a URL or of curl's `-u`, after the name of a user.
_AFTER_A_USER = re.compile(r"""(?:://(?=[^\s@"']{1,600}@)|\s-u\s{0,4}["']?)[^\s:/@"']{1,64}:([^\s@"']{6,512})""")
# Long values; and the words that make one a secret within the same sentence, or a checksum or a name.
_LONG = re.compile(r"(?<![\w+/=.-])[A-Za-z0-9+/_-]{20,512}={0,2}(?![\w+/=-])")
_ANNOUNCED = re.compile(
    r"\b(?:pass(?:word|phrase|wd|code)|secret|token|credential|(?:api|access|private|auth|signing)[ _-]?key|key is)"
    r"s?\b",
    re.IGNORECASE,
)
_NAMES_OTHERS = re.compile(
    r"\b(?:commit|revision|branch|tag|sha\d*|md5|digest|hash|checksum|image|file|path|id|uuid|version|build)\b",
    re.IGNORECASE,
)
_BEFORE, _AFTER = 60, 30  # characters
# Hyphenated or dotted words, and names with a number: "step-2", "v1.2.3", "12px", "oauth2".
_WORD_OR_VERSION = re.compile(r"[A-Za-z]+(?:[-_.][A-Za-z0-9]+)*|v?\d+(?:(?:\.\d+)+\w*|[a-z]*)|[a-z]{2,}\d{1,2}s?")
_STATED = re.compile(r"pass(?:word|phrase|wd|code) (?:is|was):? {0,8}\Z", re.IGNORECASE)
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
# JSON keys that may announce a secret; and those whose value is judged like one in quotes.
_ANNOUNCING = re.compile(
    r"(?:pass(?:word|phrase|wd|code)?|pwd|secret|token|credential|key|bearer|pin code|recovery code|aws)s?"
    r"(?-i:(?![a-z]))",  # not "keyboard"
    re.IGNORECASE,
)
_NAMING = re.compile(
    r"(?:pass(?:word|phrase|wd|code)|pwd|secret"
    r"|(?:api|access|secret|private|auth|encryption|signing|client)[ _-]?(?:access[ _-]?)?(?:key|token))s?\Z",
    re.IGNORECASE,
)
# A fast test: a text without any of these contains no secret that the patterns find.
_MAY_HOLD = re.compile(
    r"[A-Za-z0-9+/_=.-]{18}|://|pass|pwd|secret|token|credential|key|bearer|pin code|recovery|basic ",
    re.IGNORECASE,
)
_NEXT_PARAMETER = re.compile(r"&\w{1,40}=")  # of a URL's query
_SHORTEST = 6
_LEAST_RANDOM, _LEAST_CHANGES = 16, 4  # characters; places where the kind of character changes
_CAPITALS = 0.35
# Placeholders of documentation and scripts.
_PLACEHOLDER = re.compile(
    r"^(?:\$|%|\*+|\.\.\.|x{4,}$|<|your|my[_-]|example|placeholder|changeme|dummy|env|os\.|process\.|self\.|get|none"
    r"|null|true|false|--?[a-z]|/|~|\.{1,2}/|https?:|secretsmanager|vault|\w+\.(?:txt|json|ya?ml|pem|key|env|sh|py|cfg|ini)$)",
    re.IGNORECASE,
)


def find_secrets(text: str, key: str = "") -> Iterator[tuple[int, int]]:
    """(start, end) of every secret in a text. Spans may overlap. key: the text's JSON key, which may announce one."""
    if _MAY_HOLD.search(text):
        yield from _secrets(text)
    if len(text) < _SHORTEST or text.isalpha() or not _ANNOUNCING.search(key):
        return
    before = len(key) + 2
    yield from ((start - before, end - before) for start, end in _secrets(f"{key}: {text}") if start >= before)
    if _NAMING.search(key) and not re.search(r"\s", text) and _is_value(text, quoted=True):
        yield 0, len(text)


def _secrets(text: str) -> Iterator[tuple[int, int]]:
    for pattern in _patterns():
        for match in pattern.finditer(text):
            yield _span(match)
    valued = (_AWS_SECRET, _looks_random), (_BASIC, _is_user_and_password), (_AFTER_A_USER, _is_value)
    for pattern, holds in valued:
        yield from (match.span(1) for match in pattern.finditer(text) if holds(match[1]))
    for match in _LONG.finditer(text):
        if _is_random(match[0]) and not _UUID.fullmatch(match[0]) and _is_announced(text, *match.span()):
            yield match.span()
    for match in _NAMED.finditer(text):
        value = _NEXT_PARAMETER.split(match["value"])[0].rstrip(".!?:")
        # After "my password is" any word with a digit is one.
        stated = len(value) >= _SHORTEST and value.isalnum() and not value.isalpha() and _STATED.search(match[0])
        if stated or _is_value(value, quoted=bool(match["open"])):
            yield match.start("value"), match.start("value") + len(value)


def _is_value(value: str, quoted: bool = False) -> bool:
    """Whether a value after a keyword is a secret: not a word, name, path, variable or placeholder."""
    if _is_random(value) or _UUID.fullmatch(value):
        return True
    if len(value) < _SHORTEST or _PLACEHOLDER.search(value):
        return False
    kinds = _kinds(value)
    if quoted:
        return kinds >= 2 and any(letter.isdigit() or not letter.isalnum() for letter in value)
    letters = any(letter.isalpha() for letter in value)
    digits = sum(letter.isdigit() for letter in value)
    if not letters or "/" in value.strip("/") or "=" in value.rstrip("="):
        return False
    if _WORD_OR_VERSION.fullmatch(value) and not (digits >= 3 and kinds >= 3):
        return False
    return digits >= 1 and (kinds >= 3 or (digits >= 2 and len(value) >= 8) or _looks_random(value))


def _is_random(value: str) -> bool:
    """Whether it is long, and changes between digits, capitals and small letters as often as no word or name does."""
    core = value.rstrip("=")
    if len(core) < _LEAST_RANDOM or not re.fullmatch(r"[A-Za-z0-9+/_-]+", core):
        return False
    kinds = [(letter.isdigit(), letter.isupper()) for letter in core if letter.isalnum()]
    changes = sum(one != other for one, other in itertools.pairwise(kinds))
    if sum(digit for digit, _ in kinds) <= 1:  # as a name such as getOAuth2Token: there fewer letters are capitals
        return changes * 4 >= len(core) and sum(upper for _, upper in kinds) >= _CAPITALS * len(core)
    return changes >= max(_LEAST_CHANGES, len(core) / (8 if core.isalnum() else 4))


def _is_announced(text: str, start: int, end: int) -> bool:
    """Whether the words around a value call it a secret, and no nearer one calls it something else."""
    before = text[max(0, start - _BEFORE) : start]
    named = [match.end() for match in _ANNOUNCED.finditer(before)]
    if not named:
        after = _ANNOUNCED.search(text[end : end + _AFTER])
        return after is not None and not _NAMES_OTHERS.search(before)
    return not _NAMES_OTHERS.search(before, named[-1])


def _is_user_and_password(value: str) -> bool:
    """Whether base64 digits stand for `user:password`."""
    try:
        plain = base64.b64decode(value.rstrip("=") + "=" * (-len(value.rstrip("=")) % 4)).decode()
    except ValueError:
        return False
    return ":" in plain and plain.isprintable()


def _kinds(value: str) -> int:
    """How many kinds of characters it has: lower case, upper case, digits, others."""
    return sum(
        any(test(letter) for letter in value)
        for test in (str.islower, str.isupper, str.isdigit, lambda letter: not letter.isalnum())
    )


def _looks_random(value: str) -> bool:
    """Whether it has at least 3.5 bits per character (Shannon), with digits: keys have, words do not."""
    counts = Counter(value)
    bits = -sum(n / len(value) * math.log2(n / len(value)) for n in counts.values())
    return bits >= 3.5 and _kinds(value) >= 2 and any(letter.isdigit() for letter in value)


def _span(match: re.Match[str]) -> tuple[int, int]:
    """The span of the secret: the group of a pattern such as `password: (...)`, else the whole match."""
    if match.re.groups == 1 and match[1] is not None and len(match[1]) >= _SHORTEST:
        return match.span(1)
    return match.span()


@functools.cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.plugins.base import RegexBasedDetector

    patterns = [re.compile(form) for form in _FORMS]
    detectors: dict[str, Any] = get_mapping_from_secret_type_to_class()
    for detector in detectors.values():
        if issubclass(detector, RegexBasedDetector) and detector.__name__ not in _UNUSED:
            patterns.extend(detector.denylist)
    return tuple(patterns)
