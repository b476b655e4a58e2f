"""The list of trusted keys as a file that a stranger may have touched."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.core.digests import canonical, digest_bytes
from tunesmith.core.errors import Refused, UsageError
from tunesmith.store.names import check_name, check_scope
from tunesmith.store.trust import TRUST_FILE, TrustedKey, find_key, read_trust, write_trust


def key(user: str, public: str | None = None) -> TrustedKey:
    public = public or f"key of {user}"
    return TrustedKey(user=user, roles=("engineer",), public_key=public, fingerprint=digest_bytes(public.encode()))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    keys = (key("ann"), key("bob"))
    write_trust(tmp_path, reversed(keys))
    assert read_trust(tmp_path / TRUST_FILE) == keys
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
    ids=["empty", "object", "null", "bytes", "deep", "parts", "other fingerprint", "more", "user twice", "key twice"],
)
def test_a_list_that_is_broken_or_gives_one_key_to_two_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(content)
    with pytest.raises(Refused) as caught:
        read_trust(path)
    assert caught.value.where == str(path)


def test_a_missing_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no signature can be believed"):
        read_trust(tmp_path / "keys.json")


def test_a_scope_speaks_for_itself_and_an_empty_one_for_all() -> None:
    scoped = key("ann").model_copy(update={"tenant": "acme", "region": "eu"})
    assert scoped.speaks_for("acme", "eu")
    assert not scoped.speaks_for("acme", "us")
    assert not scoped.speaks_for("", "")
    assert key("ann").speaks_for("acme", "eu")


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(text=st.text(max_size=70))
def test_a_name_is_one_plain_part_of_a_path(text: str) -> None:
    try:
        name = check_name(text, "name")
    except UsageError:
        return
    assert name == text == text.casefold()
    assert name.isascii()
    assert Path("/folder", name).resolve() == Path("/folder") / name
    assert Path(name).parts == (name,)


def test_a_scope_may_be_empty_and_nothing_else() -> None:
    assert check_scope("", "tenant") == ""
    assert check_scope("acme", "tenant") == "acme"
    for text in (" ", ".", "*"):
        with pytest.raises(UsageError):
            check_scope(text, "tenant")
