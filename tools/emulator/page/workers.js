// Who polls, what waits, and how to connect a worker.

import { get, post } from "./api.js";
import { ago, byId, h, plural, setText } from "./dom.js";
import { workOf } from "./sessions.js";

const TICK_MILLISECONDS = 1000;
let environments = [];
let parts = null;

export function start() {
  parts = { list: h("div", { class: "cards" }), connect: h("pre", { tabindex: "0", "aria-label": "Settings of a worker" }) };
  const copy = h("button", { type: "button", onclick: () => copyFrom(parts.connect, copy) }, "Copy");
  byId("view-workers").append(
    h("h2", {}, "Workers"),
    parts.list,
    h("section", { class: "card" }, h("h3", {}, "Connect a worker"), parts.connect, h("div", { class: "actions" }, copy)),
  );
  setInterval(() => !byId("view-workers").hidden && show(), TICK_MILLISECONDS);
  get("/state").then((state) => {
    if (state === null) return;
    const lines = [
      ["ANTHROPIC_BASE_URL", location.origin],
      ["ANTHROPIC_ENVIRONMENT_ID", state.environment_id],
      ["ANTHROPIC_ENVIRONMENT_KEY", state.environment_key],
    ];
    setText(parts.connect, lines.map(([name, value]) => `export ${name}=${value}`).join("\n"));
  });
}

export function take(message) {
  if (!message.environments) return;
  environments = message.environments;
  show();
}

function show() {
  const had = new Map([...parts.list.children].map((card) => [card.dataset.id, card]));
  const cards = environments.map((environment) => {
    const card = had.get(environment.id) ?? makeCard(environment);
    fill(card, environment);
    return card;
  });
  if (cards.some((card, index) => parts.list.children[index] !== card)) parts.list.replaceChildren(...cards);
}

function makeCard({ id, name }) {
  const queue = () => post("/healthchecks", { environment_id: id });
  return h(
    "section",
    { class: "card", "data-id": id },
    h("h3", {}, name, " ", h("code", {}, id)),
    h("p", { class: "stats" }),
    h("ul", { class: "plain workers" }),
    h("ul", { class: "plain checks" }),
    h("div", { class: "actions" }, h("button", { type: "button", onclick: queue }, "Queue a health check")),
  );
}

function fill(card, { stats, workers, healthchecks }) {
  const waiting = `${plural(stats.depth, "item")} waiting, ${stats.pending} handed out and not acked`;
  setText(card.querySelector(".stats"), waiting + (stats.oldest_queued_at ? `, the oldest ${ago(stats.oldest_queued_at)}` : ""));
  lines(card.querySelector(".workers"), workers.length ? workers : [null], (worker) =>
    worker === null ? ["No worker has polled in the last 30 s.", ""] : [worker.id, `polled ${ago(worker.polled_at)}`],
  );
  lines(card.querySelector(".checks"), healthchecks, (item) => [`health check ${item.id}`, workOf(item)[0]]);
}

function lines(list, items, textOf) {
  while (list.children.length > items.length) list.lastElementChild.remove();
  for (const [index, item] of items.entries()) {
    const line = list.children[index] ?? list.appendChild(h("li", {}, h("span", {}), h("span", { class: "muted" })));
    const [name, more] = textOf(item);
    setText(line.children[0], name);
    setText(line.children[1], more);
  }
}

async function copyFrom(source, button) {
  if (navigator.clipboard === undefined) {
    getSelection().selectAllChildren(source); // plain http from another machine: the browser lends no clipboard
    return;
  }
  await navigator.clipboard.writeText(source.textContent);
  setText(button, "Copied");
  setTimeout(() => setText(button, "Copy"), 2 * TICK_MILLISECONDS);
}
