"""Personal data and secrets: found, replaced by one name each, and the answer still the JSON it was."""

from __future__ import annotations

import functools
import itertools
import json
import socket
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Message, ToolCall
from tunesmith.data.privacy import names
from tunesmith.data.privacy.addresses import SURE, find_addresses
from tunesmith.data.privacy.entities import ALL, RECOGNISERS, Finder
from tunesmith.data.privacy.evidence import _shipped, reference
from tunesmith.data.privacy.names import RECOMMENDED, Names
from tunesmith.data.privacy.scan import Scan, Scanner
from tunesmith.data.settings import ENTITIES, Privacy

SCANNER = Scanner(Privacy())


@pytest.fixture(scope="module")
def reader() -> Scanner:
    """With the model of names."""
    return Scanner(Privacy(model=RECOMMENDED))


def scan(*contents: str, scanner: Scanner = SCANNER) -> Scan:
    return scanner.scan(
        [Message(role=("user", "assistant")[place % 2], content=text) for place, text in enumerate(contents)]
    )


def changed(*contents: str, scanner: Scanner = SCANNER) -> list[str]:
    """What the turns become."""
    return [turn.content for turn in scan(*contents, scanner=scanner).messages]


# Entity, value, and what stands for it: of the same form.
PLANTED = [
    ("EMAIL_ADDRESS", "jane.doe@acme.org", "person1@example.com"),
    ("PHONE_NUMBER", "+1 212-456-7890", "+1 202-555-0101"),
    ("CREDIT_CARD", "4111 1111 1111 1111", "0000 0000 0000 0001"),
    ("IBAN_CODE", "GB82WEST12345698765432", "GB00XXXX00000000000001"),
    ("IP_ADDRESS", "172.16.254.1", "192.0.2.1"),
    ("MAC_ADDRESS", "00:1B:44:11:3A:B7", "00:00:5e:00:53:01"),
    ("US_SSN", "536-90-4399", "000-00-0001"),
    ("UK_NHS", "943-476-5919", "000-000-0001"),
    ("PL_PESEL", "44051401359", "00000000001"),
    ("SECRET", "AKIAIOSFODNN7EXAMPLE", "secret_1"),
    ("SECRET", "ghp_" + "aB3" * 12, "secret_1"),
    ("SECRET", "xoxb-123456789012-1234567890123-AbCdEfGhIjKlMnOpQrStUvWx", "secret_1"),
    ("SECRET", "sk_live_" + "4eC39HqLyjWDarjtT1zdp7dc", "secret_1"),
    ("SECRET", "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nAAA\n-----END RSA PRIVATE KEY-----", "secret_1"),
]


@pytest.mark.parametrize(("entity", "value", "pseudonym"), PLANTED)
def test_planted_values_are_found_and_gone(entity: str, value: str, pseudonym: str) -> None:
    found = scan(f"write {value} down", "done")
    assert found.found == {entity: 1}
    assert found.messages[0].content == f"write {pseudonym} down"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        *((text.format("kX9fLq27RmZt"), text.format("secret_1"))
          for text in ("My secret password is {}", "Secret access key: {}", "Access token secret: {}",
                       "the password was changed to {}", "the password has been reset to {}",
                       "open https://bob:{}@db.acme.org/x")),
        ("key=xxAKIAIOSFODNN7EXAMPLEyy", "key=xxsecret_1yy"),
        ('{ "a" : 1.0,\n"b": [ ] }', '{ "a" : 1.0,\n"b": [ ] }'),
        ('{"\\ud83d": "write to jane@acme.org"}', '{"\\ud83d": "write to person1@example.com"}'),
        ('{"mail":"jane\\u0040acme.org","card":4111111111111111,"n":3,"note":"caf\\u00e9"}',
         '{"mail": "person1@example.com", "card": 1, "n": 3, "note": "caf\u00e9"}'),
    ],
)  # fmt: skip
def test_what_a_text_becomes(before: str, after: str) -> None:
    assert changed("note it", before)[1] == after


