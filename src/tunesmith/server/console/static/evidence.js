"use strict";
// The matrix of requests. Rows are fetched some pieces at a time, long before they are seen, and only pieces near the
// visible part stand in the page: an empty piece keeps its height, so that the scroll bar and the place of every row are
// right from the start.

const NEAR = 2500, FAR = 9000; // px around the visible part: pieces that stand in the page, rows that are fetched
const TOGETHER = 5; // pieces of one request
const AT_ONCE = 2; // requests under way

function showMatrix(table) {
  const rows = Number(table.dataset.rows), size = Number(table.dataset.piece);
  const scroller = table.closest(".matrix");
  const pieces = [{ body: table.tBodies[0], filled: true, rows: [...table.tBodies[0].rows] }];
  const wanted = new Set(), loading = new Map(); // groups of pieces; a group's request
  let height = table.tBodies[0].rows[0].getBoundingClientRect().height;

  const count = (number) => Math.min(size, rows - number * size);

  function empty(piece, number) {
    piece.body.replaceChildren();
    piece.body.className = "empty";
    piece.body.setAttribute("aria-hidden", "true");
    piece.body.style.height = `${height * count(number)}px`;
    piece.filled = false;
  }

  function fill(piece) {
    if (piece.filled || !piece.rows) return;
    piece.body.replaceChildren(...piece.rows);
    piece.body.className = "";
    piece.body.removeAttribute("aria-hidden");
    piece.body.style.height = "";
    piece.filled = true;
  }

  function load(group) {
    if (!loading.has(group)) loading.set(group, fetchRows(group).finally(() => loading.delete(group)));
    return loading.get(group);
  }

  async function fetchRows(group) {
    const first = group * TOGETHER;
    const address = `${table.dataset.from}&first=${first * size}&most=${TOGETHER * size}`;
    const answer = await fetch(address, { headers: { "HX-Request": "true" } });
    if (answer.headers.has("HX-Redirect")) location.assign(answer.headers.get("HX-Redirect"));
    if (!answer.ok) throw new Error(`the rows could not be fetched: ${answer.status}`);
    const body = document.createElement("template");
    body.innerHTML = `<table><tbody>${await answer.text()}</tbody></table>`;
    const found = [...body.content.querySelectorAll("tr")];
    pieces.slice(first, first + TOGETHER).forEach((piece, place) => {
      piece.rows ||= found.slice(place * size, (place + 1) * size);
      if (piece.near) fill(piece);
    });
  }

  // What is nearest to the visible part comes first, so that a quick drag of the scroll bar fetches little on its way.
  function fetchNext() {
    while (loading.size < AT_ONCE && wanted.size) {
      const here = (scroller.scrollTop + scroller.clientHeight / 2) / (height * size * TOGETHER) - 0.5;
      const group = [...wanted].reduce((a, b) => (Math.abs(a - here) <= Math.abs(b - here) ? a : b));
      wanted.delete(group);
      load(group).then(fetchNext, () => {
        wanted.add(group); // again when the reader scrolls on
        failed();
      });
    }
  }

  const failed = () => {
    document.getElementById("notice").textContent = "The rows could not be fetched. Scroll on or reload the page to try again.";
  };

  const watch = (margin, see) => new IntersectionObserver((seen) => {
    for (const one of seen) see(Number(one.target.dataset.number), one.isIntersecting);
    fetchNext();
  }, { root: scroller, rootMargin: `${margin}px 0px` });

  const far = watch(FAR, (number, within) => {
    const piece = pieces[number], group = Math.floor(number / TOGETHER), first = group * TOGETHER;
    piece.far = within;
    if (!within) piece.rows = null;
    if (pieces.slice(first, first + TOGETHER).some((one) => one.far && !one.rows)) wanted.add(group);
    else wanted.delete(group);
  });

  const near = watch(NEAR, (number, within) => {
    const piece = pieces[number];
    piece.near = within;
    if (within) fill(piece);
    else if (piece.filled && !piece.body.contains(document.activeElement)) empty(piece, number);
  });

  for (let number = 1; number * size < rows; number++) {
    const piece = { body: document.createElement("tbody"), filled: false, rows: null };
    piece.body.setAttribute("role", "rowgroup");
    empty(piece, number);
    pieces.push(piece);
  }
  table.append(...pieces.slice(1).map((piece) => piece.body));
  pieces.forEach((piece, number) => {
    piece.body.dataset.number = number;
    far.observe(piece.body);
    near.observe(piece.body);
  });

  async function focusOn(place) {
    const at = Math.max(0, Math.min(rows - 1, place)), number = Math.floor(at / size), piece = pieces[number];
    if (!piece.filled) scroller.scrollTop = at * height;
    if (!piece.rows && !piece.filled) await load(Math.floor(number / TOGETHER));
    fill(piece);
    piece.body.rows[at % size].querySelector("a").focus();
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
