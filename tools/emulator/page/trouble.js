// What can go wrong on purpose: faults, open facts, the clock.

import { ask, get, post } from "./api.js";
import { byId, h, plural, setText } from "./dom.js";

const REQUEST_KINDS = ["delay", "delay_request", "drop", "fail", "lose_response", "duplicate"];
const WEBHOOK_KINDS = ["lose", "delay", "duplicate", "reorder"];
const FIELDS = {
  // Which fields of the form each kind of fault has.
  request: ["operation", "kind", "count", "after"],
  webhook: ["kind", "count"],
  stream: ["session_id", "after_events", "count"],
};
let parts = null;

export function start() {
  parts = { armed: h("ul", { class: "plain faults" }), none: h("p", { class: "muted" }, "Nothing is armed."), switches: h("div", { class: "switches" }) };
  parts.clear = h("button", { type: "button", hidden: true, onclick: () => ask("DELETE", "/faults") }, "Switch all off");
  parts.form = faultForm();
  parts.clock = h("span", { class: "muted" });
  byId("view-trouble").append(
    h("h2", {}, "Trouble"),
    h("section", { class: "card" }, h("div", { class: "head" }, h("h3", {}, "Faults"), parts.clear), parts.none, parts.armed, parts.form),
    h("section", { class: "card" }, h("h3", {}, "Clock ", parts.clock), clockForm()),
    h(
      "section",
      { class: "card" },
      h("h3", {}, "Switches"),
      h("p", { class: "muted" }, "What nobody knows about the real service. A worker has to do with each value; the first is the default."),
      parts.switches,
    ),
  );
  get("/switches").then((reply) => reply && showSwitches(reply));
}

export function take(message) {
  if (message.faults) showFaults(message.faults);
  if (message.switches) chooseSwitches(message.switches);
  if (message.clock) {
    const { advanced, skew } = message.clock;
    const said = [advanced && `${plural(advanced, "second")} ahead`, skew && `shown ${skew} s off`].filter(Boolean);
    setText(parts.clock, said.join(", "));
  }
}

// Faults

function faultForm() {
  const on = select("on", ["request", "webhook", "stream"]);
  const controls = {
    operation: h("input", { name: "operation", value: "work.ack", list: "operations", required: true, autocomplete: "off" }),
    kind: select("kind", REQUEST_KINDS, "lose_response"),
    session_id: h("input", { name: "session_id", placeholder: "any session", autocomplete: "off" }),
    count: h("input", { name: "count", type: "number", min: 1, value: 1, placeholder: "no end" }),
    after: h("input", { name: "after", type: "number", min: 0, value: 0 }),
    after_events: h("input", { name: "after_events", type: "number", min: 0, value: 0 }),
    status: h("input", { name: "status", type: "number", min: 400, max: 599, value: 503 }),
    seconds: h("input", { name: "seconds", type: "number", min: 0.1, step: "any", value: 5 }),
  };
  const labels = {
    operation: "Operation",
    kind: "Fault",
    session_id: "Session",
    count: "How many",
    after: "After so many",
    after_events: "After so many events",
    status: "Status",
    seconds: "Seconds",
  };
  const fields = Object.fromEntries(Object.entries(controls).map(([name, control]) => [name, h("label", {}, labels[name], control)]));
  const wanted = () => [
    ...FIELDS[on.value],
    ...(on.value === "request" && controls.kind.value === "fail" ? ["status"] : []),
    ...(on.value !== "stream" && controls.kind.value.startsWith("delay") ? ["seconds"] : []),
  ];
  const refresh = () => {
    for (const [name, field] of Object.entries(fields)) {
      field.hidden = !wanted().includes(name);
      controls[name].disabled = field.hidden;
    }
  };
  on.addEventListener("change", () => {
    const kinds = on.value === "webhook" ? WEBHOOK_KINDS : REQUEST_KINDS;
    controls.kind.replaceChildren(...kinds.map((kind) => h("option", {}, kind)));
    refresh();
  });
  controls.kind.addEventListener("change", refresh);
  const operations = h("datalist", { id: "operations" });
  get("/faults").then((reply) => reply && operations.append(...reply.operations.map((value) => h("option", { value }))));
  const form = h("form", { class: "grid" }, h("label", {}, "On", on), ...Object.values(fields), operations, h("button", { class: "primary" }, "Switch on"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const path = { request: "/faults", webhook: "/webhook-faults", stream: "/stream-cuts" }[on.value];
    post(path, bodyOf(controls, wanted()));
  });
  refresh();
  return form;
}

function bodyOf(controls, names) {
  const body = {};
  for (const name of names) {
    const { type, value } = controls[name];
    if (type === "number") body[name] = value === "" ? null : Number(value);
    else if (value !== "" || name === "operation") body[name] = value;
  }
  return body;
}

function showFaults(faults) {
  parts.none.hidden = faults.length > 0;
  parts.clear.hidden = faults.length === 0;
  parts.armed.replaceChildren(
    ...faults.map((fault) => {
      const off = h("button", { type: "button", onclick: () => ask("DELETE", `/faults/${encodeURIComponent(fault.id)}`) }, "Switch off");
      return h("li", {}, h("span", {}, h("strong", {}, nameOf(fault)), ` ${aboutOf(fault)}`), off);
    }),
  );
}

function nameOf(fault) {
  if (fault.on === "stream") return `cut the stream of ${fault.session_id ?? "any session"}`;
  return fault.on === "webhook" ? `${fault.kind} webhooks` : `${fault.kind} ${fault.operation}`;
}

function aboutOf(fault) {
  const said = [fault.count === null ? `${fault.hits} met it, no end` : `${fault.hits} of ${fault.count} met it`];
  if (fault.after) said.push(`after ${fault.after} more`);
  if (fault.on === "stream") said.push(`after ${plural(fault.after_events, "event")}`);
  if (fault.kind === "fail") said.push(`status ${fault.status}`);
  if (fault.kind?.startsWith("delay")) said.push(`${fault.seconds} s`);
  return said.join(", ");
}

// Open facts

function showSwitches({ values, options }) {
  parts.switches.replaceChildren(
    ...Object.entries(options).map(([name, choices]) => {
      const control = select(name, choices.map(String));
      control.addEventListener("change", () => post("/switches", { [name]: choices[control.selectedIndex] }));
      return h("label", {}, h("code", {}, name), control);
    }),
  );
  chooseSwitches(values);
}

function chooseSwitches(values) {
  for (const control of parts.switches.querySelectorAll("select")) {
    control.value = String(values[control.name]);
    control.classList.toggle("changed", control.selectedIndex !== 0);
  }
}

// The clock

function clockForm() {
  const seconds = h("input", { name: "seconds", type: "number", min: 0, step: "any", value: 361 });
  const skew = h("input", { name: "skew", type: "number", step: "any", value: 0 });
  const advance = h("button", { type: "button", onclick: () => post("/clock", { advance: Number(seconds.value) }) }, "Advance");
  const apply = h("button", { type: "button", onclick: () => post("/clock", { skew: Number(skew.value) }) }, "Show it so");
  return h(
    "div",
    { class: "grid" },
    h("label", {}, "Go forward, seconds", seconds),
    advance,
    h("label", {}, "Shown off by, seconds", skew),
    apply,
  );
}

function select(name, values, chosen) {
  const control = h("select", { name }, ...values.map((value) => h("option", {}, value)));
  if (chosen !== undefined) control.value = chosen;
  return control;
}
