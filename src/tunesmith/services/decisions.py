"""An approver's side of a decision over HTTP: ask a server for the statement, check it, sign it here, send it back."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any, TypeVar

import httpx
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.scope import Scope
from tunesmith.core.text.urls import is_private
from tunesmith.core.version_ref import VersionRef
from tunesmith.core.view import View
from tunesmith.registry.signing import keys
from tunesmith.registry.signing.attestations import Decision, read_statement, signed_bytes
from tunesmith.services.versions import PreparedDecision, RecordedDecision

Answer = TypeVar("Answer", bound=View)
_SECONDS = 300  # the server verifies the version first


def decide(
    server: str,
    version: str,
    decision: Decision,
    reason: str,
    key_file: Path | None,
    scope: Scope = Scope(),
    *,
    actor: str | None = None,
) -> RecordedDecision:
    """Approve or refuse a version (NAME@v3) on a server, with a key that stays here. The token is $TUNESMITH_TOKEN.

    actor: the user whose token it must be; by default anybody. Raises UsageError for a server without TLS on another
    host, or without a token or key; Refused if the server says no, or asks for a signature over something else.
    """
    VersionRef.parse(version)  # an alias may move between what was read and what is signed
    token = os.environ.get("TUNESMITH_TOKEN", "")
    if not token:
        raise UsageError(
            "no token", where="$TUNESMITH_TOKEN", fix="tunesmith users token NAME, run by an admin, makes one"
        )
    if key_file is None:
        raise UsageError("with --server, the private key is named", fix="--key FILE")
    private = keys.load_private_key(key_file)
    own = keys.fingerprint_of(private)
    if not is_private(server):
        raise UsageError(
            f"{server[:80]!r} is no address, or would get the token without encryption",
            where="--server",
            fix="https://HOST, or http://127.0.0.1:PORT",
        )
    with httpx.Client(base_url=server, timeout=_SECONDS, headers={"Authorization": f"Bearer {token}"}) as http:
        asked: dict[str, Any] = {"version": version, "decision": decision, "reason": reason}
        if scope != Scope():
            asked |= scope.fields()
        prepared = _sent(http, "/api/decisions/prepare", asked, PreparedDecision)
        if own not in prepared.keys:
            raise Refused(
                "this key is not an active one of the token's user", where=str(key_file), fix="tunesmith keys enrol"
            )
        statement = prepared.statement
        label, _, stated = read_statement(statement)
        if (label, stated.decision, stated.reason) != (version, decision, reason.strip()):
            raise Refused(
                f"the server asks for another signature than you meant to give: {stated.decision} {label}",
                fix="tell the server's operator; nothing was signed",
            )
        if actor not in (None, stated.approver):
            raise Refused(f"the token is {stated.approver}'s, not {actor}'s", where="$TUNESMITH_TOKEN")
        signature = private.sign(signed_bytes(statement), ec.ECDSA(hashes.SHA256()))
        signed = {"statement": statement, "key": own, "signature": base64.b64encode(signature).decode()}
        return _sent(http, "/api/decisions", signed, RecordedDecision)


def _sent(http: httpx.Client, path: str, document: dict[str, Any], expected: type[Answer]) -> Answer:
    try:
        answer = http.post(path, json=document)
        if answer.is_success:
            return expected.model_validate(answer.json())
        said = str(answer.json()["error"]["message"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise Refused(
            f"the server did not answer: {error or type(error).__name__}", where=str(http.base_url)
        ) from error
    raise Refused(f"the server said no ({answer.status_code}): {said}", where=str(http.base_url))
