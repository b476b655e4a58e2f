"""/api/decisions: approve or refuse a version with a signature that was made elsewhere. No private key comes here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Base64Bytes, BaseModel, ConfigDict, Field

from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.view import View
from tunesmith.server.access import caller, needs, stated_scope
from tunesmith.server.errors import ApiError, bad_request, forbidden, not_stored
from tunesmith.server.intake.body import read_body
from tunesmith.server.openapi import body, errors
from tunesmith.services import versions as service
from tunesmith.store.identities import User
from tunesmith.store.store import Store

routes = APIRouter(dependencies=[needs("decisions")])
Body = TypeVar("Body", bound=BaseModel)
Short = Annotated[str, Field(max_length=200)]


class DecisionRequest(BaseModel):
    """What is to be decided. version: `NAME@v3`, an alias or the start of a digest.

    reason: signed with the decision; a refusal needs one. tenant, region: the version's, by default the caller's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Annotated[str, Field(min_length=1, max_length=200)]
    decision: Literal["approve", "refuse"]
    reason: Annotated[str, Field(max_length=2000)] = ""
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
    "/api/decisions/prepare",
    response_model=service.PreparedDecision,
    responses=errors(400, 401, 403, 408, 409, 413, 429, 503, 507),
    openapi_extra=body(DecisionRequest),
)
async def prepare(request: Request) -> Response:
    """Verify a version, and state what its approver signs. Changes nothing."""

    def prepared(store: Store, user: User, given: DecisionRequest) -> View:
        scope = stated_scope(user, given.tenant, given.region)
        return service.prepare(store, given.version, given.decision, given.reason, actor=user.name, scope=scope)

    return await _decided(request, DecisionRequest, prepared)


@routes.post(
    "/api/decisions",
    response_model=service.RecordedDecision,
    responses=errors(400, 401, 403, 408, 409, 413, 429, 503, 507),
    openapi_extra=body(SignedDecision),
)
async def submit(request: Request) -> Response:
    """Check a signed decision and record it. The caller must be the one who signed it."""

    def submitted(store: Store, user: User, given: SignedDecision) -> View:
        return service.submit(store, given.statement, given.key, given.signature, actor=user.name)

    return await _decided(request, SignedDecision, submitted)


async def _decided(request: Request, model: type[Body], decide: Callable[[Store, User, Body], View]) -> Response:
    user, serving = caller(request)
    if not user.may("version.approve"):
        raise forbidden(f"{user.name} may not approve or refuse versions.")
    with serving.arrives(user) as count:
        given = await read_body(request, model, serving.settings, count)

    def run() -> View:
        try:
            return decide(serving.store, user, given)
        except UsageError as error:
            raise bad_request(_sentence(error)) from error
        except Refused as error:
            raise ApiError(409, _sentence(error), code="decision_refused") from error
        except TunesmithError as error:
            raise not_stored(error) from error

    return JSONResponse((await serving.files.run(user.name, run)).document())


def _sentence(error: TunesmithError) -> str:
    return f"{error.what[:1].upper()}{error.what[1:]}." + (f" Then: {error.fix}." if error.fix else "")
