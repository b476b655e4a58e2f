"""What the scan finds is measured on the dataset's own rows, and what it missed is bounded."""

import json
import stat
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
from scipy.stats import beta, binom

from tests.attack_table import Happened
from tests.data.rows import build, held, many_rows, row, settings, write_jsonl
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Message
from tunesmith.data.privacy import credentials
from tunesmith.data.privacy.detection_recall import measure, probably_remaining, recall_at_least
from tunesmith.data.privacy.entities import Finder, FoundEntity
from tunesmith.data.privacy.originals import KEY, new_key, read_originals
from tunesmith.data.privacy.scan import Scan, Scanner
from tunesmith.data.privacy.synthetic_pii import KEY_FORMS, MAKERS, SECRETS, key_of_no_form
from tunesmith.data.settings import ENTITIES, MODEL_ENTITIES, Privacy
from tunesmith.records.dataset import SyntheticValues

PRIVATE = {"entities": ["EMAIL_ADDRESS", "SECRET"], "synthetic_values": 20}


@pytest.mark.parametrize("entity", sorted(set(ENTITIES) - {"SECRET", "PHONE_NUMBER"}))
def test_made_up_values_are_of_their_kind(entity: str) -> None:
    assert {*ENTITIES, *MODEL_ENTITIES} <= MAKERS.keys()
    finder = Finder(Privacy(entities=(entity,)))
    values = [MAKERS[entity](Random(n)) for n in range(30)]
    assert len(set(values)) > 25
    for value, found in zip(values, finder.find([f"it says {value} there" for value in values]), strict=True):
        assert [one.end - one.start for one in found] == [len(value)], value


def test_what_cannot_be_found_is_measured_as_lost() -> None:
    badge = {"regex": r"B-\d{4}", "score": 0.9, "examples": ["B-1234", "badge 77"]}
    chosen = Privacy.model_validate({"entities": [], "synthetic_values": 30, "recognisers": {"BADGE": badge}})
    talk = [[Message(role="user", content="let me in please"), Message(role="assistant", content="ok then")]]
    measured = measure(Scanner(chosen), talk)["BADGE"]
    assert measured.inserted == 30
    assert 5 < measured.found < 25  # of the two examples one does not fit the pattern
    assert measured.precision_by_character == 1


class _WithoutKeys(Scanner):
    """Does not look at the keys of JSON."""

    def findings(self, texts: Sequence[str], keys: Sequence[str] = ()) -> list[list[FoundEntity]]:
        return super().findings(texts)


def test_passwords_under_keys_of_json_are_inserted_too() -> None:
    chosen = Privacy(entities=("SECRET",), synthetic_values=100)
    asked, login = Message(role="user", content="log in"), json.dumps({"do": "login", "password": "aB031xy&Zq"})
    talks = [[asked, Message(role="assistant", content=login)]] * 20
    assert measure(Scanner(chosen), talks)["SECRET"].found >= 95
    missed = 100 - measure(_WithoutKeys(chosen), talks)["SECRET"].found
    assert 30 < missed < 70  # half of the values are passwords, which are found by their keys only


def _measured(inserted: int, found: int) -> SyntheticValues:
    rest = dict.fromkeys(("recall", "recall_at_least", "recall_by_character", "precision_by_character"), 0.0)
    return SyntheticValues(inserted=inserted, found=found, **rest)


def test_the_bounds_are_clopper_pearson_and_the_binomials_own() -> None:
    assert recall_at_least(18, 20, 0.05) == pytest.approx(beta.ppf(0.05, 18, 3))
    assert recall_at_least(0, 20, 0.05) == 0
    # One entity: the largest number missed that is not yet too unlikely, at the recall's lower bound.
    measured = {"A": _measured(40, 36)}
    left = probably_remaining({"A": 7}, measured)
    low = recall_at_least(36, 40, 0.025)
    assert left is not None
    assert binom.cdf(7, 7 + left, low) > 0.025 >= binom.cdf(7, 7 + left + 1, low)
    assert probably_remaining({"A": 70}, measured) > left
    assert probably_remaining({"A": 0}, {"A": _measured(20, 0)}) is None


