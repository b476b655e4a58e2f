"""Registering, finding and opening versions, by use and by attack."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import delete, select, update

from tests.fabricate import (
    FINGERPRINT,
    Chain,
    adapter_config,
    adapter_files,
    adapter_tensors,
    approve,
    encode,
    put_base,
    put_chain,
    put_training,
    put_verdict,
)
from tunesmith.candidates.candidate import Candidate, put_candidate
from tunesmith.core.clock import stamp
from tunesmith.core.digests import digest_bytes
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.scope import Scope
from tunesmith.models.weight_files import ADAPTER_FILE, CONFIG_FILE
from tunesmith.registry import registration
from tunesmith.registry.aliases import set_alias
from tunesmith.registry.licence_duties import NOTICE
from tunesmith.registry.lineage import tree
from tunesmith.registry.opening import verified_copy
from tunesmith.registry.registration import register
from tunesmith.registry.signing import release
from tunesmith.registry.signing import signatures as signing
from tunesmith.registry.verification import verify_version
from tunesmith.registry.versions import Version, list_versions, load_version, resolve
from tunesmith.store import database
from tunesmith.store.people import identities
from tunesmith.store.records import Record
from tunesmith.store.store import Store
from tunesmith.store.tables import AuditRow, RecallRow, VersionRow


def actions(store: Store) -> list[str]:
    with database.reading(store.engine) as session:
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


def test_a_prompt_can_be_released_as_well(store: Store) -> None:
    version = register(store, name="intents", verdict=put_chain(store, tuned=False).verdict, actor="olive")
    assert {path.name for path in (store.root / "versions" / "intents" / "v1").iterdir()} == {
        NOTICE,
        "release.json",
        "model.sig",
    }
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
    with database.reading(store.engine) as session:
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
    assert not (store.root / "versions").exists()
    identities.add_user(store, "eve", ["engineer"], actor="olive", scope=Scope("acme", "eu"))
    for scope in (Scope(), Scope("other", "eu"), Scope("acme", "us")):
        with pytest.raises(Refused, match="may act only within acme/eu"):
            register(store, name="intents", verdict=chain.verdict, actor="eve", scope=scope)
    assert register(store, name="intents", verdict=chain.verdict, actor="eve", scope=Scope("acme", "eu")).number == 1


@pytest.mark.parametrize("name", ["", "../x", "a@v1", "ｉntents"])
def test_names_that_look_or_lead_elsewhere_are_wrong_usage(store: Store, chain: Chain, name: str) -> None:
    with pytest.raises(UsageError):
        register(store, name=name, verdict=chain.verdict, actor="olive")
    if name:
        for scope in ("tenant", "region"):
            with pytest.raises(UsageError):
                register(store, name="intents", verdict=chain.verdict, actor="olive", scope=Scope(**{scope: name}))
    assert not (store.root / "versions").exists()


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
    for forged in (body, {"name": "tuned", "verdict": "pass", "gates": []}, {"name": "tuned", "verdict": "pass"}):
        digest = store.put_record(typed.model_copy(update={"body": forged}))
        with pytest.raises(Refused, match="does not follow from the evaluation's scores"):
            register(store, name="intents", verdict=digest, actor="olive")
    with pytest.raises(UsageError, match="is a evaluation, not a verdict"):
        register(store, name="intents", verdict=chain.evaluation, actor="olive")


def candidate_with(store: Store, chain: Chain, **changes: Any) -> str:
    """A judged candidate that differs from the chain's."""
    record = store.record(chain.candidate)
    stated = {"name": "tuned", "base": chain.base, "prompt": "Answer.", "max_tokens": 16, "training": chain.training}
    candidate = put_candidate(
        store, Candidate.model_validate({**stated, "dataset": record.parents["dataset"], **changes})
    )
    return put_verdict(store, name="tuned", candidate=candidate, tuned=True, dataset=chain.dataset)[1]


def test_an_adapter_of_another_base_or_rendering_is_refused(store: Store, chain: Chain) -> None:
    with pytest.raises(Refused, match="another base"):
        register(store, name="intents", verdict=candidate_with(store, chain, base=put_base(store, 1)), actor="olive")
    files = adapter_files(chain.base, 5)
    training = put_training(store, chain.base, chain.dataset, files, digest_bytes(b"another template"))
    with pytest.raises(Refused, match="another tokenizer or chat template"):
        register(store, name="intents", verdict=candidate_with(store, chain, training=training), actor="olive")
    bare = put_training(store, chain.base, chain.dataset, {CONFIG_FILE: b"{}"}, FINGERPRINT)
    with pytest.raises(Refused, match="neither an adapter nor whole weights"):
        register(store, name="intents", verdict=candidate_with(store, chain, training=bare), actor="olive")


