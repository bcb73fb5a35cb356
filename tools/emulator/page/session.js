// One session: what can be done with it, when it got where, and its events, the newest first.

import { follow, post } from "./api.js";
import { ago, byId, countdown, h, now, noteNow, plural, setText, span } from "./dom.js";
import { show as showEvent } from "./events.js";
import { statusOf, workOf } from "./sessions.js";

const TICK_MILLISECONDS = 1000;

let isBrief = false; // for every session, until the page is left
let shown = null; // the one that is on the page: {id, source, session, parts, events, threads}

export function show(id) {
  if (shown?.id === id) return;
  shown?.source?.close();
  shown = null;
  const detail = byId("detail");
  detail.replaceChildren();
  if (id === null) {
    detail.append(h("p", { class: "empty" }, "Choose a session to see its timeline and its events."));
    return;
  }
  shown = { id, source: null, session: null, events: new Map(), threads: {}, parts: frame(id) };
  detail.append(...shown.parts.all);
  detail.scrollTop = 0;
  connect(shown);
}

/** The tab is hidden, or seen again. */
export function pause() {
  shown?.source?.close();
}

export function resume() {
  if (shown !== null && !shown.isGone) connect(shown);
}

function connect(it) {
  it.source?.close();
  it.source = follow(`/sessions/${encodeURIComponent(it.id)}/live`, {
    onMessage: (message) => take(it, message),
    onState(state) {
      if (state === "closed" && it === shown) gone(it, "There is no such session (any more).");
    },
  });
}

setInterval(() => {
  if (shown?.session && !shown.isGone) showWork(shown);
}, TICK_MILLISECONDS);

// The frame

function frame(id) {
  const parts = {
    title: h("h2", {}),
    status: h("span", { class: "state" }),
    work: h("span", { class: "state work" }),
    lease: h("span", { class: "muted number" }),
    facts: h("p", { class: "facts muted" }),
    calls: h("section", { class: "calls", "aria-label": "Calls that wait", hidden: true }),
    rounds: h("div", { class: "rounds" }),
    events: h("ol", { class: "events", reversed: true }),
    eventCount: h("span", { class: "count" }),
    leftOut: h("p", { class: "muted", hidden: true }),
    text: h("input", { name: "text", autocomplete: "off", placeholder: "A message; !CMD runs a command" }),
  };
  parts.interrupt = h("button", { type: "button", onclick: () => send({ type: "user.interrupt" }) }, "Interrupt");
  parts.stop = h("button", { type: "button", onclick: () => stop(false) }, "Stop item");
  parts.force = h("button", { type: "button", class: "danger", onclick: () => stop(true) }, "Force stop");
  parts.form = h(
    "form",
    { class: "say", onsubmit: say },
    h("label", { class: "grow" }, h("span", { class: "hidden-label" }, "Message to the agent"), parts.text),
    h("button", { class: "primary" }, "Send"),
  );
  const quiet = h("input", { type: "checkbox", checked: isBrief });
  parts.events.classList.toggle("brief", isBrief);
  quiet.addEventListener("change", () => {
    isBrief = quiet.checked;
    parts.events.classList.toggle("brief", isBrief);
  });
  const head = h(
    "header",
    { class: "detail-head" },
    h("a", { class: "back", href: "#/sessions" }, "All sessions"),
    parts.title,
    h("p", { class: "states" }, h("code", {}, id), parts.status, parts.work, parts.lease),
    parts.facts,
    parts.form,
    h("div", { class: "actions" }, parts.interrupt, parts.stop, parts.force),
  );
  const log = h(
    "section",
    { class: "log", "aria-label": "Events" },
    h("div", { class: "head" }, h("h3", {}, "Events ", parts.eventCount), h("label", { class: "check" }, quiet, "Without bookkeeping")),
    parts.events,
    parts.leftOut,
  );
  const timeline = h("section", { class: "timeline", "aria-label": "Timeline" }, h("h3", {}, "Timeline"), parts.rounds);
  return { ...parts, head, all: [head, parts.calls, timeline, log] };
}

function gone(it, text) {
  it.source.close();
  it.isGone = true;
  it.parts.calls.hidden = true;
  for (const control of it.parts.head.querySelectorAll("button, input")) control.disabled = true;
  setText(it.parts.facts, text);
}

// What the stream says

function take(it, message) {
  if (it !== shown) return;
  noteNow(message.now);
  const { parts } = it;
  if (message.threads) it.threads = message.threads;
  if (message.session) {
    it.session = message.session;
    setText(parts.title, it.session.title ?? "Untitled");
    const [status, tone] = statusOf(it.session);
    setText(parts.status, status);
    parts.status.dataset.tone = tone;
    showWork(it);
  }
  if (message.calls) showCalls(it, message.calls);
  if (message.rounds) showRounds(it, message.rounds);
  if (message.events) {
    for (const event of message.events) showEvent(it, event);
    setText(parts.eventCount, String(it.events.size));
  }
  if (message.events_left_out) {
    parts.leftOut.hidden = false;
    setText(parts.leftOut, `${plural(message.events_left_out, "older event")} are not shown.`);
  }
  if (message.is_deleted) gone(it, "This session has been deleted.");
}