def test_one_name_for_one_value_in_the_whole_conversation() -> None:
    said = ("mail Jane@Acme.org and bob@acme.org", '{"to": "jane@acme.org", "cc": ["bob@acme.org"]}', "jane@acme.org")
    assert changed(*said) == [
        "mail person1@example.com and person2@example.com",
        '{"to": "person1@example.com", "cc": ["person2@example.com"]}',
        "person1@example.com",
    ]
    found = scan(*said)
    assert found.found == {"EMAIL_ADDRESS": 2}
    assert found.fields == {("user", "EMAIL_ADDRESS"): 3, ("assistant", "EMAIL_ADDRESS"): 2}
    assert found.originals == {"person1@example.com": "Jane@Acme.org", "person2@example.com": "bob@acme.org"}
    assert scan("a.b@acme.org ab@acme.org", "x").found == {"EMAIL_ADDRESS": 2}, "a dot counts"
    # A number keeps its layout, so that a schema still fits.
    assert changed("my card is 4111 1111 1111 1111", '{"card": "4111111111111111"}') == [
        "my card is 0000 0000 0000 0001",
        '{"card": "0000000000000001"}',
    ]
    zip_codes = Scanner(Privacy(entities=("ZIP_CODE",)))
    answer = changed("hello", '{"zip": "12345", "year": "12345"}', scanner=zip_codes)[1]
    assert answer == '{"zip": "00001", "year": "12345"}', "under its key only"


@pytest.mark.parametrize(
    ("answer", "entity", "value"),
    [
        ('{"password": "Tr0ub4dor&3x9"}', "SECRET", "Tr0ub4dor&3x9"),
        ('{"login": {"dbPasswords": ["aB3,xY9(q!"]}}', "SECRET", "aB3,xY9(q!"),
        ('{"password": "VHIwdWI0ZG9yJjN4OQ=="}', "SECRET", "VHIw"),
        ('{"api_key": "9f8a7b6c5d4e3f2a1b0c9d8e"}', "SECRET", "9f8a7b"),
        ('{"aws_secret_access_key": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"}', "SECRET", "wJalr"),
        ('{"customerSsn": 219099999}', "US_SSN", "219099999"),
        ('{"home_phone": "555 0123 45"}', "PHONE_NUMBER", "0123 45"),
    ],
)
def test_a_key_of_json_announces_its_value(answer: str, entity: str, value: str) -> None:
    found = scan("hello", answer)
    assert found.found == {entity: 1}
    assert value not in found.messages[1].content
    json.loads(found.messages[1].content)


NOTHING = (
    "turn on the kitchen lights at 7:30 and set them to 45 percent for 1.5 hours",
    "kubectl get pods -n prod | grep web-7d4b9c && tail -n 100 /var/log/syslog",
    '{"token": "re-elected", "tokens": ["U.S.", "COVID-19", "e-mail"]}',
    '{"password": "required", "secret": "<your secret>", "api_key": "your-api-key-1"}',
    '{"properties": {"password": {"type": "string", "description": "8-64 characters"}}, "required": ["password"]}',
    '{"order_number": 12345678, "orderNumber": "123456789"}',
    '{"keyboard": "qwerty-2000x", "passenger": "seat-12A", "max_tokens": 128000}',
    '{"name": "kitchen lamp", "intent": "reset_password"}',
    '{"total": 16427.77, "share": 0.227725, "at": [37.3696, 164.8257], "day": "06.04.2002"}',
    "31033.18 euros, or 3107069.50, or 1,016.47",
    "on 08.11.1996, 8/12/1991 or 2/16/1942",
    "card AB-1648 of 1990-01-28 and version 3.10.1237",
)


@pytest.mark.parametrize("text", NOTHING)
def test_keys_that_announce_nothing_and_figures_hold_nothing(text: str) -> None:
    assert not scan("hello", text).found


@pytest.mark.parametrize(
    "text", ['{"phone": 2025550123.0}', "415.555.0123", "(415) 555-0123", "030.1234567", "call me at 555.0123 today"]
)
def test_telephone_numbers_that_look_like_figures_are_found(text: str) -> None:
    assert scan("hello", text).found == {"PHONE_NUMBER": 1}


