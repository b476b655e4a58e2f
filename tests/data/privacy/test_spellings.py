"""Values are found as people read them, whatever characters and spaces they are written with; ordinary texts stay."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from tests.attack_table import Happened
from tunesmith.core.messages import Message, ToolCall
from tunesmith.data.privacy.check_digits import find_cards, find_ibans
from tunesmith.data.privacy.scan import Scan, Scanner
from tunesmith.data.privacy.synthetic_pii import MAKERS
from tunesmith.data.settings import ENTITIES, Privacy
from tunesmith.store.people.identities import ensure_owner
from tunesmith.store.people.tokens import issue_token
from tunesmith.store.store import Store

SCANNER = Scanner(Privacy())
TOKEN = "tsk_" + "aB3_-" * 8 + "xyz"
WIDE = {point: point + 0xFEE0 for point in range(33, 127)}
FORMS = {
    "hidden characters": lambda value: f"{value[:1]}\u200b{value[1:3]}\u00ad{value[3:]}",
    "full width": lambda value: value.translate(WIDE),
    "mathematical": lambda value: value.translate({48 + digit: 0x1D7CE + digit for digit in range(10)}),
    "Arabic digits": lambda value: value.translate({48 + digit: 0x660 + digit for digit in range(10)}),
}


def scan(text: str, answer: str = "ok") -> Scan:
    return SCANNER.scan([Message(role="user", content=text), Message(role="assistant", content=answer)])


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
    (entity,) = found.found
    left = found.messages[0].content.removeprefix("so: ").removesuffix(" , and thanks").removeprefix("IBAN")
    assert left in ("person1@example.com", "secret_1") or {*left} <= {*"GBgb0123456789Xx -.–+()/\n\u00a0"}, left
    assert found.originals[left.removeprefix("IBAN")] in f"IBAN{spelled}"
    happened(f"replaced as {entity}")


def test_one_pseudonym_for_all_spellings() -> None:
    found = scan("write to jane@acme.org", '{"to": "jane\u200b@acme.org", "copy": "ｊane＠acme.org"}')
    assert found.messages is not None
    assert found.messages[1].content == '{"to": "person1@example.com", "copy": "person1@example.com"}'
    assert found.found == {"EMAIL_ADDRESS": 1}
    assert SCANNER.values([Message(role="user", content="ｊane＠acme.org")]) == ["ｊane＠acme.org"]
    keep = Scanner(Privacy(), keep={"Jane@acme.org"})
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
    assert found.found == {"EMAIL_ADDRESS": 1, "CREDIT_CARD": 1}
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
        assert changed.found == {"SECRET": 1}
        assert changed.messages is not None
        assert token not in changed.messages[0].content
        happened("replaced")


ORDINARY = """\
it’s “fine” — really… see 1914–18 and 6½ sacks ❤️ 👩‍👩‍👧 5 m² of №7™
the café in Zürich sells crème brûlée for 5 €
Привет, мир! Как дела? Ελληνικά и русский
数据集的版本 is 3。ok
https://example.com/a%20b?q=c%2Fd&lang=en&amp;x=1
git checkout 9fceb02d0ae598e95dc970b74767f19372d61af8
Python x[::2] and y[:, 100::2], ratio 1::2, a:b:c:d:e:f:a:b
at dad::beef with add::bad::cafe and std::a::b and a::before
numbers[1::2] or rows[::-1] or f(x)[100::20]
basic authentication, or Basic functionality for the AuthorizationHeader
redis://:$REDIS_PASSWORD@cache:6379/0 or redis://:<password>@cache:6379/0
the password is wrong again, where is the access token endpoint of the api
kubectl create secret generic db --from-literal=password=$DB_PASSWORD
curl -H "Authorization: Bearer $TOKEN" or export API_KEY=your-api-key-here
aws s3 cp s3://bucket-2024/reports/2024-01-31.csv . && openssl rand -base64 32
forgot my passcode for the second time in 2024, set the token limit to 4096
docker pull alpine@sha256:4bcff63911fcb4448bd4fdacec207030997caf25e9bea4045fa6c8c44de311d1
uuid 6ba7b810-9dad-11d1-80b4-00c04fd430c8 was not found
the order is 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16
at 2024-01-31 12:30:45.123456 and 2024-02-01 13:31:46
iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk
SELECT * FROM t WHERE a = 'x' AND b = 'y' -- \\d+ \\w
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
    assert scan(f"ping {address} now").found == {"IP_ADDRESS": 1}
    assert scan(f"hosts[{address.strip('[]')}]").found == ({} if address[0] == "f" else {"IP_ADDRESS": 1})