function showWork(it) {
  const { parts, session } = it;
  const { work } = session;
  const [state, tone] = workOf(work);
  setText(parts.work, work === null ? "no work item" : `item ${state}`);
  parts.work.dataset.tone = tone;
  const left = work?.expires_at ? Date.parse(work.expires_at) - now() : null;
  setText(parts.lease, left === null ? "" : left > 0 ? `lease ${countdown(left)}` : "lease is over");
  const facts = [`agent ${session.agent}`, `created ${ago(session.created_at)}`];
  if (work?.latest_heartbeat_at) facts.push(`last beat ${ago(work.latest_heartbeat_at)}`);
  if (work?.epoch) facts.push(plural(work.epoch, "lease"));
  if (session.waiting_messages) facts.push(`${plural(session.waiting_messages, "message")} waiting`);
  for (const [name, value] of Object.entries(session.metadata)) facts.push(`${name}: ${value}`);
  setText(parts.facts, facts.join(" · "));
  const isOver = session.status === "terminated";
  for (const control of parts.form.elements) control.disabled = isOver;
  parts.interrupt.disabled = isOver;
  parts.stop.disabled = work === null || work.state === "stopped" || work.state === "stopping";
  parts.force.disabled = work === null || work.state === "stopped";
}

// Calls that wait for a verdict or for an answer that a person can give

function showCalls(it, calls) {
  const { parts } = it;
  const had = new Map([...parts.calls.children].map((card) => [card.dataset.id, card]));
  const cards = calls.map((call) => {
    const old = had.get(call.id);
    return old && old.dataset.confirmed === String(call.is_confirmed) ? old : callCard(call);
  });
  const focused = document.activeElement;
  const losesFocus = parts.calls.contains(focused) && !cards.some((card) => card.contains(focused));
  parts.calls.replaceChildren(...cards);
  parts.calls.hidden = cards.length === 0;
  if (losesFocus) parts.text.focus();
  else if (cards.some((card) => card.contains(focused))) focused.focus();
}

function callCard(call) {
  const code = call.name === "bash" && typeof call.input.command === "string" ? call.input.command : null;
  const input = h("pre", {}, code ?? JSON.stringify(call.input, null, 2));
  const card = h("article", { class: "call card", "data-id": call.id, "data-confirmed": String(call.is_confirmed) });
  const name = h("strong", {}, call.name);
  if (!call.is_confirmed) {
    const reason = h("input", { placeholder: "Why not (optional)", autocomplete: "off", "aria-label": "Why not" });
    const verdict = (result) => {
      const event = { type: "user.tool_confirmation", tool_use_id: call.id, result };
      if (result === "deny" && reason.value) event.deny_message = reason.value;
      send(event);
    };
    const allow = h("button", { type: "button", class: "primary", onclick: () => verdict("allow") }, "Allow");
    const deny = h("button", { type: "button", class: "danger", onclick: () => verdict("deny") }, "Deny");
    card.append(h("p", {}, "May it run ", name, "?"), input, h("div", { class: "actions" }, allow, deny, reason));
  } else if (call.is_custom) {
    const answer = h("input", { placeholder: "The result", autocomplete: "off", "aria-label": `Result of ${call.name}` });
    const form = h("form", { class: "say" }, h("label", { class: "grow" }, answer), h("button", {}, "Answer"));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const content = [{ type: "text", text: answer.value || "done" }];
      send({ type: "user.custom_tool_result", custom_tool_use_id: call.id, content });
    });
    card.append(h("p", {}, "A tool of the client's own, ", name, ", waits for its result"), input, form);
  } else {
    card.append(h("p", {}, name, " waits for a worker"), input);
  }
  return card;
}

// The timeline: the last round in full, those before it folded

function showRounds(it, rounds) {
  const { parts } = it;
  const open = new Set([...parts.rounds.querySelectorAll("details[open]")].map((each) => each.dataset.round));
  const all = rounds.map((round, index) => {
    const steps = roundSteps(round);
    if (index === rounds.length - 1) return h("div", { class: "round" }, steps);
    const last = round.steps[round.steps.length - 1];
    const title = `Round ${index + 1}, ${round.steps.length} steps in ${span(last?.ms ?? 0)}`;
    const folded = h("details", { class: "round", "data-round": index }, h("summary", {}, title), steps);
    folded.open = open.has(String(index));
    return folded;
  });
  parts.rounds.replaceChildren(...all.reverse());
}

function roundSteps({ steps }) {
  const longest = Math.max(1, ...steps.map((step, index) => gap(steps, index)));
  const list = h("ol", { class: "steps" });
  for (const [index, step] of steps.entries()) {
    const bar = h("span", { class: "bar", "aria-hidden": "true" });
    bar.style.setProperty("--share", String(Math.sqrt(gap(steps, index) / longest)));
    const title = [step.at, step.note].filter(Boolean).join("\n");
    const name = h("span", { class: "step-name" }, step.name);
    const at = h("span", { class: "step-at" }, span(step.ms));
    const more = h("span", { class: "step-gap muted" }, index ? `+${span(gap(steps, index))}` : "");
    const bad = step.is_bad ? h("span", { class: "step-note" }, step.note || "no beat came") : null;
    list.append(h("li", { title, class: step.is_bad ? "bad" : null, "data-step": step.name }, name, at, more, bad, bar));
  }
  return list;
}

const gap = (steps, index) => (index ? steps[index].ms - steps[index - 1].ms : 0);

// What a person does

const send = (...events) => post(`/sessions/${encodeURIComponent(shown.id)}/events`, { events });
const stop = (force) => post(`/sessions/${encodeURIComponent(shown.id)}/stop`, { force });

async function say(event) {
  event.preventDefault();
  const { text } = shown.parts;
  if (!text.value.trim()) return;
  const content = [{ type: "text", text: text.value }];
  if ((await send({ type: "user.message", content })) !== null) text.value = "";
}
