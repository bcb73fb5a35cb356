// The events of a session, each a line that opens to its JSON.

import { h, instant, setText, span } from "./dom.js";

const LONGEST = 600;
const BOOKKEEPING = /^(span\.|session\.(usage|thread_|status_running|updated))/;

/** Put an event where its time belongs, or change the one that came before as unprocessed. */
export function show(it, event) {
  const known = it.events.get(event.id);
  if (known !== undefined) {
    known.event = { ...known.event, ...event };
    if (known.at === null && event.processed_at) {
      known.li.remove();
      place(it, known);
    }
    fill(it, known);
    return;
  }
  const parts = {
    at: h("span", { class: "event-at number" }),
    type: h("span", { class: "event-type" }),
    text: h("span", { class: "event-text" }),
  };
  const summary = h("summary", {}, parts.at, parts.type, parts.text);
  const details = h("details", {}, summary);
  const entry = { event, at: null, parts, li: h("li", { "data-type": event.type }, details) };
  if (BOOKKEEPING.test(event.type)) entry.li.classList.add("bookkeeping");
  if (isBad(event)) entry.li.classList.add("bad");
  entry.li.dataset.from = event.type.split(".")[0];
  details.addEventListener("toggle", () => unfold(details, entry));
  it.events.set(event.id, entry);
  place(it, entry);
  fill(it, entry);
}

/** The newest on top; what waits for its turn is newer than all. Almost always the first comparison ends it. */
function place(it, entry) {
  const key = entry.event.processed_at ?? "~";
  entry.at = entry.event.processed_at;
  let next = it.parts.events.firstElementChild;
  while (next !== null && next.dataset.key > key) next = next.nextElementSibling;
  entry.li.dataset.key = key;
  it.parts.events.insertBefore(entry.li, next);
}

function fill(it, entry) {
  const { event, parts } = entry;
  const began = it.session ? instant(it.session.created_at) : null;
  const at = event.processed_at && began !== null ? span(Math.max(0, instant(event.processed_at) - began)) : "waits";
  setText(parts.at, at);
  parts.at.title = event.processed_at ?? "not processed yet";
  setText(parts.type, event.type);
  const thread = event.session_thread_id ? it.threads[event.session_thread_id] : undefined;
  const text = summaryOf(event);
  setText(parts.text, thread ? `[${thread}] ${text}` : text);
  const open = entry.li.querySelector("pre");
  if (open) setText(open, JSON.stringify(event, null, 2));
}

function unfold(details, entry) {
  details.querySelector("pre")?.remove();
  if (details.open) details.append(h("pre", { tabindex: "0" }, JSON.stringify(entry.event, null, 2)));
}

function isBad(event) {
  return event.type === "session.error" || event.is_error === true || event.stop_reason?.type === "retries_exhausted";
}

function summaryOf(event) {
  if (event.name && event.input) return cut(`${event.name} ${inputOf(event)}${permissionOf(event)}`);
  if (Array.isArray(event.content)) return cut(event.content.map((block) => block.text ?? `(${block.type})`).join("\n"));
  if (event.stop_reason) {
    const calls = event.stop_reason.event_ids?.length;
    return event.stop_reason.type + (calls ? `, ${calls} open` : "");
  }
  if (event.error) return cut(event.error.message);
  if (event.result) return event.result + (event.deny_message ? `: ${cut(event.deny_message)}` : "");
  if (event.agent_name) return event.agent_name;
  if (event.model_usage) return `${event.model_usage.input_tokens} in, ${event.model_usage.output_tokens} out`;
  return "";
}

function inputOf(event) {
  return typeof event.input.command === "string" ? event.input.command : JSON.stringify(event.input);
}

const permissionOf = ({ evaluated_permission: permission }) =>
  permission && permission !== "allow" ? ` (${permission})` : "";

const cut = (text) => (text.length > LONGEST ? `${text.slice(0, LONGEST)} …` : text);
