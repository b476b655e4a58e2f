"""Each event arrives at least once, signed, with the same id and body; what does not arrive is kept. Settings."""

import base64
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from openai.types.webhooks import FineTuningJobCancelledWebhookEvent, FineTuningJobFailedWebhookEvent
from typer.testing import CliRunner

from tests.acting import do
from tests.forked import run_forked
from tests.http_server import answering
from tests.tiny_project import settings
from tests.waiting import until
from tests.webhooks.conftest import SECRET, Receiver, deliverer, deliverer_of, project_of
from tunesmith.cli.main import app
from tunesmith.core.errors import Refused, UsageError
from tunesmith.jobs import leases, queue
from tunesmith.jobs.queue import JobError
from tunesmith.project import parse_settings
from tunesmith.services import monitoring
from tunesmith.store.people import identities
from tunesmith.store.store import Store
from tunesmith.webhooks import deliveries, sending
from tunesmith.webhooks.sending import secrets_of, signed_headers


def ended(store: Store, kind: str = "run", error: str = "", what: str = "private text") -> int:
    """The number of a job that somebody performed."""
    actor = identities.ensure_owner(store).name
    number = queue.add(store, kind, {"a": 1}, project="tiny", actor=actor).id
    lease = leases.claim(store, "w", [kind], project="tiny")
    assert lease is not None
    leases.finish(store, lease, {}, JobError(code=error, what=what) if error else None)
    return number


def documents(receiver: Receiver) -> list[dict[str, Any]]:
    return [json.loads(body) for _, body in receiver.got]


def test_openais_client_reads_our_fine_tuning_events(store: Store, receiver: Receiver) -> None:
    sender = deliverer(store, receiver.url)
    number = ended(store, "fine_tuning", "gate_failed")
    waiting = queue.add(store, "fine_tuning", {}, project="tiny", actor="olive").id
    queue.cancel(store, waiting, actor="olive")
    sender.turn()
    client = openai.OpenAI(api_key="none", webhook_secret=SECRET)
    (headers, body), (other_headers, other) = receiver.got
    event = client.webhooks.unwrap(body, headers)
    assert isinstance(event, FineTuningJobFailedWebhookEvent)
    assert (event.data.id, event.object) == (f"ftjob-{number}", "event")
    assert abs(event.created_at - time.time()) < 60
    assert event.id == headers["webhook-id"]
    assert isinstance(client.webhooks.unwrap(other, other_headers), FineTuningJobCancelledWebhookEvent)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body.replace(b"failed", b"succeeded"), headers)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body, {**headers, "webhook-id": "evt_other"})


