"""Dataset versions in the browser: the account, the rows, two versions compared, a steward's sign-off."""

from __future__ import annotations

import re
from pathlib import Path

from playwright.sync_api import expect

from tests.console.conftest import OPERATOR, OWNER, Login, check_page, follow
from tests.console.test_login import cookie_of, plain
from tests.data.rows import build, many_rows, row, settings, write_jsonl
from tests.fabricate import APPROVER, STEWARD
from tests.server.conftest import Served
from tunesmith.core.scope import Scope
from tunesmith.data.dataset import SPLITS, Dataset
from tunesmith.data.governance.signoff import sign_offs
from tunesmith.store.people.identities import add_user

HOSTILE = '<script>document.title="owned"</script>"><img src=x onerror=alert(1)> \u202e {{7*7}} javascript:alert(1) '


def test_a_steward_reads_compares_and_signs(served: Served, login: Login, tmp_path: Path) -> None:
    store = served.scene.store
    rows = many_rows(80)
    rows[5] = row(f"hostile {HOSTILE}", HOSTILE + "x" * 10_000, subject=HOSTILE[:60])
    write_jsonl(tmp_path / "rows.jsonl", [*rows, row("said twice", "x"), row("said twice", "x")])
    first = build(tmp_path)
    rows[3]["messages"][1]["content"] = "another answer"
    write_jsonl(tmp_path / "rows.jsonl", [*rows[1:], row("an entirely new request", "new")])
    second = build(tmp_path, settings(split={"seed": 0}, attributes=["x"]))

    page = login(STEWARD, "/console/rows")
    expect(page.get_by_role("table").get_by_role("link")).to_have_count(3)

    follow(page.get_by_role("link", name=first.digest[7:19]))
    expect(page.get_by_role("cell", name="exact duplicate")).to_be_visible()
    page.get_by_label("Text").fill("HOSTILE")
    page.get_by_role("combobox", name="Split").select_option(split_with(first, "hostile"))
    page.get_by_role("button", name="Show").click()
    expect(page.locator("#rows .pager")).to_have_text("1 row")
    expect(page.get_by_text("⟨U+202E⟩ {{7*7}}").first).to_be_visible()
    assert "owned" not in page.title()
    check_page(page)
    page.get_by_role("combobox", name="Split").select_option("removed")
    page.get_by_label("Text").fill("")
    page.get_by_label("Left out because").select_option("exact duplicate")
    page.get_by_role("button", name="Show").click()
    expect(page.get_by_role("cell", name="rows.jsonl", exact=True)).to_be_visible()

    page.get_by_label("What did you check?").fill(f"looked at 50 rows {HOSTILE}")
    page.get_by_role("button", name="Verify and sign off").click()
    expect(page.get_by_text("looked at 50 rows")).to_be_visible()
    assert [one["steward"] for one in sign_offs(store, first.digest)] == [STEWARD]

    page.goto(f"{served.url}/console/rows/compare?before={first.digest[7:]}&after={second.digest[7:]}")
    expect(page.get_by_text("Changed rows (1)")).to_be_visible()
    expect(page.get_by_text("another answer")).to_be_visible()
    expect(page.get_by_text("Added rows (1)")).to_be_visible()
    expect(page.get_by_text("attributes.0")).to_be_visible()
    check_page(page)


def test_who_sees_what(served: Served, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", many_rows(80, subject="a-subject"))
    digest = build(tmp_path).digest[7:]
    add_user(served.scene.store, "tia", ["steward"], actor=OWNER, scope=Scope("acme"))
    with plain(served, cookie_of(served, "tia")) as http:
        page = http.get("/console/rows").text
        assert ("shown only to people who" in page, digest[:12] in page) == (True, False)
        assert http.get(f"/console/rows/compare?before={digest}&after={digest}").status_code == 404
    for name in (APPROVER, OPERATOR):
        with plain(served, cookie_of(served, name)) as http:
            page = http.get(f"/console/rows/{digest}").text
            assert "shown to engineers and stewards" in page
            assert not re.search("sign off|a-subject", page)
            for wrong in ("0" * 64, "x", f"sha256:{digest}", served.scene.base[7:]):
                assert http.get(f"/console/rows/{wrong}").status_code == 404, wrong


def split_with(dataset: Dataset, text: str) -> str:
    """The split that holds the row with a text."""
    return next(name for name in SPLITS for one in dataset.examples(name) if text in one.messages[0].text)
