"""A version's signed statement (release.json), and the verification of a version's folder. Needs only files.

`release.json` in a version's folder has the same bytes as the version's record, so its SHA-256 is the version's digest.
What was signed, what was approved and what the lineage names are therefore the same thing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from tunesmith.core.clock import now
from tunesmith.core.digests import digest_bytes, digest_file, short
from tunesmith.core.errors import NextStep, Refused, TunesmithError
from tunesmith.core.text.names import VersionRef
from tunesmith.core.values import ScopedView
from tunesmith.models.weight_files import ADAPTER_FILE, CONFIG_FILE, MODEL_FILE, check_model_file, read_adapter_file
from tunesmith.records.candidate import BaseBody, CandidateBody
from tunesmith.records.evaluation import EvaluationBody, VerdictBody
from tunesmith.records.training import TrainingBody
from tunesmith.records.version import Paper, Requirement, VersionBody
from tunesmith.registry.licence_duties import NOTICE
from tunesmith.registry.signing.signatures import (
    FIX,
    RELEASE,
    SIGNATURE,
    Expired,
    check_may_sign,
    verify_signature,
)
from tunesmith.store.people.trust import TrustedKey
from tunesmith.store.records import Record, decode
from tunesmith.store.store import Store

ADAPTER_FILES = frozenset((CONFIG_FILE, ADAPTER_FILE))
_WHOLE_FILES = frozenset((MODEL_FILE,))
_PARENTS = frozenset(("candidate", "evaluation", "verdict"))
CANARIES = "trained with canaries"  # a mark of a version


class Version(ScopedView):
    """A registry entry: a candidate, its evidence by digest, and its tenant and region."""

    name: str
    number: int
    digest: str
    candidate: str
    evaluation: str
    verdict: str
    tenant: str = ""
    region: str = ""
    override: str | None = None
    signer: str
    created_at: str
    expires_at: str | None = None
    marks: tuple[str, ...] = ()
    risk: Requirement | None = None
    papers: tuple[Paper, ...] = ()

    @property
    def ref(self) -> VersionRef:
        """Its name and number."""
        return VersionRef(self.name, self.number)

    @property
    def label(self) -> str:
        """`name@v3`."""
        return str(self.ref)


class Release(NamedTuple):
    """A verified folder: its record, its statement, and the key that signed it."""

    record: Record
    statement: VersionBody
    version: Version
    signer: TrustedKey


def has_weights(record: Record) -> bool:
    """Whether a version has weights, an adapter's or whole ones."""
    return record.blobs.keys() >= ADAPTER_FILES or record.blobs.keys() >= _WHOLE_FILES


def read_version(record: Record, where: str, digest: str | None = None) -> tuple[Version, VersionBody]:
    """The version and the statement in a record. Raises Refused if the record is not a valid version.

    digest: the record's, where it was just read by it; else it is computed, which takes as long as all the rest.
    """
    try:
        statement = VersionBody.of(record)
    except Refused as error:
        raise Refused(f"not a valid version: {error.what}", where=where, fix=FIX) from error
    if record.parents.keys() != _PARENTS:
        raise Refused("not a version's record", where=where, fix=FIX)
    if record.blobs.keys() - {NOTICE} not in (frozenset(), ADAPTER_FILES, _WHOLE_FILES):
        raise Refused("a version has an adapter's two files, whole weights, or no weights", where=where, fix=FIX)
    if (NOTICE in record.blobs) != (statement.duties is not None):
        raise Refused(f"a version with duties has a {NOTICE}, one without has none", where=where, fix=FIX)
    stated = statement.model_dump(include=set(Version.model_fields))
    version = Version.model_validate({**stated, **record.parents, "digest": digest or record.digest})
    return version, statement


def check_release(folder: Path, keys: Sequence[TrustedKey]) -> Release:
    """Verify a private copy of a version's folder: its signature, its files, its signer and its expiry date.

    keys: every trusted key, those of deactivated users too. Raises Refused; its subclass Untrusted if only the signer
    may not sign it today, its subclass Expired if only its time is over.
    """
    key = verify_signature(folder, keys)
    path = folder / RELEASE
    raw = path.read_bytes()
    try:
        record = decode(raw, digest_bytes(raw), str(path))
    except Refused as error:
        raise Refused("not a record", where=str(path), fix=FIX) from error
    if record.encoded != raw:
        raise Refused("not in canonical form", where=str(path), fix=FIX)
    version, statement = read_version(record, str(path))
    present = {entry.name for entry in folder.iterdir()} - {RELEASE, SIGNATURE}
    if present != record.blobs.keys():
        odd = sorted(present ^ record.blobs.keys())[0]
        raise Refused("this file is in the folder or in the release, but not in both", where=str(folder / odd))
    for name, digest in record.blobs.items():
        if digest_file(folder / name) != digest:
            raise Refused("its bytes are not the ones the release names", where=str(folder / name), fix=FIX)
    if key.user != statement.signer:
        raise Refused(f"the release says {statement.signer} signed it, the key is {key.user}'s", where=str(path))
    check_signer(version, key, where=str(folder / SIGNATURE))
    check_expiry(version, where=str(path))
    if has_weights(record):
        check = check_model_file if MODEL_FILE in record.blobs else read_adapter_file
        check(folder, base=statement.base, fingerprint=statement.fingerprint)
    return Release(record=record, statement=statement, version=version, signer=key)


