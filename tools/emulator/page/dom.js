// Elements, time and numbers. Everything that comes from an agent, a worker or a person ends in a text node.

/** An element: h("p", {class: "x", onclick: f}, "text", child). Strings become text, never markup. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") element.toggleAttribute(name, value);
    else if (value !== null && value !== undefined) element.setAttribute(name, String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Set a text only when it is another one: what has not changed is not laid out again. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function setAttribute(element, name, value) {
  if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}

export const byId = (id) => document.getElementById(id);

// The emulator's clock, as of its last message.
let known = null;

export function noteNow(stamp) {
  known = { at: Date.parse(stamp), since: performance.now() };
}

export function now() {
  return known === null ? Date.now() : known.at + performance.now() - known.since;
}

/** 4:07, or 0:00 when it is over. */
export function countdown(milliseconds) {
  const seconds = Math.max(0, Math.ceil(milliseconds / 1000));
  return `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
}

/** A span of time as one reads it: 0.4 ms, 38 ms, 1.25 s, 4 min 5 s. */
export function span(milliseconds) {
  if (milliseconds < 10) return `${trim(milliseconds, 1)} ms`;
  if (milliseconds < 1000) return `${Math.round(milliseconds)} ms`;
  if (milliseconds < 60_000) return `${trim(milliseconds / 1000, 2)} s`;
  const seconds = Math.round(milliseconds / 1000);
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${seconds % 60} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** Milliseconds since 1970 with the fraction that Date.parse drops: stamps have microseconds. */
export function instant(stamp) {
  const finer = /\.\d{3}(\d{1,3})Z$/.exec(stamp);
  return Date.parse(stamp) + (finer ? Number(`0.${finer[1]}`) : 0);
}

/** How long ago, in whole seconds and up. */
export function ago(stamp) {
  const seconds = Math.max(0, Math.round((now() - Date.parse(stamp)) / 1000));
  return seconds === 0 ? "now" : `${span(seconds * 1000)} ago`;
}

export function plural(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

const trim = (value, digits) => String(Number(value.toFixed(digits)));