def zeroed(store: Store) -> bytes:
    tensors = {name: t * np.float32("lora_A" in name) for name, t in adapter_tensors().items()}
    return encode(tensors, put_base(store))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda store: {ADAPTER_FILE: zeroed(store)}, "changes nothing"),
        (lambda store: {ADAPTER_FILE: b"\x80\x04."}, "not readable as safetensors"),
        (lambda store: {CONFIG_FILE: json.dumps(adapter_config("x")).encode()}, "trained on another base"),
        (
            lambda store: {CONFIG_FILE: json.dumps(adapter_config(put_base(store), auto_mapping={})).encode()},
            "auto_mapping",
        ),
    ],
)
def test_a_bad_adapter_is_refused_and_leaves_nothing(
    store: Store, make: Callable[[Store], dict[str, bytes]], reason: str
) -> None:
    before = actions(store)
    files = {**adapter_files(put_base(store)), **make(store)}
    with pytest.raises(Refused, match=reason):
        register(store, name="intents", verdict=put_chain(store, files=files).verdict, actor="olive")
    assert not list((store.root / "versions").glob("*/*"))
    assert not list((store.root / "work").iterdir())
    assert set(actions(store)[len(before) :]) <= {"user.key", "test.use"}


def test_damaged_evidence_is_not_signed(store: Store, chain: Chain) -> None:
    path = store.blob_path(store.record(chain.evaluation).blobs["scores.jsonl"])
    path.chmod(0o644)
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(Refused, match="do not match its digest"):
        register(store, name="intents", verdict=chain.verdict, actor="olive")


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


# Finding


def point(store: Store, version: Version) -> None:
    """Make it the champion of its scope, under an override."""
    how: dict[str, Any] = {"expected": 0, "actor": "olive", "override_by": "olive", "scope": version.scope}
    with store.change("olive", "test.point", "intents", {}) as session:
        set_alias(session, name="intents", alias="champion", version=version, **how)


def test_a_version_is_found_by_label_alias_and_digest(store: Store, version: Version) -> None:
    point(store, version)
    for text in ("intents@v1", "intents@champion", version.digest, version.digest[7:15], version.digest[:15]):
        assert resolve(store, text) == version
    for text in ("intents@v2", "others@v1", "others@champion", "f" * 64):
        with pytest.raises(UsageError, match="there is no version"):
            resolve(store, text)
    for text in ("intents", "intents@", "intents@v0", "intents@challenger", "../x@v1", "%", "____", "abc", ""):
        with pytest.raises(UsageError, match="is not a"):
            resolve(store, text)


def test_a_version_of_another_scope_does_not_exist(store: Store, chain: Chain) -> None:
    version = register(store, name="intents", verdict=chain.verdict, actor="olive", scope=Scope("acme", "eu"))
    point(store, version)
    nothing = {
        "intents@v1": "intents@v9",
        "intents@champion": "others@champion",
        version.digest: "sha256:" + "0" * 64,
        version.digest[7:19]: "0" * 12,
    }
    for text, missing in nothing.items():
        assert resolve(store, text, scope=Scope("acme", "eu")) == version
        for tenant, region in (("", ""), ("other", "eu"), ("acme", "us"), ("acme", "")):
            answers = []
            for asked in (text, missing):
                with pytest.raises(UsageError) as caught:
                    resolve(store, asked, scope=Scope(tenant, region))
                answers.append(str(caught.value).replace(asked, "..."))
            assert answers[0] == answers[1]


def test_a_row_that_was_pointed_elsewhere_is_noticed(store: Store, version: Version) -> None:
    with database.writing(store.engine) as session:
        session.execute(update(VersionRow).values(number=7))
    with pytest.raises(Refused, match="the database says intents@v7"):
        load_version(store, version.digest)
    with database.writing(store.engine) as session:
        session.execute(delete(VersionRow))
    with pytest.raises(Refused, match="not a registered version"), verified_copy(store, version):
        pass


# Opening


def test_files_swapped_after_verification_have_no_effect(store: Store, version: Version) -> None:
    folder = store.root / "versions" / "intents" / "v1"
    good = (folder / ADAPTER_FILE).read_bytes()
    with verified_copy(store, version) as loaded:
        (folder / ADAPTER_FILE).write_bytes(b"swapped")
        (folder / CONFIG_FILE).unlink()
        (folder / CONFIG_FILE).symlink_to("/etc/passwd")
        assert loaded.adapter is not None
        assert not loaded.adapter.is_relative_to(store.root)
        assert (loaded.version, loaded.candidate.tuned) == (version, True)
        assert (loaded.adapter / ADAPTER_FILE).read_bytes() == good
    for use in (
        lambda: verified_copy(store, version).__enter__(),
        lambda: register(store, name="intents", verdict=version.verdict, actor="olive"),
    ):
        with pytest.raises(Refused):
            use()
    assert len(list_versions(store)) == 1


