"""The list of trusted keys as a file that a stranger may have touched."""

from pathlib import Path

import pytest

from tunesmith.core.digests import canonical, digest_bytes
from tunesmith.core.errors import Refused
from tunesmith.core.text.names import Scope
from tunesmith.store.blobs.local import LocalBlobs
from tunesmith.store.people.trust import TRUST_KEY, TrustedKey, find_key, read_trust, write_trust


def key(user: str, public: str | None = None) -> TrustedKey:
    public = public or f"key of {user}"
    return TrustedKey(user=user, roles=("engineer",), public_key=public, fingerprint=digest_bytes(public.encode()))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no signature can be believed"):
        read_trust(tmp_path / "keys.json")
    scoped = key("ann").model_copy(update={"tenant": "acme", "region": "eu"})
    assert (scoped.scope, key("ann").scope) == (Scope("acme", "eu"), Scope())
    keys = (scoped, key("bob"))
    blobs = LocalBlobs(tmp_path)
    write_trust(blobs, keys[::-1])
    assert read_trust(blobs.path(TRUST_KEY)) == keys
    assert find_key(keys, keys[1].fingerprint) == keys[1]
    assert find_key(keys, "") is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"null",
        b"\xff",
        b"[" * 100_000,
        b'[{"user": "ann"}]',
        canonical([{**key("ann").model_dump(mode="json"), "fingerprint": digest_bytes(b"another")}]),
        canonical([{**key("ann").model_dump(mode="json"), "expires": "never"}]),
        canonical([key("ann").model_dump(mode="json"), key("ann", "x").model_dump(mode="json")]),
        canonical([key("ann", "x").model_dump(mode="json"), key("bob", "x").model_dump(mode="json")]),
    ],
    ids=["empty", "object", "null", "bytes", "deep", "parts", "other fingerprint", "more", "label twice", "key twice"],
)
def test_a_broken_or_ambiguous_key_list_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(content)
    with pytest.raises(Refused) as caught:
        read_trust(path)
    assert caught.value.where == str(path)
