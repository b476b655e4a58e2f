"use strict";
// On the page of one request the arrow keys go to its neighbours.
document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
  if (event.target.closest("input, select, textarea, pre, [tabindex='0'], summary")) return;
  const to = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
  const link = to && document.querySelector(`a[rel=${to}]`);
  if (link) link.click();
});
