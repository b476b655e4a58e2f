"""Personal data and secrets in conversations: found by patterns, counted, and replaced by pseudonyms where asked.

presidio's pattern recognisers and phonenumbers find identifiers with a form or a checksum; the token patterns of
detect-secrets find credentials. Names of people and places have no pattern and are not found here. The recognisers
are called without presidio's engine, which would want a language model for what these patterns do not need.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Message
from tunesmith.data.settings import Privacy

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

# detect-secrets' detectors of tokens with a form of their own. Its entropy and keyword detectors are made for source
# code and call half of ordinary prose a secret.
_SECRET_DETECTORS = {
    "artifactory": "ArtifactoryDetector",
    "aws": "AWSKeyDetector",
    "azure_storage_key": "AzureStorageKeyDetector",
    "basic_auth": "BasicAuthDetector",
    "cloudant": "CloudantDetector",
    "discord": "DiscordBotTokenDetector",
    "github_token": "GitHubTokenDetector",
    "gitlab_token": "GitLabTokenDetector",
    "ibm_cloud_iam": "IbmCloudIamDetector",
    "ibm_cos_hmac": "IbmCosHmacDetector",
    "jwt": "JwtTokenDetector",
    "mailchimp": "MailchimpDetector",
    "npm": "NpmDetector",
    "openai": "OpenAIDetector",
    "pypi_token": "PypiTokenDetector",
    "sendgrid": "SendGridDetector",
    "slack": "SlackDetector",
    "softlayer": "SoftlayerDetector",
    "square_oauth": "SquareOAuthDetector",
    "stripe": "StripeDetector",
    "telegram_token": "TelegramBotTokenDetector",
    "twilio": "TwilioKeyDetector",
}
# The whole key, not its first line alone.
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY[A-Z ]*-----.*?(?:-----END [A-Z0-9 ]*-----|\Z)", re.DOTALL)
_SHORTEST_SECRET = 6
_SPELT_EXACTLY = (SECRET, "CRYPTO")
# Every identifier that presidio's patterns know holds one of these; most words and keys hold none and cost nothing.
_MAY_IDENTIFY = re.compile(r"[\d@.:]|\w{20}")

# What stands for the nth value of an entity in a conversation: of the same form where a reserved range exists
# (RFC 2606, RFC 5737, RFC 7042, the 555-01xx telephone numbers), so that texts and schemas stay plausible.
_PSEUDONYMS: dict[str, Callable[[int], str]] = {
    "EMAIL_ADDRESS": lambda n: f"person{n}@example.com",
    "PHONE_NUMBER": lambda n: f"202-555-01{n % 100:02d}",
    "CREDIT_CARD": lambda n: f"0000 0000 0000 {n:04d}",
    "IP_ADDRESS": lambda n: f"192.0.2.{n % 256}",
    "MAC_ADDRESS": lambda n: f"00:00:5e:00:53:{n % 256:02x}",
    "URL": lambda n: f"https://example.com/{n}",
    "US_SSN": lambda n: f"000-00-{n:04d}",
}


@dataclass(frozen=True, slots=True)
class Scan:
    """What was found in a conversation: messages with pseudonyms, and entity -> number of distinct values."""

    messages: tuple[Message, ...]
    found: Counter[str]


class Scanner:
    """Finds personal data and secrets in conversations. Made once a build: the patterns take a second to load."""

    def __init__(self, settings: Privacy) -> None:
        unknown = [name for name in settings.entities if name != SECRET and name not in RECOGNISERS]
        if unknown:
            raise UsageError(
                f"there is no entity {unknown[0]!r}",
                where="data.privacy.entities",
                fix=f"one of {', '.join([*RECOGNISERS, SECRET])}",
            )
        self._minimum = settings.minimum_score
        self._recognisers = _presidio(tuple(name for name in settings.entities if name != SECRET))
        self._secrets = _secret_patterns() if SECRET in settings.entities else ()

    def scan(self, messages: Sequence[Message]) -> Scan:
        """Look through every turn. One value has one pseudonym in the whole conversation, wherever it stands."""
        values: dict[tuple[str, str], str] = {}  # (entity, normalised value) -> pseudonym
        spellings: dict[str, str] = {}  # what stands in the texts -> pseudonym
        counts: Counter[str] = Counter()
        for text in _texts(messages):
            for entity, value in self._find(text):
                key = (entity, _same_value(entity, value))
                if key not in values:
                    counts[entity] += 1
                    values[key] = pseudonym(entity, counts[entity])
                spellings.setdefault(value, values[key])
        if not spellings:
            return Scan(tuple(messages), counts)
        replace = _replacer(spellings)
        return Scan(tuple(_replaced(message, replace) for message in messages), counts)

    def values(self, messages: Sequence[Message]) -> list[tuple[str, str]]:
        """(entity, value) of everything found in the messages, as it stands there."""
        return [found for text in _texts(messages) for found in self._find(text)]

    def _find(self, text: str) -> list[tuple[str, str]]:
        """(entity, value) of findings that do not overlap: secrets first, then the longest, then the surest."""
        spans = [(2.0, *_secret_span(match), SECRET) for pattern in self._secrets for match in pattern.finditer(text)]
        if _MAY_IDENTIFY.search(text):
            spans.extend(
                (result.score, result.start, result.end, name)
                for name, recogniser in self._recognisers
                for result in recogniser.analyze(text, [name], None)
                if result.score >= self._minimum
            )
        spans.sort(key=lambda span: (span[3] != SECRET, span[1] - span[2], -span[0], span[1:]))
        taken: list[tuple[int, int, str]] = []
        for _, start, end, name in spans:
            if all(end <= other or start >= stop for other, stop, _ in taken):
                taken.append((start, end, name))
        return [(name, text[start:end]) for start, end, name in sorted(taken)]


def _same_value(entity: str, value: str) -> str:
    """What two spellings of one value share: numbers their digits and letters, addresses all but their case."""
    if entity in _SPELT_EXACTLY:
        return value
    if entity in ("EMAIL_ADDRESS", "URL"):
        return value.casefold()
    return re.sub(r"[\W_]", "", value).casefold()


def pseudonym(entity: str, n: int) -> str:
    """What stands for the nth value of an entity."""
    make = _PSEUDONYMS.get(entity)
    return make(n) if make else f"{entity.lower()}_{n}"


def _texts(messages: Sequence[Message]) -> Iterator[str]:
    """Every text of the conversation; of JSON the strings and numbers inside, so that escapes hide nothing."""
    for message in messages:
        value = _json_in(message.content)
        yield from (message.content,) if value is None else _leaves(value)


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield str(value)


def _json_in(text: str) -> Any:
    """The object or list that a text is; None for prose."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        value = json.loads(text, object_pairs_hook=_pairs)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; one with a key twice is read as prose, since as an object it would lose the first."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key stands twice")
    return fields


