"use strict";
// Keys in this browser, and signatures by them. A private key cannot be read, not even by this page.

const usable = window.isSecureContext && window.crypto && window.crypto.subtle && window.indexedDB;
const ALGORITHM = { name: "ECDSA", namedCurve: "P-256" };

function inStore(mode, act) {
  return new Promise((done, failed) => {
    const opening = indexedDB.open("tunesmith-keys", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore("keys", { keyPath: "fingerprint" });
    opening.onerror = () => failed(opening.error);
    opening.onsuccess = () => {
      const change = opening.result.transaction("keys", mode);
      const asked = act(change.objectStore("keys"));
      change.oncomplete = () => { opening.result.close(); done(asked.result); };
      change.onabort = change.onerror = () => { opening.result.close(); failed(change.error); };
    };
  });
}

const base64 = (bytes) => btoa(String.fromCharCode(...new Uint8Array(bytes)));

async function makeKey() {
  const pair = await crypto.subtle.generateKey(ALGORITHM, false, ["sign", "verify"]);
  const lines = base64(await crypto.subtle.exportKey("spki", pair.publicKey)).match(/.{1,64}/g);
  const pem = ["-----BEGIN PUBLIC KEY-----", ...lines, "-----END PUBLIC KEY-----", ""].join("\n");
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", new TextEncoder().encode(pem)));
  const fingerprint = "sha256:" + [...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  // Kept before it is proposed: a key that the server knows and nobody holds would be of no use.
  await inStore("readwrite", (keys) => keys.put({ fingerprint, key: pair.privateKey }));
  return pem;
}

function tell(error) {
  const said = document.createElement("p");
  said.className = "notice bad";
  said.textContent = `The browser did not do it: ${error.message || error.name}`;
  document.getElementById("notice").replaceChildren(said);
}

async function prepare(root) {
  for (const one of root.querySelectorAll(".insecure")) one.hidden = Boolean(usable);
  if (!usable) return;
  const held = new Map((await inStore("readonly", (keys) => keys.getAll())).map((one) => [one.fingerprint, one.key]));
  for (const one of root.querySelectorAll("[data-fingerprint]")) {
    one.querySelector(".here").hidden = !held.has(one.dataset.fingerprint);
  }
  for (const form of root.querySelectorAll("form.make-key")) form.querySelector("button").disabled = false;
  for (const form of root.querySelectorAll("form.sign")) {
    const own = form.dataset.keys.split(" ").find((fingerprint) => held.has(fingerprint));
    root.querySelector(".no-key").hidden = Boolean(own);
    if (!own) continue;
    form.elements.key.value = own;
    form.querySelector("code").textContent = own.slice(7, 27);
    form.querySelector(".sign-with").hidden = false;
    form.querySelector("button").disabled = false;
  }
}

async function sign(form) {
  const { key } = await inStore("readonly", (keys) => keys.get(form.elements.key.value));
  const payload = Uint8Array.from(atob(form.dataset.payload), (letter) => letter.charCodeAt(0));
  form.elements.signature.value = base64(await crypto.subtle.sign({ name: "ECDSA", hash: "SHA-256" }, key, payload));
}

document.addEventListener("submit", async (event) => {
  const form = event.target;
  const makes = form.matches("form.make-key");
  if (!makes && !form.matches("form.sign")) return;
  event.preventDefault();
  form.querySelector("button").disabled = true;
  try {
    if (makes) form.elements.public_key.value = await makeKey();
    else await sign(form);
    form.submit();
  } catch (error) {
    form.querySelector("button").disabled = false;
    tell(error);
  }
});

document.addEventListener("htmx:afterSwap", (event) => prepare(event.detail.target).catch(tell));
prepare(document).catch(tell);
