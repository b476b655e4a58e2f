"""Personal data and secrets: found, replaced by one name each, and the answer still the JSON it was."""

import itertools
import json
import socket
from pathlib import Path
from random import Random
from unittest import mock

import pytest

from tests.attack_table import Happened
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Message, ToolCall
from tunesmith.data.privacy import names
from tunesmith.data.privacy.addresses import SURE, find_addresses
from tunesmith.data.privacy.check_digits import find_cards, find_ibans
from tunesmith.data.privacy.detection_recall import reference
from tunesmith.data.privacy.names import RECOMMENDED, Names
from tunesmith.data.privacy.scan import Scan, Scanner
from tunesmith.data.privacy.synthetic_pii import MAKERS
from tunesmith.data.settings import ENTITIES, Privacy
from tunesmith.store.people.identities import ensure_owner
from tunesmith.store.people.tokens import issue_token
from tunesmith.store.store import Store

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
    ("SECRET", "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nAAA\n-----END RSA PRIVATE KEY-----", "secret_1"),
]


@pytest.mark.parametrize(("entity", "value", "pseudonym"), PLANTED)
def test_planted_values_are_found_and_gone(entity: str, value: str, pseudonym: str) -> None:
    found = scan(f"write {value} down", "done")
    assert found.counts == {entity: 1}
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
    assert found.counts == {"EMAIL_ADDRESS": 2}
    assert found.fields == {("user", "EMAIL_ADDRESS"): 3, ("assistant", "EMAIL_ADDRESS"): 2}
    assert found.originals == {"person1@example.com": "Jane@Acme.org", "person2@example.com": "bob@acme.org"}
    assert scan("a.b@acme.org ab@acme.org", "x").counts == {"EMAIL_ADDRESS": 2}, "a dot counts"
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
    assert found.counts == {entity: 1}
    assert value not in found.messages[1].content
    json.loads(found.messages[1].content)


NOTHING = (
    '{"token": "re-elected", "tokens": ["U.S.", "COVID-19", "e-mail"]}',
    '{"password": "required", "secret": "<your secret>", "api_key": "your-api-key-1"}',
    '{"properties": {"password": {"type": "string", "description": "8-64 characters"}}, "required": ["password"]}',
    '{"order_number": 12345678, "orderNumber": "123456789"}',
    '{"keyboard": "qwerty-2000x", "passenger": "seat-12A", "max_tokens": 128000}',
    '{"name": "kitchen lamp", "intent": "reset_password"}',
    '{"total": 16427.77, "share": 0.227725, "at": [37.3696, 164.8257], "day": "06.04.2002"}',
    "31033.18 euros, or 3107069.50, or 1,016.47",
)


@pytest.mark.parametrize("text", NOTHING)
def test_keys_that_announce_nothing_and_figures_hold_nothing(text: str) -> None:
    assert not scan("hello", text).counts


@pytest.mark.parametrize(
    "text", ['{"phone": 2025550123.0}', "415.555.0123", "(415) 555-0123", "030.1234567", "call me at 555.0123 today"]
)
def test_telephone_numbers_that_look_like_figures_are_found(text: str) -> None:
    assert scan("hello", text).counts == {"PHONE_NUMBER": 1}


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
    assert scan("jane@acme.co.uk", "x", scanner=fresh).counts == {"EMAIL_ADDRESS": 1}


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
    keep = Scanner(Privacy(model=RECOMMENDED), {"enum": ["Nairobi"]})
    assert not scan("What is the weather in Nairobi today?", '{"city": "Nairobi"}', scanner=keep).counts
    rows = [[Message(role="user", content=f"Ask Maria Novak at {n} Church Street about {n} eggs.")] for n in range(8)]
    alone = [reader.scan(one) for one in rows]
    assert alone[0].counts["PERSON"] == 1
    assert reader.scan_many(rows) == alone


def test_addresses_in_several_forms(reader: Scanner) -> None:
    for address in ("Schillerstraße 12", "56 rue La Boétie", "1317 Kimberly Way, Apt. 9, Portland 219", "P.O. Box 24"):
        found = scan(f"Please send it to {address}.", scanner=reader)
        assert "STREET_ADDRESS" in found.counts, address
        assert address not in found.messages[0].content
    for text in ("play track 5 of Top 100 at 3 pm", "book a table for 2 at the olive garden", "is it 213 by 3"):
        assert "STREET_ADDRESS" not in scan(text, scanner=reader).counts, text
    (found,) = reader.findings(["Ann Lee, jane@acme.org, 12 Mill Road, Leeds +1 212-456-7890"])
    assert len(found) >= 4
    assert all(one.end <= other.start for one, other in itertools.pairwise(found)), "none overlaps another"
    assert max(score for *_, score in find_addresses("we met near 12 Maple Throughway today")) >= SURE


