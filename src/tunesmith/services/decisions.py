"""Decisions on versions: approve and refuse, with the key of this machine or with a signature made elsewhere.

Over HTTP an approver asks a server for the statement, checks it, signs it here and sends it back: `decide`.
"""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Annotated, Any, TypeVar

import httpx
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import Base64Bytes, BeforeValidator, Field

from tunesmith.core.errors import NextStep, Refused, UsageError
from tunesmith.core.reading.strict_json import JsonObject, parse_json
from tunesmith.core.system.http_clients import is_private
from tunesmith.core.text.names import VersionRef
from tunesmith.core.values import View
from tunesmith.records.version import Decision, Requirement
from tunesmith.registry import approvals
from tunesmith.registry.risk import Approvals
from tunesmith.registry.serving import approvals_of
from tunesmith.registry.signing import keys
from tunesmith.registry.signing.attestations import envelope_of, fingerprint_of, read_statement, seal, signed_bytes
from tunesmith.registry.signing.release import Version
from tunesmith.registry.versions import load_version, resolve
from tunesmith.services.actions import Acting, Action, Digest, Named, Reason, Request, ScopedRequest, action
from tunesmith.store.store import Store

Answer = TypeVar("Answer", bound=View)
_SECONDS = 300  # the server verifies the version first


class DecideVersion(ScopedRequest):
    """A version to approve or refuse, with the key of this machine.

    version: NAME@v3, an alias or the start of a digest. reason: signed with the decision; a refusal needs one. tenant,
    region: the version's; by default those of whoever decides.
    """

    version: Named
    reason: Reason = ""


class PrepareDecision(DecideVersion):
    """What is to be decided. version: `NAME@v3`, an alias or the start of a digest.

    reason: signed with the decision; a refusal needs one. tenant, region: the version's, by default the caller's.
    """

    decision: Decision


class SubmitDecision(Request):
    """A statement as `prepare` gave it, and the signature over it.

    key: the fingerprint of the key that signed. signature: ECDSA with SHA-256 over the payload that `prepare` gave, in
    base64: DER, as openssl writes it, or r and s of 32 bytes each, as WebCrypto gives it.
    """

    # A form sends it as text.
    statement: Annotated[
        JsonObject, BeforeValidator(lambda given: parse_json(given.encode()) if isinstance(given, str) else given)
    ]
    key: Digest
    signature: Base64Bytes = Field(min_length=8, max_length=200)


class PreparedDecision(View):
    """What an approver is to sign. statement: the in-toto statement, for people and for `submit`.

    payload: the bytes to sign, base64: DSSE's encoding of the statement. keys: fingerprints of the approver's active
    keys, newest first. risk: the version's class and what it takes, None for one approver. missing: what it still takes
    before this decision.
    """

    statement: JsonObject
    payload: str
    keys: tuple[str, ...]
    risk: Requirement | None = None
    missing: tuple[str, ...] = ()


class RecordedDecision(View):
    """An approval or refusal that counts. record: its digest; digest: the version's.

    missing: what the version takes before it may serve, this decision counted. override: why the version's gates were
    overridden, "" if they were not; marks: why it is not meant for service.
    """

    record: str
    version: str
    digest: str
    decision: Decision
    approver: str
    reason: str
    missing: tuple[str, ...] = ()
    override: str = ""
    marks: tuple[str, ...] = ()


@action("version.approve", says="approved a version", permission="version.approve")
def approve(acting: Acting, asked: DecideVersion) -> RecordedDecision:
    """Verify a version and approve it with the actor's signature. The one who registered it may not approve it."""
    return _signed_here(acting, asked, "approve")


@action("version.refuse", says="refused a version", permission="version.approve")
def refuse(acting: Acting, asked: DecideVersion) -> RecordedDecision:
    """Refuse a version with the actor's signature: it serves no request until as many people approve it again as its
    risk class takes.
    """
    return _signed_here(acting, asked, "refuse")


@action(
    "decision.prepare", permission="version.approve", tokens=("decisions",), at="/decisions/prepare", form=True,
    refused="decision_refused", reads_files=True,
)  # fmt: skip
def prepare(acting: Acting, asked: PrepareDecision) -> PreparedDecision:
    """Verify a version, and state what its approver signs. Changes nothing."""
    version, statement = _stated(acting, asked, asked.decision)
    return PreparedDecision(
        statement=statement,
        payload=base64.b64encode(signed_bytes(statement)).decode(),
        keys=tuple(key.fingerprint for key in acting.user.active_keys),
        risk=version.risk,
        missing=approvals_for(acting.store, version).missing,
    )


