"""What changes while a registration works counts, and a killed one is carried on by the next call."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import delete

from tests.fabricate import Chain, approve, put_chain, put_verdict
from tests.forked import run_forked
from tunesmith.candidates.candidate import Candidate, put_candidate
from tunesmith.core.errors import Refused, TunesmithError
from tunesmith.data.dataset import load_dataset
from tunesmith.models.weight_files import ADAPTER_FILE
from tunesmith.monitoring.recall import Cause, recall
from tunesmith.registry import registration
from tunesmith.registry.approvals import require_approved
from tunesmith.registry.history import verify_log
from tunesmith.registry.registration import register
from tunesmith.registry.signing import keys
from tunesmith.registry.verification import verify_version
from tunesmith.registry.versions import Version, list_versions
from tunesmith.services.releases import versions
from tunesmith.store import audit, database
from tunesmith.store.blobs.local import LocalBlobs
from tunesmith.store.people import identities
from tunesmith.store.store import RELEASE, Store
from tunesmith.store.tables import LockRow


class Interrupted(LocalBlobs):
    """Calls back when a file with a certain name was put into a version's folder, once."""

    def __init__(self, root: Path, name: str, meanwhile: Callable[[], object]) -> None:
        super().__init__(root)
        self._name, self._meanwhile = name, meanwhile

    def put_file(self, key: str, source: Path) -> None:
        super().put_file(key, source)
        if key.startswith("versions/") and key.endswith(f"/{self._name}"):
            self._name = ""
            self._meanwhile()