def test_the_record_carries_fields_measured_error_and_bound_and_a_gate_holds_it(tmp_path: Path) -> None:
    rows = [*many_rows(60), row("mail jane@acme.org about amber things", "sent to jane@acme.org")]
    dataset = build(tmp_path, settings(privacy=PRIVATE), rows=rows)
    scan = dataset.record.body["privacy_scan"]
    assert scan["fields"] == {"assistant": {"EMAIL_ADDRESS": 1}, "user": {"EMAIL_ADDRESS": 1}}
    measured = scan["synthetic"]["EMAIL_ADDRESS"]
    assert (measured["inserted"], measured["found"], measured["precision_by_character"]) == (20, 20, 1.0)
    assert 0.8 < measured["recall_at_least"] < measured["recall"]
    assert scan["left"]["unmeasured"] == []
    assert 0 < scan["left"]["at_most"] < 5
    assert scan["reference"]["entities"]["EMAIL_ADDRESS"]["recall"] == 1.0
    assert build(tmp_path, settings(privacy=PRIVATE)).digest == dataset.digest
    build(tmp_path, settings(privacy={**PRIVATE, "left_at_most": 5}))
    for privacy, said in (
        ({**PRIVATE, "left_at_most": 0}, "up to .* may remain"),
        # What is only reported is left for certain.
        ({**PRIVATE, "synthetic_values": 300, "left_at_most": 0, "action": "report"}, "up to .* may remain"),
        ({"entities": ["US_PASSPORT"], "left_at_most": 5}, "US_PASSPORT"),
    ):
        with pytest.raises(Refused, match=said) as caught:
            build(tmp_path, settings(privacy=privacy))
        assert caught.value.exit_code == 3
    with pytest.raises(ValueError, match="20 or more"):
        Privacy(left_at_most=5, synthetic_values=0)


def test_the_map_of_originals_is_encrypted_and_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "project"
    write_jsonl(project / "rows.jsonl", [*many_rows(60), row("mail jane@acme.org about amber", "ok")])
    chosen = settings(privacy={**PRIVATE, "originals": "../vault/originals.bin"})
    monkeypatch.delenv(KEY, raising=False)
    with pytest.raises(UsageError, match="no key"):
        build(project, chosen)
    monkeypatch.setenv(KEY, new_key())
    dataset = build(project, chosen)
    kept = tmp_path / "vault" / "originals.bin"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    for path in (kept, *project.rglob("*")):
        assert path.is_dir() or path.name == "rows.jsonl" or b"jane@acme" not in path.read_bytes()
    (changed,) = [one for one in held(dataset) if "person1" in one.messages[0].content]
    assert read_originals(kept) == {changed.id: {"person1@example.com": "jane@acme.org"}}
    monkeypatch.setenv(KEY, new_key())
    with pytest.raises(Refused, match="not the key"):
        read_originals(kept)
    with pytest.raises(UsageError, match="must not be in the store"):
        build(project, settings(privacy={**PRIVATE, "originals": ".tunesmith/originals.bin"}))
    with pytest.raises(ValueError, match="originals needs action: pseudonymise"):
        Privacy(originals="x", action="remove")


SECRET = Scanner(Privacy(entities=("SECRET",)))


def scan(text: str) -> Scan:
    return SECRET.scan([Message(role="user", content=text), Message(role="assistant", content="ok")])


SENTENCES = ("please use {} for the upload", "i pasted {} into the chat", "the deploy key is {}", "export KEY={}")


