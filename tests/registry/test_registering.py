"""Registering: what becomes a signed version, and what changes meanwhile. Killed ones: attacks/test_kill_points.py."""

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import delete, select

from tests.fabricate import (
    FINGERPRINT,
    Chain,
    adapter_config,
    adapter_files,
    put_base,
    put_chain,
    put_training,
    put_verdict,
)
from tunesmith.candidates.candidate import Candidate, put_candidate
from tunesmith.core.digests import digest_bytes
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.text.names import Scope
from tunesmith.data.dataset import load_dataset
from tunesmith.models.weight_files import ADAPTER_FILE, CONFIG_FILE
from tunesmith.monitoring.recall import Cause, recall
from tunesmith.registry import registration
from tunesmith.registry.history import verify_log
from tunesmith.registry.licence_duties import NOTICE
from tunesmith.registry.opening import verified_copy
from tunesmith.registry.registration import register
from tunesmith.registry.signing import release
from tunesmith.registry.verification import verify_version
from tunesmith.registry.versions import Version, list_versions
from tunesmith.store.blobs.local import LocalBlobs
from tunesmith.store.people import identities
from tunesmith.store.store import RELEASE, Store
from tunesmith.store.tables import AuditRow, LockRow


def actions(store: Store) -> list[str]:
    with store.reading() as session:
        return list(session.scalars(select(AuditRow.action).order_by(AuditRow.seq)))


def test_a_passing_candidate_becomes_a_signed_version(store: Store, chain: Chain) -> None:
    version = register(store, name="intents", verdict=chain.verdict, actor="olive")
    assert (version.label, version.candidate, version.signer) == ("intents@v1", chain.candidate, "olive")
    folder = store.root / "versions" / "intents" / "v1"
    assert {path.name for path in folder.iterdir()} == {CONFIG_FILE, ADAPTER_FILE, NOTICE, "release.json", "model.sig"}
    assert digest_bytes((folder / "release.json").read_bytes()) == version.digest
    assert (folder / "release.json").read_bytes() == Path(store.record_where(version.digest)).read_bytes()
    body = store.record(version.digest).body
    assert body["records"] == sorted(set(body["records"]))
    assert {chain.base, chain.dataset, chain.training, chain.evaluation, chain.verdict} <= set(body["records"])
    assert actions(store)[-1] == "version.register"
    # A prompt can be released as well.
    version = register(store, name="prompt", verdict=put_chain(store, tuned=False).verdict, actor="olive")
    names = {path.name for path in (store.root / "versions" / "prompt" / "v1").iterdir()}
    assert names == {NOTICE, "release.json", "model.sig"}
    with verified_copy(store, version) as loaded:
        assert (loaded.candidate.name, loaded.adapter) == ("few-shot", None)
    assert verify_version(store, version.label).ok


def test_the_same_verdict_again_is_the_same_version(store: Store, version: Version, chain: Chain) -> None:
    before = actions(store)
    assert register(store, name="intents", verdict=chain.verdict, actor="olive") == version
    assert actions(store) == before
    second = register(store, name="intents", verdict=put_chain(store, seed=1).verdict, actor="olive")
    elsewhere = register(store, name="intents", verdict=chain.verdict, actor="olive", scope=Scope("acme"))
    assert [found.label for found in list_versions(store)] == ["intents@v1", "intents@v2", "intents@v3"]
    assert (second.number, elsewhere.number, elsewhere.tenant) == (2, 3, "acme")
    end = "2999-01-31T00:00:00Z"
    limited = register(store, name="intents", verdict=chain.verdict, actor="olive", expires_at=end)
    assert (limited.number, limited.expires_at) == (4, end)
    assert register(store, name="intents", verdict=chain.verdict, actor="olive", expires_at=end) == limited


