"""Which licences rows may have."""

import pytest

from tunesmith.core.errors import Refused, UsageError
from tunesmith.data.governance.licences import custom_ids, duties, mentions, needs, permitted
from tunesmith.data.settings import Licences
from tunesmith.records.dataset import Credit


def credit(source: str, licence: str, line: str | None) -> Credit:
    """A required attribution."""
    return Credit(source=source, licence=licence, credit=line)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (None, "without a licence"),
        ("CC-BY-NC-4.0", "non-commercial"),
        ("CC-BY-SA-4.0", "share-alike"),
        ("CC-BY-ND-4.0", "forbids sharing derived"),
        ("Apache-2.0 WITH LLVM-exception", "are not known"),
        ("LicenseRef-Our-Own", r"data\.licences\.allow does not list LicenseRef-Our-Own"),
        ("licenseref-our-own", "not an SPDX licence id"),
        ("MIT AND", "not an SPDX expression"),
    ],
)
def test_refused(given: str | None, why: str) -> None:
    with pytest.raises(Refused, match=why) as caught:
        permitted(given, Licences(), "a.jsonl, row 3")
    assert caught.value.exit_code == 3
    assert caught.value.where == "a.jsonl, row 3"


def test_the_policy_is_by_use_and_by_name() -> None:
    for given, spelling in (
        ("apache-2.0", "Apache-2.0"),
        ("mit or cc-by-nc-4.0", "MIT OR CC-BY-NC-4.0"),
        ("mit or LicenseRef-Our-Own", "MIT OR LicenseRef-Our-Own"),
    ):
        assert permitted(given, Licences(), "rows") == spelling
    for given, policy in (
        ("LicenseRef-Our-Own", Licences(allow=("LicenseRef-Our-Own",))),
        ("CC-BY-SA-4.0", Licences(share_alike=True)),
        ("CC-BY-NC-4.0", Licences(use="non-commercial")),
        ("CC-BY-ND-4.0", Licences(allow=("CC-BY-ND-4.0",))),
    ):
        assert permitted(given, policy, "rows") == given
        with pytest.raises(Refused):
            permitted(given, Licences(), "rows")
    with pytest.raises(Refused, match="non-commercial"):
        permitted("CC-BY-NC-SA-4.0", Licences(share_alike=True), "rows")
    for named, licence in (
        ("cc-by-4.0", "CC-BY-4.0"),
        ("GPL-3.0", "GPL-3.0-only"),
        ("llvm-exception", "Apache-2.0 WITH LLVM-exception"),
    ):
        assert permitted(licence, Licences(allow=(named,)), "rows") == licence
        with pytest.raises(Refused, match=r"refused by data\.licences\.refuse"):
            permitted(licence, Licences(allow=(named,), refuse=(named,)), "rows")
    for key, name in (("allow", "MITT"), ("refuse", "MIT OR ISC"), ("allow", "")):
        with pytest.raises(UsageError, match="not an SPDX licence id") as caught:
            permitted("ISC", Licences.model_validate({key: [name]}), "rows")
        assert caught.value.where == f"data.licences.{key}"


@pytest.mark.parametrize(
    ("one", "other", "fit"),
    [
        ("GPL-2.0-or-later", "GPL-3.0-only", True),
        ("GPL-2.0-only", "GPL-3.0-or-later", False),
        ("CC-BY-SA-3.0", "CC-BY-SA-4.0", True),
        ("CC-BY-SA-4.0", "ODbL-1.0", False),
    ],
)
def test_versions_of_one_licence_fit_unless_one_says_only(one: str, other: str, fit: bool) -> None:
    rows = {credit("a", one, None), credit("b", other, None)}
    if fit:
        assert duties(rows, Licences(share_alike=True)).share_alike == tuple(sorted((one, other)))
    else:
        with pytest.raises(Refused, match=f"{one} and {other}.*different licences"):
            duties(rows, Licences(share_alike=True))


def test_duties_are_those_of_the_licences_that_are_relied_on() -> None:
    policy = Licences(share_alike=True, allow=("LicenseRef-Own",))
    rows = {
        credit("a.jsonl", "CC0-1.0", None),
        credit("b.jsonl", "MIT OR CC-BY-SA-4.0", "Ann"),  # of a choice the lighter one
        credit("c.jsonl", "CC-BY-SA-3.0 AND MIT", "Bob"),
        credit("d.jsonl", "LicenseRef-Own", None),
    }
    assert duties(rows, policy).model_dump(mode="json") == {
        "use": "commercial",
        "attribution": [
            {"source": "b.jsonl", "licence": "MIT OR CC-BY-SA-4.0", "credit": "Ann"},
            {"source": "c.jsonl", "licence": "CC-BY-SA-3.0 AND MIT", "credit": "Bob"},
            {"source": "d.jsonl", "licence": "LicenseRef-Own", "credit": None},
        ],
        "share_alike": ["CC-BY-SA-3.0"],
        "unknown": ["LicenseRef-Own"],
    }

    assert duties({credit("a", "CC-BY-NC-4.0", None)}, Licences(use="non-commercial")).use == "non-commercial"


@pytest.mark.parametrize(
    ("expression", "licence", "needed"),
    [
        ("(MIT AND CC-BY-4.0) OR (Zlib AND CC-BY-4.0)", "CC-BY-4.0", True),
        ("MIT AND (Zlib OR CC-BY-4.0)", "CC-BY-4.0", False),
        ("GPL-2.0-only WITH Classpath-exception-2.0", "Classpath-exception-2.0", True),
        ("Zlib OR (CC-BY-4.0 AND MIT)", "(MIT AND CC-BY-4.0) OR Zlib", True),
        ("CC-BY-4.0 OR MIT OR Zlib", "MIT OR CC-BY-4.0", False),
        ("Zlib AND (MIT OR CC-BY-4.0)", "MIT OR CC-BY-4.0", True),
        ("no expression, such", "no expression, such", True),
    ],
)
def test_what_an_expression_needs(expression: str, licence: str, needed: bool) -> None:
    assert needs(expression, licence) is needed


def test_what_an_expression_mentions_and_its_own_ids() -> None:
    assert mentions("MIT OR (Zlib AND CC-BY-4.0)", "CC-BY-4.0")
    assert mentions("GPL-2.0-only WITH Classpath-exception-2.0 OR MIT", "Classpath-exception-2.0")
    for given, licence in (("MIT OR CC-BY-SA-4.0", "CC-BY-4.0"), ("MIT", "MIT AND Zlib"), ("no expression", "MIT")):
        assert not mentions(given, licence)
    for given in ("LicenseRef-Own", "MIT AND LicenseRef-Own"):
        assert custom_ids(given) == ("LicenseRef-Own",)
    for given in ("MIT OR LicenseRef-Own", "", "LicenseRef-Own AND Foo", "MIT AND"):
        assert custom_ids(given) == ()
