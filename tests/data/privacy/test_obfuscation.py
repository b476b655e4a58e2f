"""Values in spellings that hide them from patterns are found whole, and ordinary texts stay as they are."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.attack_table import Happened
from tunesmith.core.messages import Message, ToolCall
from tunesmith.data.privacy.check_digits import find_cards, find_ibans
from tunesmith.data.privacy.obfuscation import FOR, FOR_OTHERS, TRICKS
from tunesmith.data.privacy.scan import Scan, Scanner
from tunesmith.data.privacy.synthetic_pii import MAKERS
from tunesmith.data.privacy.views import views_of
from tunesmith.data.settings import ENTITIES, Privacy
from tunesmith.store.people.identities import ensure_owner
from tunesmith.store.people.tokens import issue_token
from tunesmith.store.store import Store

SCANNER = Scanner(Privacy())
MAIL, CARD, IBAN = "jane.doe@acme.org", "4111111111111111", "GB82WEST12345698765432"
TOKEN = "tsk_" + "aB3_-" * 8 + "xyz"


def scan(text: str, answer: str = "ok") -> Scan:
    return SCANNER.scan([Message(role="user", content=text), Message(role="assistant", content=answer)])


def b64(value: str) -> str:
    return base64.b64encode(value.encode()).decode()


@pytest.mark.attack("privacy", "a value in each obfuscated spelling")
@pytest.mark.parametrize("entity", ENTITIES)
def test_every_trick_on_every_kind(entity: str, happened: Happened) -> None:
    for trick in FOR.get(entity, FOR_OTHERS):
        for number in range(3):
            chance = Random(f"{entity} {trick} {number}")
            value = TRICKS[trick](chance, MAKERS[entity](chance))
            text = f"my phone number or card is {value} , thanks"
            start = text.index(value)
            seen = {place for one in SCANNER.findings([text])[0] for place in range(one.start, one.end)}
            assert all(at in seen for at in range(start, start + len(value)) if text[at].isalnum()), (trick, value)
            happened("found whole")


SPELLED = (
    "jane.doe\u200b@acme.org",
    "jane.\u00addoe@ac\u00adme.org",
    "jane.doe\uff20acme.org",
    "jаne.dоe@аcme.org",
    "jane.doe&#64;acme.org",
    "jane.doe&#x40;acme.org",
    "jane.doe&commat;acme&period;org",
    "jane.doe\\u0040acme.org",
    "jane.doe\\x40acme.org",
    "jane.doe\\u{40}acme.org",
    "jane.doe\\100acme.org",
    "jane.doe%40acme.org",
    "jane.doe%2540acme.org",
    "jane.doe%u0040acme.org",
    "jane.doe=40acme.org",
    "jane.doe&amp;#64;acme.org",
    "jane.doe\\\\u0040acme.org",
    "jane.doe\\\\\\\\x40acme.org",
    "jane.doe&#0000000064;acme.org",
    "jane.doe&#x0000000040;acme.org",
    "jane.doe(a)acme.org",
    "jane.doe*at*acme*dot*org",
    "jane.doe'at'acme'dot'org",
    "jane.doe**@**acme.org",
    "jane.doe<b>@</b>acme.org",
    "jane@acme . org",
    "jane at acme dot org",
    "jane.doe at acme dot it",
    "jane.doe [at] acme.org",
    "jane.doe(at)acme(dot)org",
    "jane.doe {at} acme {dot} org",
    "jane.doe <at> acme.org",
    "jane.doe at acme dot org",
    "jane.doe AT acme DOT org",
    "jane.doe arroba acme punto org",
    "jane_at_acme_dot_org",
    "jane.doe @ acme . org",
    "jane.doe@acme[.]org",
    "jane.doe@acme dot org",
    "j a n e . d o e @ a c m e . o r g",
    "𝐣𝐚𝐧𝐞.𝐝𝐨𝐞@𝐚𝐜𝐦𝐞.𝐨𝐫𝐠",
    "ｊａｎｅ．ｄｏｅ＠ａｃｍｅ．ｏｒｇ",
    b64(MAIL),
    b64(MAIL).rstrip("="),
    b64(b64(MAIL)),
    base64.urlsafe_b64encode(b"??>" + MAIL.encode()).decode(),
    b64("mail " + MAIL).replace("=", "%3D"),
    base64.b32encode(MAIL.encode()).decode(),
    MAIL.encode().hex(),
    MAIL.encode().hex(" "),
    b64(MAIL * 9)[:76] + "\n" + b64(MAIL * 9)[76:],
    base64.b64encode(MAIL.encode("utf-16-le")).decode(),
    f"data:text/plain;base64,{b64(MAIL)}",
    "٤١١١١١١١١١١١١١١١",
    "۴۱۱۱ ۱۱۱۱ ۱۱۱۱ ۱۱۱۱",
    "४१११११११११११११११",
    "４１１１１１１１１１１１１１１１",
    "𝟒𝟏𝟏𝟏𝟏𝟏𝟏𝟏𝟏𝟏𝟏𝟏𝟏𝟏𝟏𝟏",
    "4111\u200b1111\u200b1111\u200b1111",
    "4111\n1111\n1111\n1111",
    "4111.1111.1111.1111",
    "4111 - 1111 - 1111 - 1111",
    "4111\u20131111\u20131111\u20131111",
    "4 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1",
    "41 11 11 11 11 11 11 11",
    "41111111\n11111111",
    "3782 822463 10005",
    b64(CARD),
    CARD.encode().hex(),
    "&#52;111111111111111",
    "%34111111111111111",
    IBAN.lower(),
    f"IBAN{IBAN}",
    "gb82 west 1234 5698 7654 32",
    "GB82-WEST-1234-5698-7654-32",
    "GB82.WEST.1234.5698.7654.32",
    "Gb82Wesт12345698765432",
    b64(IBAN),
    "G B 8 2 W E S T 1 2 3 4 5 6 9 8 7 6 5 4 3 2",
    TOKEN,
    TOKEN.replace("_", "\uff3f", 1),
    TOKEN[:20] + "\u2060" + TOKEN[20:],
    b64(TOKEN),
    TOKEN.replace("_", "%5F"),
    f'"{TOKEN[:20]}" + "{TOKEN[20:]}"',
    TOKEN[:24] + "\n" + TOKEN[24:],
    "AKIAIOSF\u200dODNN7EXAMPLE",
    "ＡＫＩＡIOSFODNN7EXAMPLE",
    b64("AKIAIOSFODNN7EXAMPLE"),
    "ghp\u00ad_" + "aB3" * 12,
    b64("password: hunter2xyZ9!"),
    "536\u201390\u20134399",
    "+1 (2\u200b12) 456-7890",
    "\uff0b1 212-456-7890",
    "1%37%32.16.254.1",
    "172[.]16[.]254[.]1",
)


@pytest.mark.attack("privacy", "obfuscated values, one by one")
@pytest.mark.parametrize("spelled", SPELLED)
def test_nothing_of_an_obfuscated_value_is_left(spelled: str, happened: Happened) -> None:
    found = scan(f"so: {spelled} , and thanks")
    assert found.messages is not None
    (entity,) = found.found
    left = found.messages[0].content.removeprefix("so: ").removesuffix(" , and thanks")
    left = left.removeprefix("data:text/plain;base64,").removeprefix("IBAN").strip("\"'")
    assert left in ("person1@example.com", "secret_1", "192.0.2.1") or {*left} <= {
        *"GBgb0123456789Xx -.–+()/\n\uff0b\u200b"
    }, left
    assert spelled not in found.messages[0].content
    happened(f"replaced as {entity}")


def test_one_pseudonym_for_all_spellings() -> None:
    found = scan("write to jane@acme.org", '{"to": "jane (at) acme.org", "copy": "jane&#64;acme.org"}')
    assert found.messages[1].content == '{"to": "person1@example.com", "copy": "person1@example.com"}'
    assert found.found == {"EMAIL_ADDRESS": 1}


@pytest.mark.attack("privacy", "obfuscated values outside the user's text")
def test_system_turns_calls_and_keys_of_json(happened: Happened) -> None:
    spelled = "jane.doe (at) acme.org"
    call = ToolCall(id="c1", name="send", arguments=json.dumps({spelled: [{"to": b64(MAIL)}], "n": 4111111111111111}))
    turns = [
        Message(role="system", content=f"you answer for {spelled}"),
        Message(role="user", content=f'see {{"to": "jane.doe\\u0040acme.org", "{spelled}": 1}} please'),
        Message(role="assistant", content="", tool_calls=(call,)),
        Message(role="assistant", content=json.dumps({spelled: {"key": "jane.doe%40acme.org"}})),
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
        assert scan(f"curl -H 'Authorization: Bearer {token}' here").found == {"SECRET": 1}
        assert token not in scan(f"it is {token}, i think").messages[0].content
        happened("replaced")


ORDINARY = """\
look at amazon dot com or visit us at example dot com
meet me at 5 and dot the i
it’s “fine” — really… see 1914–18 and 6½ sacks ❤️ 👩‍👩‍👧
the café in Zürich sells crème brûlée for 5 €
Привет, мир! Как дела? Ελληνικά και русский
数据集的版本 is 3。ok
https://example.com/a%20b?q=c%2Fd&lang=en&amp;x=1
git checkout 9fceb02d0ae598e95dc970b74767f19372d61af8
Python x[::2] and y[:, 100::2], ratio 1::2, a:b:c:d:e:f:a:b
at dad::beef with add::bad::cafe and std::a::b and a::before
numbers[1::2] or rows[::-1] or f(x)[100::20]
turn left at main dot to
Play songs at random dot in loop
She works at acme dot com.
lunch @ cafe . it was good
Tom @ Home . Me and you
train @ station . no delay
meeting @ office . be there
party @ club.no thanks
I am @ work. me too
see (a) example.org, (b) the rest
docker pull alpine@sha256:4bcff63911fcb4448bd4fdacec207030997caf25e9bea4045fa6c8c44de311d1
uuid 6ba7b810-9dad-11d1-80b4-00c04fd430c8 was not found
internationalisation and PostgreSQLDatabase and InstantResales
the order is 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16
at 2024-01-31 12:30:45.123456 and 2024-02-01 13:31:46
iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk
a b c d e f g h i j k
SELECT * FROM t WHERE a = 'x' AND b = 'y' -- \\d+ \\w
""".splitlines()


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_texts_hold_nothing(text: str) -> None:
    assert not scan(text).found


@pytest.mark.parametrize(
    "address",
    ["2001:db8::1", "fe80::1%eth0", "::ffff:192.0.2.1", "2a02:8109:9a00::1", "2001:db8:1:2:3:4:5:6", "[2001:db8::7]"],
)
def test_addresses_of_computers_are_found(address: str) -> None:
    assert scan(f"ping {address} now").found == {"IP_ADDRESS": 1}
    assert scan(f"hosts[{address.strip('[]')}]").found == ({} if address[0] == "f" else {"IP_ADDRESS": 1})


def test_numbers_without_valid_check_digits() -> None:
    assert not list(find_cards("4111 1111 1111 1112 and 4111.1111.1111.1113"))
    assert not list(find_ibans("gb82 west 1234 5698 7654 33 and xx82 west 1234 5698 7654 32"))


plain = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)


@given(plain, st.sampled_from(sorted(TRICKS)), st.integers(0, 10_000), plain)
@examples(max_examples=80, deadline=None)
def test_views_map_back_to_the_text(before: str, trick: str, seed: int, after: str) -> None:
    text = f"{before} {TRICKS[trick](Random(seed), MAIL)} {after}"
    for view in views_of(text):
        assert len(view.text) == len(view.starts) == len(view.ends)
        assert all(0 <= start < end <= len(text) for start, end in zip(view.starts, view.ends, strict=True))
        assert list(view.starts) == sorted(view.starts)
        assert list(view.ends) == sorted(view.ends)
        for place, (start, end) in enumerate(zip(view.starts, view.ends, strict=True)):
            assert (
                end - start > 1
                or text[start] == view.text[place]
                or not text[start].isascii()
                or text[start] in "\r\n\t="
            )


words = st.lists(
    st.sampled_from(["hello", "the", "naïve", "“quoted”", "—", "ok", "日本", "мир", "50%", "&", "a=b", "x\ny"]),
    max_size=8,
)


@given(words, st.sampled_from(FOR["EMAIL_ADDRESS"]), st.integers(0, 10_000), words)
@examples(max_examples=80, deadline=None)
def test_masking_covers_exactly_the_value(before: list[str], trick: str, seed: int, after: list[str]) -> None:
    value = TRICKS[trick](Random(seed), MAIL)
    lead, tail = " ".join(("so", *before, "is: ")), " ".join((" ;", *after))
    found = scan(lead + value + tail)
    assert found.messages is not None
    assert found.messages[0].content == f"{lead}person1@example.com{tail}"


@pytest.mark.attack("privacy", "texts made to be slow to decode")
@pytest.mark.parametrize(
    "piece",
    [
        "%25",
        "&amp;",
        "\\u005c",
        "A",
        "QUFB",
        "dGhlIHF1aWNrIGJyb3du ",
        "a (at) b ",
        "a dot ",
        "a at b dot ",
        "4 ",
        "4111 ",
        "GB82 ",
        "ab@",
        "\u200ba",
        "а",
        "a\n",
        "'+'",
        "4a6f",
        "=40",
        "a-",
        "&#",
        "jane&#64;acme.org ",
        "x@y dot ",
        " ",
        "\n",
        "a.",
        "a_dot_",
        "'  ",
        "@a.",
        "(",
        "\\",
        "&#0",
        "0",
        "a**@**",
        "x @ y . it ",
        "a@",
        "1::2 ",
        "\u00a0",
    ],
)
def test_hostile_texts_take_linear_time(piece: str, happened: Happened) -> None:
    text = "dot (at) '+' &\n" + (piece * 30_000)[:30_000]
    began = time.process_time()
    for _ in views_of(text):
        pass
    list(find_cards(text)), list(find_ibans(text))
    assert time.process_time() - began < 5
    happened("in time")
