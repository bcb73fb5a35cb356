// The list of sessions: one row each, made once and changed in place, so that five hundred of them stay quick.

import { post } from "./api.js";
import { byId, countdown, h, now, setAttribute, setText } from "./dom.js";

const KINDS = {
  all: { label: "All", admits: () => true },
  running: { label: "Running", admits: (it) => it.status === "running" },
  waiting: { label: "Waiting for a tool", admits: (it) => it.open_calls > 0 },
  asking: { label: "Asking you", admits: (it) => it.unconfirmed > 0 },
  queued: { label: "Queued", admits: (it) => it.work?.state === "queued" },
  idle: { label: "Idle", admits: (it) => it.status === "idle" && it.open_calls === 0 },
};
const TICK_MILLISECONDS = 1000;
const SHORTEST_OF_ID = 4;

const rows = new Map(); // id -> {it, li, link, parts, text, isShown}
let kind = "all";
let words = [];
let selected = null;
let chips = {};

export function start() {
  chips = Object.fromEntries(
    Object.entries(KINDS).map(([name, { label }]) => {
      const count = h("span", { class: "count" });
      const button = h("button", { type: "button", "aria-pressed": String(name === kind) }, label, " ", count);
      button.addEventListener("click", () => choose(name));
      return [name, { button, count }];
    }),
  );
  byId("chips").append(...Object.values(chips).map(({ button }) => button));
  byId("filter").addEventListener("input", (event) => {
    words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    refilter();
  });
  byId("filter").addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown") focusRow(firstShown(), event);
  });
  byId("rows").addEventListener("keydown", onKey);
  byId("new-session").addEventListener("click", () => toggleForm(byId("new-form").hidden));
  byId("new-form").addEventListener("submit", create);
  byId("new-form").addEventListener("keydown", (event) => {
    if (event.key === "Escape") toggleForm(false);
  });
  setInterval(tick, TICK_MILLISECONDS);
}

export function take(message, isFirst) {
  const gone = new Set(message.gone ?? []);
  if (isFirst) {
    const there = new Set((message.sessions ?? []).map((it) => it.id));
    for (const id of rows.keys()) if (!there.has(id)) gone.add(id);
  }
  for (const id of gone) {
    rows.get(id)?.li.remove();
    rows.delete(id);
  }
  const fresh = [];
  for (const it of message.sessions ?? []) {
    let row = rows.get(it.id);
    if (row === undefined) {
      row = make(it);
      rows.set(it.id, row);
      fresh.push(row.li);
    }
    update(row, it);
  }
  byId("rows").prepend(...fresh.reverse()); // the youngest first
  if (message.sessions || gone.size || isFirst) count();
  if (isFirst) rows.get(selected)?.li.scrollIntoView({ block: "nearest" });
}

export function select(id) {
  rows.get(selected)?.link.removeAttribute("aria-current");
  selected = id;
  document.body.classList.toggle("has-detail", id !== null);
  rows.get(id)?.link.setAttribute("aria-current", "true");
  roam(id);
}

// Rows

function make(it) {
  const parts = {
    title: h("span", { class: "title" }),
    id: h("span", { class: "id" }),
    status: h("span", { class: "state" }),
    work: h("span", { class: "state work" }),
    lease: h("span", { class: "number lease" }),
    events: h("span", { class: "number event-count" }),
  };
  const name = h("span", { class: "name" }, parts.title, parts.id);
  const cells = [name, parts.status, parts.work, parts.lease, parts.events];
  const link = h("a", { href: `#/sessions/${encodeURIComponent(it.id)}`, tabindex: "-1" }, ...cells);
  const row = { it, link, parts, li: h("li", { "data-id": it.id }, link), text: "", isShown: true };
  if (it.id === selected) link.setAttribute("aria-current", "true");
  return row;
}

function update(row, it) {
  const { parts } = row;
  row.it = it;
  setText(parts.title, it.title ?? "Untitled");
  parts.title.classList.toggle("untitled", it.title === null);
  setText(parts.id, it.id);
  const [status, tone] = statusOf(it);
  setText(parts.status, status);
  setAttribute(parts.status, "data-tone", tone);
  const [work, workTone] = workOf(it.work);
  setText(parts.work, work);
  setAttribute(parts.work, "data-tone", workTone);
  setText(parts.events, String(it.events));
  showLease(row);
  row.text = ` ${[it.title ?? "", status, work].join(" ").toLowerCase()}`;
  filter(row);
}

