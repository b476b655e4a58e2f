"""Scopes, references to versions, and the names that they are made of."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.core.errors import UsageError
from tunesmith.core.text.names import Scope, VersionRef, check_name


def test_a_scope_covers_itself_and_an_empty_part_covers_all() -> None:
    scope = Scope("acme", "eu")
    assert list(scope.covering()) == [scope, Scope("acme"), Scope(region="eu"), Scope()]
    assert list(Scope("acme").covering()) == [Scope("acme"), Scope()]
    assert all(wider.covers(scope) for wider in scope.covering())
    for other in (Scope("acme", "us"), Scope("acme"), Scope()):
        assert not scope.covers(other)
    assert str(Scope("acme")) == "tenant 'acme', region 'any'"
    assert scope.options() == " --tenant acme --region eu"
    assert Scope().options() == ""
    for text in (" ", "*", "A", "a/b", "../x"):
        with pytest.raises(UsageError, match="is not a tenant"):
            Scope(text)
        with pytest.raises(UsageError, match="is not a region"):
            Scope(region=text)


def test_a_version_reference_reads_what_it_prints_and_is_ordered_by_number() -> None:
    ref = VersionRef("home-intents", 12)
    assert str(ref) == "home-intents@v12"
    assert VersionRef.parse(str(ref)) == ref
    assert sorted([VersionRef("a", 10), VersionRef("a", 9)]) == [VersionRef("a", 9), VersionRef("a", 10)]
    with pytest.raises(UsageError, match="numbered from 1"):
        VersionRef("a", 0)
    for text in ("", "a", "a@v0", "a@v01", "a@1", "a@v1 ", "A@v1", "a@b@v1", "../a@v1", "a@champion"):
        with pytest.raises(UsageError):
            VersionRef.parse(text)


@settings(max_examples=50)
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
