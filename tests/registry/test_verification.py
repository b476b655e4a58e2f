"""Offline verification, by attack: whatever is changed in the files, the outcome names the file."""

import base64
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner

from tests.fabricate import Chain, approve, put_chain, put_verdict
from tunesmith.core.digests import canonical, digest_bytes
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.system.scratch import SCRATCH
from tunesmith.registry.registration import register
from tunesmith.registry.signing import keys
from tunesmith.registry.signing.signatures import private_copy, verify_signature
from tunesmith.registry.verification import verify_version
from tunesmith.registry.versions import Version
from tunesmith.store.people import identities
from tunesmith.store.people.trust import TrustedKey
from tunesmith.store.store import Store


def flip(path: Path, offset: int) -> None:
    """Change one bit of a byte."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def problems(root: Path, label: str = "intents@v1") -> dict[str, str]:
    return {problem.path: problem.reason for problem in verify_version(Store(root), label).problems}


@pytest.fixture
def folder(store: Store, version: Version) -> Path:
    return store.root / "versions" / "intents" / "v1"


def test_a_whole_store_verifies_and_says_what_it_looked_at(store: Store, version: Version, tmp_path: Path) -> None:
    assert list(problems(tmp_path).values()) == ["the store holds no version intents@v1"]  # nor a list of trusted keys
    for label in ("intents", "intents@v0", "../x@v1", "Intents@v1", "intents@v1\n", "@v1"):
        with pytest.raises(UsageError):
            verify_version(store, label)
    approve(store, version, approver="ann")
    found = verify_version(store, version.label)
    files = [path for kind in ("blobs", "records", "versions") for path in (store.root / kind).rglob("*")]
    assert (found.ok, found.problems, found.digest) == (True, [], version.digest)
    assert found.checked == len([path for path in files if path.is_file()])
    assert any(note.startswith("approved by ann") for note in found.notes)


def test_a_flipped_byte_in_any_file_is_found(store: Store, version: Version, folder: Path) -> None:
    put_chain(store, seed=1)  # what another version rests on counts too: the whole store is held against its names
    approve(store, version, approver="ann")
    files = [path for kind in ("blobs", "records", "versions") for path in (store.root / kind).rglob("*")]
    files = sorted(path for path in files if path.is_file())
    assert len(files) > 30
    for path in files:
        whole = path.read_bytes()
        for offset in {len(whole) // 2, len(whole) - 1}:
            flip(path, offset)
            assert str(path.relative_to(store.root)) in problems(store.root), f"byte {offset} of {path}"
            path.write_bytes(whole)
    signature = folder / "model.sig"
    whole = signature.read_bytes()
    for offset in range(0, len(whole), 41):
        flip(signature, offset)
        assert not verify_version(store, "intents@v1", whole_store=False).ok, f"byte {offset}: {whole[offset:][:1]!r}"
        signature.write_bytes(whole)
    release = json.loads((folder / "release.json").read_bytes())
    needed = {name.removeprefix("sha256:") for name in (*release["body"]["records"], *release["body"]["blobs"])}
    for path in [each for each in files if each.stem in needed or "versions" in each.parts][::3]:
        whole = path.read_bytes()
        path.unlink()
        assert str(path.relative_to(store.root)) in problems(store.root), f"{path} is missing"
        path.write_bytes(whole)
    (store.root / "tunesmith.db").unlink()
    shutil.move(store.root / "trust" / "keys.json", store.root / "keys.json")
    assert list(problems(store.root)) == ["trust/keys.json"]
    shutil.move(store.root / "keys.json", store.root / "trust" / "keys.json")
    assert problems(store.root) == {}, "a whole store verifies without a database"


ADDITIONS: dict[str, Callable[[Path], object]] = {
    "pickle beside": lambda folder: (folder / "adapter_model.bin").write_bytes(b"\x80\x04."),
    "folder for file": lambda folder: ((folder / "model.sig").unlink(), (folder / "model.sig").mkdir()),
    "link": lambda folder: (
        shutil.move(folder / "release.json", folder.parent / "away"),
        (folder / "release.json").symlink_to(folder.parent / "away"),
    ),
    "hard link": lambda folder: os.link(folder / "release.json", folder.parent / "twin"),
    "fifo": lambda folder: ((folder / "model.sig").unlink(), os.mkfifo(folder / "model.sig")),
    "signature stripped": lambda folder: (folder / "model.sig").unlink(),
    "signature emptied": lambda folder: (folder / "model.sig").write_bytes(b""),
    "signature huge": lambda folder: (folder / "model.sig").write_bytes(b" " * (2 << 20)),
    "signature nested": lambda folder: (folder / "model.sig").write_bytes(b"[" * 100_000),
    "release stripped": lambda folder: (folder / "release.json").unlink(),
    "adapter stripped": lambda folder: (folder / "adapter_model.safetensors").unlink(),
}


@pytest.mark.parametrize("attack", ADDITIONS)
def test_a_folder_holds_allowed_plain_files_alone(store: Store, folder: Path, attack: str) -> None:
    for path in folder.iterdir():
        path.chmod(0o644)
    ADDITIONS[attack](folder)
    found = problems(store.root)
    assert found
    assert all(path.startswith("versions/intents/v1") for path in found)


@pytest.mark.parametrize("place", ["intents/v7", "others/v1"])
def test_a_copy_under_another_name_or_number_is_refused(store: Store, folder: Path, place: str) -> None:
    register(store, name="intents", verdict=put_chain(store, seed=1).verdict, actor="olive")
    target = store.root / "versions" / place
    target.parent.mkdir(exist_ok=True)
    shutil.copytree(folder, target)
    name, number = place.split("/")
    found = verify_version(store, f"{name}@{number}")
    assert not found.ok
    assert found.problems[0].path.startswith(f"versions/{place}")
    shutil.copy(folder.with_name("v2") / "model.sig", folder / "model.sig")
    assert problems(store.root), "another version's signature"
    shutil.move(folder, folder.with_name("real"))
    folder.symlink_to("real")
    assert "versions/intents/v1" in problems(store.root)


def test_the_verifiers_own_key_list_counts(store: Store, version: Version, tmp_path: Path) -> None:
    theirs, mine = tmp_path / "theirs.json", tmp_path / "mine.json"
    theirs.write_bytes((store.root / "trust" / "keys.json").read_bytes())
    assert verify_version(store, version.label, trust=theirs).ok
    listed = json.loads(theirs.read_bytes())
    mine.write_bytes(canonical([key for key in listed if key["user"] != "olive"]))
    [problem] = verify_version(store, version.label, trust=mine).problems
    assert "not trusted here" in problem.reason
    # An attacker with the whole store makes everything anew with a key of their own, under the same names.
    other = Store(tmp_path / "forged")
    identities.ensure_owner(other)
    forged = register(other, name="intents", verdict=put_chain(other).verdict, actor="olive")
    assert verify_version(other, forged.label).ok
    assert not verify_version(other, forged.label, trust=theirs).ok


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"active": False}, "deactivated"),
        ({"roles": ["approver"]}, "may not sign versions"),
        ({"tenant": "acme"}, "does not speak for"),
        ({"region": "us"}, "does not speak for"),
        ({"user": "someone"}, "signed it"),
    ],
)
def test_a_valid_key_counts_only_for_what_it_is_trusted_for(
    store: Store, version: Version, change: dict[str, object], reason: str
) -> None:
    path = store.root / "trust" / "keys.json"
    listed = json.loads(path.read_bytes())
    path.write_bytes(canonical([{**key, **change} if key["user"] == "olive" else key for key in listed]))
    [problem] = verify_version(store, version.label).problems
    assert reason in problem.reason


def test_a_dataset_whose_count_is_not_its_rows_is_found(store: Store, chain: Chain) -> None:
    record = store.record(chain.dataset)
    lying = record.model_copy(update={"body": {**record.body, "splits": {"train": 5, "validation": 2, "test": 4}}})
    digest = store.put_record(lying)
    candidate = store.record(chain.candidate)
    moved = store.put_record(candidate.model_copy(update={"parents": {**candidate.parents, "dataset": digest}}))
    _, verdict = put_verdict(store, name="tuned", candidate=moved, tuned=True, dataset=digest)
    version = register(store, name="intents", verdict=verdict, actor="olive")
    [problem] = verify_version(store, version.label).problems
    assert "says 5 rows in train, there are 6" in problem.reason


def test_base_files_are_checked_if_they_are_found(store: Store, version: Version, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_bytes(b"{}")
    absent = verify_version(store, version.label)
    assert absent.ok
    assert any("were not found and not checked" in note for note in absent.notes)
    assert verify_version(store, version.label, base_folder=folder).checked == absent.checked + 1
    (folder / "config.json").write_bytes(b"[]")
    [problem] = verify_version(store, version.label, base_folder=folder).problems
    assert problem.path == str(folder / "config.json")
    (folder / "config.json").unlink()
    assert not verify_version(store, version.label, base_folder=folder).ok


def test_what_does_not_belong_into_a_store_is_named(store: Store, version: Version) -> None:
    (store.root / "blobs" / "notes.txt").write_text("x")
    data = b"misplaced"
    (store.root / "blobs" / "00").mkdir(exist_ok=True)
    misplaced = store.root / "blobs" / "00" / digest_bytes(data).removeprefix("sha256:")
    misplaced.write_bytes(data)
    (store.root / "blobs" / f"{SCRATCH}left").write_text("half")
    found = verify_version(store, version.label)
    assert {problem.path for problem in found.problems} == {"blobs/notes.txt", str(misplaced.relative_to(store.root))}


# Genuine signatures of a trusted signer about something else than what lies there, which model-signing may pass


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


def edit(path: tuple[str | int, ...], value: object) -> Callable[[dict[str, Any]], None]:
    def change(statement: dict[str, Any]) -> None:
        place: Any = statement
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value

    return change


def test_a_private_copy_is_private_and_goes_away(store: Store, folder: Path) -> None:
    sign_statement(store, folder, statement_in(folder))  # the forger of these tests can make a good one
    with pytest.raises(Refused) as caught, private_copy(folder) as copy:  # noqa: PT012
        assert copy.parent.stat().st_mode & 0o777 == 0o700
        assert {path.name for path in copy.iterdir()} == {path.name for path in folder.iterdir()}
        shutil.rmtree(folder)
        assert verify_signature(copy, identities.trusted_keys(store)).user == "olive"
        raise Refused("no", where=f"{copy / 'release.json'}")
    assert not copy.exists()
    assert caught.value.where == str(folder / "release.json")


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
    "nothing": lambda statement: statement.clear(),
    "no files": edit(("predicate",), {"resources": [1]}),
}


@pytest.mark.parametrize("name", [*EDITS, "no object"])
def test_a_signed_statement_about_other_files_is_refused(store: Store, folder: Path, name: str) -> None:
    statement = statement_in(folder)
    EDITS.get(name, lambda _: None)(statement)
    sign_statement(store, folder, None if name == "no object" else statement)
    with pytest.raises(Refused):
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


def test_another_users_hint_or_another_spelling_is_refused(store: Store, folder: Path) -> None:
    path = folder / "model.sig"
    whole = json.loads(path.read_bytes())
    path.write_text(json.dumps(whole, indent=1))
    with pytest.raises(Refused):
        check(store, folder)
    keys.ensure_key(store, "ann")
    sign_statement(store, folder, statement_in(folder), user="ann")
    bundle = json.loads(path.read_bytes())
    bundle["verificationMaterial"] = whole["verificationMaterial"]
    path.write_bytes(canonical(bundle))
    with pytest.raises(Refused, match="not olive's"):
        check(store, folder)
