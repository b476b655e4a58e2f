"""What serves, moves and waits for whom, on the first page and by `tunesmith status`."""

from __future__ import annotations

import time
from datetime import timedelta

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from playwright.sync_api import expect

from tests.console.conftest import Login, check_page, follow, statements
from tests.fabricate import APPROVER, NAME, OPERATOR, OWNER, STEWARD, Scene, approve, put_requests
from tests.server.conftest import Served
from tunesmith.core.clock import now
from tunesmith.core.scope import Scope
from tunesmith.registry.signing.keys import read_public_key
from tunesmith.registry.versions import Version
from tunesmith.services import home
from tunesmith.services.home import Home
from tunesmith.store import database
from tunesmith.store.people.identities import add_user
from tunesmith.store.people.proposed_keys import propose_key
from tunesmith.store.tables import AliasRow, JobRow


def says(found: Home, *, mine: bool | None = None) -> list[str]:
    return [one.says for one in found.waiting if mine in (None, one.mine)]


def test_the_first_page_says_what_serves_what_is_rolled_out_and_what_needs_action(
    served: Served, versions: dict[int, Version], login: Login
) -> None:
    store = served.scene.store
    put_requests(store, versions[1].digest, [{"ok": place >= 2} for place in range(8)])
    earlier = (now() - timedelta(hours=2)).isoformat(timespec="microseconds")
    put_requests(store, versions[1].digest, [{"ok": False, "at": earlier}] * 5)
    page = login(APPROVER)
    serving = page.get_by_role("region", name="Serving now")
    expect(serving.get_by_role("row").nth(1)).to_contain_text(f"{NAME}@v1")
    expect(serving.get_by_role("row").nth(1)).to_contain_text("25.0%")
    waits = page.locator("#waiting")
    expect(waits).to_contain_text(f"{NAME}@v4 waits for 1 more approver")
    expect(waits.get_by_text("for you")).to_have_count(1)
    expect(page.get_by_text("database: answers")).to_be_visible()
    expect(page.get_by_text("controller: answers")).to_be_visible()

    # While the page is open, a rollout pauses and the version is approved.
    rollout = served.begin(versions[2], {"setWeight": 10}, {"pause": {}}, {"setWeight": 100})
    expect(page.get_by_role("link", name=f"{NAME}@v2 gets 10%")).to_be_visible(timeout=60_000)
    expect(waits).to_contain_text(f"rollout {rollout.id} of {NAME} is paused", timeout=60_000)
    check_page(page)
    approve(store, versions[4], approver=APPROVER)
    expect(waits).not_to_contain_text("@v4", timeout=60_000)

    mine = login(OPERATOR)
    first = mine.locator("#waiting li").first
    expect(first).to_contain_text("for you")
    follow(first.get_by_role("link", name="is paused"))
    mine.wait_for_url(f"{served.url}/console/rollouts/{rollout.id}")


def test_each_item_names_who_may_do_it(served: Served, versions: dict[int, Version]) -> None:
    store = served.scene.store
    served.until(
        served.begin(versions[2], {"setWeight": 10}, {"pause": {}}, {"setWeight": 100}),
        lambda now: now.status == "paused",
    )
    approver, operator, steward = (home.home(store, name) for name in (APPROVER, OPERATOR, STEWARD))
    assert ["@v4" in one for one in says(approver, mine=True)] == [True]
    assert ["paused" in one for one in says(operator, mine=True)] == [True]
    assert says(steward, mine=True) == []
    assert sorted(says(approver)) == sorted(says(operator)) == sorted(says(steward))
    assert "paused" in says(operator)[0], "what waits for the viewer comes first"
    pem = ec.generate_private_key(ec.SECP256R1()).public_key()
    text = pem.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    propose_key(store, OPERATOR, read_public_key(text), actor=OPERATOR)
    assert f"a key of {OPERATOR} waits to be confirmed" in says(home.home(store, OWNER), mine=True)
    # Who registered a version may not approve it, whatever their roles.
    add_user(store, "max", ["approver"], actor=OWNER)
    assert says(home.home(store, "max"), mine=True)
    assert not [one for one in home.home(store, OWNER).waiting if one.mine and "@v4" in one.says]


def test_a_tenant_sees_what_serves_it_and_only_its_own_requests(served: Served, versions: dict[int, Version]) -> None:
    store = served.scene.store
    add_user(store, "eve", ["operator", "approver"], actor=OWNER, scope=Scope("beta"))
    for tenant, count in (("acme", 8), ("beta", 3)):
        put_requests(store, versions[1].digest, [{"tenant": tenant, "ok": place > 0} for place in range(count)])
    served.begin(versions[1], scope=Scope("acme"))
    served.begin(versions[2], {"setWeight": 10}, {"pause": {}}, {"setWeight": 100}, scope=Scope("acme"))
    found = home.home(store, "eve")
    assert [(one.version, one.tenant, one.requests, one.failed) for one in found.serving] == [(f"{NAME}@v1", "", 3, 1)]
    assert found.moving == ()
    assert says(found) == []
    assert home.home(store, OPERATOR).moving != ()


def test_a_queue_that_nobody_works_on_is_not_well(served: Served) -> None:
    store = served.scene.store
    (worker,) = (each for each in home.home(store, OPERATOR).health if each.part == "worker")
    assert worker.ok
    empty = {"arguments": {}, "progress": {}, "result": {}, "error": {}}
    row = {"project": "p", "kind": "run", "state": "queued", "created_by": OWNER, "most_attempts": 3, **empty}
    with database.writing(store.engine) as session:
        session.add(JobRow(**row, due=time.time() - 600, created=time.time() - 600))
    (worker,) = (each for each in home.home(store, OPERATOR).health if each.part == "worker")
    assert (worker.ok, "tunesmith worker" in worker.says) == (False, True)


def test_more_champions_take_no_more_queries_and_a_list_that_is_cut_says_so(
    scene: Scene, versions: dict[int, Version]
) -> None:
    store = scene.store
    row = {"name": NAME, "alias": "champion", "region": "", "revision": 1, "version": versions[1].digest}

    def looked(*tenants: str) -> tuple[Home, int]:
        with store.change(OWNER, "test.aliases", NAME, {}) as session:
            session.add_all(AliasRow(**row, tenant=tenant) for tenant in tenants)
        return home.home(store, OWNER), statements(store, lambda: home.home(store, OWNER))

    (few, before), (many, after) = looked("a", "b"), looked(*(f"t{number}" for number in range(48)))
    assert (len(few.serving), len(many.serving), after <= before) == (2, 50, True)
    assert all(one.refused == "" for one in many.serving)
    assert (few.champions, many.champions) == (None, None)
    cut, _ = looked("t-more")
    assert (cut.champions, len(cut.serving), cut.versions) == (50, 50, None)
