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
