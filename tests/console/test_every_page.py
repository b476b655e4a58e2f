"""Every page that links lead to: the keyboard, a large text, hostile texts in every field, and paper."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from tests.console.conftest import Login, check_accessible
from tests.console.evidence_rows import put_evaluation
from tests.fabricate import OWNER
from tests.server.conftest import Served
from tunesmith.registry.versions import Version
from tunesmith.store.people.identities import add_user
from tunesmith.store.people.roles import ROLES

# Right-to-left marks, characters without a width, and more characters without a space than fit any screen.
HOSTILE = "\u202eright to left\u202c \u200b\u200d\u2066 \u05d0\u05d1\u05d2 " + "W" * 1_000
FILL = """text => {
  const inside = "td, th, dd, li, p, h1, h2, h3, summary, a, code, .badge, option, label".split(", ");
  const fields = inside.map((each) => `main ${each}`);
  for (const field of document.querySelectorAll([...fields, ".brand", ".account"].join(", ")))
    for (const node of field.childNodes)
      if (node.nodeType === 3 && node.textContent.trim()) node.textContent = text;
}"""
FITS = "document.documentElement.scrollWidth <= window.innerWidth"
FOCUSED = """() => {
  const at = document.activeElement;
  if (at === document.body) return null;
  const style = getComputedStyle(at), box = at.getBoundingClientRect();
  at.dataset.walked = (at.dataset.walked || 0) + 1;
  return {name: at.outerHTML.slice(0, 120), shown: box.width > 0 && box.height > 0,
          ringed: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2, again: at.dataset.walked > 1};
}"""


def kind(path: str) -> str:
    """A page's address without what names one thing."""
    return re.sub(r"(/(sha256:)?[0-9a-f]{8,}|/\d+|/home(?=/))+", "/x", path.partition("?")[0].partition("#")[0])


def pages(page: Page, start: str) -> Iterator[str]:
    """Goes to one page of each kind that links lead to, and gives its kind."""
    seen, waiting = {kind("/")}, ["/"]
    while waiting:
        path = waiting.pop(0)
        page.goto(start + path)
        expect(page.locator("[hx-trigger=load]:not(#drift, [hx-get='/console/due'])")).to_have_count(0)
        found = page.eval_on_selector_all("a[href^='/']", "links => links.map((link) => link.getAttribute('href'))")
        for link in found:
            if kind(link) not in seen and not re.search(r"\.(md|html)$|logout", link):
                seen.add(kind(link))
                waiting.append(link)
        yield kind(path)


def walk(page: Page, place: str) -> None:
    """The keyboard reaches everything once and shows where it is, and leads on from the last stop."""
    page.set_viewport_size({"width": 1280, "height": 900})
    page.evaluate(
        "() => { document.body.tabIndex = -1; document.body.focus(); document.body.removeAttribute('tabindex'); }"
    )
    stops = []
    for _ in range(400):
        page.keyboard.press("Tab")
        stop = page.evaluate(FOCUSED)
        if stop is None or stop["again"]:
            break
        stops.append(stop)
    assert 'class="skip"' in stops[0]["name"], (place, stops[0])
    unseen = [stop["name"] for stop in stops if not (stop["shown"] and stop["ringed"])]
    assert not unseen, (place, unseen)
    assert len(stops) < 400, f"{place}: the keyboard finds no end"
    assert "/console/operations" in " ".join(stop["name"] for stop in stops), place


def stretch(page: Page, place: str) -> None:
    """Nothing is wider than the screen: at 200%, on paper, and with hostile texts in every field."""
    page.set_viewport_size({"width": 640, "height": 450})  # of 1280 by 900 at 200%
    assert page.evaluate(FITS), place
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 720, "height": 1000})  # a sheet of A4 between its margins
    assert page.evaluate(FITS), f"{place} on paper"
    page.emulate_media(media="screen")
    page.evaluate(FILL, HOSTILE)
    for width in (360, 1280, 2560):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate(FITS), f"{place}: a hostile text is wider than {width} pixels"


@pytest.mark.attack("input", "texts in every field that turn the direction, have no width, or never end")
def test_every_page_by_keyboard_at_200_percent_with_hostile_texts_and_on_paper(
    served: Served, versions: dict[int, Version], login: Login
) -> None:
    put_evaluation(served.scene)
    add_user(served.scene.store, "uma", list(ROLES), actor=OWNER)
    served.paused(versions[2], 10)
    page = login("uma")
    walked = []
    for place in pages(page, served.url):
        walked.append(place)
        check_accessible(page)
        walk(page, place)
        stretch(page, place)
    for place in ("/console/jobs", "/console/evidence/x", "/console/rollouts/x", "/console/rows/review"):
        assert place in walked, walked
    assert len(walked) >= 14, walked
