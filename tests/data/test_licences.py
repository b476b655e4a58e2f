"""Which licences rows may stand under."""

from __future__ import annotations

import pytest

from tunesmith.core.errors import Refused
from tunesmith.data.licences import permitted
from tunesmith.data.settings import PERMISSIVE


@pytest.mark.parametrize(
    ("given", "spelling"),
    [
        ("apache-2.0", "Apache-2.0"),
        ("MIT", "MIT"),
        ("mit or cc-by-nc-4.0", "MIT OR CC-BY-NC-4.0"),
        ("MIT AND (CC0-1.0 OR GPL-3.0-only)", "MIT AND (CC0-1.0 OR GPL-3.0-only)"),
    ],
)
def test_allowed(given: str, spelling: str) -> None:
    assert permitted(given, PERMISSIVE, "rows") == spelling


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (None, "without a licence"),
        ("", "without a licence"),
        ("  ", "without a licence"),
        ("CC-BY-NC-4.0", "non-commercial"),
        ("MIT AND CC-BY-NC-SA-4.0", "non-commercial"),
        ("CC-BY-SA-4.0", "share-alike"),
        ("GPL-3.0-only", "not among"),
        ("Apache-2.0 WITH LLVM-exception", "not among"),
        ("LicenseRef-Our-Own", "no SPDX licence id"),
        ("free for all", "no"),
        ("MIT AND", "not an SPDX expression"),
        ("MIT; rm -rf /", "not an SPDX expression"),
    ],
)
def test_refused(given: str | None, why: str) -> None:
    with pytest.raises(Refused, match=why) as caught:
        permitted(given, PERMISSIVE, "a.jsonl, row 3")
    assert caught.value.exit_code == 3
    assert caught.value.where == "a.jsonl, row 3"


def test_a_licence_is_allowed_by_name() -> None:
    assert permitted("LicenseRef-Our-Own", ("LicenseRef-Our-Own",), "rows") == "LicenseRef-Our-Own"
    assert permitted("CC-BY-SA-4.0", (*PERMISSIVE, "CC-BY-SA-4.0"), "rows") == "CC-BY-SA-4.0"
    with pytest.raises(Refused):
        permitted("MIT", (), "rows")
