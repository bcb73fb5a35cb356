// Requests to the admin API. What goes wrong is said where everybody sees it, in the emulator's words.

import { byId, h } from "./dom.js";

const TOAST_MILLISECONDS = 8000;

export function complain(text) {
  const toast = h("p", { class: "toast" }, text);
  byId("toasts").append(toast);
  setTimeout(() => toast.remove(), TOAST_MILLISECONDS);
}

/** The reply, or null after a complaint. */
export async function ask(method, path, body) {
  const options = { method };
  if (body !== undefined) {
    options.headers = { "content-type": "application/json" };
    options.body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(`/_emulator${path}`, options);
  } catch {
    complain("The emulator does not answer.");
    return null;
  }
  const reply = await response.json().catch(() => null);
  if (response.ok) return reply;
  complain(reply?.error?.message ?? `The emulator answered ${response.status}.`);
  return null;
}

export const get = (path) => ask("GET", path);
export const post = (path, body) => ask("POST", path, body);

/** Events of a stream, until `close`. `onMessage(message, isFirst)`: the first after each connection is the whole. */
export function follow(path, { onMessage, onState = () => {} }) {
  const source = new EventSource(`/_emulator${path}`);
  let isFirst = true;
  source.onopen = () => {
    isFirst = true;
    onState("live");
  };
  source.onmessage = (event) => {
    onMessage(JSON.parse(event.data), isFirst);
    isFirst = false;
  };
  source.onerror = () => onState(source.readyState === EventSource.CLOSED ? "closed" : "reconnecting");
  return source;
}
