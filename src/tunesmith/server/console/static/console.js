"use strict";
// What every page does by itself. Pages bring what only they need in files of their own.

function chooseTheme(name) {
  try { localStorage.setItem("theme", name); } catch { /* only this page then */ }
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  document.dispatchEvent(new Event("themechange"));
}

for (const input of document.querySelectorAll("input[name=theme]")) {
  input.checked = input.value === (document.documentElement.dataset.theme || "auto");
  input.addEventListener("change", () => chooseTheme(input.value));
}

// Times that are near become "12 min ago", and stay right while the page is open. The whole time is their title.
function ago(seconds) {
  const units = [["s", 1, 120], ["min", 60, 120], ["h", 3600, 48]];
  const size = Math.abs(seconds);
  const unit = units.find(([, length, most]) => size < length * most);
  if (!unit) return null;
  if (unit[0] === "s" && size < 10) return "now";
  const said = `${Math.round(size / unit[1])} ${unit[0]}`;
  return seconds < 0 ? `in ${said}` : `${said} ago`;
}
function sayTimes(within) {
  for (const time of within.querySelectorAll("time[datetime]")) {
    time.dataset.whole ||= time.textContent;
    time.textContent = ago((Date.now() - Date.parse(time.dateTime)) / 1000) || time.dataset.whole;
  }
}
setInterval(() => sayTimes(document), 30000);
// The style sheet shows a cell's label on narrow screens, where a table has no row of headings.
function complete(within) {
  sayTimes(within);
  for (const cell of within.querySelectorAll(".wide > table > tbody td")) {
    const headings = cell.closest("table").querySelector("thead tr");
    cell.dataset.label = headings?.cells[cell.cellIndex]?.textContent.trim() || "";
  }
}
document.addEventListener("htmx:load", (event) => complete(event.target.parentNode || document));
window.addEventListener("beforeprint", () => {
  for (const time of document.querySelectorAll("time[data-whole]")) time.textContent = time.dataset.whole;
});
window.addEventListener("afterprint", () => sayTimes(document));
complete(document);

// Buttons that copy. Browsers give the clipboard to pages over HTTPS or of localhost only; others select the text.
document.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-copy]");
  if (!button) return;
  const heard = document.getElementById("heard");
  try {
    await navigator.clipboard.writeText(button.dataset.copy);
    heard.textContent = "Copied.";
    button.classList.add("done");
    setTimeout(() => button.classList.remove("done"), 2000);
  } catch {
    const text = button.previousElementSibling;
    text.textContent = button.dataset.copy;
    getSelection().selectAllChildren(text);
    heard.textContent = "Selected: copy it with the keyboard.";
  }
});

// What went wrong is said next to the button that was pressed, or in the place of the part that a page waits for.
function noticeAt(by) {
  const notice = document.getElementById("notice");
  if (by && by.matches("[hx-trigger=load]")) by.replaceChildren(notice);
  const form = by && (by.closest("form") || by);
  if (form && form.matches("form, button")) form.after(notice);
  return notice;
}
document.addEventListener("htmx:beforeRequest", (event) => {
  if (event.detail.requestConfig.elt.matches("form, button, form *")) document.getElementById("notice").replaceChildren();
});
document.addEventListener("htmx:sendError", (event) => {
  noticeAt(event.detail.requestConfig.elt).textContent = "The server does not answer. Try again.";
});

// A part that is fetched again by itself never replaces an open form, or a field in which somebody writes. What was
// unfolded and has an id stays unfolded.
let unfolded = [];
document.addEventListener("htmx:beforeSwap", (event) => {
  if (event.detail.xhr.status >= 400) noticeAt(event.detail.requestConfig.elt);
  const part = event.detail.target;
  if (event.detail.requestConfig.verb !== "get" || event.detail.requestConfig.elt !== part) return;
  const notice = document.getElementById("notice");
  if (part.contains(notice)) document.getElementById("content").prepend(notice);
  const writes = document.activeElement.matches("input, select, textarea") && part.contains(document.activeElement);
  if (writes || part.querySelector("details[open] > form")) event.detail.shouldSwap = false;
  unfolded = [...part.querySelectorAll("details[open][id]")].map((each) => each.id);
});
document.addEventListener("htmx:afterSwap", () => {
  for (const id of unfolded) if (document.getElementById(id)) document.getElementById(id).open = true;
  unfolded = [];
});
