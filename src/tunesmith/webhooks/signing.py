"""Signatures of the Standard Webhooks scheme, which OpenAI's webhooks use too.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os

from tunesmith.core.errors import UsageError

_PREFIX = "whsec_"
_SIZES = range(24, 65)  # bytes, as the scheme has it


def secret_of(variable: str, where: str) -> bytes:
    """The secret's bytes from an environment variable. Raises UsageError where it is missing or is no secret.

    The message never holds the secret.
    """
    given = os.environ.get(variable, "")
    fix = f'export {variable}="whsec_$(openssl rand -base64 32)", and give the receiver the same'
    if not given:
        raise UsageError(f"the environment variable {variable} is not set", where=where, fix=fix)
    try:
        secret = base64.b64decode(given.removeprefix(_PREFIX), validate=True)
    except binascii.Error:
        secret = b""
    if not given.startswith(_PREFIX) or len(secret) not in _SIZES:
        raise UsageError(f"{variable} is not {_PREFIX} and 24 to 64 bytes in base64", where=where, fix=fix)
    return secret


def signed_headers(secret: bytes, identifier: str, at: int, body: bytes) -> dict[str, str]:
    """The three headers of a delivery. at: seconds since 1970, of this attempt: receivers refuse old ones."""
    signature = hmac.new(secret, f"{identifier}.{at}.".encode() + body, hashlib.sha256).digest()
    return {
        "webhook-id": identifier,
        "webhook-timestamp": str(at),
        "webhook-signature": f"v1,{base64.b64encode(signature).decode()}",
    }