def test_a_file_swapped_before_verification_is_refused(
    store: Store, version: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = store.root / "versions" / "intents" / "v1"
    good = (folder / ADAPTER_FILE).read_bytes()
    real = signing._copy_plain

    def copy_then_swap(source: Path, target: Path) -> None:
        real(source, target)
        (folder / ADAPTER_FILE).write_bytes(b"swapped at the worst moment")

    monkeypatch.setattr(signing, "_copy_plain", copy_then_swap)
    with verified_copy(store, version) as loaded:
        assert loaded.adapter is not None
        assert (loaded.adapter / ADAPTER_FILE).read_bytes() == good


def test_another_versions_folder_is_not_served_instead(store: Store, version: Version) -> None:
    other = register(store, name="intents", verdict=put_chain(store, seed=1).verdict, actor="olive")
    folder = store.root / "versions" / "intents"
    shutil.rmtree(folder / "v2")
    shutil.copytree(folder / "v1", folder / "v2")
    with pytest.raises(Refused), verified_copy(store, other):
        pass
    forged = version.model_copy(update={"digest": other.digest})
    with pytest.raises(Refused, match="not the version of that digest"), verified_copy(store, forged):
        pass


def test_recalled_versions_or_parents_are_not_opened(store: Store, version: Version, chain: Chain) -> None:
    for digest in (version.digest, chain.dataset, store.record(chain.dataset).blobs["train.jsonl"]):
        with database.writing(store.engine) as session:
            session.add(RecallRow(digest=digest, cause="row x", reason="consent withdrawn", at=stamp()))
        with pytest.raises(Refused, match="recalled: consent withdrawn"), verified_copy(store, version):
            pass
        with pytest.raises(Refused, match="recalled"):
            register(store, name="intents", verdict=chain.verdict, actor="olive")
        with database.writing(store.engine) as session:
            session.execute(delete(RecallRow))


def test_a_colleague_can_sign_for_a_signer_without_role(store: Store, chain: Chain) -> None:
    identities.add_user(store, "eve", ["engineer"], actor="olive")
    version = register(store, name="intents", verdict=chain.verdict, actor="eve")
    identities.deactivate(store, "eve", actor="olive")
    with pytest.raises(Refused, match="eve, who is deactivated"), verified_copy(store, version):
        pass
    assert not verify_version(store, version.label).ok  # both ways of asking give the same answer
    again = register(store, name="intents", verdict=chain.verdict, actor="olive")
    assert (again.label, again.signer) == ("intents@v2", "olive")


# Cut short, and at once


def test_a_number_that_a_folder_bears_is_never_given_again(store: Store, version: Version) -> None:
    with database.writing(store.engine) as session:  # as after restoring an older backup of the database
        session.execute(delete(VersionRow))
    other = register(store, name="intents", verdict=put_chain(store, seed=1).verdict, actor="olive")
    assert other.label == "intents@v2"
    assert verify_version(store, version.label).ok
    assert register(store, name="intents", verdict=version.verdict, actor="olive") == version


def test_a_folder_left_by_someone_else_is_not_taken_up(store: Store, version: Version, chain: Chain) -> None:
    with database.writing(store.engine) as session:
        session.execute(delete(VersionRow))
    identities.add_user(store, "eve", ["engineer"], actor="olive")
    assert register(store, name="intents", verdict=chain.verdict, actor="eve").label == "intents@v2"


def test_no_half_version_is_ever_a_traceback(store: Store, version: Version) -> None:
    record = store.record(version.digest)
    for body in ({}, {**record.body, "number": 0}, {**record.body, "name": "../x"}, {**record.body, "more": 1}):
        digest = store.put_record(Record(kind="version", parents=record.parents, blobs=record.blobs, body=body))
        with database.writing(store.engine) as session:
            session.execute(update(VersionRow).values(digest=digest))
        with pytest.raises(TunesmithError):
            resolve(store, "intents@v1")


def kinds(nodes: list[dict[str, Any]], key: str) -> set[str]:
    return {node["kind"] for node in nodes} | {kind for node in nodes for kind in kinds(node[key], key)}


def test_a_tree_shows_each_record_in_full_once(store: Store, version: Version, chain: Chain) -> None:
    approve(store, version, approver="ann")
    node = tree(store, chain.training or "").document()
    assert kinds(node["parents"], "parents") == {"base", "dataset"}
    assert kinds(node["children"], "children") == {
        "candidate",
        "answers",
        "evaluation",
        "verdict",
        "version",
        "approval",
    }
    assert node["says"] == "262 steps, loss 0.069068"

    def spelled_out(nodes: list[dict[str, Any]], key: str) -> list[str]:
        whole = [inner["digest"] for inner in nodes if not inner["seen"]]
        return whole + [digest for inner in nodes for digest in spelled_out(inner[key], key)]

    for way in ("parents", "children"):
        found = spelled_out(tree(store, version.digest if way == "parents" else chain.base).document()[way], way)
        assert len(found) == len(set(found))
