"""Genuine signatures of a trusted signer about something else than what lies there, which model-signing may pass."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from model_signing import hashing, signing, verifying
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner

from tunesmith.core.digests import canonical
from tunesmith.core.errors import Refused
from tunesmith.registry.signing import keys
from tunesmith.registry.signing.signatures import private_copy, verify_signature
from tunesmith.registry.versions import Version
from tunesmith.store.people import identities
from tunesmith.store.people.trust import TrustedKey
from tunesmith.store.store import Store


@pytest.fixture
def folder(store: Store, version: Version) -> Path:
    return store.root / "versions" / "intents" / "v1"


def check(store: Store, folder: Path) -> TrustedKey:
    with private_copy(folder) as copy:
        return verify_signature(copy, identities.trusted_keys(store))


def statement_in(folder: Path) -> dict[str, Any]:
    bundle = json.loads((folder / "model.sig").read_bytes())
    return json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))


def sign_statement(store: Store, folder: Path, statement: object, user: str = "olive") -> None:
    """Put a genuine signature of a user over any statement into the folder."""
    signer = CryptoSigner(keys.load_signing_key(store, identities.get_user(store, user)))
    envelope = Envelope(canonical(statement), "application/vnd.in-toto+json", {})
    envelope.sign(signer)
    dsse = envelope.to_dict()
    dsse["signatures"][0]["keyid"] = ""
    hint = (identities.get_user(store, user).fingerprint or "").removeprefix("sha256:")
    bundle = {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {"publicKey": {"hint": hint}, "tlogEntries": []},
        "dsseEnvelope": dsse,
    }
    (folder / "model.sig").write_bytes(canonical(bundle))


def stock_verify(store: Store, folder: Path) -> None:
    """What model-signing does by itself."""
    public = store.root / "trust" / "olive.pem"
    verifying.Config().use_elliptic_key_verifier(public_key=public).verify(folder, folder / "model.sig")


def test_a_folder_as_signed_names_its_signer(store: Store, folder: Path) -> None:
    assert check(store, folder).user == "olive"
    sign_statement(store, folder, statement_in(folder))  # the forger of these tests can make a good one
    assert check(store, folder).user == "olive"


def test_an_ignore_list_that_covers_the_weights_is_refused(store: Store, folder: Path) -> None:
    (folder / "model.sig").unlink()
    hashes = hashing.Config().set_ignored_paths(paths=["adapter_model.safetensors", "model.sig"])
    key = keys.signing_key(store, identities.get_user(store, "olive"))
    signing.Config().use_elliptic_key_signer(private_key=key).set_hashing_config(hashes).sign(
        folder, folder / "model.sig"
    )
    (folder / "model.sig").write_bytes(canonical(json.loads((folder / "model.sig").read_bytes())))
    (folder / "adapter_model.safetensors").write_bytes(b"anything")
    stock_verify(store, folder)  # the trap: it is content
    with pytest.raises(Refused, match="not among the files that were signed") as caught:
        check(store, folder)
    assert str(caught.value.where).endswith("v1/adapter_model.safetensors")


def edit(path: tuple[str | int, ...], value: object) -> Callable[[dict[str, Any]], None]:
    def change(statement: dict[str, Any]) -> None:
        place: Any = statement
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value

    return change


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "empty manifest": edit(("predicate", "resources"), []),
    "no manifest": lambda statement: statement["predicate"].pop("resources"),
    "one file left out": lambda statement: statement["predicate"]["resources"].pop(),
    "another digest": edit(("predicate", "resources", 0, "digest"), "0" * 64),
    "another name": edit(("predicate", "resources", 0, "name"), "../release.json"),
    "other folder": edit(("subject", 0, "name"), "v2"),
    "no subject": edit(("subject",), []),
    "older format": edit(("predicateType",), "https://model_signing/Digests/v0.1"),
    "links allowed": edit(("predicate", "serialization", "allow_symlinks"), True),
    "more than asked": edit(("predicate", "note"), "trust me"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_signed_statement_about_other_files_is_refused(store: Store, folder: Path, name: str) -> None:
    statement = statement_in(folder)
    EDITS[name](statement)
    sign_statement(store, folder, statement)
    with pytest.raises(Refused):
        check(store, folder)


@pytest.mark.parametrize("statement", [None, {}, {"predicate": {"resources": [1]}}])
def test_a_signature_over_no_statement_is_refused(store: Store, folder: Path, statement: object) -> None:
    sign_statement(store, folder, statement)
    with pytest.raises(Refused):
        check(store, folder)


def test_a_signature_under_another_users_hint_is_refused(store: Store, folder: Path) -> None:
    keys.ensure_key(store, "ann")
    sign_statement(store, folder, statement_in(folder), user="ann")
    bundle = json.loads((folder / "model.sig").read_bytes())
    hint = (identities.get_user(store, "olive").fingerprint or "").removeprefix("sha256:")
    bundle["verificationMaterial"]["publicKey"]["hint"] = hint
    (folder / "model.sig").write_bytes(canonical(bundle))
    with pytest.raises(Refused, match="not olive's"):
        check(store, folder)


@pytest.mark.parametrize(
    "change",
    [
        edit(("mediaType",), "application/vnd.dev.sigstore.bundle+json;version=0.2"),
        edit(("verificationMaterial", "publicKey", "hint"), None),
        edit(("dsseEnvelope", "payloadType"), "application/json"),
        edit(("dsseEnvelope", "signatures"), []),
        lambda bundle: bundle["dsseEnvelope"]["signatures"].append(bundle["dsseEnvelope"]["signatures"][0]),
    ],
)
def test_a_bundle_in_another_form_is_refused(
    store: Store, folder: Path, change: Callable[[dict[str, Any]], object], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = json.loads((folder / "model.sig").read_bytes())
    change(bundle)
    (folder / "model.sig").write_bytes(canonical(bundle))
    with pytest.raises(Refused):
        check(store, folder)
    assert capsys.readouterr().out == ""  # stdout is the JSON document's alone


def test_the_same_signature_spelled_otherwise_is_refused(store: Store, folder: Path) -> None:
    path = folder / "model.sig"
    path.write_text(json.dumps(json.loads(path.read_bytes()), indent=1))
    stock_hashes = hashing.Config().set_ignored_paths(paths=["model.sig"], ignore_git_paths=False)
    public = store.root / "trust" / "olive.pem"
    verifying.Config().use_elliptic_key_verifier(public_key=public).set_hashing_config(stock_hashes).verify(
        folder, path
    )
    with pytest.raises(Refused):
        check(store, folder)


def test_a_private_copy_is_private_and_goes_away(store: Store, folder: Path) -> None:
    with pytest.raises(Refused) as caught, private_copy(folder) as copy:  # noqa: PT012
        assert copy.parent.stat().st_mode & 0o777 == 0o700
        assert {path.name for path in copy.iterdir()} == {path.name for path in folder.iterdir()}
        shutil.rmtree(folder)
        assert verify_signature(copy, identities.trusted_keys(store)).user == "olive"
        raise Refused("no", where=f"{copy / 'release.json'}")
    assert not copy.exists()
    assert caught.value.where == str(folder / "release.json")