def check_signer(version: Version, key: TrustedKey, where: str | None = None) -> None:
    """Raise Untrusted unless the owner of a key may sign this version today and the key did so while it was active.

    key: the one that signed it.
    """
    for action in ("version.register", *(["version.override"] if version.override is not None else [])):
        check_may_sign(key, action, version.digest, where or version.label, version.scope)


def check_expiry(version: Version, where: str | None = None) -> None:
    """Raise Expired if the version was signed for a time that is over."""
    if is_over(version.expires_at):
        fix = NextStep("register it again with a later date", "register", expires_at=...)
        raise Expired(f"expired on {version.expires_at}", where=where or version.label, fix=fix)


def is_over(expires_at: str | None) -> bool:
    """Whether a version's time is over. None: it has no end."""
    return expires_at is not None and datetime.fromisoformat(expires_at) <= now()


def check_evidence(records: Mapping[str, Record], parents: Mapping[str, str], override: str | None) -> None:
    """Check that a version's candidate, evaluation and verdict belong together.

    records: everything that the version was made from. Raises Refused if the verdict is about another candidate or
    evaluation, or if it is not a pass and not overridden.
    """
    candidate, evaluation, verdict = (records[parents[role]] for role in ("candidate", "evaluation", "verdict"))
    where = f"verdict {short(parents['verdict'])}"
    kinds = (candidate.kind, evaluation.kind, verdict.kind)
    if kinds != ("candidate", "evaluation", "verdict"):
        raise Refused(f"a version needs a candidate, an evaluation and a verdict, not {', '.join(kinds)}")
    if any(verdict.parents.get(role) != parents[role] for role in ("candidate", "evaluation")):
        raise Refused("the verdict is about another candidate or evaluation", where=where)
    judged = VerdictBody.of(verdict)
    if CandidateBody.of(candidate).endpoint is not None:
        raise Refused(
            f"{judged.name} is an endpoint: without its weights it cannot be signed or served",
            where=where,
            fix="release another candidate; an endpoint is only for comparison",
        )
    measured = EvaluationBody.of(evaluation).candidates.get(judged.name)
    if measured is None or measured.candidate != parents["candidate"]:
        raise Refused("the evaluation did not measure this candidate", where=where, fix="evaluate it, then judge it")
    if judged.verdict != "pass" and override is None:
        named = [f"{gate.name} ({gate.outcome})" for gate in judged.gates if gate.outcome != "pass"]
        raise Refused(
            f"the verdict on {judged.name} is {judged.verdict}: {', '.join(named) or 'no gate passed'}",
            where=where,
            fix=NextStep("improve the candidate; an admin may register it by an override", "register", override=...),
        )


def check_replay(store: Store, verdict: str) -> dict[str, str]:
    """Recompute a verdict from its evaluation's scores. Raises Refused if it does not follow. Needs only files.

    Returns the gates that are no longer computed: name -> what computed them and was removed. They count as recorded.
    """
    from tunesmith.evaluation.gates.settings import gone_gates
    from tunesmith.evaluation.gates.verdict import replay

    try:
        follows = replay(store, verdict)
        why = ""
    except (TunesmithError, KeyError, TypeError, ValueError, AttributeError) as error:
        follows, why = False, f" ({error.what if isinstance(error, TunesmithError) else error!r})"
    if not follows:
        raise Refused(
            f"the verdict does not follow from the evaluation's scores{why}",
            where=store.record_where(verdict),
            fix=NextStep("evaluate and judge the candidate", "gate"),
        )
    return gone_gates(VerdictBody.read(store, verdict).gates)


def marks_of(records: Mapping[str, Record], candidate: str) -> tuple[str, ...]:
    """Warnings from a candidate's records against serving it: its weights were trained with canaries."""
    training = records[candidate].parents.get("training")
    return (CANARIES,) if training and TrainingBody.of(records[training]).settings.canaries else ()


def weight_blobs(records: Mapping[str, Record], candidate: str) -> dict[str, str]:
    """File name -> digest of the candidate's adapter or whole weights; empty for an untuned candidate.

    Raises Refused if they were trained on another base than the candidate's, or with another rendering than the base's.
    """
    record = records[candidate]
    if "training" not in record.parents:
        return {}
    training, base = records[record.parents["training"]], records[record.parents["base"]]
    where = f"training {short(record.parents['training'])}"
    if training.parents.get("base") != record.parents["base"]:
        raise Refused("the adapter was trained on another base than the candidate's", where=where)
    if TrainingBody.of(training).fingerprint != BaseBody.of(base).fingerprint:
        raise Refused("the adapter was trained with another tokenizer or chat template than the base's", where=where)
    blobs = {name: digest for name, digest in training.blobs.items() if name in ADAPTER_FILES | _WHOLE_FILES}
    if blobs.keys() not in (ADAPTER_FILES, _WHOLE_FILES):
        raise Refused("the training has neither an adapter nor whole weights", where=where, fix="train again")
    return blobs
