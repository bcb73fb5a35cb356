// The endpoint as the Console shows it: where webhooks go, whether it is disabled and why, and the last attempts.

import { post } from "./api.js";
import { byId, h, setText } from "./dom.js";

let parts = null;

export function start() {
  parts = {
    state: h("span", { class: "state" }),
    reason: h("p", { class: "reason", hidden: true }),
    url: h("input", { name: "url", type: "url", autocomplete: "off", placeholder: "http://127.0.0.1:8000/webhook" }),
    enable: h("button", { type: "button", class: "primary", onclick: () => post("/webhooks", { enabled: true }) }, "Re-enable"),
    pause: h("button", { type: "button" }, "Pause"),
    body: h("tbody"),
    none: h("p", { class: "empty" }, "No webhook has been sent."),
  };
  parts.pause.addEventListener("click", () => post("/webhooks", { paused: parts.pause.dataset.next === "pause" }));
  parts.table = h(
    "table",
    { hidden: true },
    h("caption", { class: "hidden-label" }, "The last attempts, the newest first"),
    h("thead", {}, h("tr", {}, ...["Sent", "Event", "Session", "Attempt", "Answer"].map((name) => h("th", { scope: "col" }, name)))),
    parts.body,
  );
  byId("view-webhooks").append(
    h("h2", {}, "Webhooks"),
    h(
      "section",
      { class: "card" },
      h("h3", {}, "Endpoint ", parts.state),
      parts.reason,
      h("form", { class: "say", onsubmit: register }, h("label", { class: "grow" }, "URL", parts.url), h("button", {}, "Save")),
      h("div", { class: "actions" }, parts.enable, parts.pause),
      h("p", { class: "muted" }, "Nothing that was missed is sent again. Saving a URL also enables the endpoint; an empty one removes it."),
    ),
    h("section", { class: "card" }, h("h3", {}, "Attempts"), parts.none, h("div", { class: "scroll" }, parts.table)),
  );
}

export function take(message) {
  if (!message.webhooks) return;
  const { url, paused, disabled_reason: reason, last } = message.webhooks;
  const [state, tone] = reason ? ["disabled", "bad"] : url === null ? ["none", "quiet"] : paused ? ["paused", "wait"] : ["enabled", "good"];
  setText(parts.state, state);
  parts.state.dataset.tone = tone;
  parts.reason.hidden = !reason;
  setText(parts.reason, reason ?? "");
  parts.enable.disabled = !reason;
  parts.pause.dataset.next = paused ? "resume" : "pause";
  setText(parts.pause, paused ? "Resume" : "Pause");
  if (document.activeElement !== parts.url) parts.url.value = url ?? "";
  parts.none.hidden = last.length > 0;
  parts.table.hidden = last.length === 0;
  parts.body.replaceChildren(...last.reverse().map(attempt));
}

function attempt(each) {
  const session = h("a", { href: `#/sessions/${encodeURIComponent(each.session_id)}` }, each.session_id);
  const answer = `${each.status ?? each.error ?? "none"} after ${each.ms} ms`;
  return h(
    "tr",
    { title: each.webhook_id },
    h("td", { class: "number" }, each.at.slice(11, 23)),
    h("td", {}, each.type),
    h("td", {}, session),
    h("td", { class: "number" }, String(each.attempt)),
    h("td", {}, h("span", { class: "state", "data-tone": each.is_ok ? "good" : "bad" }, answer)),
  );
}

async function register(event) {
  event.preventDefault();
  if ((await post("/webhooks", { url: parts.url.value || null })) !== null) parts.url.blur();
}
