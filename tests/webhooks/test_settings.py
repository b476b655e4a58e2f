"""What the project file and the environment may say of webhooks, and the commands."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.tiny_project import settings
from tests.webhooks.conftest import SECRET, Receiver, project_of
from tunesmith.cli.main import app
from tunesmith.core.errors import UsageError
from tunesmith.project import parse_settings
from tunesmith.services.webhooks import check_secrets
from tunesmith.store.store import Store
from tunesmith.webhooks.signing import signed_headers

HOOK = {"url": "https://example.org/hook", "secret": "HOOK_SECRET"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"url": "http://example.org/hook"}, "plain_http"),
        ({"url": "http://127.0.0.1.example.org/hook"}, "plain_http"),
        ({"url": "http://localhost.example.org/hook"}, "plain_http"),
        ({"url": "https://user:password@example.org/"}, "user and password"),
        ({"url": "file:///etc/passwd"}, "https://HOST"),
        ({"url": "https://"}, "https://HOST"),
        ({"url": "https://example.org:port/"}, "no URL"),
        ({"url": "https://example.org/a\r\nx: y"}, "https://HOST"),
        ({"events": ["job.ended"]}, "job.succeeded"),
        ({"events": []}, "at least 1"),
        ({"secret": "whsec_abc="}, "pattern"),
        ({"retries": 3}, "no setting 'retries'"),
    ],
)
def test_what_is_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_settings(yaml.safe_dump({**settings(), "webhooks": {"ops": {**HOOK, **changed}}}), "test")


@pytest.mark.parametrize("url", ["http://localhost:8/", "http://127.0.0.1/", "http://[::1]:8/", "https://example.org/"])
def test_what_is_taken(store: Store, url: str) -> None:
    assert project_of(store, ops={**HOOK, "url": url}).settings.webhooks["ops"].url == url


def test_plain_http_must_be_stated(store: Store) -> None:
    webhook = {**HOOK, "url": "http://example.org/", "plain_http": True}
    assert project_of(store, ops=webhook).settings.webhooks["ops"].host == "example.org"


def test_webhooks_change_no_result(store: Store) -> None:
    assert project_of(store, ops=HOOK).settings.digest == project_of(store).settings.digest


@pytest.mark.parametrize("given", ["", "hunter2", "whsec_!", "whsec_c2hvcnQ=", SECRET.removeprefix("whsec_")])
def test_a_bad_secret_is_refused_and_never_shown(store: Store, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("HOOK_SECRET", given)
    with pytest.raises(UsageError, match="HOOK_SECRET") as refused:
        check_secrets(project_of(store, ops=HOOK))
    assert refused.value.where == "webhooks.ops.secret"
    assert not given or given not in f"{refused.value.what} {refused.value.fix}"


def test_the_example_of_the_standard() -> None:
    """From the scheme's own tests of its libraries."""
    secret = base64.b64decode(SECRET.removeprefix("whsec_"))
    headers = signed_headers(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_commands(tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_USER", "olive")
    webhooks = {"webhooks": {"ops": {**HOOK, "url": receiver.url, "events": ["job.failed"]}}}
    (tmp_path / "tunesmith.yaml").write_text(yaml.safe_dump({**settings(), **webhooks}))
    (tmp_path / "schema.json").write_text("{}")

    def run(*words: str) -> tuple[int, dict[str, Any]]:
        done = CliRunner().invoke(app, ["-C", str(tmp_path), "webhooks", *words, "--json"])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.exit_code, json.loads(done.stdout)

    code, listed = run("list")
    shown = {"name": "ops", "host": "127.0.0.1", "events": ["job.failed"], "waiting": 0, "given_up": 0}
    assert (code, listed) == (0, {"webhooks": [shown], "failed": []})
    assert run("test", "ops")[1]["problem"] == ""
    receiver.answers = [404]
    code, tested = run("test", "ops")
    assert (code, tested["problem"]) == (1, "answered 404")
    assert json.loads(receiver.got[0][1])["type"] == "webhook.test"
    assert run("retry", "ops") == (0, {"webhook": "ops", "events": 0})
    monkeypatch.delenv("HOOK_SECRET")
    for words in (["worker"], ["serve"], ["webhooks", "test", "ops"]):
        refused = CliRunner().invoke(app, ["-C", str(tmp_path), *words])
        assert isinstance(refused.exception, UsageError), words
        assert "HOOK_SECRET is not set" in refused.exception.what
    unknown = CliRunner().invoke(app, ["-C", str(tmp_path), "webhooks", "test", "other"])
    assert isinstance(unknown.exception, UsageError)