def _replacer(spellings: dict[str, str]) -> Callable[[str], str]:
    # Wherever the letters stand, even within a longer word: what was found must not be left over.
    pattern = re.compile("|".join(map(re.escape, sorted(spellings, key=len, reverse=True))))
    return lambda text: pattern.sub(lambda match: spellings[match[0]], text)


def _replaced(message: Message, replace: Callable[[str], str]) -> Message:
    """The message with pseudonyms; JSON stays JSON, in the spacing it had."""
    value = _json_in(message.content)
    content = replace(message.content)
    if value is not None:
        with contextlib.suppress(ValueError):  # two keys that become one: the text is replaced as it stands
            changed = _replace_leaves(value, replace)
            compact = json.dumps(value, ensure_ascii=False, separators=(",", ":")) == message.content
            separators = (",", ":") if compact else None
            content = message.content
            if changed != value:
                content = json.dumps(changed, ensure_ascii=False, separators=separators)
    return message if content == message.content else message.model_copy(update={"content": content})


def _replace_leaves(value: Any, replace: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return _pairs([(replace(key), _replace_leaves(inner, replace)) for key, inner in value.items()])
    if isinstance(value, list):
        return [_replace_leaves(inner, replace) for inner in value]
    if isinstance(value, str):
        return replace(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        text = replace(str(value))
        if text == str(value):
            return value
        digits = re.sub(r"\D", "", text)  # a number stays a number
        return int(digits) if digits else text
    return value


def _secret_span(match: re.Match[str]) -> tuple[int, int]:
    """The secret within its match: the one group of `password: (...)` patterns, else all of it."""
    if match.re.groups == 1 and match[1] is not None and len(match[1]) >= _SHORTEST_SECRET:
        return match.span(1)
    return match.span()


@functools.cache
def _secret_patterns() -> tuple[re.Pattern[str], ...]:
    from importlib import import_module

    patterns = [_PRIVATE_KEY]
    for module, detector in _SECRET_DETECTORS.items():
        patterns.extend(getattr(import_module(f"detect_secrets.plugins.{module}"), detector).denylist)
    return tuple(patterns)


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
