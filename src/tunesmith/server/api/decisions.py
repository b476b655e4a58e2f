"""/api/decisions: approve or refuse a version with a signature that was made elsewhere. No private key comes here."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from fastapi import Request
from fastapi.responses import Response
from pydantic import Base64Bytes, BaseModel, ConfigDict, Field

from tunesmith.server.access import needs, stated_scope
from tunesmith.server.api.routing import Reason, Short, call_of, changes, router
from tunesmith.services import versions as service

routes = router(code="decision_refused")


class DecisionRequest(BaseModel):
    """What is to be decided. version: `NAME@v3`, an alias or the start of a digest.

    reason: signed with the decision; a refusal needs one. tenant, region: the version's, by default the caller's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Annotated[str, Field(min_length=1, max_length=200)]
    decision: Literal["approve", "refuse"]
    reason: Reason = ""
    tenant: Short | None = None
    region: Short | None = None


class SignedDecision(BaseModel):
    """A statement as `prepare` gave it, and the signature over it.

    key: the fingerprint of the key that signed. signature: ECDSA with SHA-256 over the payload that `prepare` gave, in
    base64: DER, as openssl writes it, or r and s of 32 bytes each, as WebCrypto gives it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    statement: dict[str, Any]
    key: Annotated[str, Field(pattern="^sha256:[0-9a-f]{64}$")]
    signature: Annotated[Base64Bytes, Field(min_length=8, max_length=200)]


@routes.post(
    "/decisions/prepare", dependencies=[needs("decisions")], **changes(service.PreparedDecision, DecisionRequest)
)
async def prepare(request: Request) -> Response:
    """Verify a version, and state what its approver signs. Changes nothing."""
    call = call_of(request, "version.approve")
    given = await call.read(DecisionRequest)
    scope = stated_scope(call.user, given.tenant, given.region)
    state = partial(service.prepare, call.store, given.version, given.decision, given.reason, scope=scope, **call.by)
    return await call.answer(state, threads=call.serving.files)


@routes.post("/decisions", dependencies=[needs("decisions")], **changes(service.RecordedDecision, SignedDecision))
async def submit(request: Request) -> Response:
    """Check a signed decision and record it. The caller must be the one who signed it."""
    call = call_of(request, "version.approve")
    given = await call.read(SignedDecision)
    record = partial(service.submit, call.store, given.statement, given.key, given.signature, **call.by)
    return await call.answer(record, threads=call.serving.files)