def test_a_failure_is_tried_again_later_and_later_until_it_is_given_up(
    store: Store, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, at = deliverer(store, receiver.url), [time.time()]
    monkeypatch.setattr("tunesmith.services.monitoring.time.time", lambda: at[0])
    receiver.answers = [500, 302, *[503] * 6]
    number = ended(store)
    sender.turn()
    for delay in deliveries.DELAYS:
        at[0] += delay * 0.79
        sender.turn()
        before = len(receiver.got)
        at[0] += delay * 0.42
        sender.turn()
        assert len(receiver.got) == before + 1, "tried once, after its delay and no redirect followed"
    at[0] += 1e6
    sender.turn()
    assert len(receiver.got) == 8
    assert len({(headers["webhook-id"], body) for headers, body in receiver.got}) == 1
    project = project_of(store, ops={"url": receiver.url, "secret": "HOOK_SECRET"})
    found = monitoring.list_webhooks(project)
    assert [(each.waiting, each.given_up) for each in found.webhooks] == [(0, 1)]
    assert [(each.type, each.attempts, each.error) for each in found.failed] == [("job.succeeded", 8, "answered 503")]
    ended(store)
    sender.turn()
    assert len(receiver.got) == 9, "others are sent"
    assert do(project, monitoring.retry_webhook, webhook="ops").events == 1
    sender.turn()
    assert [each["data"]["job"] for each in documents(receiver)][-2:] == [number + 1, number]
    assert monitoring.list_webhooks(project).failed == ()
    identities.add_user(store, "ann", ["approver"], actor="olive")
    with pytest.raises(Refused):
        do(project, monitoring.retry_webhook, actor="ann", webhook="ops")


def test_a_process_killed_after_sending_sends_the_same_id_again(
    store: Store, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = project_of(store, ops={"url": receiver.url, "secret": "HOOK_SECRET"})
    deliverer_of(project).turn()
    ended(store)
    store.engine.dispose()

    def killed() -> None:
        monkeypatch.setattr(deliveries, "record", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        deliverer_of(project).turn()

    assert run_forked(killed) == signal.SIGKILL
    deliverer_of(project).turn()
    deliverer_of(project).turn()
    assert len(receiver.got) == 2
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1


def test_a_webhook_gets_what_happens_from_then_on_and_what_it_asked_for(store: Store, receiver: Receiver) -> None:
    """And no text that people wrote."""
    ended(store)
    sender = deliverer(store, receiver.url, events=["job.failed", "recall.started"])
    ended(store)
    ended(store, error="refused", what="SECRET row text")
    with store.change("olive", "recall.start", "row SECRET", {"reason": "SECRET", "reached": [], "aliases": []}):
        pass
    sender.turn()
    failed, started = documents(receiver)
    assert (failed["type"], failed["data"]["error"], started["type"]) == ("job.failed", "refused", "recall.started")
    assert b"SECRET" not in b"".join(body for _, body in receiver.got)
    receiver.answers = [500]
    ended(store, error="refused")
    sender.turn()
    other = deliverer_of(project_of(store, other={"url": receiver.url, "secret": "HOOK_SECRET"}))
    other.turn()
    assert deliveries.count(store, "tiny") == {}, "nothing waits for a webhook that is gone"
    other.turn()
    assert len(receiver.got) == 3


def test_a_webhook_that_hangs_or_is_away_keeps_no_other_waiting(
    store: Store, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = Receiver()
    hanging.drips = True
    both = {"a": {"url": hanging.url, "secret": "HOOK_SECRET"}, "b": {"url": receiver.url, "secret": "HOOK_SECRET"}}
    sender = deliverer_of(project_of(store, **both))
    sender.turn()
    for _ in range(3):
        ended(store)
    monkeypatch.setattr(sending, "SECONDS", 3.0)
    with answering(hanging):
        sender.turn()
    assert (len(hanging.got), len(receiver.got)) == (1, 3)
    assert deliveries.failed(store, "tiny")[0].error == "no answer within 3 s"
    assert deliveries.count(store, "tiny") == {("a", False): 3}
    sender = deliverer(store, "http://127.0.0.1:9/token-in-the-path")
    ended(store)
    sender.turn()
    failed = deliveries.failed(store, "tiny")[-1]
    assert ("could not be reached" in failed.error, "token" in failed.error) == (True, False)


def test_one_process_sends_at_a_time(store: Store, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "_POLL", 0.05)
    monkeypatch.setattr(sending, "_HELD", 0.05)
    sender = deliverer(store, receiver.url)
    ended(store)
    with store.lock("webhooks tiny", "another worker"):
        thread = threading.Thread(target=sender.run)
        thread.start()
        time.sleep(0.5)
        assert receiver.got == []
    until(lambda: receiver.got)
    number = ended(store)
    sender.stopping.set()
    thread.join()
    assert documents(receiver)[-1]["data"]["job"] == number, "sent before it ends"


# What the project file and the environment may say of webhooks, and the commands


HOOK = {"url": "https://example.org/hook", "secret": "HOOK_SECRET"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"url": "http://example.org/hook"}, "plain_http"),
        ({"url": "http://127.0.0.1.example.org/hook"}, "plain_http"),
        ({"url": "https://user:password@example.org/"}, "user and password"),
        ({"url": "file:///etc/passwd"}, "https://HOST"),
        ({"url": "https://example.org:port/"}, "no URL"),
        ({"url": "https://example.org/a\r\nx: y"}, "https://HOST"),
        ({"events": ["job.ended"]}, "job.succeeded"),
        ({"secret": "whsec_abc="}, "pattern"),
    ],
)
def test_what_is_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_settings(yaml.safe_dump({**settings(), "webhooks": {"ops": {**HOOK, **changed}}}), "test")


def test_what_is_taken_and_changes_no_result(store: Store) -> None:
    plain = {**HOOK, "url": "http://example.org/", "plain_http": True}
    assert project_of(store, ops=plain).settings.webhooks["ops"].host == "example.org"
    assert project_of(store, ops=plain).settings.digest == project_of(store).settings.digest
    for url in ("http://localhost:8/", "http://127.0.0.1/", "http://[::1]:8/", "https://example.org/"):
        assert project_of(store, ops={**HOOK, "url": url}).settings.webhooks["ops"].url == url


@pytest.mark.parametrize("given", ["", "hunter2", "whsec_!", "whsec_c2hvcnQ=", SECRET.removeprefix("whsec_")])
def test_a_bad_secret_is_refused_and_never_shown(store: Store, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("HOOK_SECRET", given)
    with pytest.raises(UsageError, match="HOOK_SECRET") as refused:
        secrets_of(project_of(store, ops=HOOK).settings.webhooks)
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
