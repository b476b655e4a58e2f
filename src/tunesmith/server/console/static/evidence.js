"use strict";
// The matrix of requests. Rows are fetched in pieces, and only pieces near the visible part stay in the page: an empty
// piece keeps its height, so that the scroll bar and the place of every row are right from the start.

const NEAR = "2500px 0px";
const WAIT = 30; // ms: a piece that is passed sooner is not fetched

function showMatrix(table) {
  const rows = Number(table.dataset.rows), size = Number(table.dataset.piece);
  const scroller = table.closest(".matrix");
  const pieces = [{ body: table.tBodies[0], filled: true }];
  let height = table.tBodies[0].rows[0].getBoundingClientRect().height;

  const count = (number) => Math.min(size, rows - number * size);

  function empty(piece, number) {
    piece.body.replaceChildren();
    piece.body.className = "empty";
    piece.body.setAttribute("aria-hidden", "true");
    piece.body.style.height = `${height * count(number)}px`;
    piece.filled = false;
  }

  async function fill(piece, number) {
    if (piece.filled) return;
    piece.fetching ||= fetchRows(piece, number).finally(() => { piece.fetching = null; });
    await piece.fetching;
  }

  async function fetchRows(piece, number) {
    piece.stop = new AbortController();
    const headers = { "HX-Request": "true" };
    const answer = await fetch(`${table.dataset.from}&first=${number * size}`, { headers, signal: piece.stop.signal });
    if (answer.headers.has("HX-Redirect")) location.assign(answer.headers.get("HX-Redirect"));
    if (!answer.ok) throw new Error(`the rows could not be fetched: ${answer.status}`);
    const body = document.createElement("template");
    body.innerHTML = `<table><tbody>${await answer.text()}</tbody></table>`;
    piece.body.replaceChildren(...body.content.querySelectorAll("tr"));
    piece.body.className = "";
    piece.body.removeAttribute("aria-hidden");
    piece.body.style.height = "";
    piece.filled = true;
  }

  const failed = (error) => {
    if (error.name === "AbortError") return;
    document.getElementById("notice").textContent = "The rows could not be fetched. Scroll on or reload the page to try again.";
  };

  const near = new IntersectionObserver((seen) => {
    for (const one of seen) {
      const number = Number(one.target.dataset.number), piece = pieces[number];
      clearTimeout(piece.timer);
      if (one.isIntersecting) {
        piece.timer = setTimeout(() => fill(piece, number).catch(failed), WAIT);
      } else {
        piece.stop?.abort();
        if (piece.filled && !piece.body.contains(document.activeElement)) empty(piece, number);
      }
    }
  }, { root: scroller, rootMargin: NEAR });

  for (let number = 1; number * size < rows; number++) {
    const piece = { body: document.createElement("tbody"), filled: false };
    piece.body.setAttribute("role", "rowgroup");
    empty(piece, number);
    pieces.push(piece);
  }
  table.append(...pieces.slice(1).map((piece) => piece.body));
  pieces.forEach((piece, number) => {
    piece.body.dataset.number = number;
    near.observe(piece.body);
  });

  async function focusOn(place) {
    const at = Math.max(0, Math.min(rows - 1, place)), number = Math.floor(at / size);
    if (!pieces[number].filled) scroller.scrollTop = at * height;
    await fill(pieces[number], number);
    pieces[number].body.rows[at % size].querySelector("a").focus();
  }

  scroller.addEventListener("keydown", (event) => {
    const row = event.target.closest("tbody tr");
    if (!row || event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
    const at = Number(row.getAttribute("aria-rowindex")) - 2;
    const page = Math.max(1, Math.floor(scroller.clientHeight / height) - 2);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + page, PageUp: at - page, Home: 0, End: rows - 1 };
    if (!(event.key in to)) return;
    event.preventDefault();
    focusOn(to[event.key]).catch(failed);
  });

  // A larger text makes taller rows.
  new ResizeObserver(() => {
    const row = table.querySelector("tbody:not(.empty) tr");
    const now = row ? row.getBoundingClientRect().height : height;
    if (Math.abs(now - height) < 0.5) return;
    height = now;
    pieces.forEach((piece, number) => { if (!piece.filled) empty(piece, number); });
  }).observe(table.tHead);

  const at = Number(table.dataset.at);
  if (at > 0) focusOn(at).catch(failed);
}

document.addEventListener("htmx:load", (event) => {
  for (const table of event.target.querySelectorAll(".matrix table")) showMatrix(table);
});

// On the page of one request the arrow keys go to its neighbours.
document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
  if (event.target.closest("input, select, textarea, pre, [tabindex='0'], summary")) return;
  const to = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
  const link = to && document.querySelector(`a[rel=${to}]`);
  if (link) link.click();
});
