// Which view is shown, and the stream that feeds them all.

import { complain, follow } from "./api.js";
import { byId, noteNow, setText } from "./dom.js";
import * as session from "./session.js";
import * as sessions from "./sessions.js";
import * as trouble from "./trouble.js";
import * as webhooks from "./webhooks.js";
import * as workers from "./workers.js";

const VIEWS = { sessions, workers, webhooks, trouble };
const LIVE = { live: "live", reconnecting: "reconnecting", closed: "reconnecting", hidden: "paused" };
const RETRY_MILLISECONDS = 2000;
let overview = null;
let retry = null;

function route() {
  const [, view = "sessions", id = null] = location.hash.split("/");
  const name = view in VIEWS ? view : "sessions";
  for (const each of Object.keys(VIEWS)) byId(`view-${each}`).hidden = each !== name;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const selected = name === "sessions" && id ? decodeURIComponent(id) : null;
  sessions.select(selected);
  session.show(selected);
}

function take(message, isFirst) {
  noteNow(message.now);
  sessions.take(message, isFirst);
  workers.take(message);
  webhooks.take(message);
  trouble.take(message);
  if (message.environments) {
    const polling = message.environments.reduce((sum, each) => sum + each.workers.length, 0);
    setText(byId("count-workers"), polling ? String(polling) : "");
  }
  if (message.webhooks) {
    const { url, paused, disabled_reason: reason } = message.webhooks;
    setText(byId("count-webhooks"), reason ? "disabled" : url === null ? "" : paused ? "paused" : "");
  }
  if (message.faults) setText(byId("count-faults"), message.faults.length ? String(message.faults.length) : "");
}

function connect() {
  clearTimeout(retry);
  overview?.close();
  overview = follow("/live", {
    onMessage: take,
    onState(state) {
      showState(state);
      // A browser gives up for good after an answer that is no stream, as while something else has the port.
      if (state === "closed") retry = setTimeout(connect, RETRY_MILLISECONDS);
    },
  });
}

function showState(state) {
  const live = byId("live");
  live.dataset.state = state;
  setText(live, LIVE[state]);
}

// A browser has six connections to a server: tabs that nobody looks at give theirs back.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    clearTimeout(retry);
    overview?.close();
    session.pause();
    showState("hidden");
  } else {
    connect();
    session.resume();
  }
});

addEventListener("hashchange", route);
addEventListener("unhandledrejection", (event) => complain(`The page has failed: ${event.reason}`));
for (const view of Object.values(VIEWS)) view.start();
route();
connect();
