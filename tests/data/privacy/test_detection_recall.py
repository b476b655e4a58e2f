"""What the scan finds is measured on the dataset's own rows, and what it missed is bounded."""

from __future__ import annotations

import json
import stat
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
from cryptography.fernet import Fernet
from scipy.stats import beta, binom

from tests.data.rows import build, many_rows, row, settings, write_jsonl
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Message
from tunesmith.data.privacy.detection_recall import Measured, measure, probably_remaining, recall_at_least
from tunesmith.data.privacy.entities import Finder, Finding
from tunesmith.data.privacy.originals import KEY, read_originals
from tunesmith.data.privacy.scan import Scanner
from tunesmith.data.privacy.synthetic_pii import MAKERS, SECRETS
from tunesmith.data.settings import ENTITIES, MODEL_ENTITIES, Privacy

PRIVATE = {"entities": ["EMAIL_ADDRESS", "SECRET"], "synthetic_values": 20}


def whole(inserted: int, found: int) -> Measured:
    return Measured(inserted, found, inserted, found, found, found)


@pytest.mark.parametrize("entity", sorted(set(ENTITIES) - {"SECRET", "PHONE_NUMBER"}))
def test_made_up_values_are_of_their_kind(entity: str) -> None:
    assert {*ENTITIES, *MODEL_ENTITIES} <= MAKERS.keys()
    finder = Finder(Privacy(entities=(entity,)))
    values = [MAKERS[entity](Random(n)) for n in range(30)]
    assert len(set(values)) > 25
    for value, found in zip(values, finder.find([f"it says {value} there" for value in values]), strict=True):
        assert [one.end - one.start for one in found] == [len(value)], value


def test_what_cannot_be_found_is_measured_as_lost() -> None:
    chosen = Privacy.model_validate(
        {
            "entities": [],
            "synthetic_values": 30,
            "recognisers": {"BADGE": {"regex": r"B-\d{4}", "score": 0.9, "examples": ["B-1234", "badge 77"]}},
        }
    )
    talk = [[Message(role="user", content="let me in please"), Message(role="assistant", content="ok then")]]
    measured = measure(Scanner(chosen), chosen, talk)["BADGE"]
    assert measured.inserted == 30
    assert 5 < measured.found < 25  # of the two examples one does not fit the pattern
    assert measured.right == measured.new


class _WithoutKeys(Scanner):
    """Does not look at the keys of JSON."""

    def findings(self, texts: Sequence[str], keys: Sequence[str] = ()) -> list[list[Finding]]:
        return super().findings(texts)


def login(n: int) -> dict[str, str]:
    return {"action": "login", "password": f"aB{n:03d}xy&Zq"}


def test_passwords_under_keys_of_json_are_inserted_too() -> None:
    chosen = Privacy(entities=("SECRET",), synthetic_values=100)
    talks = [
        [
            Message(role="user", content=f"log in as user {n} please"),
            Message(role="assistant", content=json.dumps(login(n))),
        ]
        for n in range(20)
    ]
    assert measure(Scanner(chosen), chosen, talks)["SECRET"].found >= 95
    missed = 100 - measure(_WithoutKeys(chosen), chosen, talks)["SECRET"].found
    assert 30 < missed < 70  # half of the values are passwords, which are found by their keys only


def test_the_bounds_are_clopper_pearson_and_the_binomials_own() -> None:
    assert recall_at_least(18, 20, 0.05) == pytest.approx(beta.ppf(0.05, 18, 3))
    assert binom.sf(17, 20, recall_at_least(18, 20, 0.05)) == pytest.approx(0.05)
    assert recall_at_least(0, 20, 0.05) == 0
    # One entity: the largest number missed that is not yet too unlikely, at the recall's lower bound.
    left = probably_remaining({"A": 7}, {"A": whole(40, 36)})
    low = recall_at_least(36, 40, 0.025)
    assert left is not None
    assert binom.cdf(7, 7 + left, low) > 0.025 >= binom.cdf(7, 7 + left + 1, low)
    assert probably_remaining({"A": 0}, {"A": whole(20, 0)}) is None
    assert probably_remaining({"A": 70}, {"A": whole(40, 36)}) > left


def test_the_bound_holds_as_often_as_it_says() -> None:
    held = 0
    for n in range(100):
        chance = Random(n)
        recall, total = chance.uniform(0.6, 0.95), chance.randint(0, 60)
        found = sum(chance.random() < recall for _ in range(total))
        seen = sum(chance.random() < recall for _ in range(60))
        bound = probably_remaining({"A": found}, {"A": whole(60, seen)})
        held += bound is not None and total - found <= bound
    assert held / 100 >= 0.95


def test_the_record_carries_fields_measured_error_and_bound(tmp_path: Path) -> None:
    rows = [*many_rows(60), row("mail jane@acme.org about amber things", "sent to jane@acme.org")]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    dataset = build(tmp_path, settings(privacy=PRIVATE))
    scan = dataset.record.body["privacy_scan"]
    assert scan["fields"] == {"assistant": {"EMAIL_ADDRESS": 1}, "user": {"EMAIL_ADDRESS": 1}}
    measured = scan["synthetic"]["EMAIL_ADDRESS"]
    assert (measured["inserted"], measured["found"], measured["precision_by_character"]) == (20, 20, 1.0)
    assert 0.8 < measured["recall_at_least"] < measured["recall"]
    assert scan["left"]["unmeasured"] == []
    assert 0 < scan["left"]["at_most"] < 5
    assert scan["reference"]["entities"]["EMAIL_ADDRESS"]["recall"] == 1.0
    assert build(tmp_path, settings(privacy=PRIVATE)).digest == dataset.digest


