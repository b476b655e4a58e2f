"""Keys that have no form of their own are found by the words around them, however people paste them."""

from __future__ import annotations

from random import Random

import pytest

from tests.attack_table import Happened
from tunesmith.core.messages import Message
from tunesmith.data.privacy import credentials
from tunesmith.data.privacy.detection_recall import measure
from tunesmith.data.privacy.scan import Scanner
from tunesmith.data.privacy.synthetic_pii import KEY_FORMS, key_of_no_form
from tunesmith.data.settings import Privacy


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


def test_the_recall_estimate_shows_a_rule_that_drops_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Privacy(entities=("SECRET",), synthetic_values=200)
    rows = [[Message(role="user", content="what is on at the cinema tonight")]]
    assert measure(Scanner(settings), settings, rows)["SECRET"].found >= 0.99 * 200
    monkeypatch.setattr(credentials, "_is_random", lambda value: False)
    assert measure(Scanner(settings), settings, rows)["SECRET"].found < 0.95 * 200


def test_single_words_measure_no_less() -> None:
    settings = Privacy(entities=("SECRET",), synthetic_values=200)
    rows = [[Message(role="user", content="lights"), Message(role="assistant", content="on")]]
    assert measure(Scanner(settings), settings, rows)["SECRET"].found >= 0.99 * 200