def test_values_in_a_call_are_replaced_wherever_they_come() -> None:
    call = ToolCall(id="jane@acme.org", name="login", arguments='{"user":"bob","password":"Tr0ub4dor&3x9"}')
    found = SCANNER.scan(
        [
            Message(role="system", content="You work for ops@acme.org."),
            Message(role="user", content="log me in"),
            Message(role="assistant", content="", tool_calls=(call,)),
            Message(role="tool", content="Tr0ub4dor&3x9 is right", tool_call_id="jane@acme.org"),
        ]
    )
    assert found.fields == {("system", "EMAIL_ADDRESS"): 1, ("call", "SECRET"): 1, ("call", "EMAIL_ADDRESS"): 2}
    assert found.messages is not None
    _, _, asked, told = found.messages
    assert asked.tool_calls[0].arguments == '{"user":"bob","password":"secret_1"}'
    assert told.content == "secret_1 is right"
    assert asked.tool_calls[0].id == told.tool_call_id == "person2@example.com"


def test_nothing_goes_to_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = mock.Mock(side_effect=AssertionError("the scan opened a socket"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    fresh = Scanner(Privacy(entities=("EMAIL_ADDRESS", "URL")))
    assert scan("jane@acme.co.uk", "x", scanner=fresh).found == {"EMAIL_ADDRESS": 1}


def test_every_entity_has_its_recogniser() -> None:
    for entity, recogniser in Scanner(Privacy(entities=tuple(RECOGNISERS))).finder._presidio:
        assert entity in recogniser.supported_entities
    assert set(ENTITIES) <= {*RECOGNISERS, "SECRET"}
    with pytest.raises(UsageError, match="no entity 'EMAIL'"):
        Scanner(Privacy(entities=("EMAIL",)))


leaf = st.text(max_size=12) | st.integers() | st.booleans() | st.none() | st.sampled_from([one[1] for one in PLANTED])
document = st.recursive(
    leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


@given(st.dictionaries(st.sampled_from(["to", "note", "list"]), document, min_size=1), st.booleans())
@examples(max_examples=30)
def test_json_answers_stay_json_and_hold_no_planted_value(value: dict, compact: bool) -> None:
    answer = json.loads(changed("here", json.dumps(value, separators=(",", ":") if compact else None))[1])
    assert isinstance(answer, dict)
    decoded = json.dumps(answer, ensure_ascii=False)
    for _, planted, _ in PLANTED:
        assert json.dumps(planted, ensure_ascii=False)[1:-1] not in decoded


def test_names_are_found_and_one_person_stays_one(reader: Scanner) -> None:
    text, answer = changed(
        "Please call Maria Novak in Nairobi. Maria said that Peter Schmidt is in Nairobi too.",
        '{"call": "Maria Novak", "city": "Nairobi", "first": "maria"}',
        scanner=reader,
    )
    assert not {"Maria", "Novak", "Peter", "Schmidt", "Nairobi"} & {word.strip(".,") for word in text.split()}
    fields = json.loads(answer)
    given, family = fields["call"].split()
    assert text.startswith(f"Please call {given} {family} in {fields['city']}. {given} said that ")
    assert fields["first"] == given.lower()
    (asked,) = changed("Ask Ann Lee about the Annual Leeway report.", scanner=reader)
    assert "Annual Leeway" in asked
    assert "Ann " not in asked, "names are replaced as words"
    keep = Scanner(Privacy(model=RECOMMENDED), keep={"Nairobi"})  # what a schema lists
    assert not scan("What is the weather in Nairobi today?", '{"city": "Nairobi"}', scanner=keep).found
    rows = [[Message(role="user", content=f"Ask Maria Novak at {n} Church Street about {n} eggs.")] for n in range(8)]
    alone = [reader.scan(one) for one in rows]
    assert alone[0].found["PERSON"] == 1
    assert reader.scan_many(rows) == alone


def test_addresses_in_several_forms(reader: Scanner) -> None:
    for address in (
        "615 Benedum Drive",
        "Schillerstraße 12",
        "56 rue La Boétie",
        "1317 Kimberly Way, Apt. 962, Portland 21959",
        "P.O. Box 242",
    ):
        found = scan(f"Please send it to {address}.", scanner=reader)
        assert "STREET_ADDRESS" in found.found, address
        assert address not in found.messages[0].content
    for text in ("play track 5 of Top 100 at 3 pm", "book a table for 2 at the olive garden", "is it 213 by 3"):
        assert "STREET_ADDRESS" not in scan(text, scanner=reader).found, text
    for ending in ("Street", "Trace", "Throughway", "Track"):
        assert max(score for *_, score in find_addresses(f"we met near 12 Maple {ending} today")) >= SURE, ending


STAFF = {"STAFF_ID": {"regex": r"\bE\d{6}\b", "context": ["employee", "staff"], "score": 0.2}}


def test_a_recogniser_of_ones_own_counts_in_its_context() -> None:
    own = Scanner(Privacy.model_validate({"entities": [], "recognisers": STAFF}))
    assert scan("part E123456 is missing", scanner=own).found == {}
    said = ("employee E123456 is missing", '{"id": "E123456"}')
    assert scan(*said, scanner=own).found == {"STAFF_ID": 1}
    assert changed(*said, scanner=own) == ["employee E000001 is missing", '{"id": "E000001"}']
    with pytest.raises(UsageError, match="not a regular expression"):
        Scanner(Privacy.model_validate({"recognisers": {"BAD_ONE": {"regex": "("}}}))
    slow = Scanner(Privacy.model_validate({"entities": [], "recognisers": {"SLOW": {"regex": r"(?:\w+ ?){3,}\d+$"}}}))
    with pytest.raises(UsageError, match="took more than 1 s") as caught:
        scan("word " * 5000 + "!", scanner=slow)
    assert "recognisers.SLOW.regex" in (caught.value.where or "")


def test_models_that_are_changed_unknown_or_missing_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(names.PINNED, RECOMMENDED, "sha256:" + "0" * 64)
    with pytest.raises(Refused, match="not the pinned ones"):
        Names(RECOMMENDED, None)
    monkeypatch.delitem(names.PINNED, RECOMMENDED)
    with pytest.raises(UsageError, match="no digest is known"):
        Names(RECOMMENDED, None)
    with pytest.raises(UsageError, match="not installed"):
        Scanner(Privacy(model="no_such_model"))
    with pytest.raises(UsageError, match="needs a model of names"):
        Scanner(Privacy(entities=("LOCATION",)))


def test_the_shipped_figures_are_of_every_annotated_entity() -> None:
    for setup, floor in ((None, 0.45), (RECOMMENDED, 0.80)):
        shipped = _shipped()["setups"][setup or "patterns"]
        assert shipped["recall"] >= floor
        assert shipped["precision"] >= 0.80
    told = reference(RECOMMENDED, ["PERSON", "UK_NHS"])
    assert told is not None
    assert told["entities"].keys() == {"PERSON"}
    assert reference("another_model", ["PERSON"]) is None


def test_a_long_text_is_looked_through_to_its_end(reader: Scanner) -> None:
    filler = "the lamp in the hall is on again and nobody knows why. " * 400
    text = f"{filler}ask Maria Novak, maria@acme.org, about it. {filler}key AKIAIOSFODNN7EXAMPLE here"
    found = scan(text, scanner=reader)
    assert {"EMAIL_ADDRESS": 1, "SECRET": 1}.items() <= found.found.items()
    for gone in ("Maria Novak", "maria@acme", "AKIA"):
        assert gone not in found.messages[0].content


@functools.cache
def finder() -> Finder:
    """Of every kind. Not made when tests are collected: each process of them would load the recognisers."""
    return Finder(Privacy(model=RECOMMENDED, entities=ALL))


@given(st.text(max_size=300))
@examples(max_examples=30)
def test_findings_never_overlap_and_lie_in_the_text(text: str) -> None:
    text = f"Ann Lee {text} 12 Mill Road, Leeds +1 212-456-7890 {text}"
    (found,) = finder().find([text])
    assert all(0 <= one.start < one.end <= len(text) for one in found)
    assert all(one.end <= other.start for one, other in itertools.pairwise(found))