@action(
    "decision.submit", permission="version.approve", tokens=("decisions",), at="/decisions", form=True,
    refused="decision_refused", reads_files=True,
)  # fmt: skip
def submit(acting: Acting, asked: SubmitDecision) -> RecordedDecision:
    """Check a decision that was signed elsewhere and record it. The caller must be the one who signed it."""
    envelope = envelope_of(asked.statement, asked.key, asked.signature)
    recorded = approvals.submit_approval(acting.store, envelope, by=acting.actor)
    _, digest, _ = read_statement(asked.statement)
    return _recorded(acting.store, load_version(acting.store, digest), recorded)


def approvals_for(store: Store, version: Version) -> Approvals:
    """Who approved or refused a version, and what it still takes before it may serve."""
    with store.reading() as session:
        return approvals_of(session, version)


def decide(server: str, key_file: Path | None, asked: PrepareDecision, *, actor: str | None = None) -> RecordedDecision:
    """Approve or refuse a version (NAME@v3) on a server, with a key that stays here. The token is $TUNESMITH_TOKEN.

    actor: the user whose token it must be; by default anybody. Raises UsageError for a server without TLS on another
    host, or without a token or key; Refused if the server says no, or asks for a signature over something else.
    """
    VersionRef.parse(asked.version)  # an alias may move between what was read and what is signed
    token = os.environ.get("TUNESMITH_TOKEN", "")
    if not token:
        raise UsageError("no token", where="$TUNESMITH_TOKEN", fix=NextStep("have an admin make one", "users token"))
    if key_file is None:
        raise UsageError("a decision on a server is signed with a key of yours", where="key", fix="name its file")
    private = keys.load_private_key(key_file)
    own = fingerprint_of(private)
    if not is_private(server):
        raise UsageError(
            f"{server[:80]!r} is no address, or would get the token without encryption",
            where="server",
            fix="https://HOST, or http://127.0.0.1:PORT",
        )
    with httpx.Client(base_url=server, timeout=_SECONDS, headers={"Authorization": f"Bearer {token}"}) as http:
        prepared = _sent(http, prepare, asked.model_dump(mode="json", exclude_none=True))
        if own not in prepared.keys:
            raise Refused(
                "this key is not an active one of the token's user",
                where=str(key_file),
                fix=NextStep("enrol it", "keys enrol"),
            )
        statement = prepared.statement
        label, _, stated = read_statement(statement)
        if (label, stated.decision, stated.reason) != (asked.version, asked.decision, asked.reason):
            raise Refused(
                f"the server asks for another signature than you meant to give: {stated.decision} {label}",
                fix="tell the server's operator; nothing was signed",
            )
        if actor not in (None, stated.approver):
            raise Refused(f"the token is {stated.approver}'s, not {actor}'s", where="$TUNESMITH_TOKEN")
        signature = private.sign(signed_bytes(statement), ec.ECDSA(hashes.SHA256()))
        signed = {"statement": statement, "key": own, "signature": base64.b64encode(signature).decode()}
        return _sent(http, submit, signed)


def _stated(acting: Acting, asked: DecideVersion, decision: Decision) -> tuple[Version, JsonObject]:
    """The version, and what the actor signs to decide on it."""
    version = resolve(acting.store, asked.version, scope=acting.scope(asked))
    return version, approvals.prepare_approval(acting.store, version, acting.actor, asked.reason, decision)


def _signed_here(acting: Acting, asked: DecideVersion, decision: Decision) -> RecordedDecision:
    version, statement = _stated(acting, asked, decision)
    key = keys.load_signing_key(acting.store, keys.ensure_key(acting.store, acting.actor))
    return _recorded(acting.store, version, approvals.submit_approval(acting.store, seal(statement, key)))


def _recorded(store: Store, version: Version, recorded: approvals.RecordedApproval) -> RecordedDecision:
    return RecordedDecision.of(
        recorded.approval,
        record=recorded.digest,
        version=version.label,
        digest=version.digest,
        missing=approvals_for(store, version).missing,
        override=version.override or "",
        marks=version.marks,
    )


def _sent(http: httpx.Client, to: Action[Any, Answer], asked: JsonObject) -> Answer:
    """What an action of the server returns."""
    try:
        answer = http.post(f"/api{to.at}", json=asked)
        if answer.is_success:
            return to.result.model_validate(answer.json())
        said = str(answer.json()["error"]["message"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise Refused(
            f"the server did not answer: {error or type(error).__name__}", where=str(http.base_url)
        ) from error
    raise Refused(f"the server said no ({answer.status_code}): {said}", where=str(http.base_url))