/** What a person wants to know of a session, and how loud it is. */
export function statusOf(it) {
  if (it.status === "running") return ["running", "good"];
  if (it.unconfirmed > 0) return ["asks you", "ask"];
  if (it.open_calls > 0) return ["waits for a tool", "wait"];
  return [it.status, "quiet"];
}

export function workOf(work) {
  if (work === null) return ["none", "quiet"];
  if (work.state === "queued") return [work.is_reserved ? "reserved" : "queued", "wait"];
  const tones = { starting: "wait", active: "good", stopping: "wait", stopped: "quiet" };
  return [work.state, tones[work.state]];
}

function showLease({ it, parts }) {
  const until = it.work?.expires_at ? Date.parse(it.work.expires_at) - now() : null;
  setText(parts.lease, until === null ? "" : countdown(until));
  parts.lease.classList.toggle("over", until !== null && until <= 0);
}

function tick() {
  for (const row of rows.values()) if (row.isShown && row.it.work?.expires_at) showLease(row);
}

// Filters

function choose(name) {
  kind = name;
  for (const [each, { button }] of Object.entries(chips)) button.setAttribute("aria-pressed", String(each === name));
  refilter();
}

function filter(row) {
  const isShown = KINDS[kind].admits(row.it) && words.every((word) => matches(row, word));
  if (row.isShown !== isShown) row.li.hidden = !isShown;
  row.isShown = isShown;
}

/** The beginning of a word, or a part of an id; not a short one, since nearly every id has a 4 in it somewhere. */
function matches({ text, it }, word) {
  return text.includes(` ${word}`) || (word.length >= SHORTEST_OF_ID && it.id.includes(word));
}

function refilter() {
  for (const row of rows.values()) filter(row);
  count();
}

function count() {
  const all = [...rows.values()];
  for (const [name, { count }] of Object.entries(chips)) {
    const number = all.filter(({ it }) => KINDS[name].admits(it)).length;
    setText(count, String(number));
  }
  setText(byId("count-sessions"), all.length ? String(all.length) : "");
  const isEmpty = !all.some((row) => row.isShown);
  const text = all.length ? "No session matches." : "No sessions yet. Make one here, or with the API.";
  byId("no-rows").hidden = !isEmpty;
  setText(byId("no-rows"), text);
  roam(selected);
}

// Keys: one row is in the tab order, the arrows go on from there

function roam(id) {
  const stop = byId("rows").querySelector('a[tabindex="0"]');
  const row = rows.get(id);
  const next = row?.isShown ? row.link : stop && !stop.parentElement.hidden ? stop : firstShown();
  if (stop === next) return;
  stop?.setAttribute("tabindex", "-1");
  next?.setAttribute("tabindex", "0");
}

const firstShown = () => byId("rows").querySelector("li:not([hidden]) > a");

function onKey(event) {
  const li = event.target.closest("li");
  if (li === null) return;
  if (event.key === "ArrowDown") focusRow(neighbour(li, "nextElementSibling"), event);
  else if (event.key === "ArrowUp") focusRow(neighbour(li, "previousElementSibling") ?? byId("filter"), event);
  else if (event.key === "Home") focusRow(firstShown(), event);
  else if (event.key === "End") focusRow(lastShown(), event);
}

function lastShown() {
  const all = byId("rows").querySelectorAll("li:not([hidden]) > a");
  return all[all.length - 1];
}

function neighbour(li, direction) {
  let next = li[direction];
  while (next?.hidden) next = next[direction];
  return next?.firstElementChild ?? null;
}

function focusRow(target, event) {
  if (target === null || target === undefined) return;
  event.preventDefault();
  target.focus();
}

// A new one

function toggleForm(isOpen) {
  byId("new-form").hidden = !isOpen;
  byId("new-session").setAttribute("aria-expanded", String(isOpen));
  if (isOpen) byId("new-form").elements.title.focus();
  else byId("new-session").focus();
}

async function create(event) {
  event.preventDefault();
  const { title, text } = event.target.elements;
  const body = { title: title.value || null, text: text.value || null };
  const reply = await post("/sessions", body);
  if (reply === null) return;
  event.target.reset();
  toggleForm(false);
  location.hash = `#/sessions/${encodeURIComponent(reply.session.id)}`;
}
