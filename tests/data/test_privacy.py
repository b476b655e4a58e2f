"""Personal data and secrets: found, replaced by one name each, and the answer still the JSON it was."""

from __future__ import annotations

import json
import socket

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Message
from tunesmith.data.privacy import RECOGNISERS, Scan, Scanner, pseudonym
from tunesmith.data.settings import ENTITIES, Privacy


@pytest.fixture(scope="module")
def scanner() -> Scanner:
    return Scanner(Privacy())


def scan(scanner: Scanner, *contents: str) -> Scan:
    return scanner.scan(
        [Message(role=("user", "assistant")[place % 2], content=text) for place, text in enumerate(contents)]
    )


PLANTED = [
    ("EMAIL_ADDRESS", "jane.doe@acme.org"),
    ("PHONE_NUMBER", "+1 212-456-7890"),
    ("CREDIT_CARD", "4111 1111 1111 1111"),
    ("IBAN_CODE", "GB82WEST12345698765432"),
    ("IP_ADDRESS", "172.16.254.1"),
    ("MAC_ADDRESS", "00:1B:44:11:3A:B7"),
    ("US_SSN", "536-90-4399"),
    ("UK_NHS", "943-476-5919"),
    ("PL_PESEL", "44051401359"),
    ("SECRET", "AKIAIOSFODNN7EXAMPLE"),
    ("SECRET", "ghp_" + "aB3" * 12),
    ("SECRET", "xoxb-123456789012-1234567890123-AbCdEfGhIjKlMnOpQrStUvWx"),
    ("SECRET", "sk_live_" + "4eC39HqLyjWDarjtT1zdp7dc"),
    ("SECRET", "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nAAA\n-----END RSA PRIVATE KEY-----"),
]


@pytest.mark.parametrize(("entity", "value"), PLANTED)
def test_planted_values_are_found_and_gone(scanner: Scanner, entity: str, value: str) -> None:
    found = scan(scanner, f"write {value} down", "done")
    assert found.found == {entity: 1}
    assert found.messages[0].content == f"write {pseudonym(entity, 1)} down"


@pytest.mark.parametrize(
    "text",
    [
        "turn on the kitchen lights at 7:30 and set them to 45 percent",
        "set the color temperature to 2700 kelvin for 1.5 hours",
        "kubectl get pods -n prod | grep web-7d4b9c && tail -n 100 /var/log/syslog",
        "play bohemian rhapsody on the sonos one",
    ],
)
def test_ordinary_requests_hold_nothing(scanner: Scanner, text: str) -> None:
    assert not scan(scanner, text, '{"intent":"HassTurnOn","slots":{"brightness":45}}').found


def test_one_name_for_one_value_in_the_whole_conversation(scanner: Scanner) -> None:
    found = scan(
        scanner,
        "mail Jane@Acme.org and bob@acme.org",
        '{"to": "jane@acme.org", "cc": ["bob@acme.org"]}',
        "again to jane@acme.org",
        "ok",
    )
    assert found.found == {"EMAIL_ADDRESS": 2}
    assert [turn.content for turn in found.messages] == [
        "mail person1@example.com and person2@example.com",
        '{"to": "person1@example.com", "cc": ["person2@example.com"]}',
        "again to person1@example.com",
        "ok",
    ]


def test_different_addresses_stay_different(scanner: Scanner) -> None:
    assert scan(scanner, "a.b@acme.org ab@acme.org", "x").found == {"EMAIL_ADDRESS": 2}


def test_escapes_and_numbers_in_json_hide_nothing(scanner: Scanner) -> None:
    answer = '{"mail":"jane\\u0040acme.org","card":4111111111111111,"n":3,"note":"caf\\u00e9"}'
    changed = scan(scanner, "note it", answer).messages[1].content
    assert json.loads(changed) == {"mail": "person1@example.com", "card": 1, "n": 3, "note": "café"}
    assert "acme" not in changed


def test_a_secret_inside_a_longer_word_is_replaced_too(scanner: Scanner) -> None:
    assert "AKIA" not in scan(scanner, "key=xxAKIAIOSFODNN7EXAMPLEyy", "ok").messages[0].content


def test_password_in_a_url(scanner: Scanner) -> None:
    assert scan(scanner, "open https://bob:hunter22@db.acme.org/x", "ok").messages[0].content == (
        "open https://bob:secret_1@db.acme.org/x"
    )


def test_untouched_messages_keep_their_bytes(scanner: Scanner) -> None:
    odd = '{ "a" : 1.0,\n"b": [ ] }'
    found = scan(scanner, "jane@acme.org", odd)
    assert found.messages[1].content == odd


def test_nothing_goes_to_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the scan opened a socket")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    fresh = Scanner(Privacy(entities=("EMAIL_ADDRESS", "URL")))
    assert scan(fresh, "jane@acme.co.uk", "x").found == {"EMAIL_ADDRESS": 1}


def test_every_entity_has_its_recogniser() -> None:
    for entity, recogniser in Scanner(Privacy(entities=tuple(RECOGNISERS)))._recognisers:
        assert entity in recogniser.supported_entities
    assert set(ENTITIES) <= {*RECOGNISERS, "SECRET"}
    with pytest.raises(UsageError, match="no entity 'EMAIL'"):
        Scanner(Privacy(entities=("EMAIL",)))


leaf = (
    st.text(max_size=12) | st.integers() | st.booleans() | st.none() | st.sampled_from([value for _, value in PLANTED])
)
document = st.recursive(
    leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


@given(st.dictionaries(st.sampled_from(["to", "note", "list"]), document, min_size=1), st.booleans())
@examples(max_examples=60, deadline=None)
def test_json_answers_stay_json_and_hold_no_planted_value(value: dict, compact: bool) -> None:
    answer = json.dumps(value, separators=(",", ":") if compact else None)
    shared = Scanner(Privacy())
    changed = scan(shared, "here", answer).messages[1].content
    assert isinstance(json.loads(changed), dict)
    decoded = json.dumps(json.loads(changed), ensure_ascii=False)
    for _, planted in PLANTED:
        assert json.dumps(planted, ensure_ascii=False)[1:-1] not in decoded
