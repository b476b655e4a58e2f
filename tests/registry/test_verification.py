"""Offline verification, by attack: whatever is changed in the files, the outcome names the file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fabricate import Chain, approve, put_chain, put_verdict
from tunesmith.core.digests import canonical, digest_bytes
from tunesmith.core.errors import UsageError
from tunesmith.core.system.scratch import SCRATCH
from tunesmith.registry.registration import register
from tunesmith.registry.verification import verify_version
from tunesmith.registry.versions import Version
from tunesmith.store.people import identities
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


def test_a_whole_store_verifies_and_says_what_it_looked_at(store: Store, version: Version) -> None:
    approve(store, version, approver="ann")
    found = verify_version(store, version.label)
    files = [path for kind in ("blobs", "records", "versions") for path in (store.root / kind).rglob("*")]
    assert (found.ok, found.problems, found.digest) == (True, [], version.digest)
    assert found.checked == len([path for path in files if path.is_file()])
    assert any(note.startswith("approved by ann") for note in found.notes)


def test_a_flipped_byte_in_any_file_is_found(store: Store, version: Version) -> None:
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
    release = json.loads((store.root / "versions" / "intents" / "v1" / "release.json").read_bytes())
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


def test_no_byte_of_a_signature_is_free(store: Store, folder: Path) -> None:
    path = folder / "model.sig"
    whole = path.read_bytes()
    for offset in range(0, len(whole), 41):
        flip(path, offset)
        assert not verify_version(store, "intents@v1", whole_store=False).ok, f"byte {offset}: {whole[offset:][:1]!r}"
        path.write_bytes(whole)


def test_a_version_that_was_never_registered_is_named(tmp_path: Path) -> None:
    """A store without a version has no list of trusted keys either, which would say nothing of it."""
    assert list(problems(tmp_path).values()) == ["the store holds no version intents@v1"]


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


def test_a_key_that_is_not_trusted_is_refused(store: Store, version: Version, tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    listed = json.loads((store.root / "trust" / "keys.json").read_bytes())
    mine.write_bytes(canonical([key for key in listed if key["user"] != "olive"]))
    assert verify_version(store, version.label, trust=store.root / "trust" / "keys.json").ok
    [problem] = verify_version(store, version.label, trust=mine).problems
    assert "not trusted here" in problem.reason


def test_the_verifiers_own_key_list_counts(store: Store, version: Version, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.json"
    theirs.write_bytes((store.root / "trust" / "keys.json").read_bytes())
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
    assert any(f"{SCRATCH}left" in note for note in found.notes)


@pytest.mark.parametrize(
    "label",
    ["intents", "intents@v0", "../x@v1", "Intents@v1", "intents@v1\n", "@v1"],
)
def test_a_label_that_is_none_is_wrong_usage(store: Store, label: str) -> None:
    with pytest.raises(UsageError):
        verify_version(store, label)