@pytest.mark.parametrize("outcome", ["fail", "inconclusive"])
def test_a_failed_candidate_needs_an_admins_override(store: Store, outcome: str) -> None:
    verdict = put_chain(store, verdict=outcome).verdict
    with pytest.raises(Refused, match=rf"{outcome}: valid \({outcome}\)"):
        register(store, name="intents", verdict=verdict, actor="olive")
    identities.add_user(store, "eve", ["engineer"], actor="olive")
    with pytest.raises(Refused, match="it takes admin"):
        register(store, name="intents", verdict=verdict, actor="eve", override="I say so")
    with pytest.raises(UsageError, match="needs a reason"):
        register(store, name="intents", verdict=verdict, actor="olive", override="  ")
    version = register(store, name="intents", verdict=verdict, actor="olive", override="a drill")
    assert version.override == "a drill"
    found = verify_version(store, version.label)
    assert found.ok
    assert any("was overridden: a drill" in note for note in found.notes)
    with store.reading() as session:
        newest = session.scalars(select(AuditRow).order_by(AuditRow.seq.desc())).first()
    assert newest is not None
    assert newest.detail["override"] == "a drill"


def test_only_engineers_register(store: Store, chain: Chain) -> None:
    with pytest.raises(Refused, match="it takes engineer"):
        register(store, name="intents", verdict=chain.verdict, actor="ann")
    with pytest.raises(Refused, match="not a user"):
        register(store, name="intents", verdict=chain.verdict, actor="nobody")
    with pytest.raises(UsageError, match="nothing to override"):
        register(store, name="intents", verdict=chain.verdict, actor="olive", override="just in case")
    for name in ("", "../x", "a@v1", "ｉntents"):
        with pytest.raises(UsageError):
            register(store, name=name, verdict=chain.verdict, actor="olive")
    assert not (store.root / "versions").exists()
    identities.add_user(store, "eve", ["engineer"], actor="olive", scope=Scope("acme", "eu"))
    for scope in (Scope(), Scope("other", "eu"), Scope("acme", "us")):
        with pytest.raises(Refused, match="may act only within acme/eu"):
            register(store, name="intents", verdict=chain.verdict, actor="eve", scope=scope)
    assert register(store, name="intents", verdict=chain.verdict, actor="eve", scope=Scope("acme", "eu")).number == 1


def forge_verdict(store: Store, chain: Chain, **parents: str) -> str:
    record = store.record(chain.verdict)
    return store.put_record(record.model_copy(update={"parents": {**record.parents, **parents}}))


def test_evidence_of_another_candidate_or_forged_is_refused(store: Store, chain: Chain) -> None:
    other = put_chain(store, seed=1)
    for parents in ({"candidate": other.candidate}, {"evaluation": other.evaluation}):
        with pytest.raises(Refused, match="did not measure this candidate"):
            register(store, name="intents", verdict=forge_verdict(store, chain, **parents), actor="olive")
    typed = store.record(put_chain(store, verdict="fail", seed=2).verdict)
    body = {**typed.body, "verdict": "pass", "gates": [{**typed.body["gates"][0], "outcome": "pass", "value": 1.0}]}
    follows = "does not follow from the evaluation's scores"
    for forged, said in ((body, follows), ({**body, "gates": []}, follows), ({"verdict": "pass"}, "does not state")):
        digest = store.put_record(typed.model_copy(update={"body": forged}))
        with pytest.raises(Refused, match=said):
            register(store, name="intents", verdict=digest, actor="olive")
    with pytest.raises(UsageError, match="is a evaluation, not a verdict"):
        register(store, name="intents", verdict=chain.evaluation, actor="olive")
    path = store.blob_path(store.record(chain.evaluation).blobs["scores.jsonl"])
    path.chmod(0o644)
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(Refused, match="do not match its digest"):
        register(store, name="intents", verdict=chain.verdict, actor="olive")


