"""Versions: found by label, alias and digest, opened by what was signed, and served while nothing speaks against it."""

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, update

from tests.fabricate import Chain, approve, put_chain, put_recall
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.text.names import Scope
from tunesmith.models.weight_files import ADAPTER_FILE, CONFIG_FILE
from tunesmith.registry import versions
from tunesmith.registry.approvals import check_may_serve
from tunesmith.registry.history import verify_log
from tunesmith.registry.opening import verified_copy
from tunesmith.registry.registration import register
from tunesmith.registry.serving import GRANTED, Permission, may_load, may_serve, set_alias
from tunesmith.registry.signing import release
from tunesmith.registry.signing import signatures as signing
from tunesmith.registry.signing.signatures import Expired, Untrusted
from tunesmith.registry.verification import verify_version
from tunesmith.registry.versions import Version, list_versions, load_version, resolve
from tunesmith.services.lineage import tree
from tunesmith.store.people import identities
from tunesmith.store.store import Store
from tunesmith.store.tables import AliasRow, RecallRow, VersionRow


def point(store: Store, version: Version | None, expected: int, **place: Any) -> versions.Alias:
    """Under an override: these tests are about the alias, not about approvals."""
    where = {"name": "intents", "override_by": "olive", **place}
    with store.change("olive", "test.point", "intents", {}) as session:
        return set_alias(session, version=version, expected=expected, actor="olive", **where)


def test_an_alias_cleared_in_between_counts_as_changed(store: Store, version: Version) -> None:
    assert versions.get_alias(store, "intents") is None
    assert point(store, version, 0).revision == 1
    found = versions.get_alias(store, "intents")
    assert found is not None
    assert (found.version, found.revision, versions.list_aliases(store)) == (version.digest, 1, [found])
    point(store, None, 1)
    assert versions.get_alias(store, "intents") is None
    assert versions.list_aliases(store) == []
    with store.reading() as session:
        assert [versions.revision_of(session, "intents", Scope(each)) for each in ("", "acme")] == [2, 0]
    for expected in (0, 1, 3):
        with pytest.raises(Refused, match="was changed by somebody else"):
            point(store, version, expected)
    assert point(store, version, 2).revision == 3
    assert versions.get_alias(store, "intents", Scope("acme")) is None, "each tenant has its own"
    assert point(store, version, 0, scope=Scope("acme")).revision == 1
    point(store, None, 1, scope=Scope("acme"))
    found = versions.get_alias(store, "intents")
    assert found is not None
    assert (found.version, found.revision) == (version.digest, 3)
    assert verify_log(store) == []
    other = register(store, name="intents", verdict=put_chain(store, seed=1).verdict, actor="olive")
    with store.writing() as session:
        session.execute(update(AliasRow).where(AliasRow.tenant == "").values(version=other.digest))
    assert verify_log(store) == ["alias intents@champion for / differs between the log and the database: version"]


def test_an_alias_needs_a_version_of_its_name_and_scope(store: Store, version: Version, chain: Chain) -> None:
    theirs = register(store, name="intents", verdict=chain.verdict, actor="olive", scope=Scope("acme", "eu"))
    others = register(store, name="others", verdict=chain.verdict, actor="olive")
    unknown = version.model_copy(update={"digest": chain.candidate})
    for wrong, why in (
        (theirs, "is for tenant 'acme'"),
        (others, "is not a version of intents"),
        (unknown, "is not in the registry"),
    ):
        with pytest.raises(Refused, match=why):
            point(store, wrong, 0)
    with pytest.raises(Refused, match="is for tenant 'acme', region 'eu'"):
        point(store, theirs, 0, scope=Scope("acme", "us"))
    point(store, theirs, 0, scope=Scope("acme", "eu"))
    point(store, version, 0, scope=Scope("acme", "us"))  # a version of no tenant is everyone's
    with pytest.raises(Refused, match="intents@v1 is not approved"):
        point(store, version, 0, override_by=None)
    approve(store, version, approver="ann")
    assert point(store, version, 0, override_by=None).override_by == ""
    approve(store, theirs, approver="ann")
    assert asked(store, theirs, scope=Scope("acme", "eu")) == GRANTED
    for scope in (Scope(), Scope("acme"), Scope("other", "eu")):
        refused = asked(store, theirs, scope=scope)
        assert (refused.reason, "is for tenant 'acme', region 'eu'" in refused.message) == ("wrong_scope", True)
    with pytest.raises(UsageError):
        point(store, version, 0, name="../x")


# Which versions may serve: each reason in turn


def asked(store: Store, version: Version, **how: Any) -> Permission:
    with store.reading() as session:
        return may_serve(session, version, **how)


def loadable(store: Store, version: Version) -> Permission:
    with store.reading() as session:
        return may_load(session, version)