@pytest.mark.parametrize("kind", sorted(SECRETS))
def test_secrets_of_every_kind_in_sentences(kind: str) -> None:
    for n in range(8):
        value = SECRETS[kind](Random(n))
        frame = "my password is {}" if kind == "password" else SENTENCES[n % len(SENTENCES)]
        secret = value.split(":")[2].split("@")[0] if kind == "url with password" else value
        assert secret not in scan(frame.format(value)).messages[0].content, value


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("curl -H 'authorization: basic dXNlcjpwdw==' x.org", "dXNlcjpwdw=="),
        ("get https://a.windows.net/c?sr=b&sig=Zm9v%2BFyYmF6cXV4Zm9vYmFyYmF6cXV4Zm9vYmE%3D&se=2", "Zm9v"),
        ("the cache is at redis://:s3cr3tPw99@cache:6379/0", "s3cr3tPw99"),
        ("the cache is at redis://:p%40ssW0@cache:6379/0", "ssW0"),
    ],
)
def test_secrets_of_headers_and_addresses(text: str, secret: str) -> None:
    found = scan(text)
    assert found.counts == {"SECRET": 1}
    assert secret not in found.messages[0].content


# Keys that have no form of their own are found by the words around them, however people paste them


def missed(form: str, count: int) -> list[str]:
    """Texts of this form whose key was not found whole. The padding of base 64 may stay."""
    texts = []
    for number in range(count):
        key = key_of_no_form(Random(f"{form} {number}")).rstrip("=")
        text = form.replace("{}", key, 1)
        places = {place for start, end in credentials.find_secrets(text) for place in range(start, end)}
        start = text.index(key)
        if not places.issuperset(range(start, start + len(key))):
            texts.append(text)
    return texts


@pytest.mark.attack("privacy", "random keys, as people paste them, 28 forms")
def test_random_keys_are_found_in_every_form(happened: Happened) -> None:
    texts = [text for form in KEY_FORMS for text in missed(form, 40)]
    happened("found", 40 * len(KEY_FORMS) - len(texts))
    happened("missed", len(texts))
    assert len(texts) <= 0.01 * 40 * len(KEY_FORMS), texts


@pytest.mark.parametrize(
    "text",
    [
        "client_secret=9f86d081884c7d659a2feaa0c55ad015", "api_key=277dc1f57d1fe0c6875ca2e3", "token=4f9a2b1c",
        "api key: 1b4e28ba-2fa1-41d2-883f-0016d3cca427", "my password is hunter2!", "secret=9kLmQ27xZp/a+bc3TyUv80Rw==",
    ],
)  # fmt: skip
def test_found(text: str) -> None:
    assert list(credentials.find_secrets(text)), text


@pytest.mark.parametrize(
    "text",
    [
        "token=getAccessTokenFromRequestHeader()", "the secret scanner flagged commit 9f86d081884c7d659a2feaa0c55ad015",
        "token 1.2.3", "the password must have 12characters", "token id 1b4e28ba-2fa1-41d2-883f-0016d3cca427",
        "X-Amz-S3session-Token is the token's header", "export TOKEN=your-token-here", "secret: src/app/Main2.java",
        "my password is wrong!", "sha256:9f86d081884c7d659a2feaa0c55ad0159f86d081884c7d659a2feaa0c55ad015",
    ],
)  # fmt: skip
def test_words_versions_and_checksums_are_no_keys(text: str) -> None:
    assert not list(credentials.find_secrets(text))


@pytest.mark.parametrize("said", [("what is on at the cinema tonight",), ("lights", "on")])
def test_the_recall_estimate_shows_a_rule_that_drops_keys(monkeypatch: pytest.MonkeyPatch, said: tuple[str]) -> None:
    settings = Privacy(entities=("SECRET",), synthetic_values=200)
    rows = [[Message(role=role, content=text) for role, text in zip(("user", "assistant"), said, strict=False)]]
    assert measure(Scanner(settings), rows)["SECRET"].found >= 0.99 * 200
    monkeypatch.setattr(credentials, "_is_random", lambda value: False)
    assert measure(Scanner(settings), rows)["SECRET"].found < 0.95 * 200
