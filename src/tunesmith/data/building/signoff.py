"""Verifies dataset versions, and keeps stewards' sign-offs of them as records and in the audit log."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.core.clock import stamp
from tunesmith.core.digests import short
from tunesmith.core.errors import NextStep, Refused, TunesmithError, UsageError
from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.core.values import Problem, View
from tunesmith.data.building.build import counts
from tunesmith.data.building.outside_sets import OUTSIDE, Outside, decode_outside
from tunesmith.data.dataset import REMOVED, SPLITS, Dataset, Example, example_id, load_dataset
from tunesmith.data.duplicates import learned_parts, request_text
from tunesmith.data.settings import DataSettings
from tunesmith.data.splitting.assignment import split_of
from tunesmith.data.splitting.groups import wording_group
from tunesmith.data.splitting.leakage import Nearness, leakage
from tunesmith.records.dataset import SignOffBody
from tunesmith.store.people import identities
from tunesmith.store.records import recalled
from tunesmith.store.store import Store, blob_key
from tunesmith.store.tables import AuditRow

ACTION = "data.sign"


def sign_off(store: Store, digest: str, *, steward: str, reason: str) -> str:
    """Record a steward's sign-off of a dataset version, which is verified first; returns the record's digest.

    Raises Refused where the version was recalled or does not verify, or the user is not allowed to sign; UsageError
    without a reason.
    """
    identities.require(store, steward, ACTION)
    if not reason.strip():
        raise UsageError("a sign-off needs a reason", fix="say what was checked")
    verified = verify_dataset(store, digest)
    if not verified.ok:
        first = verified.problems[0]
        raise Refused(f"the dataset version does not verify: {first.reason}", where=first.path)
    detail: JsonObject = {}
    with store.change(steward, ACTION, digest, detail) as session:
        identities.require(session, steward, ACTION)  # the role may have been revoked meanwhile
        if recall := recalled(session, digest):
            fix = NextStep("build a version without it, and sign that one", "data build")
            raise Refused(f"dataset version {short(digest)} was recalled: {recall}", fix=fix)
        record = SignOffBody(steward=steward, reason=reason.strip(), at=stamp()).record({"dataset": digest})
        store.put_record(record, session)
        detail |= {"signoff": record.digest, "reason": reason.strip()}
    return record.digest


class SignOff(SignOffBody):
    """A steward's sign-off that counts. signoff: its record's digest."""

    signoff: str


def sign_offs(store: Store, digest: str) -> list[SignOff]:
    """The valid sign-offs, oldest first.

    A sign-off is valid while the audit log has it, its record agrees, and the user who signed is still a steward.
    """
    return sign_offs_of(store, [digest])[digest]


def sign_offs_of(store: Store, digests: Sequence[str]) -> dict[str, list[SignOff]]:
    """The valid sign-offs of several dataset versions, by digest, each as `sign_offs` gives them."""
    signed: dict[str, list[SignOff]] = {digest: [] for digest in digests}
    query = select(AuditRow).where(AuditRow.action == ACTION, AuditRow.subject.in_(digests)).order_by(AuditRow.seq)
    with store.reading() as session:
        for row in session.scalars(query):
            if valid := _valid_sign_off(store, session, row):
                signed[row.subject].append(valid)
    return signed


def require_signed(store: Store, digest: str) -> None:
    """Raise Refused where a dataset version has no valid sign-off."""
    if not sign_offs(store, digest):
        raise Refused(
            f"no steward has signed off dataset version {short(digest)}",
            where="data.sign_off",
            fix=NextStep("have a steward check and sign it", "data sign", dataset=short(digest), actor=...),
        )


def _valid_sign_off(store: Store, session: Session, entry: AuditRow) -> SignOff | None:
    try:
        record = store.record(str(entry.detail.get("signoff")), kind="signoff")
        identities.require(session, entry.actor, ACTION)
        body = SignOffBody.of(record)
    except TunesmithError:
        return None
    same = record.parents == {"dataset": entry.subject} and body.steward == entry.actor
    return SignOff(**dict(body), signoff=record.digest) if same else None


class DatasetVerification(View):
    """Whether a dataset version is what its record says. checked: number of comparisons.

    erased: files whose rows were erased in part. Then the record's counts, which stay, are not compared.
    """

    dataset: str
    ok: bool
    checked: int
    problems: tuple[Problem, ...]
    erased: tuple[str, ...] = ()


def verify_dataset(store: Store, digest: str) -> DatasetVerification:
    """Recompute a dataset version's digests, ids, splits, counts and leakage, and compare them with its record."""
    problems: list[Problem] = []
    erased: list[str] = []
    with _noted(problems, "record"):
        blobs = store.record(digest, kind="dataset").blobs
        erased = [name for name, blob in blobs.items() if store.left_of(blob, blob_key) != blob]
    checked = _check(store, digest, problems, counted=not erased)
    return DatasetVerification(
        dataset=digest, ok=not problems, checked=checked, problems=tuple(problems), erased=tuple(erased)
    )


