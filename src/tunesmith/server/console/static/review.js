"use strict";
// The keys of the review page. They can be switched off, for people whose software types letters by itself.

const keys = document.getElementById("keys");
try { keys.checked = localStorage.getItem("review-keys") !== "off"; } catch { /* they are on */ }
keys.addEventListener("change", () => {
  try { localStorage.setItem("review-keys", keys.checked ? "on" : "off"); } catch { /* only this page then */ }
});

function open(name) {
  const part = document.getElementById(name);
  if (!part) return;
  part.open = true;
  const first = part.querySelector("[data-first]");
  first.focus();
  if (first.tagName === "TEXTAREA") first.setSelectionRange(first.value.length, first.value.length);
}

for (const button of document.querySelectorAll("[data-opens]")) {
  button.addEventListener("click", () => open(button.dataset.opens));
}

const actions = {
  a: () => document.querySelector("#accept button:not([disabled])")?.click(),
  e: () => open("edit"),
  r: () => open("reject"),
  j: () => document.querySelector("a[rel=next]")?.click(),
  k: () => document.querySelector("a[rel=prev]")?.click(),
  "?": () => { const help = document.getElementById("help"); help.open = !help.open; },
};

document.addEventListener("keydown", (event) => {
  const field = event.target.closest("input:not([type=checkbox]), textarea, select");
  if (field) {
    if (event.key === "Escape") field.blur();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      field.form.requestSubmit();
    }
    return;
  }
  if (!keys.checked || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const action = actions[event.key];
  if (action) {
    event.preventDefault();
    action();
  }
});