def test_a_version_serves_while_nothing_speaks_against_it(
    store: Store, version: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asked(store, version).reason == "not_approved"
    assert loadable(store, version) == GRANTED
    approve(store, version, approver="ann")
    assert asked(store, version) == GRANTED
    assert asked(store, version, scope=Scope("acme", "eu")).granted  # a version for no tenant is for every tenant
    assert asked(store, version.model_copy(update={"digest": "sha256:" + "0" * 64})).reason == "unknown"
    put_recall(store, version.digest)
    assert asked(store, version) == loadable(store, version)
    assert (asked(store, version).reason, asked(store, version).message) == (
        "recalled",
        "was recalled: consent withdrawn",
    )
    with store.writing() as session:
        session.execute(delete(RecallRow))
    with monkeypatch.context() as patch:
        patch.setattr(release, "is_over", lambda _expires_at: True)
        with pytest.raises(Expired, match="intents@v1 expired on"):
            asked(store, version).require(version.label)
    identities.add_user(store, "eve", ["operator", "admin"], actor="olive")
    identities.set_roles(store, "olive", ["operator"], actor="eve")
    with pytest.raises(Untrusted, match="olive may not sign versions"):
        asked(store, version).require(version.label)
    identities.set_roles(store, "olive", ["engineer"], actor="eve")
    identities.set_roles(store, "ann", ["operator"], actor="eve")
    refused = asked(store, version)
    assert (refused.reason, "ann may not approve" in refused.message) == ("not_approved", True)
    assert asked(store, version, override_by="eve") == GRANTED
    refused = asked(store, version, override_by="olive")
    assert (refused.reason, "olive may not do this" in refused.message) == ("override", True)


def test_the_files_of_an_approval_are_read_when_a_rollout_asks(store: Store, version: Version) -> None:
    record = store.record(approve(store, version, approver="ann"))
    store.blob_path(record.blobs["envelope.json"]).unlink()
    assert asked(store, version) == GRANTED  # the database alone
    with store.reading() as session, pytest.raises(Refused, match="is not approved"):
        check_may_serve(session, store, version, Scope(), override_by=None, verified={})


# Finding


def test_a_version_is_found_by_label_alias_and_digest(store: Store, version: Version) -> None:
    point(store, version, 0, scope=version.scope)
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
    point(store, version, 0, scope=version.scope)
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
    def point_row(**values: object) -> None:
        with store.writing() as session:
            session.execute(update(VersionRow).values(**values))

    record = store.record(version.digest)
    for body in ({}, {**record.body, "number": 0}, {**record.body, "name": "../x"}, {**record.body, "more": 1}):
        point_row(digest=store.put_record(record.model_copy(update={"body": body})))
        with pytest.raises(TunesmithError):  # half a version
            resolve(store, "intents@v1")
    point_row(digest=version.digest, number=7)
    with pytest.raises(Refused, match="the database says intents@v7"):
        load_version(store, version.digest)
    # As after restoring an older backup of the database: a number that a folder bears is never given again.
    with store.writing() as session:
        session.execute(delete(VersionRow))
    with pytest.raises(Refused, match="not a registered version"), verified_copy(store, version):
        pass
    other = register(store, name="intents", verdict=put_chain(store, seed=1).verdict, actor="olive")
    assert other.label == "intents@v2"
    assert verify_version(store, version.label).ok
    assert register(store, name="intents", verdict=version.verdict, actor="olive") == version
    with store.writing() as session:
        session.execute(delete(VersionRow))
    identities.add_user(store, "eve", ["engineer"], actor="olive")
    theirs = register(store, name="intents", verdict=version.verdict, actor="eve")
    assert theirs.label == "intents@v3", "what someone else signed is not taken up"


# Opening


def test_files_swapped_during_or_after_verification_have_no_effect(
    store: Store, version: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = store.root / "versions" / "intents" / "v1"
    good, real = (folder / ADAPTER_FILE).read_bytes(), signing._copy_plain

    def copy_then_swap(source: Path, target: Path) -> None:
        real(source, target)
        (folder / ADAPTER_FILE).write_bytes(b"swapped at the worst moment")

    with monkeypatch.context() as patch:
        patch.setattr(signing, "_copy_plain", copy_then_swap)
        with verified_copy(store, version) as loaded:
            assert loaded.adapter is not None
            assert (loaded.adapter / ADAPTER_FILE).read_bytes() == good
    (folder / ADAPTER_FILE).write_bytes(good)
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


def kinds(nodes: list[dict[str, Any]], key: str) -> set[str]:
    return {node["kind"] for node in nodes} | {kind for node in nodes for kind in kinds(node[key], key)}


def test_a_tree_shows_each_record_in_full_once(store: Store, version: Version, chain: Chain) -> None:
    approve(store, version, approver="ann")
    node = tree(store, chain.training or "").document()
    assert kinds(node["parents"], "parents") == {"base", "dataset"}
    made = {"candidate", "answers", "evaluation", "verdict", "version", "approval"}
    assert kinds(node["children"], "children") == made
    assert node["says"] == "262 steps, loss 0.069068"

    def spelled_out(nodes: list[dict[str, Any]], key: str) -> list[str]:
        whole = [inner["digest"] for inner in nodes if not inner["seen"]]
        return whole + [digest for inner in nodes for digest in spelled_out(inner[key], key)]

    for way in ("parents", "children"):
        found = spelled_out(tree(store, version.digest if way == "parents" else chain.base).document()[way], way)
        assert len(found) == len(set(found))
