"""Scopes, references to versions, and the names that they are made of."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.core.errors import UsageError
from tunesmith.core.scope import Scope
from tunesmith.core.text.names import check_name
from tunesmith.core.version_ref import VersionRef


def test_a_scope_covers_itself_and_an_empty_part_covers_all() -> None:
    scope = Scope("acme", "eu")
    assert scope.covers(scope)
    assert not scope.covers(Scope("acme", "us"))
    assert not scope.covers(Scope("acme"))
    assert not scope.covers(Scope())
    assert Scope("acme").covers(scope)
    assert Scope(region="eu").covers(scope)
    assert Scope().covers(scope)


def test_covering_scopes_come_narrowest_first() -> None:
    assert list(Scope("acme", "eu").covering()) == [Scope("acme", "eu"), Scope("acme"), Scope(region="eu"), Scope()]
    assert list(Scope("acme").covering()) == [Scope("acme"), Scope()]
    assert list(Scope().covering()) == [Scope()]
    assert all(wider.covers(Scope("acme", "eu")) for wider in Scope("acme", "eu").covering())


def test_a_scope_is_shown_as_text_and_as_options() -> None:
    assert str(Scope("acme")) == "tenant 'acme', region 'any'"
    assert Scope("acme", "eu").options() == " --tenant acme --region eu"
    assert Scope().options() == ""


@pytest.mark.parametrize("text", [" ", ".", "*", "A", "a/b", "../x"])
def test_a_tenant_or_region_is_a_name_or_empty(text: str) -> None:
    with pytest.raises(UsageError, match="is not a tenant"):
        Scope(text)
    with pytest.raises(UsageError, match="is not a region"):
        Scope(region=text)


@pytest.mark.parametrize("text", ["", "a", "a@v0", "a@v01", "a@1", "a@v1 ", "A@v1", "a@b@v1", "../a@v1", "a@champion"])
def test_other_spellings_of_a_version_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        VersionRef.parse(text)


def test_a_version_reference_reads_what_it_prints_and_is_ordered_by_number() -> None:
    ref = VersionRef("home-intents", 12)
    assert str(ref) == "home-intents@v12"
    assert VersionRef.parse(str(ref)) == ref
    assert sorted([VersionRef("a", 10), VersionRef("a", 9)]) == [VersionRef("a", 9), VersionRef("a", 10)]
    with pytest.raises(UsageError, match="numbered from 1"):
        VersionRef("a", 0)


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