def _check(store: Store, digest: str, problems: list[Problem], *, counted: bool) -> int:
    """Add what is wrong with a dataset version to problems; returns the number of comparisons."""
    with _noted(problems, "record"):
        dataset = load_dataset(store, digest)
        settings = DataSettings.model_validate(dataset.body.settings)
    if problems:
        return 1
    splits: dict[str, list[Example]] = {}
    for name in SPLITS:
        with _noted(problems, f"{name}.jsonl"):
            splits[name] = dataset.examples(name)
    with _noted(problems, REMOVED):
        removed = dataset.removed()
    outside = Outside()
    if settings.decontaminate:
        with _noted(problems, OUTSIDE):
            outside = decode_outside(store.read_blob(dataset.record.blobs[OUTSIDE]))
    checked = 2 + len(SPLITS)
    if problems:  # damaged rows cannot be checked further
        return checked
    problems.extend(_row_problems(dataset, splits, settings, outside))
    shared = leakage(Nearness(splits, settings.duplicates.threshold, outside.requests), settings.split)
    kept = sum(map(len, splits.values()))
    body = dataset.body
    compared: dict[str, tuple[object, object]] = {
        **{what: (getattr(body, what), again) for what, again in counts(splits).items()},
        "licences": (body.licences, dict(Counter(row.licence for rows in splits.values() for row in rows))),
        "leakage": (body.leakage, shared),
        "rows kept": (body.rows.kept, kept),
        "rows read": (body.rows.read, kept + len(removed)),
        "rows removed": (body.rows.removed, dict(Counter(row.reason for row in removed))),
    }
    for what, (stated, again) in compared.items():
        if counted and stated != again:
            problems.append(Problem(path=what, reason=f"the record says {stated}, the rows say {again}"))
    for what, number in shared.faults().items():
        problems.append(Problem(path=f"leakage.{what}", reason=f"is {number}, and must be 0"))
    return checked + len(compared) + kept


@contextlib.contextmanager
def _noted(problems: list[Problem], path: str) -> Iterator[None]:
    """Add an error in the block to problems. path: of the problem where the error names none."""
    try:
        yield
    except TunesmithError as error:
        problems.append(Problem(path=error.where or path, reason=error.what))
    except (KeyError, ValueError) as error:
        problems.append(Problem(path=path, reason=str(error)))


def _row_problems(
    dataset: Dataset, splits: Mapping[str, Sequence[Example]], settings: DataSettings, outside: Outside
) -> Iterator[Problem]:
    by_hash = settings.split.time is None and settings.split.stratify is None
    held = frozenset(dataset.body.held_groups)
    seen: set[str] = set()
    for name, examples in splits.items():
        for example in examples:
            path = f"{name}.jsonl, {example.id}"
            if example.id != example_id(example.messages, example.source):
                yield Problem(path=path, reason="the id does not match the content")
            if example.id in seen:
                yield Problem(path=path, reason="the id occurs twice")
            if by_hash and split_of(example.group, settings.split, held) != name:
                yield Problem(path=path, reason="the row's group belongs to another split")
            parts = learned_parts(example.messages) if outside.wordings else []
            if any(wording_group(request_text(part), part[-1].text) in outside.wordings for part in parts):
                yield Problem(path=path, reason="has the wording of a row of an outside test set")
            seen.add(example.id)