def test_registrations_of_one_name_take_turns(store: Store, chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    second = put_chain(store, seed=1).verdict
    uploading, waiting = threading.Event(), threading.Event()

    def sleep(seconds: float) -> None:
        waiting.set()
        time.sleep(seconds)

    def until_the_other_waits() -> None:
        uploading.set()
        assert waiting.wait(60), "the other registration did not wait"

    monkeypatch.setattr(registration, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    slow = Store(store.root, blobs=Interrupted(store.root, ADAPTER_FILE, until_the_other_waits))
    identities.acting(store)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(register, slow, name="intents", verdict=chain.verdict, actor="olive")
        assert uploading.wait(60)
        elsewhere = register(store, name="lamps", verdict=second, actor="olive")  # another name does not wait
        assert (elsewhere.label, waiting.is_set()) == ("lamps@v1", False)
        after = register(store, name="intents", verdict=second, actor="olive")
        before = first.result()
    assert (before.label, after.label) == ("intents@v1", "intents@v2")
    for version, verdict in ((before, chain.verdict), (after, second)):
        assert version.verdict == verdict
        assert verify_version(store, version.label).ok


@pytest.mark.parametrize(
    ("roles", "outcome", "override", "left", "said"),
    [
        (["engineer"], "pass", None, ["steward"], "it takes engineer"),
        (["engineer", "admin"], "fail", "a drill", ["engineer"], "it takes admin"),
        (["engineer"], "pass", None, None, "recalled: consent withdrawn"),
    ],
)
def test_what_is_lost_while_weights_are_uploaded_counts(
    store: Store, roles: list[str], outcome: str, override: str | None, left: list[str] | None, said: str
) -> None:
    identities.add_user(store, "eve", roles, actor="olive")
    chain = put_chain(store, verdict=outcome)
    verdict = chain.verdict

    def lose() -> None:
        if left is None:
            _recall_row(store, chain)
        else:
            identities.set_roles(store, "eve", left, actor="olive")

    own = Store(store.root, blobs=Interrupted(store.root, RELEASE, lose))
    with pytest.raises(Refused, match=said):
        register(own, name="intents", verdict=verdict, actor="eve", override=override)
    assert store.version_folders("intents") == []
    assert list_versions(store) == []
    assert verify_log(store) == []


def test_who_lost_the_lock_registers_nothing(store: Store, chain: Chain) -> None:
    second = put_chain(store, seed=1).verdict

    def overtake() -> None:
        with database.writing(store.engine) as session:  # as if it could not be renewed in time
            session.execute(delete(LockRow))
        register(store, name="intents", verdict=second, actor="olive")

    own = Store(store.root, blobs=Interrupted(store.root, RELEASE, overtake))
    with pytest.raises(TunesmithError, match="another process registered a version of intents meanwhile"):
        register(own, name="intents", verdict=chain.verdict, actor="olive")
    assert [version.verdict for version in list_versions(store)] == [second]
    assert [ref.number for ref in store.version_folders("intents")] == [2]
    assert verify_version(store, "intents@v2").ok
    assert verify_log(store) == []
    assert register(store, name="intents", verdict=chain.verdict, actor="olive").label == "intents@v3"


def _recall_row(store: Store, chain: Chain) -> None:
    row = load_dataset(store, chain.dataset).examples("train")[0]
    recall(store, Cause(kind="row", value=row.id), reason="consent withdrawn", actor="olive")


def test_a_recalled_verdict_is_not_signed(store: Store, chain: Chain) -> None:
    _recall_row(store, chain)
    with pytest.raises(Refused, match="made from something that was recalled: consent withdrawn"):
        register(store, name="intents", verdict=chain.verdict, actor="olive")
    with pytest.raises(Refused, match="recalled: consent withdrawn") as caught:  # the newest one, which is the default
        versions.register(store, name="intents", risk=None, actor="olive")
    assert "tunesmith run" in str(caught.value.fix)
    failed = put_chain(store, seed=3, verdict="fail")
    _recall_row(store, failed)
    with pytest.raises(Refused, match="recalled: consent withdrawn"):
        register(store, name="intents", verdict=failed.verdict, actor="olive", override="I say so")
    assert store.version_folders("intents") == []


def test_the_weights_of_a_recalled_version_are_not_registered_under_another_name(store: Store, chain: Chain) -> None:
    assert chain.training is not None
    version = register(store, name="intents", verdict=chain.verdict, actor="olive")
    recall(store, Cause(kind="version", value=version.digest), reason="it swears", actor="olive")
    facts = {"base": chain.base, "dataset": chain.dataset, "training": chain.training}
    other = put_candidate(store, Candidate(name="later", prompt="Answer otherwise.", max_tokens=16, **facts))
    later = put_verdict(store, name="later", candidate=other, tuned=True, dataset=chain.dataset)[1]
    for verdict in (chain.verdict, later):
        with pytest.raises(Refused, match="recalled: it swears"):
            register(store, name="others", verdict=verdict, actor="olive")
    # What was only compared with it may be registered.
    assert register(store, name="others", verdict=put_chain(store, seed=1).verdict, actor="olive").number == 1


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_after(module: Any, name: str) -> None:
    real = getattr(module, name)

    def then_die(*given: Any, **named: Any) -> None:
        real(*given, **named)
        die()

    setattr(module, name, then_die)


def killed(store: Store, prepare: Callable[[], None], work: Callable[[Store], object]) -> bool:
    """Whether a forked child that does prepare() and then the work was killed; it has everything imported already."""

    def both() -> None:
        prepare()
        work(Store(store.root))

    store.engine.dispose()
    status = run_forked(both)
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
    return status != 0


def registered(store: Store, chain: Chain) -> Version:
    return register(store, name="intents", verdict=chain.verdict, actor="olive")


def check_registered(store: Store, chain: Chain) -> Version:
    version = registered(store, chain)
    assert version.label == "intents@v1"
    assert list_versions(store) == [version]
    assert verify_version(store, version.label).ok
    Store(store.root).engine.dispose()  # opening it, as each command does, removes what the killed process left
    assert list((store.root / "work").iterdir()) == []
    return version


def check_whole(store: Store, chain: Chain) -> None:
    version = check_registered(store, chain)
    approve(store, version, approver="ann")
    assert require_approved(store, version).approver == "ann"
    assert verify_log(store) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "times"),
    [("signed aside", 3), ("partly in place", 3), ("in place", 1), ("before commit", 3), ("committed", 1)],
)
def test_a_killed_registration_is_carried_on(store: Store, chain: Chain, moment: str, times: int) -> None:
    keys.ensure_key(store, "olive")  # it has an audit entry, at which the child must not be killed
    prepare = {
        "signed aside": lambda: die_after(registration, "sync_files"),
        "partly in place": lambda: die_after(LocalBlobs, "put_file"),
        "in place": lambda: die_after(Store, "put_version"),
        "before commit": lambda: setattr(audit, "append", die),
        "committed": lambda: setattr(identities, "publish_trust", die),
    }[moment]
    for _ in range(times):
        assert killed(store, prepare, lambda own: registered(own, chain))
    assert bool(store.version_folders("intents")) == (moment not in ("signed aside", "partly in place"))
    assert len(list_versions(store)) == (1 if moment == "committed" else 0)
    check_whole(store, chain)