STAFF = {"STAFF_ID": {"regex": r"\bE\d{6}\b", "context": ["employee", "staff"], "score": 0.2}}


def test_a_recogniser_of_ones_own_counts_in_its_context() -> None:
    own = Scanner(Privacy.model_validate({"entities": [], "recognisers": STAFF}))
    assert scan("part E123456 is missing", scanner=own).counts == {}
    said = ("employee E123456 is missing", '{"id": "E123456"}')
    assert scan(*said, scanner=own).counts == {"STAFF_ID": 1}
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
    for entity, said in (("LOCATION", "needs a model of names"), ("EMAIL", "no entity 'EMAIL'")):
        with pytest.raises(UsageError, match=said):
            Scanner(Privacy(entities=(entity,)))


def test_figures_of_the_annotated_entities_alone() -> None:
    told = reference(RECOMMENDED, ["PERSON", "UK_NHS"])
    assert told is not None
    assert told.entities.keys() == {"PERSON"}
    assert reference("another_model", ["PERSON"]) is None


def test_a_long_text_is_looked_through_to_its_end(reader: Scanner) -> None:
    filler = "the lamp in the hall is on again and nobody knows why. " * 400
    text = f"{filler}ask Maria Novak, maria@acme.org, about it. {filler}key AKIAIOSFODNN7EXAMPLE here"
    found = scan(text, scanner=reader)
    assert {"EMAIL_ADDRESS": 1, "SECRET": 1}.items() <= found.counts.items()
    for gone in ("Maria Novak", "maria@acme", "AKIA"):
        assert gone not in found.messages[0].content


# Values are found as people read them, whatever characters and spaces they are written with; ordinary texts stay


TOKEN = "tsk_" + "aB3_-" * 8 + "xyz"
WIDE = {point: point + 0xFEE0 for point in range(33, 127)}
FORMS = {
    "hidden characters": lambda value: f"{value[:1]}\u200b{value[1:3]}\u00ad{value[3:]}",
    "full width": lambda value: value.translate(WIDE),
    "mathematical": lambda value: value.translate({48 + digit: 0x1D7CE + digit for digit in range(10)}),
    "Arabic digits": lambda value: value.translate({48 + digit: 0x660 + digit for digit in range(10)}),
}


@pytest.mark.attack("privacy", "a value of each kind with hidden, wide, mathematical or Arabic characters")
@pytest.mark.parametrize("entity", ENTITIES)
def test_every_form_of_every_kind(entity: str, happened: Happened) -> None:
    value = MAKERS[entity](Random(f"{entity} 0"))
    for form, write in FORMS.items():
        text = f"my phone number or card is {write(value)} , thanks"
        start, end = text.index(write(value)), text.rindex(" , thanks")
        seen = {place for one in SCANNER.findings([text])[0] for place in range(one.start, one.end)}
        assert all(at in seen for at in range(start, end) if text[at].isalnum()), form
        happened("found whole")


SPELLED = (
    "jane.doe\u200b@acme.org",
    "jаne.dоe@аcme.org",  # Cyrillic letters
    "𝐣𝐚𝐧𝐞.𝐝𝐨𝐞@𝐚𝐜𝐦𝐞.𝐨𝐫𝐠",
    "۴۱۱۱ ۱۱۱۱ ۱۱۱۱ ۱۱۱۱",
    "4111\n1111\n1111\n1111",
    "4111.1111.1111.1111",
    "4111 - 1111 - 1111 - 1111",
    "4111\u20131111\u20131111\u20131111",
    "4111\u00a01111\u00a01111\u00a01111",
    "4 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1",
    "3782 822463 10005",
    "gb82west12345698765432",
    "IBANGB82WEST12345698765432",
    "gb82 west 1234 5698 7654 32",
    "GB82.WEST.1234.5698.7654.32",
    "Gb82Wesт12345698765432",
    TOKEN,
    "536\u201390\u20134399",
)


@pytest.mark.attack("privacy", "values in look-alike and hidden characters and in other spacings, one by one")
@pytest.mark.parametrize("spelled", SPELLED)
def test_nothing_of_a_value_is_left(spelled: str, happened: Happened) -> None:
    found = scan(f"so: {spelled} , and thanks")
    assert found.messages is not None
    (entity,) = found.counts
    left = found.messages[0].content.removeprefix("so: ").removesuffix(" , and thanks").removeprefix("IBAN")
    assert left in ("person1@example.com", "secret_1") or {*left} <= {*"GBgb0123456789Xx -.–+()/\n\u00a0"}, left
    assert found.originals[left.removeprefix("IBAN")] in f"IBAN{spelled}"
    happened(f"replaced as {entity}")