def candidate_with(store: Store, chain: Chain, **changes: Any) -> str:
    """A judged candidate that differs from the chain's."""
    record = store.record(chain.candidate)
    stated = {"name": "tuned", "base": chain.base, "prompt": "Answer.", "max_tokens": 16, "training": chain.training}
    candidate = put_candidate(
        store, Candidate.model_validate({**stated, "dataset": record.parents["dataset"], **changes})
    )
    return put_verdict(store, name="tuned", candidate=candidate, tuned=True, dataset=chain.dataset)[1]


def test_an_adapter_of_another_base_or_rendering_is_refused(store: Store, chain: Chain) -> None:
    files = adapter_files(chain.base, 5)
    other = put_training(store, chain.base, chain.dataset, files, digest_bytes(b"another template"))
    bare = put_training(store, chain.base, chain.dataset, {CONFIG_FILE: b"{}"}, FINGERPRINT)
    for changes, said in (
        ({"base": put_base(store, 1)}, "another base"),
        ({"training": other}, "another tokenizer or chat template"),
        ({"training": bare}, "neither an adapter nor whole weights"),
    ):
        with pytest.raises(Refused, match=said):
            register(store, name="intents", verdict=candidate_with(store, chain, **changes), actor="olive")


def test_a_bad_adapter_is_refused_and_leaves_nothing(store: Store) -> None:
    before = actions(store)
    for bad, reason in (
        ({ADAPTER_FILE: b"\x80\x04."}, "not readable as safetensors"),
        ({CONFIG_FILE: json.dumps(adapter_config("x")).encode()}, "trained on another base"),
    ):
        files = {**adapter_files(put_base(store)), **bad}
        with pytest.raises(Refused, match=reason):
            register(store, name="intents", verdict=put_chain(store, files=files).verdict, actor="olive")
        assert not list((store.root / "versions").glob("*/*"))
        assert not list((store.root / "work").iterdir())
    assert set(actions(store)[len(before) :]) <= {"user.key", "test.use"}


def test_a_version_expires(store: Store, chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("2001-01-01T00:00:00Z", "2100-01-01T00:00:00", "tomorrow", ""):
        with pytest.raises(UsageError, match="not a time in the future"):
            register(store, name="intents", verdict=chain.verdict, actor="olive", expires_at=text)
    until = "2100-01-01T00:00:00Z"
    version = register(store, name="intents", verdict=chain.verdict, actor="olive", expires_at=until)
    assert verify_version(store, version.label).ok
    later = release.datetime.fromisoformat("2100-01-01T00:00:01Z")
    monkeypatch.setattr(release, "now", lambda: later)
    monkeypatch.setattr(registration, "now", lambda: later)
    assert "expired" in verify_version(store, version.label).problems[0].reason
    with pytest.raises(Refused, match="expired"), verified_copy(store, version):
        pass
    again = register(store, name="intents", verdict=chain.verdict, actor="olive")
    assert (again.label, again.expires_at) == ("intents@v2", None)


# What changes meanwhile


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
        with store.writing() as session:  # as if it could not be renewed in time
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


def test_the_weights_of_a_recalled_version_are_not_registered_under_another_name(store: Store, chain: Chain) -> None:
    assert chain.training is not None
    version = register(store, name="intents", verdict=chain.verdict, actor="olive")
    recall(store, Cause(kind="version", value=version.digest), reason="it swears", actor="olive")
    facts = {"base": chain.base, "dataset": chain.dataset, "training": chain.training}
    other = put_candidate(store, Candidate(name="later", prompt="Answer otherwise.", max_tokens=16, **facts))
    later = put_verdict(store, name="later", candidate=other, tuned=True, dataset=chain.dataset)[1]
    for verdict in (chain.verdict, later):
        with pytest.raises(Refused, match="made from something that was recalled: it swears") as caught:
            register(store, name="others", verdict=verdict, actor="olive")
        assert "judge a candidate without it" in str(caught.value.fix)
    # What was only compared with it may be registered.
    assert register(store, name="others", verdict=put_chain(store, seed=1).verdict, actor="olive").number == 1
