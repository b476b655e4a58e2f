"""Each event arrives at least once, signed, with the same id and body; what does not arrive is kept."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import openai
import pytest
from openai.types.webhooks import FineTuningJobCancelledWebhookEvent, FineTuningJobFailedWebhookEvent

from tests.forked import run_forked
from tests.http_server import answering
from tests.waiting import until
from tests.webhooks.conftest import SECRET, Receiver, deliverer, project_of
from tunesmith.core.errors import Refused
from tunesmith.jobs import leases, queue
from tunesmith.services import webhooks
from tunesmith.services.accounts.users import add_user
from tunesmith.services.webhooks import Deliverer
from tunesmith.store.people import identities
from tunesmith.store.store import Store
from tunesmith.webhooks import deliveries, sending


def ended(store: Store, kind: str = "run", error: str = "", what: str = "private text") -> int:
    """The number of a job that somebody performed."""
    actor = identities.ensure_owner(store).name
    number = queue.add(store, kind, {"a": 1}, project="tiny", actor=actor).id
    lease = leases.claim(store, "w", [kind], project="tiny")
    assert lease is not None
    leases.finish(store, lease, {}, {"code": error, "what": what} if error else None)
    return number


def documents(receiver: Receiver) -> list[dict[str, object]]:
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
    monkeypatch.setattr("tunesmith.services.webhooks.time.time", lambda: at[0])
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
    found = webhooks.list_webhooks(project)
    assert [(each.waiting, each.given_up) for each in found.webhooks] == [(0, 1)]
    assert [(each.type, each.attempts, each.error) for each in found.failed] == [("job.succeeded", 8, "answered 503")]
    ended(store)
    sender.turn()
    assert len(receiver.got) == 9, "others are sent"
    assert webhooks.retry(project, "ops").events == 1
    sender.turn()
    assert [each["data"]["job"] for each in documents(receiver)][-2:] == [number + 1, number]  # type: ignore[index]
    assert webhooks.list_webhooks(project).failed == ()
    add_user(store, "ann", ["approver"])
    with pytest.raises(Refused):
        webhooks.retry(project, "ops", actor="ann")


def test_a_process_killed_after_sending_sends_the_same_id_again(
    store: Store, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = project_of(store, ops={"url": receiver.url, "secret": "HOOK_SECRET"})
    Deliverer(project).turn()
    ended(store)
    store.engine.dispose()

    def killed() -> None:
        monkeypatch.setattr(deliveries, "record", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        Deliverer(project).turn()

    assert run_forked(killed) == signal.SIGKILL
    Deliverer(project).turn()
    Deliverer(project).turn()
    assert len(receiver.got) == 2
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1


def test_a_webhook_gets_what_happens_from_then_on_and_what_it_asked_for(store: Store, receiver: Receiver) -> None:
    ended(store)
    sender = deliverer(store, receiver.url, events=["job.failed"])
    ended(store)
    ended(store, error="refused")
    sender.turn()
    assert [(each["type"], each["data"]["error"]) for each in documents(receiver)] == [("job.failed", "refused")]  # type: ignore[index]
    receiver.answers = [500]
    ended(store, error="refused")
    sender.turn()
    other = Deliverer(project_of(store, other={"url": receiver.url, "secret": "HOOK_SECRET"}))
    other.turn()
    assert deliveries.count(store, "tiny") == {}, "nothing waits for a webhook that is gone"
    other.turn()
    assert len(receiver.got) == 2


def test_one_webhook_that_hangs_keeps_no_other_waiting(
    store: Store, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = Receiver()
    hanging.drips = True
    both = {"a": {"url": hanging.url, "secret": "HOOK_SECRET"}, "b": {"url": receiver.url, "secret": "HOOK_SECRET"}}
    sender = Deliverer(project_of(store, **both))
    sender.turn()
    for _ in range(3):
        ended(store)
    monkeypatch.setattr("tunesmith.services.webhooks.send", lambda queues: sending.send(queues, 3.0))
    with answering(hanging):
        sender.turn()
    assert (len(hanging.got), len(receiver.got)) == (1, 3)
    assert deliveries.failed(store, "tiny")[0].error == "no answer within 3 s"
    assert deliveries.count(store, "tiny") == {("a", False): 3}


def test_nobody_at_home_is_a_failure_that_names_no_address(store: Store, receiver: Receiver) -> None:
    sender = deliverer(store, "http://127.0.0.1:9/token-in-the-path")
    ended(store)
    sender.turn()
    (failed,) = deliveries.failed(store, "tiny")
    assert "could not be reached" in failed.error
    assert "token" not in failed.error


def test_one_process_sends_at_a_time(store: Store, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "_POLL", 0.05)
    monkeypatch.setattr(webhooks, "_HELD", 0.05)
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
    assert documents(receiver)[-1]["data"]["job"] == number, "sent before it ends"  # type: ignore[index]


def test_no_text_that_people_wrote_is_sent(store: Store, receiver: Receiver) -> None:
    sender = deliverer(store, receiver.url)
    ended(store, error="refused", what="SECRET row text")
    with store.change("olive", "recall.start", "row SECRET", {"reason": "SECRET", "reached": [], "aliases": []}):
        pass
    sender.turn()
    assert [each["type"] for each in documents(receiver)] == ["job.failed", "recall.started"]
    assert b"SECRET" not in b"".join(body for _, body in receiver.got)