def test_one_pseudonym_for_all_spellings() -> None:
    found = scan("write to jane@acme.org", '{"to": "jane\u200b@acme.org", "copy": "ｊane＠acme.org"}')
    assert found.messages is not None
    assert found.messages[1].content == '{"to": "person1@example.com", "copy": "person1@example.com"}'
    assert found.counts == {"EMAIL_ADDRESS": 1}
    assert SCANNER.values([Message(role="user", content="ｊane＠acme.org")]) == ["ｊane＠acme.org"]
    keep = Scanner(Privacy(), {"properties": {"to": {"const": "Jane@acme.org"}}})
    assert keep.findings(["jane@acme.org", "jane\u200b@acme.org"]) == [[], []]


@pytest.mark.attack("privacy", "values with hidden characters outside the user's text")
def test_system_turns_calls_and_keys_of_json(happened: Happened) -> None:
    spelled = "jane.doe\u200b@acme.org"
    call = ToolCall(id="c1", name="send", arguments=json.dumps({spelled: [{"to": spelled}], "n": 4111111111111111}))
    turns = [
        Message(role="system", content=f"you answer for {spelled}"),
        Message(role="user", content=f'see {{"to": "jane.doe＠acme.org", "{spelled}": 1}} please'),
        Message(role="assistant", content="", tool_calls=(call,)),
        Message(role="assistant", content=json.dumps({spelled: {"key": "jane.doe\u00ad@acme.org"}})),
    ]
    found = SCANNER.scan(turns)
    assert found.messages is not None
    assert found.counts == {"EMAIL_ADDRESS": 1, "CREDIT_CARD": 1}
    text = " ".join(text for turn in found.messages for text in turn.texts())
    assert text.count("person1@example.com") == 7
    assert "acme" not in text
    assert "4111" not in text
    happened("replaced", 7)


@pytest.mark.attack("privacy", "a token of our own server in a row")
def test_a_token_that_the_store_issues(tmp_path: Path, happened: Happened) -> None:
    store = Store(tmp_path)
    user = ensure_owner(store).name
    for _ in range(5):
        token = issue_token(store, user, actor=user)
        changed = scan(f"curl -H 'Authorization: Bearer {token}' here, it is {token}, i think")
        assert changed.counts == {"SECRET": 1}
        assert changed.messages is not None
        assert token not in changed.messages[0].content
        happened("replaced")


ORDINARY = """\
it’s “fine” — really… see 1914–18 and 6½ sacks ❤️ 👩‍👩‍👧 5 m² of №7™
the café in Zürich sells crème brûlée for 5 €
数据集的版本 is 3。ok
https://example.com/a%20b?q=c%2Fd&lang=en&amp;x=1
Python x[::2] and y[:, 100::2], ratio 1::2, a:b:c:d:e:f:a:b
basic authentication, or Basic functionality for the AuthorizationHeader
redis://:$REDIS_PASSWORD@cache:6379/0 or redis://:<password>@cache:6379/0
curl -H "Authorization: Bearer $TOKEN" or export API_KEY=your-api-key-here
aws s3 cp s3://bucket-2024/reports/2024-01-31.csv . && openssl rand -base64 32
docker pull alpine@sha256:4bcff63911fcb4448bd4fdacec207030997caf25e9bea4045fa6c8c44de311d1
the order is 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16
""".splitlines()


def test_ordinary_texts_and_numbers_without_valid_check_digits_hold_nothing() -> None:
    assert {text: one for text, one in zip(ORDINARY, SCANNER.findings(ORDINARY), strict=True) if one} == {}
    assert not list(find_cards("4111 1111 1111 1112 and 4111.1111.1111.1113"))
    assert not list(find_ibans("gb82 west 1234 5698 7654 33 and xx82 west 1234 5698 7654 32"))


@pytest.mark.parametrize(
    "address",
    ["2001:db8::1", "fe80::1%eth0", "::ffff:192.0.2.1", "2a02:8109:9a00::1", "2001:db8:1:2:3:4:5:6", "[2001:db8::7]"],
)
def test_addresses_of_computers_are_found(address: str) -> None:
    assert scan(f"ping {address} now").counts == {"IP_ADDRESS": 1}
    assert scan(f"hosts[{address.strip('[]')}]").counts == ({} if address[0] == "f" else {"IP_ADDRESS": 1})
