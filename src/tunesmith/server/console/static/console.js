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

// An open menu closes with Escape and with a click elsewhere.
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  for (const menu of document.querySelectorAll("details.account[open]")) {
    menu.open = false;
    menu.querySelector("summary").focus();
  }
});
document.addEventListener("click", (event) => {
  for (const menu of document.querySelectorAll("details.account[open]")) {
    if (!menu.contains(event.target)) menu.open = false;
  }
});

// A form asks before it does what cannot be undone: <form data-confirm="...">.
document.addEventListener("submit", (event) => {
  const asked = event.target.dataset.confirm;
  if (asked && !window.confirm(asked)) event.preventDefault();
});

// A part that is fetched again by itself never replaces an open form, or a field in which somebody writes. What was
// unfolded and has an id stays unfolded.
let unfolded = [];
document.addEventListener("htmx:beforeSwap", (event) => {
  const part = event.detail.target;
  if (event.detail.requestConfig.verb !== "get" || event.detail.requestConfig.elt !== part) return;
  const writes = document.activeElement.matches("input, select, textarea") && part.contains(document.activeElement);
  if (writes || part.querySelector("details[open] > form")) event.detail.shouldSwap = false;
  unfolded = [...part.querySelectorAll("details[open][id]")].map((each) => each.id);
});
document.addEventListener("htmx:afterSwap", () => {
  for (const id of unfolded) if (document.getElementById(id)) document.getElementById(id).open = true;
  unfolded = [];
});