def test_a_gate_on_what_is_probably_left(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [*many_rows(60), row("mail jane@acme.org about amber", "ok")])
    build(tmp_path, settings(privacy={**PRIVATE, "left_at_most": 5}))
    with pytest.raises(Refused, match="may remain") as caught:
        build(tmp_path, settings(privacy={**PRIVATE, "left_at_most": 0}))
    assert caught.value.exit_code == 3
    # What is only reported is left for certain.
    with pytest.raises(Refused, match="may remain"):
        build(tmp_path, settings(privacy={**PRIVATE, "synthetic_values": 300, "left_at_most": 0, "action": "report"}))


def test_a_gate_needs_every_kind_to_be_measured(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", many_rows(60))
    with pytest.raises(Refused, match="US_PASSPORT"):
        build(tmp_path, settings(privacy={"entities": ["US_PASSPORT"], "left_at_most": 5}))
    with pytest.raises(ValueError, match="20 or more"):
        Privacy(left_at_most=5, synthetic_values=0)


def test_the_map_of_originals_is_encrypted_and_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "project"
    write_jsonl(project / "rows.jsonl", [*many_rows(60), row("mail jane@acme.org about amber", "ok")])
    chosen = settings(privacy={**PRIVATE, "originals": "../vault/originals.bin"})
    monkeypatch.delenv(KEY, raising=False)
    with pytest.raises(UsageError, match="no key"):
        build(project, chosen)
    monkeypatch.setenv(KEY, Fernet.generate_key().decode())
    dataset = build(project, chosen)
    kept = tmp_path / "vault" / "originals.bin"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert b"acme" not in kept.read_bytes()
    assert not any(
        b"jane@acme" in path.read_bytes() for path in project.rglob("*") if path.is_file() and path.name != "rows.jsonl"
    )
    (changed,) = [
        one
        for split in ("train", "validation", "test")
        for one in dataset.examples(split)
        if "person1" in one.messages[0].content
    ]
    assert read_originals(kept) == {changed.id: {"person1@example.com": "jane@acme.org"}}
    monkeypatch.setenv(KEY, Fernet.generate_key().decode())
    with pytest.raises(Refused, match="not the key"):
        read_originals(kept)
    with pytest.raises(UsageError, match="must not be in the store"):
        build(project, settings(privacy={**PRIVATE, "originals": ".tunesmith/originals.bin"}))
    with pytest.raises(ValueError, match="originals needs action: pseudonymise"):
        Privacy(originals="x", action="remove")


SENTENCES = ("please use {} for the upload", "i pasted {} into the chat", "the deploy key is {}", "export KEY={}")


@pytest.mark.parametrize("kind", sorted(SECRETS))
def test_secrets_of_every_kind_in_sentences(kind: str) -> None:
    scanner = Scanner(Privacy(entities=("SECRET",)))
    for n in range(8):
        value = SECRETS[kind](Random(n))
        frame = "my password is {}" if kind == "password" else SENTENCES[n % len(SENTENCES)]
        found = scanner.scan(
            [Message(role="user", content=frame.format(value)), Message(role="assistant", content="ok")]
        )
        secret = value.split(":")[2].split("@")[0] if kind == "url with password" else value
        assert secret not in found.messages[0].content, value


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("Authorization: Basic dXNlcjpwYXNzd29yZDEyMw==", "dXNlcjpwYXNzd29yZDEyMw=="),
        ("curl -H 'authorization: basic dXNlcjpwdw==' x.org", "dXNlcjpwdw=="),
        ("get https://a.windows.net/c?sr=b&sig=Zm9v%2BFyYmF6cXV4Zm9vYmFyYmF6cXV4Zm9vYmE%3D&se=2", "Zm9v"),
        ("the cache is at redis://:s3cr3tPw99@cache:6379/0", "s3cr3tPw99"),
        ("the cache is at redis://:p%40ssW0@cache:6379/0", "ssW0"),
    ],
)
def test_secrets_of_headers_and_addresses(text: str, secret: str) -> None:
    scanner = Scanner(Privacy(entities=("SECRET",)))
    found = scanner.scan([Message(role="user", content=text), Message(role="assistant", content="ok")])
    assert found.found == {"SECRET": 1}
    assert secret not in found.messages[0].content


CLEAN = """\
basic authentication, or Basic functionality for the AuthorizationHeader
redis://:$REDIS_PASSWORD@cache:6379/0 or redis://:<password>@cache:6379/0
how do i reset my password
the password is wrong again
what is the access token endpoint of the api
kubectl create secret generic db --from-literal=password=$DB_PASSWORD
curl -H "Authorization: Bearer $TOKEN" https://api.example.com/v1/items
git checkout 9fceb02d0ae598e95dc970b74767f19372d61af8
docker pull alpine@sha256:4bcff63911fcb4448bd4fdacec207030997caf25e9bea4045fa6c8c44de311d1
ssh-keygen -t ed25519 -f ~/.ssh/id_ed25519
aws s3 cp s3://bucket-2024/reports/2024-01-31.csv .
openssl rand -base64 32
export API_KEY=your-api-key-here
psql "postgresql://localhost:5432/app"
the session id is 6ba7b810-9dad-11d1-80b4-00c04fd430c8
forgot my passcode for the second time in 2024
set the token limit to 4096
""".splitlines()


def test_sentences_and_commands_without_secrets() -> None:
    scanner = Scanner(Privacy(entities=("SECRET",)))
    for text in CLEAN:
        assert not scanner.scan([Message(role="user", content=text), Message(role="assistant", content="ok")]).found, (
            text
        )
