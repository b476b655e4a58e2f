"""Time stamps (RFC 3161): a time-stamping authority signs the digest of some bytes and the time.

The protocol, the signature, the chain and the comparison of digests are rfc3161-client's.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from cryptography import x509

from tunesmith.core.errors import Refused, TunesmithError, UsageError

_SECONDS = 30.0
_LONGEST = 1 << 15


def load_roots(path: Path) -> list[x509.Certificate]:
    """The root certificates (PEM) of the authorities that are trusted. Raises UsageError where there is none."""
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"no certificates can be read: {error}", where=str(path), fix="a PEM file of root certificates"
        ) from error


def time_stamp(url: str, message: bytes, roots: Sequence[x509.Certificate]) -> tuple[str, datetime]:
    """(the authority's signed response in base64, its time) for a message, checked as `check` does.

    Raises TunesmithError where the authority does not answer, Refused where its answer is not a valid time stamp.
    """
    import httpx
    from rfc3161_client import HashAlgorithm, TimestampRequestBuilder

    request = TimestampRequestBuilder().data(message).hash_algorithm(HashAlgorithm.SHA256)
    built = request.nonce(nonce=True).cert_request(cert_request=True).build()
    headers = {"content-type": "application/timestamp-query"}
    try:
        answer = httpx.post(url, content=built.as_bytes(), headers=headers, timeout=_SECONDS)
        answer.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise TunesmithError(
            f"the time-stamping authority did not answer: {error}", where=url[:200], fix="try again, or another one"
        ) from error
    encoded = base64.b64encode(answer.content[:_LONGEST]).decode()
    try:
        return encoded, check(encoded, message, roots, nonce=built.nonce)
    except ValueError as error:
        fix = "check the address, and the authority's root certificates"
        raise Refused(f"the authority's time stamp does not verify: {error}", where=url[:200], fix=fix) from error


def check(encoded: str, message: bytes, roots: Sequence[x509.Certificate], nonce: int | None = None) -> datetime:
    """The time of a time stamp, if it is of this message and signed by an authority under one of the roots.

    Raises ValueError with the reason otherwise.
    """
    from rfc3161_client import VerificationError, VerifierBuilder, decode_timestamp_response

    try:
        response = decode_timestamp_response(base64.b64decode(encoded, validate=True))
        VerifierBuilder(roots=list(roots), nonce=nonce).build().verify_message(response, message)
        return response.tst_info.gen_time
    except (VerificationError, ValueError, binascii.Error) as error:
        raise ValueError(str(error)) from error
